"""Budgets in quantities whose prices do not add up exactly: solve, look at the exact cost, move the limit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tightrope.solve.select import Selection, cheapest, infeasible, price, select, the_limit
from tightrope.types import Budget, Cost, FloatArray, Limit, Problem

TRIES = 8  # choices whose exact cost is looked at
SLACK = 0.01  # of what a budget leaves to choices may stay unused
Picked = Mapping[str, NDArray[np.intp]]
Exact = Callable[[Picked], Cost]


@dataclass(frozen=True)
class Fit:
    """`selection` with its exact cost, and the limit on the sum of prices that it is the best choice for."""

    selection: Selection
    limit: float


def anchored(problem: Problem, exact: Cost, quantities: frozenset[str]) -> Problem:
    """The problem whose unchanged network costs exactly `exact` in these quantities."""
    new = {m: getattr(exact, m) for m in quantities}
    fixed = {m: getattr(problem.fixed, m) + v - getattr(problem.baseline, m) for m, v in new.items()}
    return replace(problem, fixed=replace(problem.fixed, **fixed), baseline=replace(problem.baseline, **new))


def check(problem: Problem, budget: Budget, exact: Exact) -> None:
    """Raise BudgetError, as `select` would, if even the exact cost of the cheapest choice is too much."""
    metric, target = the_limit(problem, budget)
    least = getattr(exact(_extreme(problem, metric, np.argmin)), metric)
    if least > target:
        raise infeasible(problem, budget, least)


def fit(problem: Problem, budget: Budget, exact: Exact) -> Fit:
    """The best choice found whose exact cost meets the budget.

    The limit on the sum of prices starts at the budget and goes where the exact cost of the choices so far
    says that it would be a little below the budget, until 99 % of the room is used or 8 choices were looked
    at. The bound of the selection is proved for the sum of prices and `Fit.limit`.

    Raises BudgetError where `select` does, and when even the cheapest choice costs too much.
    """
    metric, target = the_limit(problem, budget)
    fixed, least = getattr(problem.fixed, metric), cheapest(problem, metric)
    most = getattr(price(problem, _extreme(problem, metric, np.argmax)).cost, metric)
    aim = target - SLACK / 2 * (target - fixed)  # the budget itself would be approached only
    low, high = least, math.inf  # the best limit is between them
    under: tuple[float, float] | None = None  # sum of prices and exact cost, of the best choice
    over: tuple[float, float] | None = None  # and of the nearest one that is too dear
    limit = min(max(target, least), most)
    best: Fit | None = None
    for k in range(TRIES):
        if k == TRIES - 1 and best is None:
            limit = least
        found = select(problem, Budget((Limit(metric, limit),)))
        if best is not None and _same(found, best.selection):
            low = limit  # nothing more to pay for up to here
        else:
            cost = exact(found.picked)
            spent, summed = getattr(cost, metric), getattr(found.cost, metric)
            if spent <= target:
                best, low, under = Fit(replace(found, cost=cost), limit), limit, (summed, spent)
                if limit >= most or target - spent <= SLACK * (target - fixed):
                    break
            elif limit <= least:
                raise infeasible(problem, budget, spent)
            else:
                high, over = summed, (summed, spent)
            limit = _between(under, over, fixed, aim)
        limit = min(limit, most)
        if not low < limit < high:
            limit = (low + min(high, most)) / 2
    assert best is not None  # the last try is the cheapest choice, which is met or raises
    return best


def _extreme(problem: Problem, metric: str, which: Callable[[FloatArray], np.intp]) -> Picked:
    return {t.site: np.full(len(t.loss), which(t.cost[metric])) for t in problem.tables}


def _between(
    under: tuple[float, float] | None, over: tuple[float, float] | None, fixed: float, aim: float
) -> float:
    """The sum of prices whose exact cost should be `aim`: on the line through both points, else through one
    and the fixed cost."""
    (price_a, cost_a), (price_b, cost_b) = under or (fixed, fixed), over or (fixed, fixed)
    if cost_a == cost_b:
        return price_a
    return price_a + (aim - cost_a) * (price_b - price_a) / (cost_b - cost_a)


def _same(a: Selection, b: Selection) -> bool:
    return all((a.picked[site] == b.picked[site]).all() for site in a.picked)
