"""What a plan decides, site by site, counted again from the problem that it was chosen from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tightrope.errors import BundleError
from tightrope.methods import Method
from tightrope.rewrite import measuring_method_of
from tightrope.solve.select import price
from tightrope.types import ALONG, Cost, Json, Plan, Problem, Table


@dataclass(frozen=True)
class Decision:
    """One site that the plan decides: `labels` of its options, one per group; `shape` (C, H, W) or (C,).

    `before`: what it costs with the first option, the dearest, in every group; `after`: as chosen.
    """

    name: str
    shape: tuple[int, ...]
    labels: tuple[str, ...]
    before: Cost
    after: Cost

    @property
    def map(self) -> tuple[int, int]:
        return (self.shape[1], self.shape[2]) if len(self.shape) == 3 else (1, 1)


def decisions(plan: Plan, problem: Problem) -> list[Decision]:
    """In the network's order. Raises BundleError when the plan is no choice out of the problem, or its costs
    are not those that it predicts: one of the two was changed.
    """
    method = measuring_method_of(plan)
    picked = {t.site: _picked(t, plan.choices.get(t.site, "no choice"), method) for t in problem.tables}
    _compare(plan.choices, method, problem, picked)
    counted = price(problem, picked).cost
    for metric in ("drelus", *(ALONG if problem.path else ())):
        found, told = getattr(counted, metric), getattr(plan.predicted, metric)
        if not math.isclose(found, told, rel_tol=1e-9):
            raise _apart(metric, f"{found:,.15g} counted, {told:,.15g} in the plan")
    return [_decision(t, picked[t.site], problem.meta) for t in problem.tables]


def decided(problem: Problem, metric: str) -> str:
    """What is shown site by site: DReLUs where options differ in them, else what the budget limits."""
    return "drelus" if any(np.any(t.cost.get("drelus", 0)) for t in problem.tables) else metric


def _picked(table: Table, choice: Json, method: Method) -> NDArray[np.intp]:
    try:
        labels = method.options(choice)
        picked = np.array([table.labels.index(label) for label in labels], np.intp)
    except (KeyError, TypeError, ValueError) as error:
        raise _apart(table.site, f"{type(error).__name__}: {error}") from None
    if len(picked) != len(table.loss):
        raise _apart(table.site, f"{len(picked)} options for {len(table.loss)} groups")
    return picked


def _compare(
    choices: Mapping[str, Json], method: Method, problem: Problem, picked: Mapping[str, NDArray[np.intp]]
) -> None:
    """What these options are translated into must be the plan's choices."""
    try:
        wanted = json.loads(json.dumps(method.choices(problem, picked)))
    except (KeyError, TypeError, ValueError) as error:
        raise _apart("problem", f"{type(error).__name__}: {error}") from None
    given = json.loads(json.dumps(choices))
    for site in given.keys() | wanted.keys():
        if given.get(site) != wanted.get(site):
            raise _apart(site, given.get(site, "no choice"))


def _decision(table: Table, picked: NDArray[np.intp], meta: Mapping[str, Json]) -> Decision:
    try:
        shape = tuple(meta["sites"][table.site])
    except (KeyError, TypeError) as error:
        raise _apart(table.site, f"{type(error).__name__}: {error}") from None
    before = table.cost_of(np.zeros(len(picked), np.intp))
    return Decision(table.site, shape, tuple(table.labels[k] for k in picked), before, table.cost_of(picked))


def _apart(where: str, got: object) -> BundleError:
    return BundleError(
        "the plan and the problem do not belong together: one of them was changed",
        where=where,
        got=str(got)[:80],
        fix="tightrope search, or tightrope solve from an unchanged bundle",
    )
