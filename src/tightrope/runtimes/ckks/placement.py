"""Which values are bootstrapped: as few as possible, exactly (`solve/levels.py`), and to how many levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tightrope.errors import BudgetError, InputError
from tightrope.runtimes.ckks import bootstrapping
from tightrope.runtimes.ckks.parameters import Parameters
from tightrope.solve.levels import Assignment, Chain, Node, frontier


def place(nodes: Sequence[Node], levels: int) -> Assignment:
    """The fewest bootstraps (of ciphertexts) where each gives `levels`. Raises BudgetError where none do."""
    chain = Chain(top=levels, refresh=levels, least=bootstrapping.LEAST_LEVEL)
    return frontier(nodes, chain, "bootstraps")[0]


def choose_levels(
    nodes: Sequence[Node], offer: Callable[[int], Parameters | None], most: int, levels: int = 0
) -> Parameters | None:
    """Parameters with `levels` after every bootstrap; 0 for what makes the bootstraps cheapest together, at
    most `most`. None where the program needs no bootstrap with any that suffice.

    `offer` gives the parameters for so many levels, or None. What a bootstrap takes is about proportional to
    its keys: fewer levels after it leave room for primes that make both smaller.

    Raises InputError where no offer suffices.
    """
    found, needless = [], False
    for refresh in (levels,) if levels else range(2, most + 1):
        parameters = offer(refresh)
        if parameters is None:
            continue
        try:
            count = place(nodes, refresh).bootstraps
        except BudgetError:
            continue
        if count:
            found.append((count * parameters.during_bootstrap().key_bytes, refresh, parameters))
        else:
            needless = True
    if not found and not needless:
        deepest = max(action.levels for node in nodes for action in node.actions)
        raise InputError(
            "the program cannot be bootstrapped often enough",
            got=f"{levels or most} levels after a bootstrap, a step that takes {deepest}",
            fix="activations of lower degree, a smaller scale_bits, or other refresh_levels",
        )
    return min(found, key=lambda one: one[:2])[2] if found else None
