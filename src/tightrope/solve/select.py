"""Pick one option per group of a Problem under a Budget, with a proved bound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tightrope.errors import BudgetError
from tightrope.solve.mckp import Block, solve
from tightrope.types import Budget, Cost, Limit, Problem, total


@dataclass(frozen=True)
class Selection:
    """`picked` maps a site to (G,) option indices; `bound` <= every feasible loss."""

    picked: Mapping[str, NDArray[np.intp]]
    cost: Cost
    loss: float
    bound: float


def select(problem: Problem, budget: Budget) -> Selection:
    """Minimise the summed loss within a budget of one limit; the fixed cost counts against it.

    Raises BudgetError when the limit is infeasible, stating the smallest feasible one, and when the
    budget names several limits or a quantity on which the options do not differ.
    """
    if len(budget.limits) != 1:
        raise BudgetError(
            "this method takes exactly one limit", got=str(budget), fix="--budget 'drelus<=12%'"
        )
    metric = budget.limits[0].metric
    limit = budget.resolve(problem.baseline)[metric]
    priced = [t for t in problem.tables if metric in t.cost]
    if len(priced) < len(problem.tables) or not priced:
        known = sorted(set.intersection(*(set(t.cost) for t in problem.tables))) if problem.tables else []
        raise BudgetError(
            "no option is priced in this quantity", got=metric, allowed=", ".join(known) or "nothing"
        )
    fixed = getattr(problem.fixed, metric)
    cheapest = fixed + sum(float(t.cost[metric].min()) * len(t.loss) for t in problem.tables)
    if cheapest > limit:
        raise BudgetError(
            "no choice meets the budget",
            got=str(budget)
            if limit == budget.limits[0].value
            else f"{budget}, that is {metric}<={limit:.15g}",
            allowed=f"{Limit(metric, cheapest)} or more"
            + (f", of which {fixed:.15g} no choice can change" if fixed else ""),
            fix="a larger budget, or fewer fixed costs: all sites, --max-pool avg, --relu6 relu"
            if fixed
            else None,
        )
    solution = solve([Block(t.loss, t.cost[metric]) for t in problem.tables], limit - fixed)
    picked = {t.site: c for t, c in zip(problem.tables, solution.choices, strict=True)}
    return replace(price(problem, picked), loss=solution.loss, bound=min(solution.bound, solution.loss))


def price(problem: Problem, picked: Mapping[str, NDArray[np.intp]]) -> Selection:
    """Cost and loss of any assignment; its bound is its own loss, nothing being proved."""
    cost = problem.fixed + total(t.cost_of(picked[t.site]) for t in problem.tables)
    loss = sum(float(t.loss[np.arange(len(t.loss)), picked[t.site]].sum()) for t in problem.tables)
    return Selection(picked, cost, loss, loss)
