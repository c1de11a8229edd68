"""Levels and bootstraps: which option at every node of a graph, and where to bootstrap, exactly.

A ciphertext carries a number of remaining levels. A node reads its inputs at the lowest of their levels (a
higher one is dropped for free, which is how the branches of a residual block join), its option takes some
away, and its result may be bootstrapped to `refresh` levels. The dynamic programme goes through the nodes in
order; its state is the levels of all values that are still to be read, and each state keeps every pair of
(cost, loss) that no other one beats in both. Nothing is rounded, so the result is optimal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tightrope.errors import BudgetError, InputError

Array = NDArray[np.float64]
Metric = Literal["ms", "bootstraps", "levels"]
State = tuple[int, ...]  # the levels of the live values


@dataclass(frozen=True)
class Action:
    """One option of a node. `ms` by the level at which it runs (index 0 to top), or one for all levels."""

    label: str
    levels: int
    loss: float = 0.0
    ms: float | tuple[float, ...] = 0.0

    def ms_at(self, level: int) -> float:
        return self.ms[level] if isinstance(self.ms, tuple) else self.ms


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


@dataclass(frozen=True)
class _Labels:
    """The undominated ways to reach a state. `parent` and `at`: the state and the label before."""

    cost: Array
    loss: Array
    parent: tuple[State, ...]
    at: NDArray[np.intp]
    action: NDArray[np.intp]
    level: NDArray[np.intp]
    booted: NDArray[np.bool_]


def frontier(nodes: Sequence[Node], chain: Chain, metric: Metric) -> tuple[Assignment, ...]:
    """Every assignment that no other beats in both `metric` and loss, the cheapest first.

    The last node is the output. Raises InputError for a graph that is none, BudgetError when the levels do
    not suffice for any assignment.
    """
    _check(nodes, chain, metric)
    history: list[dict[State, _Labels]] = [{(chain.top,): _start()}]
    live: tuple[str, ...] = ("",)
    for k, node in enumerate(nodes):
        after = _live_after(nodes, k, live)
        history.append(_step(node, history[-1], live, after, chain, metric))
        live = after
        if not history[-1]:
            raise BudgetError(
                "the levels do not suffice",
                where=node.name,
                got=f"{chain.top} levels"
                + (", no bootstrap" if chain.refresh is None else f", {chain.refresh} after a bootstrap"),
                fix="more levels, a bootstrap, or polynomials of lower degree",
            )
    ends = [
        (labels.cost[i] + (chain.top - state[0] if metric == "levels" else 0), labels.loss[i], state, i)
        for state, labels in history[-1].items()
        for i in range(len(labels.cost))
    ]
    ends.sort(key=lambda end: (end[0], end[1]))
    found, lowest = [], np.inf
    for _, loss, state, i in ends:
        if loss < lowest:
            found.append(evaluate(nodes, chain, *_trace(nodes, history, state, i)))
            lowest = loss
    return tuple(found)


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
    left, ran = {"": chain.top}, {}
    loss = ms = 0.0
    count, lowest = 0, chain.top
    for node in nodes:
        action = node.actions[chosen[node.name]]
        most = min(left[value] for value in node.inputs)
        at = most if level is None else level[node.name]
        if at > most or at < action.levels:
            raise BudgetError("the levels do not suffice", where=node.name, got=at, allowed=action.levels)
        ran[node.name] = at
        loss, ms = loss + action.loss, ms + action.ms_at(at)
        after = at - action.levels
        lowest = min(lowest, after)
        if node.name in bootstrapped:
            if chain.refresh is None or after < chain.least:
                raise BudgetError("no bootstrap is possible here", where=node.name, got=f"{after} levels")
            after, count, ms = (
                chain.refresh,
                count + node.ciphertexts,
                ms + chain.bootstrap_ms * node.ciphertexts,
            )
        left[node.name] = after
    return Assignment(dict(chosen), ran, tuple(bootstrapped), loss, ms, count, chain.top - lowest)


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


def _start() -> _Labels:
    zero, index = np.zeros(1), np.zeros(1, np.intp)
    return _Labels(zero, zero, ((),), index, index, index, np.zeros(1, np.bool_))


def _live_after(nodes: Sequence[Node], k: int, live: tuple[str, ...]) -> tuple[str, ...]:
    read = {value for node in nodes[k + 1 :] for value in node.inputs}
    if k == len(nodes) - 1:
        return (nodes[k].name,)
    return tuple(value for value in (*live, nodes[k].name) if value in read)


def _step(
    node: Node,
    before: Mapping[State, _Labels],
    live: tuple[str, ...],
    after: tuple[str, ...],
    chain: Chain,
    metric: Metric,
) -> dict[State, _Labels]:
    places = [live.index(value) for value in node.inputs]
    kept = [live.index(value) for value in after if value != node.name]
    parts: dict[State, list[tuple[Array, Array, State, int, int, bool]]] = {}
    for state, labels in before.items():
        most = min(state[p] for p in places)
        rest = tuple(state[p] for p in kept)
        for a, action in enumerate(node.actions):
            dropping = metric == "ms" and isinstance(action.ms, tuple)  # a lower level may be faster
            for level in range(action.levels if dropping else most, most + 1):
                made = level - action.levels
                if made < 0:
                    continue
                cost = labels.cost + (action.ms_at(level) if metric == "ms" else 0)
                loss = labels.loss + action.loss
                parts.setdefault((*rest, made), []).append((cost, loss, state, a, level, False))
                if chain.refresh is not None and made >= chain.least and chain.refresh > made:
                    price = node.ciphertexts * (chain.bootstrap_ms if metric == "ms" else 1)
                    refreshed = (*rest, chain.refresh)
                    parts.setdefault(refreshed, []).append((cost + price, loss, state, a, level, True))
    return {state: _undominated(found) for state, found in parts.items()}


def _undominated(found: list[tuple[Array, Array, State, int, int, bool]]) -> _Labels:
    sizes = [len(part[0]) for part in found]
    cost, loss = (np.concatenate([part[k] for part in found]) for k in (0, 1))
    which = np.repeat(np.arange(len(found)), sizes)
    index = np.concatenate([np.arange(size) for size in sizes])
    order = np.lexsort((loss, cost))
    lowest = np.minimum.accumulate(loss[order])
    keep = order[np.concatenate([[True], loss[order][1:] < lowest[:-1]])]
    parents = tuple(found[w][2] for w in which[keep])
    action, level = (np.array([found[w][k] for w in which[keep]], np.intp) for k in (3, 4))
    booted = np.array([found[w][5] for w in which[keep]], np.bool_)
    return _Labels(cost[keep], loss[keep], parents, index[keep], action, level, booted)


def _trace(
    nodes: Sequence[Node], history: Sequence[Mapping[State, _Labels]], state: State, index: int
) -> tuple[dict[str, int], list[str], dict[str, int]]:
    chosen, booted, level = {}, [], {}
    for node, reached in zip(reversed(nodes), reversed(history[1:]), strict=True):
        labels = reached[state]
        chosen[node.name] = int(labels.action[index])
        level[node.name] = int(labels.level[index])
        if labels.booted[index]:
            booted.append(node.name)
        state, index = labels.parent[index], int(labels.at[index])
    return chosen, booted[::-1], level
