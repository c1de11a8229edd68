"""How SmartPAF's ways to train polynomials compare with ours: which of the published claims hold.

    python benchmarks/bench_paf_training.py        # 1 hour of 2 cores; resumes when interrupted

Fashion-MNIST; the five published composites in place of all ReLUs of a small residual network, and in place
of all ReLUs and the max-pool (a tournament) of one with a pool behind its stem. `baseline`: coefficients and
order of stages as published, and no training; `CT`: fitted to the histograms; `CT+PA` and `CT+PA+AT`: then
trained in turns on the labels, with the scale of the batch, as published; `joint`: ours, everything at once,
distilled from the ReLU network, with the scale of the batch. DS evaluates with the scale of a batch of 500
images, SS with the largest input over training images. All trained ones take the same epochs and images.
Batch-norm statistics are estimated anew for every candidate. Each seed has a ReLU network and an order of
images of its own; rates were chosen on validation images (f1 g2 and a7, seed 0). The test split is read once
per network and kind of scale.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import multiprocessing
import os
import statistics
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

import _rows
from _small_residual import RECIPE as BASE
from _small_residual import small
from bench_paf import untuned
from tightrope.data import Data, load
from tightrope.evaluate import accuracy, recalibrate
from tightrope.finetune import finetune
from tightrope.graph import Graph, trace
from tightrope.methods.paf import PafMethod
from tightrope.methods.paf.library import COMPOSITES
from tightrope.pipeline import quiet
from tightrope.place import place
from tightrope.reach import activations, freeze
from tightrope.recipe import Recipe
from tightrope.runtimes.plain import Plain
from tightrope.turns import train
from tightrope.types import Json, Problem

IMAGES, WATCHED, EPOCHS = 10_000, 1_000, 5.0
METHOD = PafMethod(samples=512, polynomials=";".join(COMPOSITES))
JOINT = Recipe(epochs=EPOCHS, batch_size=128, limit=IMAGES, lr=0.005, ema=0.99, scales="dynamic")
TURNS = replace(JOINT, label=1.0, distill=0.0, hints=0.0, reach=0.0)
SCHEDULES = {"CT+PA": ("progressive", 0.005), "CT+PA+AT": ("progressive+alternate", 0.02)}  # and rates
MODES = ("baseline", "CT", *SCHEDULES, "joint")
OPERATORS = ("ReLU", "ReLU and max-pool")
KINDS = ("DS", "SS")
Job = tuple[str, int, str, str]  # operators, seed, polynomial, mode


class Pooled(nn.Module):
    """A max-pool behind the first activation of the small residual network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small(10, 1)
        self.net.relu = nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y


@dataclass(frozen=True)
class Watched:
    """`data` with its first validation images only, which alternating turns look at very often."""

    data: Data

    def __getattr__(self, name: str) -> Any:
        return getattr(self.data, name)

    def batches(self, split: Any, batch_size: int, **more: Any) -> Iterator[tuple[Tensor, Tensor]]:
        if split == "validation":
            more["limit"] = min(more.get("limit") or WATCHED, WATCHED)
        return self.data.batches(split, batch_size, **more)


def base(operators: str, seed: int, data: Data, work: Path) -> tuple[nn.Module, Graph, Problem]:
    """The ReLU network, trained, and its polynomials."""
    torch.manual_seed(seed)
    net = Pooled() if "max-pool" in operators else small(10, 1)
    weights, measured = (work / f"{operators.replace(' ', '-')}-{seed}.{end}" for end in ("pt", "npz"))
    if not measured.exists():
        net = finetune(net, data, recipe=replace(BASE, epochs=4, seed=seed))
        torch.save(net.state_dict(), weights)
        graph = trace(net, data.input_shape)
        METHOD.measure(graph, data, cost=Plain(), workdir=None, progress=quiet).save(measured)
    net.load_state_dict(torch.load(weights))
    return net.eval(), trace(net.eval(), data.input_shape), Problem.load(measured)


def choices(problem: Problem, name: str, mode: str) -> dict[str, Json]:
    if mode == "baseline":
        scales = {site: fits[name]["scale"] for site, fits in problem.meta["fits"].items()}
        return dict(problem.meta["prepared"]) | untuned(name, scales)
    return METHOD.choices(problem, {t.site: np.array([t.labels.index(name)]) for t in problem.tables})


def trained(
    graph: Graph, chosen: Mapping[str, Json], teacher: nn.Module, data: Data, mode: str, seed: int
) -> nn.Module:
    def without(names: Collection[str]) -> fx.GraphModule:
        kept = {site: choice for site, choice in chosen.items() if site not in names}
        return place(graph, kept, METHOD.rewrite).module

    if mode == "joint":
        return finetune(without(()), data, teacher=teacher, recipe=replace(JOINT, seed=seed))
    if mode in SCHEDULES:
        schedule, lr = SCHEDULES[mode]
        return train(without(()), without, data, schedule, recipe=replace(TURNS, seed=seed, lr=lr))
    return without(())


