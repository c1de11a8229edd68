"""What a plan decides, site by site, counted again from the problem that it was chosen from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tightrope.errors import BundleError
from tightrope.methods.block_relu.patches import label
from tightrope.types import Json, Plan, Problem, Table

Pair = tuple[int, int]


@dataclass(frozen=True)
class Decision:
    """One site that the plan decides. DReLUs per image; `shape` (C, H, W) or (C,); a patch per channel."""

    name: str
    shape: tuple[int, ...]
    patches: tuple[Pair, ...]
    before: float
    after: float

    @property
    def map(self) -> Pair:
        return (self.shape[1], self.shape[2]) if len(self.shape) == 3 else (1, 1)


def decisions(plan: Plan, problem: Problem) -> list[Decision]:
    """In the network's order. Raises BundleError when the plan is no choice out of the problem, or its
    DReLUs are not those that it predicts: one of the two was changed.
    """
    prepared = problem.meta.get("prepared", {})
    tables = {table.site: table for table in problem.tables}
    for site in plan.choices.keys() | prepared.keys() | tables.keys():
        choice, wanted = plan.choices.get(site, {}), prepared.get(site, {})
        if ("patches" in choice) != (site in tables) or choice.get("replace") != wanted.get("replace"):
            raise _apart(site, choice or "no choice")
    found = [_decision(table, plan.choices[site], problem.meta) for site, table in tables.items()]
    counted = problem.fixed.drelus + sum(decision.after for decision in found)
    if not math.isclose(counted, plan.predicted.drelus, rel_tol=1e-9):
        raise _apart("DReLUs", f"{counted:,.15g} counted, {plan.predicted.drelus:,.15g} in the plan")
    return found


def _decision(table: Table, choice: Mapping[str, Json], meta: Mapping[str, Json]) -> Decision:
    drelus = dict(zip(table.labels, table.cost.get("drelus", [0.0] * len(table.labels)), strict=True))
    try:
        patches = tuple((int(p), int(q)) for p, q in choice["patches"])
        shape = tuple(meta["sites"][table.site])
        after = sum(float(drelus[label(patch)]) for patch in patches)
        decision = Decision(table.site, shape, patches, float(drelus["1x1"]) * len(patches), after)
    except (KeyError, TypeError, ValueError) as error:
        raise _apart(table.site, f"{type(error).__name__}: {error}") from None
    if len(patches) != len(table.loss):
        raise _apart(table.site, f"{len(patches)} patches for {len(table.loss)} channels")
    return decision


def _apart(where: str, got: object) -> BundleError:
    return BundleError(
        "the plan and the problem do not belong together: one of them was changed",
        where=where,
        got=str(got)[:80],
        fix="tightrope search, or tightrope solve from an unchanged bundle",
    )
