"""Polynomials chosen by levels against one polynomial everywhere, and the published ones against ours.

    python benchmarks/bench_paf.py budgets        # about 3 minutes of one core
    python benchmarks/bench_paf.py published      # as long

On Fashion-MNIST with the bundle that `train_paf.py` leaves: its ReLU network and its measured problem.
Batch-norm statistics are estimated anew for every candidate. `untuned`: coefficients and order of stages as
SmartPAF has them; `tuned`: fitted to the histograms. DS: a scale a batch, SS: the largest input of training
images. All accuracies are on validation images, of one seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

import _rows
from tightrope.bundle import Bundle
from tightrope.data import Data
from tightrope.evaluate import accuracy, recalibrate
from tightrope.finetune import Recipe, finetune
from tightrope.graph import Graph, trace
from tightrope.methods.paf import PafMethod
from tightrope.methods.paf.library import COMPOSITES, paf
from tightrope.nn import PolynomialActivation
from tightrope.place import place
from tightrope.reach import freeze
from tightrope.solve.select import price, select
from tightrope.types import Budget, Json, Problem

BUDGETS = (17, 21, 26)
METHOD = PafMethod()
RECIPE = Recipe(epochs=2, batch_size=128, limit=15_000)


def recalibrated(module: nn.Module, data: Data) -> nn.Module:
    recalibrate(module, data.batches("train", 256, limit=2_000))
    return module


def placed(graph: Graph, choices: Mapping[str, Json]) -> nn.Module:
    return place(graph, choices, METHOD.rewrite).module


def untuned(name: str, scales: Mapping[str, float]) -> dict[str, Json]:
    module = PolynomialActivation.relu(paf(name, published=True).stages)
    stages = [stage.tolist() for stage in module.stages]
    return {
        site: {"polynomial": name, "stages": stages, "gated": True, "scale": scale}
        for site, scale in scales.items()
    }


def score(module: nn.Module, data: Data, *, dynamic: bool) -> float:
    """After new statistics; a static scale is the largest input of training images under these."""
    layers = [m for m in module.modules() if isinstance(m, PolynomialActivation)]
    for layer in layers:
        layer.dynamic = True
    recalibrated(module, data)
    if not dynamic:
        freeze(module, data.batches("train", 256, limit=2_000))
    return accuracy(module, data, "validation")


def joint(module: nn.Module, teacher: nn.Module, data: Data) -> nn.Module:
    return finetune(module, data, teacher=teacher, recipe=RECIPE)


def budgets(graph: Graph, problem: Problem, teacher: nn.Module, data: Data) -> list[dict[str, object]]:
    """The plan of the levels programme against the best uniform one that fits."""
    rows = []
    for limit in BUDGETS:
        budget = Budget.parse(f"ckks_levels<={limit}")
        best = select(problem, budget).picked
        uniform = METHOD.controls(problem, budget)["uniform"]
        found = {}
        for name, picked in (("chosen", best), ("uniform", uniform)):
            module = placed(graph, METHOD.choices(problem, picked))
            before = accuracy(recalibrated(module, data), data, "validation")
            after = accuracy(joint(module, teacher, data), data, "validation")
            found[name] = (price(problem, picked), before, after)
            which = sorted({t.labels[int(picked[t.site][0])] for t in problem.tables})
            head = f"{limit} levels, {name} ({', '.join(which)})"
            rows.append(_rows.row(f"{head}: accuracy before training", before, "of validation"))
            rows.append(_rows.row(f"{head}: accuracy after training", after, "of validation"))
            print(rows[-2:], flush=True)
        lower = found["chosen"][0].loss <= found["uniform"][0].loss
        ratio = found["chosen"][0].loss / found["uniform"][0].loss
        rows.append(
            _rows.row(f"{limit} levels: predicted loss, chosen over uniform, <= 1", ratio, "x", lower)
        )
        gained = found["chosen"][2] - found["uniform"][2]
        bar = f"{limit} levels: accuracy after training, chosen minus uniform, >= 0"
        rows.append(_rows.row(bar, gained * 100, "points", gained >= 0))
    return rows


def published(graph: Graph, problem: Problem, teacher: nn.Module, data: Data) -> list[dict[str, object]]:
    """The five composites in place of all ReLUs, without training."""
    rows = []
    fits = problem.meta["fits"]
    for name in COMPOSITES:
        scales = {site: found[name]["scale"] for site, found in fits.items()}
        index = {t.site: np.array([t.labels.index(name)]) for t in problem.tables}
        tuned = METHOD.choices(problem, index)
        for what, choices in (("untuned", untuned(name, scales)), ("tuned", tuned)):
            for kind in ("DS", "SS"):
                value = score(placed(graph, choices), data, dynamic=kind == "DS")
                rows.append(_rows.row(f"{name}, {what}, {kind}", value, "of validation"))
        print(rows[-4:], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=("budgets", "published"))
    parser.add_argument("--bundle", type=Path, default=Path("runs/paf-small"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    bundle = Bundle.open(given.bundle)
    data, teacher, problem = bundle.data(), bundle.base(), bundle.problem()
    graph = trace(teacher, data.input_shape)
    rows = [_rows.row("ReLU network", accuracy(teacher, data, "validation"), "of validation")]
    rows += {"budgets": budgets, "published": published}[given.part](graph, problem, teacher, data)
    command = f"python benchmarks/bench_paf.py {given.part}"
    _rows.write(f"paf_{given.part}", [{"issue": 3, "command": command, **row} for row in rows])
    print(_rows.table([row for row in _rows.read() if row["command"] == command]))


if __name__ == "__main__":
    main()
