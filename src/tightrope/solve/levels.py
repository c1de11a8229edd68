"""Levels and bootstraps: which option at every node of a graph, and where to bootstrap, exactly.

A ciphertext carries a number of remaining levels. A node reads its inputs at the lowest of their levels (a
higher one is dropped for free, which is how the branches of a residual block join), its option takes some
away, and its result may be bootstrapped to `refresh` levels. Linear nodes make no ciphertext of their own:
they wait to be merged with those after them (`Action.merge`).

The dynamic programme goes through the nodes in order; its state is the levels and forms of all values that
are still to be read, and each state keeps every pair of (cost, loss) that no other one beats in both. It
counts in whole multiples of a power of two, so nothing is rounded: equal sums are equal in any order, and the
result is optimal. What an `Assignment` says is correctly rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, Literal, TypeVar

from tightrope.errors import BudgetError, InputError
from tightrope.types import Merge

Metric = Literal["ms", "bootstraps", "levels"]
Form = Literal["made", "sum", "layer"]
Value = tuple[int, Form]  # the levels left
State = tuple[Value, ...]  # the live values
T = TypeVar("T", bound=tuple[Any, ...])


@dataclass(frozen=True)
class Action:
    """One option of a node. `ms` by the level at which it runs (index 0 to top), or one for all levels.

    A value is a ciphertext (`made`), a `sum` of ciphertexts that takes a level to be made, or a sum with a
    `layer` in it, whose level is taken already. How an action merges:

    none    reads ciphertexts and makes one; sums that it reads are made then, for whatever reads them later
    layer   merges with sums, but not with another layer, which is made first; its result is a layer
    sum     a linear map beside layers, as a pool or a residual sum: merges with everything. Layers beside an
            input with no more levels left are made first, which takes none: its result holds no layer then
    same    its input in another shape
    square  of a sum made for it alone, which leaves a sum; of a ciphertext, with a level more, a ciphertext
    product of two values: squares of sums that are made for it alone; it leaves a sum
    """

    label: str
    levels: int
    loss: float = 0.0
    ms: float | tuple[float, ...] = 0.0
    merge: Merge = "none"

    def ms_at(self, level: int) -> float:
        return self.ms[level] if isinstance(self.ms, tuple) else self.ms

    def read(self, values: Sequence[Value]) -> tuple[int, list[Value], Form]:
        """The highest level at which it can run, what becomes of its inputs, and what its result is."""
        forms = {form for _, form in values}
        layers = [level for level, form in values if form == "layer"]
        others = [level for level, form in values if form != "layer"]
        waits = self.merge == "sum" and bool(layers and others) and min(others) <= min(layers)
        merged = bool(layers) and not waits
        if self.merge == "none" or (self.merge == "layer" and merged):
            values = [_made(value) for value in values]
        own = self.merge in ("square", "product") or (self.merge == "sum" and merged)  # level of its sum
        results: Mapping[Merge, Form] = {
            "none": "made",
            "layer": "layer",
            "sum": "layer" if merged else "sum",
            "same": values[0][1],
            "square": "made" if forms == {"made"} else "sum",
            "product": "sum",
        }
        most = min(level - (own and form != "layer") for level, form in values)
        return most, list(values), results[self.merge]


@dataclass(frozen=True)
class Node:
    """`inputs` name earlier nodes; "" is the fresh input of the network. `ciphertexts`: how many its result
    takes, each of which a bootstrap refreshes."""

    name: str
    inputs: tuple[str, ...]
    actions: tuple[Action, ...]
    ciphertexts: int = 1


@dataclass(frozen=True, kw_only=True)
class Chain:
    """What the parameters allow: `top` levels of a fresh ciphertext; `refresh` after a bootstrap, which needs
    `least` before it and takes `bootstrap_ms`. Without `refresh` there is no bootstrap."""

    top: int
    refresh: int | None = None
    least: int = 1
    bootstrap_ms: float = 0.0


@dataclass(frozen=True)
class Assignment:
    """`chosen`: the index of each node's action; `level`: at which it runs; `bootstrapped`: nodes whose
    result is refreshed. `levels`: how many of a fresh ciphertext are used, when there is no bootstrap."""

    chosen: Mapping[str, int]
    level: Mapping[str, int]
    bootstrapped: tuple[str, ...]
    loss: float
    ms: float
    bootstraps: int
    levels: int


@dataclass(frozen=True, slots=True)
class _Label:
    """One of the undominated ways to reach a state: the last node's action, and the way before it."""

    cost: int
    loss: int
    before: _Label | None = None
    action: int = 0
    level: int = 0
    booted: bool = False


Labels = Mapping[State, Sequence[_Label]]


