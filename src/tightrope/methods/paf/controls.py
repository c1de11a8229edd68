"""What a user would try without a solver, at the same budget: one polynomial everywhere, or random ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from tightrope.methods.paf import library
from tightrope.solve.select import price, select, the_limit
from tightrope.types import Budget, Problem, Table

Picked = Mapping[str, NDArray[np.intp]]


def controls(problem: Problem, budget: Budget, seed: int = 0) -> dict[str, Picked]:
    """`uniform`: of the polynomials that fit everywhere, the one with the least loss; and each of these by
    its name. `random`: a random polynomial per site, then random sites made dearer while that fits.

    A site without the polynomial takes the dearest one of its own that is no dearer. All meet the budget, and
    a name is missing where nothing of its kind does. Raises BudgetError like `select`.
    """
    select(problem, budget)  # raises where there is nothing to choose
    metric, limit = the_limit(problem, budget)

    def fits(picked: Picked) -> bool:
        return bool(getattr(price(problem, picked).cost, metric) <= limit)

    found: dict[str, Picked] = {}
    everywhere: dict[str, Picked] = {}
    for name in library.names():
        nearest = {t.site: _nearest(t, name) for t in problem.tables}
        picked = {site: np.array([k]) for site, k in nearest.items() if k is not None}
        here = any(name in t.labels for t in problem.tables)
        if here and len(picked) == len(nearest) and fits(picked):
            everywhere[name] = picked
    if everywhere:
        best = min(everywhere, key=lambda name: price(problem, everywhere[name]).loss)
        found["uniform"] = everywhere[best]
    found["random"] = _random(problem, metric, fits, np.random.default_rng(seed))
    return found | everywhere


def _nearest(table: Table, name: str) -> int | None:
    """The option of this name, or the dearest one below it in the library's order; None if there is none."""
    order = library.names()
    below = set(order[: order.index(name) + 1])
    return next((k for k, label in enumerate(table.labels) if label in below), None)


def _random(
    problem: Problem, metric: str, fits: Callable[[Picked], bool], generator: np.random.Generator
) -> Picked:
    """Options are in order, the dearest first."""
    picked = {t.site: generator.integers(len(t.labels), size=1) for t in problem.tables}
    order = [problem.tables[i] for i in generator.permutation(len(problem.tables))]
    for table in order:
        if not fits(picked):
            picked[table.site] = np.array([int(table.cost[metric].argmin())])
    for table in order:
        for k in range(int(picked[table.site][0])):
            grown = picked | {table.site: np.array([k])}
            if fits(grown):
                picked = grown
                break
    return picked
