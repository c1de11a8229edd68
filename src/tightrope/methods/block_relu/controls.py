"""What a user would try without a solver, at the same budget: the controls of every experiment."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from tightrope.solve.select import select
from tightrope.types import Budget, Problem, Table

Picked = Mapping[str, NDArray[np.intp]]


def controls(problem: Problem, budget: Budget, seed: int = 0) -> dict[str, Picked]:
    """`uniform`: one patch for every channel. `random`: a random patch per channel, trimmed to fit.
    `per_layer`: one patch per site, and `layers`: sites kept or removed whole, both chosen by the same losses
    and the same solver.

    All meet the budget. Raises BudgetError like `select`.
    """
    # first: it raises where there is nothing to choose
    layers = _per_layer(problem, budget, lambda text: text in ("1x1", "identity"))
    metric = budget.limits[0].metric
    room = budget.resolve(problem.baseline)[metric] - getattr(problem.fixed, metric)
    return {
        "uniform": _uniform(problem, metric, room),
        "random": _random(problem, metric, room, np.random.default_rng(seed)),
        "per_layer": _per_layer(problem, budget, lambda text: True),
        "layers": layers,
    }


def _uniform(problem: Problem, metric: str, room: float) -> Picked:
    """The dearest single patch that fits; a site that lacks it takes its largest patch inside it."""
    labels = {label for t in problem.tables for label in t.labels if label != "identity"}
    best: tuple[float, Picked] | None = None
    for text in sorted(labels):
        wanted = _sides(text)
        picked = {t.site: np.full(len(t.loss), _nearest(t, wanted)) for t in problem.tables}
        cost = sum(float(t.cost[metric][picked[t.site]].sum()) for t in problem.tables)
        if cost <= room and (best is None or cost > best[0]):
            best = (cost, picked)
    if best is None:
        return {t.site: np.full(len(t.loss), len(t.labels) - 1) for t in problem.tables}
    return best[1]


def _sides(text: str) -> tuple[int, int]:
    p, _, q = text.partition("x")
    return int(p), int(q)


def _nearest(table: Table, wanted: tuple[int, int]) -> int:
    inside = [
        (p * q, k)
        for k, text in enumerate(table.labels)
        if text != "identity"
        for p, q in [_sides(text)]
        if p <= wanted[0] and q <= wanted[1]
    ]
    return max(inside)[1]


def _random(problem: Problem, metric: str, room: float, generator: np.random.Generator) -> Picked:
    """A random option per channel; then random channels grow or shrink until nothing larger fits."""
    picked = {t.site: generator.integers(len(t.labels), size=len(t.loss)) for t in problem.tables}
    groups = [(t, g) for t in problem.tables for g in range(len(t.loss))]
    used = sum(float(t.cost[metric][picked[t.site]].sum()) for t in problem.tables)
    order = generator.permutation(len(groups))
    while used > room:
        before = used
        for i in order:
            t, g = groups[i]
            k = picked[t.site][g]
            cheaper = np.flatnonzero(t.cost[metric] < t.cost[metric][k])
            if used > room and len(cheaper):
                new = cheaper[0]  # options are sorted dearest first
                used += float(t.cost[metric][new] - t.cost[metric][k])
                picked[t.site][g] = new
        if used == before:
            break
    for i in order:
        t, g = groups[i]
        k = picked[t.site][g]
        fits = np.flatnonzero(t.cost[metric] - t.cost[metric][k] <= room - used)
        if len(fits) and t.cost[metric][fits[0]] > t.cost[metric][k]:
            used += float(t.cost[metric][fits[0]] - t.cost[metric][k])
            picked[t.site][g] = fits[0]
    return picked


def _per_layer(problem: Problem, budget: Budget, keep: Callable[[str], bool]) -> Picked:
    """The best choice of one option for all channels of a site, among the labels that `keep` accepts."""
    kept = {t.site: [k for k, text in enumerate(t.labels) if keep(text)] for t in problem.tables}
    tables = tuple(
        Table(
            t.site,
            tuple(t.labels[k] for k in kept[t.site]),
            t.loss[:, kept[t.site]].sum(0, keepdims=True),
            {m: v[kept[t.site]] * len(t.loss) for m, v in t.cost.items()},
        )
        for t in problem.tables
    )
    whole = select(Problem(tables, problem.fixed, problem.baseline), budget)
    return {t.site: np.full(len(t.loss), kept[t.site][int(whole.picked[t.site][0])]) for t in problem.tables}
