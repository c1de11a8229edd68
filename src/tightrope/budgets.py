"""The verb curve: one search's measurements, solved for many budgets.

Accuracies are those before any training, which only say how budgets and methods compare.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tightrope.bundle import Bundle, write_json
from tightrope.choose import CALIBRATION
from tightrope.errors import InputError
from tightrope.finetune import accuracy, recalibrate
from tightrope.graph import trace
from tightrope.pipeline import Progress, quiet
from tightrope.place import place
from tightrope.rewrite import measuring_method_of
from tightrope.solve.select import cheapest, price, select
from tightrope.types import Budget, Json, Limit


def curve(
    bundle: Bundle, *, points: int = 20, limit: int = 1000, progress: Progress = quiet
) -> list[dict[str, Json]]:
    """Solve the saved problem for many budgets; validation accuracy of each without any training.

    Batch-norm statistics are re-estimated on training images first, for every plan and control alike. Costs
    are in the quantities that options are priced in.

    At every third budget the method's controls are measured too. Raises InputError for less than one point,
    or less than one image (`limit`).
    """
    for name, value in (("points", points), ("limit", limit)):
        if value < 1:
            raise InputError(f"{name} must be positive", got=value, allowed="1 or more")
    plan = bundle.plan()
    method = measuring_method_of(plan)  # first: a learned plan has no problem
    problem, data = bundle.problem(), bundle.data()
    metric = Budget.parse(plan.budget).limits[0].metric
    graph = trace(bundle.base(), plan.input_shape)

    def score(picked: Mapping[str, Any]) -> float:
        module = place(graph, method.choices(problem, picked), method.rewrite).module
        recalibrate(module, data.batches("train", 128, shuffle=True, limit=CALIBRATION))
        return float(accuracy(module, data, "validation", limit=limit))

    least = cheapest(problem, metric) / getattr(problem.baseline, metric)  # bytes, say, that no choice saves
    rows: list[dict[str, Json]] = []
    for k, share in enumerate(np.geomspace(max(0.02, least * (1 + 1e-9)), 1.0, points)):
        budget = Budget((Limit(metric, float(share), relative=True),))
        best = select(problem, budget)
        entry: dict[str, Json] = {
            "share": float(share),
            "cost": best.cost.only(problem.priced).as_dict(),
            "loss": best.loss,
            "bound": best.bound,
        }
        entry["accuracy"] = {"tightrope": score(best.picked)}
        if k % 3 == 0:
            for name, picked in method.controls(problem, budget).items():
                entry["accuracy"][name] = score(picked)
                entry[name] = price(problem, picked).cost.only(problem.priced).as_dict()
        rows.append(entry)
        progress("accuracy against budget", k + 1, points)
    write_json(bundle.path / "curve.json", rows)
    return rows
