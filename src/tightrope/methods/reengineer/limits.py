"""A budget as limits on masks, and the budgets that no masks meet: refused before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping

from tightrope.errors import BudgetError
from tightrope.methods.reengineer.projection import METRICS
from tightrope.methods.reengineer.selection import front
from tightrope.nn.masked import Granularity
from tightrope.types import Budget, Cost


def limits_of(
    budget: Budget, baseline: Cost, head: Mapping[str, int], granularity: Granularity
) -> dict[str, float]:
    """What the masks may leave, the head's own share taken off.

    Raises BudgetError for another quantity, one that single weights do not save, and less than the head.
    """
    limits = {}
    for metric, limit in budget.resolve(baseline).items():
        if metric not in (*METRICS, "online_ms"):
            raise BudgetError(
                "reengineer does not limit this quantity",
                got=metric,
                allowed="weights, macs, latency_ms",
                fix="--budget 'weights<=0.1x'",
            )
        if metric != "weights" and granularity == "weight":
            raise BudgetError(
                "masks of single weights save storage, neither multiplications nor time",
                got=f"{budget}; dense kernels multiply zeros",
                fix="--set granularity=channel, or hybrid",
            )
        if limit <= head.get(metric, 0):
            raise BudgetError(
                "the budget is below the head alone",
                got=f"{budget}: {limit:,.15g} {metric}",
                allowed=f"more than {head.get(metric, 0):,}",
            )
        limits[metric] = limit - head.get(metric, 0)
    return limits


def refuse_below(budget: Budget, baseline: Cost, smallest: Cost, multiple: int) -> None:
    """Raises BudgetError for a limit that even `smallest`, of `multiple` channels a tensor, misses."""
    for metric, limit in budget.resolve(baseline).items():
        if (least := getattr(smallest, metric)) > limit:
            shown = f"{math.ceil(1e3 * least) / 1e3:,.15g}"  # a budget of what is shown is enough
            raise BudgetError(
                "the budget is below the smallest network that masks can make",
                got=f"{budget}: {limit:,.15g} {metric}",
                allowed=f"{shown} {metric} or more: {multiple} channel(s) in every tensor, or all it has",
                fix="a larger budget" + (", or a smaller multiple" if multiple > 1 else ""),
            )


def missed(got: str, allowed: str, points: list[dict[str, float]]) -> BudgetError:
    """Of a search that has ended; `points` as in `selection.front`, with whole networks' costs."""
    best = "; ".join(f"{p['weights']:,.0f} weights at {p['accuracy']:.2%}" for p in front(points)[:6])
    return BudgetError(
        "the search found no network within the limits",
        got=got,
        allowed=f"{allowed}\n  found:   {best}",
        fix="a larger budget, more epochs, a lower floor, or a smaller multiple",
    )