def scores(net: nn.Module, data: Data, split: Any) -> dict[str, float]:
    """Accuracy in % by kind of scale."""
    found = {}
    for kind in KINDS:
        one = copy.deepcopy(net)
        for layer in activations(one).values():
            layer.dynamic = True
        recalibrate(one, data.batches("train", 256, limit=2_000))
        if kind == "SS":
            freeze(one, data.batches("train", 256, limit=2_000))
        found[kind] = 100 * accuracy(one, data, split)
    return found


def named(job: Job, split: str) -> str:
    """A file for the result of this job, with these settings."""
    how = {"joint": JOINT} | {mode: (TURNS, *SCHEDULES[mode]) for mode in SCHEDULES}
    made_of = f"{job}{split}{how.get(job[-1])}{METHOD}{WATCHED}"
    return f"{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.json"


def run(job: Job, work: Path, split: str = "test") -> dict[str, Any]:
    """The result of a job, kept in a file of its own: accuracies, and where it ran."""
    operators, seed, name, mode = job
    torch.set_num_threads(1)
    data = load("fashion-mnist")
    saved = work / named(job, split)
    if not saved.exists():
        teacher, graph, problem = base(operators, seed, data, work)
        if name == "":
            result = dict.fromkeys(KINDS, 100 * accuracy(teacher, data, split))  # type: ignore[arg-type]
        else:
            chosen = choices(problem, name, mode)
            net = trained(graph, chosen, teacher, Watched(data), mode, seed)  # type: ignore[arg-type]
            result = scores(net, data, split)
        saved.write_text(json.dumps(result | {"trained_on": _rows.trained_on()}))
    found: dict[str, Any] = json.loads(saved.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, default=Path("runs/bench_paf_training"))
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    seeds = range(given.seeds)
    first = [(o, s, "", "") for o in OPERATORS for s in seeds]
    jobs = [(o, s, n, m) for s in seeds for o in OPERATORS for n, m in product(COMPOSITES, MODES)]
    results: dict[Job, dict[str, Any]] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(given.processes, mp_context=context) as pool:
        for part in (first, jobs):  # the ReLU networks before what is made of them
            waiting = {pool.submit(run, job, given.work): job for job in part}
            for future in as_completed(waiting):
                results[waiting[future]] = future.result()
                print(*waiting[future], future.result(), flush=True)
    rows = []
    for operators in OPERATORS:
        found = [results[operators, s, "", ""]["SS"] for s in seeds]
        rows += spread(f"{operators}: the network with ReLUs", found)
        means: dict[tuple[str, str, str], float] = {}
        for name, mode, kind in product(COMPOSITES, MODES, KINDS):
            found = [results[operators, s, name, mode][kind] for s in seeds]
            means[name, mode, kind] = statistics.mean(found)
            rows += spread(f"{operators}: {name}, {mode}, {kind}", found)
        rows += claims(operators, means)
    command = "python benchmarks/bench_paf_training.py"
    devices = sorted({r["trained_on"] or "a CPU" for r in results.values()})
    where = f", trained on {', '.join(devices)}" if devices != ["a CPU"] else ""
    _rows.write(
        "paf_training",
        [{"issue": 3, "command": command, **row, "bar": f"{row['bar']}{where}"} for row in rows],
    )


def spread(what: str, values: list[float]) -> list[dict[str, object]]:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return [
        _rows.row(f"{what}, test accuracy, mean of {len(values)} seeds", statistics.mean(values), "%"),
        _rows.row(f"{what}, standard deviation", deviation, "%"),
    ]


def claims(operators: str, means: Mapping[tuple[str, str, str], float]) -> list[dict[str, object]]:
    """Of the published ones, by how much they hold, the worst and the best composite."""
    rows = []
    for what, better, worse in (
        ("CT over baseline, SS", ("CT", "SS"), ("baseline", "SS")),
        ("training in turns over CT alone, DS", ("CT+PA", "DS"), ("CT", "DS")),
        ("AT over PA alone, DS", ("CT+PA+AT", "DS"), ("CT+PA", "DS")),
        ("DS over SS, after CT+PA+AT", ("CT+PA+AT", "DS"), ("CT+PA+AT", "SS")),
        ("ours over CT+PA+AT, SS", ("joint", "SS"), ("CT+PA+AT", "SS")),
    ):
        gains = [means[(name, *better)] - means[(name, *worse)] for name in COMPOSITES]
        for which, value in (("least", min(gains)), ("most", max(gains))):
            rows.append(_rows.row(f"{operators}: {what}, {which} of the five", value, "points"))
    return rows


if __name__ == "__main__":
    main()