def frontier(nodes: Sequence[Node], chain: Chain, metric: Metric) -> tuple[Assignment, ...]:
    """Every assignment that no other beats in both `metric` and loss, the cheapest first.

    The last node is the output. A loss that is not finite is larger than all finite ones together. Raises
    InputError for a graph that is none, BudgetError when the levels do not suffice for any assignment.
    """
    _check(nodes, chain, metric)
    units = _units(nodes, chain)
    reached: Labels = {((chain.top, "made"),): [_Label(0, 0)]}
    live: tuple[str, ...] = ("",)
    for k, node in enumerate(nodes):
        after = _live_after(nodes, k, live)
        reached = _step(node, reached, live, after, chain, metric, units)
        live = after
        if not reached:
            raise _too_deep(node.name, chain)
    ends = []
    for (last,), labels in reached.items():
        level, _ = _made(last)
        spent = chain.top - level if metric == "levels" else 0
        ends += [(label.cost + spent, label.loss, label) for label in labels if level >= 0]
    if not ends:
        raise _too_deep(nodes[-1].name, chain)
    return tuple(evaluate(nodes, chain, *_trace(nodes, label)) for *_, label in _undominated(ends))


def least_loss(nodes: Sequence[Node], chain: Chain, metric: Metric, limit: float) -> Assignment:
    """The smallest loss with `metric` <= limit. Raises BudgetError when nothing is that cheap."""
    curve = frontier(nodes, chain, metric)
    within = [a for a in curve if getattr(a, metric) <= limit]
    if not within:
        raise BudgetError(
            "no choice meets the budget",
            got=f"{metric}<={limit:g}",
            allowed=f"{metric} from {getattr(curve[0], metric):g}",
        )
    return within[-1]


def least_cost(nodes: Sequence[Node], chain: Chain, metric: Metric, loss: float) -> Assignment:
    """The smallest `metric` with at most this loss. Raises BudgetError when nothing loses so little."""
    curve = frontier(nodes, chain, metric)
    within = [a for a in curve if a.loss <= loss]
    if not within:
        raise BudgetError(
            "no choice has so small a loss", got=f"{loss:g}", allowed=f"from {curve[-1].loss:g}"
        )
    return within[0]


def evaluate(
    nodes: Sequence[Node],
    chain: Chain,
    chosen: Mapping[str, int],
    bootstrapped: Sequence[str] = (),
    level: Mapping[str, int] | None = None,
) -> Assignment:
    """What a given choice costs; each node runs at `level`, or as high as its inputs allow.

    Raises BudgetError naming the node where the levels do not suffice.
    """
    left: dict[str, Value] = {"": (chain.top, "made")}
    ran, losses, ms = {}, list[float](), list[float]()
    count, lowest = 0, chain.top
    for node in nodes:
        action = node.actions[chosen[node.name]]
        most, read, form = action.read([left[value] for value in node.inputs])
        at = most if level is None else level[node.name]
        if at > most or at < action.levels or min(read)[0] < 0:
            raise BudgetError("the levels do not suffice", where=node.name, got=at, allowed=action.levels)
        left.update(zip(node.inputs, read, strict=True))
        ran[node.name] = at
        losses.append(action.loss)
        ms.append(action.ms_at(at))
        after = at - action.levels
        lowest = min(lowest, after)
        if node.name in bootstrapped:
            if chain.refresh is None or after < chain.least or form != "made":
                raise BudgetError("no bootstrap is possible here", where=node.name, got=f"{after} levels")
            after = chain.refresh
            count += node.ciphertexts
            ms += [chain.bootstrap_ms] * node.ciphertexts
        left[node.name] = after, form
    end, _ = _made(left[nodes[-1].name])
    if end < 0:
        raise BudgetError("the levels do not suffice", where=nodes[-1].name, got=0, allowed=1)
    spent = chain.top - min(lowest, end)
    return Assignment(dict(chosen), ran, tuple(bootstrapped), math.fsum(losses), math.fsum(ms), count, spent)


def uniform(nodes: Sequence[Node], label: str) -> dict[str, int]:
    """The action of this label wherever a node has it, else the only one. Raises InputError if neither."""
    chosen = {}
    for node in nodes:
        labels = [action.label for action in node.actions]
        if label not in labels and len(labels) > 1:
            raise InputError("not every node offers this", where=node.name, got=label, allowed=labels)
        chosen[node.name] = labels.index(label) if label in labels else 0
    return chosen


def only(nodes: Sequence[Node], chosen: Mapping[str, int]) -> tuple[Node, ...]:
    """The same graph with nothing but these actions: bootstraps are then all that is left to choose."""
    return tuple(replace(node, actions=(node.actions[chosen[node.name]],)) for node in nodes)


