"""Pick one option per group of a Problem under a Budget, with a proved bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tightrope.errors import BudgetError
from tightrope.solve import along
from tightrope.solve.mckp import Block, solve
from tightrope.types import ALONG, Budget, Cost, FloatArray, Limit, Problem, total


@dataclass(frozen=True)
class Selection:
    """`picked` maps a site to (G,) option indices; `bound` <= every feasible loss."""

    picked: Mapping[str, NDArray[np.intp]]
    cost: Cost
    loss: float
    bound: float


def select(problem: Problem, budget: Budget) -> Selection:
    """Minimise the summed loss within a budget of one limit; the fixed cost counts against it.

    Raises BudgetError when the limit is infeasible, stating the smallest feasible one, and where
    `the_limit` does.
    """
    metric, limit = the_limit(problem, budget)
    least = cheapest(problem, metric)
    if least > limit:
        raise infeasible(problem, budget, least)
    if metric in ALONG:
        chosen = along.least_loss(problem, limit)
        picked = {t.site: np.full(len(t.loss), chosen[t.site]) for t in problem.tables}
        return price(problem, picked)  # nothing is better: the loss is its own bound
    fixed, most = getattr(problem.fixed, metric), _sum(problem, metric, np.max)
    # whatever rounding does, the cheapest choice fits, and every choice where the dearest one does
    room = most if fixed + most <= limit else max(limit - fixed, _sum(problem, metric, np.min))
    solution = solve([Block(t.loss, t.cost[metric]) for t in problem.tables], room)
    picked = {t.site: c for t, c in zip(problem.tables, solution.choices, strict=True)}
    return replace(price(problem, picked), loss=solution.loss, bound=min(solution.bound, solution.loss))


def the_limit(problem: Problem, budget: Budget) -> tuple[str, float]:
    """The quantity that is limited, and its absolute limit.

    Raises BudgetError when the budget names several limits or a quantity in which the options have no price.
    """
    if len(budget.limits) != 1:
        raise BudgetError(
            "this method takes exactly one limit", got=str(budget), fix="--budget 'drelus<=12%'"
        )
    metric, known = budget.limits[0].metric, quantities(problem)
    limit = budget.resolve(problem.baseline)[metric]
    if metric not in known:
        raise BudgetError(
            "no option is priced in this quantity", got=metric, allowed=", ".join(known) or "nothing"
        )
    return metric, limit


def quantities(problem: Problem) -> tuple[str, ...]:
    """What a budget may limit: in what every site's options are priced, and not all of them at nothing; and
    what is counted along the graph, where what no choice changes has a part too."""
    every = set.intersection(*(set(t.cost) for t in problem.tables)) if problem.tables else set[str]()
    counted = ALONG if problem.path else ()
    return tuple(sorted(m for m in every if m in counted or any(t.cost[m].any() for t in problem.tables)))


def infeasible(problem: Problem, budget: Budget, least: float) -> BudgetError:
    """The error for a budget below `least`, what the cheapest choice costs."""
    metric, limit = the_limit(problem, budget)
    fixed = getattr(problem.fixed, metric)
    return BudgetError(
        "no choice meets the budget",
        got=str(budget) if limit == budget.limits[0].value else f"{budget}, that is {metric}<={limit:.15g}",
        allowed=f"{Limit(metric, least)} or more"
        + (f", of which {fixed:.15g} no choice can change" if fixed else ""),
        fix="a larger budget, or fewer fixed costs: all sites, --max-pool avg, --relu6 relu"
        if fixed
        else None,
    )


def cheapest(problem: Problem, metric: str) -> float:
    """The least that any choice costs in a quantity in which every table is priced."""
    if metric in ALONG:
        return along.levels(problem, {t.site: int(t.cost[metric].argmin()) for t in problem.tables})
    return float(getattr(problem.fixed, metric)) + _sum(problem, metric, np.min)


def _sum(problem: Problem, metric: str, which: Callable[[FloatArray], np.float64]) -> float:
    return math.fsum(float(which(t.cost[metric])) for t in problem.tables for _ in t.loss)


def price(problem: Problem, picked: Mapping[str, NDArray[np.intp]]) -> Selection:
    """Cost and loss of any assignment; its bound is its own loss, nothing being proved."""
    cost = problem.fixed + total(t.cost_of(picked[t.site]) for t in problem.tables)
    if problem.path:
        deepest = along.levels(problem, {site: int(choice[0]) for site, choice in picked.items()})
        cost = replace(cost, ckks_levels=deepest)
    loss = sum(float(t.loss[np.arange(len(t.loss)), picked[t.site]].sum()) for t in problem.tables)
    return Selection(picked, cost, loss, loss)