def _check(nodes: Sequence[Node], chain: Chain, metric: Metric) -> None:
    known = {""}
    for node in nodes:
        bad = not node.inputs or not set(node.inputs) <= known or node.name in known or not node.actions
        if bad:
            raise InputError("not a graph of nodes in order", where=node.name, got=node.inputs)
        known.add(node.name)
    read = {value for node in nodes for value in node.inputs}
    unread = [node.name for node in nodes[:-1] if node.name not in read]
    if not nodes or unread:
        raise InputError("every node but the last must be read", got=unread or "no nodes")
    if chain.refresh is not None and not chain.least <= chain.refresh <= chain.top:
        raise InputError("a bootstrap cannot give that many levels", got=chain.refresh, allowed=chain.top)
    timed = [a.ms for node in nodes for a in node.actions if isinstance(a.ms, tuple)]
    if any(len(ms) <= chain.top for ms in timed):
        raise InputError("milliseconds are needed for every level", allowed=f"{chain.top + 1} numbers")
    if metric == "levels" and chain.refresh is not None:
        raise InputError("levels are counted where there is no bootstrap", got=f"refresh={chain.refresh}")


def _too_deep(where: str, chain: Chain) -> BudgetError:
    after = ", no bootstrap" if chain.refresh is None else f", {chain.refresh} after a bootstrap"
    return BudgetError(
        "the levels do not suffice",
        where=where,
        got=f"{chain.top} levels{after}",
        fix="more levels, a bootstrap, or polynomials of lower degree",
    )


def _made(value: Value) -> Value:
    level, form = value
    return level - (form == "sum"), "made"


@dataclass(frozen=True)
class _Units:
    """Losses and milliseconds as whole numbers."""

    loss: Callable[[float], int]
    ms: Callable[[float], int]


def _units(nodes: Sequence[Node], chain: Chain) -> _Units:
    actions = [action for node in nodes for action in node.actions]
    times = [ms for a in actions for ms in (a.ms if isinstance(a.ms, tuple) else (a.ms,))]
    return _Units(_whole(action.loss for action in actions), _whole([*times, chain.bootstrap_ms]))


def _whole(numbers: Iterable[float]) -> Callable[[float], int]:
    """In multiples of the largest power of two that divides all numbers, of which those that are not finite
    count as more than all others together."""
    ratios = [float(x).as_integer_ratio() for x in numbers if math.isfinite(x)]
    unit = max((below for _, below in ratios), default=1)
    beyond = 1 + 2 * sum(abs(above) * (unit // below) for above, below in ratios)

    def whole(x: float) -> int:
        if not math.isfinite(x):
            return beyond
        above, below = float(x).as_integer_ratio()
        return above * (unit // below)

    return whole


def _live_after(nodes: Sequence[Node], k: int, live: tuple[str, ...]) -> tuple[str, ...]:
    read = {value for node in nodes[k + 1 :] for value in node.inputs}
    if k == len(nodes) - 1:
        return (nodes[k].name,)
    return tuple(value for value in (*live, nodes[k].name) if value in read)


Found = tuple[int, int, _Label, int, int, bool]  # the cost, the loss, and what a label says


def _step(
    node: Node,
    before: Labels,
    live: tuple[str, ...],
    after: tuple[str, ...],
    chain: Chain,
    metric: Metric,
    units: _Units,
) -> Labels:
    kept = [value for value in after if value != node.name]
    losses = [units.loss(action.loss) for action in node.actions]
    price = node.ciphertexts * (units.ms(chain.bootstrap_ms) if metric == "ms" else 1)
    parts: dict[State, list[Found]] = {}
    for state, labels in before.items():
        held = dict(zip(live, state, strict=True))
        for a, action in enumerate(node.actions):
            most, read, form = action.read([held[value] for value in node.inputs])
            if min(read)[0] < 0:
                continue
            left = held | dict(zip(node.inputs, read, strict=True))
            rest = tuple(left[value] for value in kept)
            dropping = metric == "ms" and isinstance(action.ms, tuple)  # a lower level may be faster
            for level in range(action.levels if dropping else most, most + 1):
                made = level - action.levels
                if made < 0:
                    continue
                cost = units.ms(action.ms_at(level)) if metric == "ms" else 0
                reached = [((made, form), cost, False)]
                if form == "made" and chain.refresh is not None and chain.least <= made < chain.refresh:
                    reached.append(((chain.refresh, form), cost + price, True))
                for value, spent, booted in reached:
                    parts.setdefault((*rest, value), []).extend(
                        (old.cost + spent, old.loss + losses[a], old, a, level, booted) for old in labels
                    )
    return {state: [_Label(*one) for one in _undominated(found)] for state, found in parts.items()}


def _undominated(found: list[T]) -> list[T]:
    """Of (cost, loss, ...), the cheapest first."""
    kept: list[T] = []
    for one in sorted(found, key=itemgetter(0, 1)):
        if not kept or one[1] < kept[-1][1]:
            kept.append(one)
    return kept


def _trace(nodes: Sequence[Node], label: _Label) -> tuple[dict[str, int], list[str], dict[str, int]]:
    chosen, booted, level = {}, [], {}
    for node in reversed(nodes):
        chosen[node.name], level[node.name] = label.action, label.level
        if label.booted:
            booted.append(node.name)
        assert label.before is not None
        label = label.before
    return chosen, booted[::-1], level
