"""Accuracy by DReLUs: seesaw alone, block_relu on a ResNet-18, and block_relu on what seesaw found.

    python benchmarks/bench_seesaw_curve.py               # resumes when interrupted

Fashion-MNIST, one seed; searches and networks of `bench_seesaw.py --full` in the same --work are used
again. The ResNet-18 has an eighth of its usual width, so that two slow cores need about half an hour.
Every network that block_relu starts with is trained as long; then what block_relu makes of it is
fine-tuned as long again, with the network that it was made of as teacher, and so is that network itself.
What seesaw found is merged by then and has no batch-norm left, as in a bundle; the ResNet-18 has. The
test split is read once per network and training.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from _rows import row, trained_on, write
from bench_seesaw import ACCELERATOR, FULL, SEARCHED, Job, Json, counts, searched, trained
from tightrope import data as datasets
from tightrope import models
from tightrope.data import Data
from tightrope.errors import BudgetError
from tightrope.evaluate import accuracy
from tightrope.finetune import finetune
from tightrope.graph import Graph, trace
from tightrope.methods.block_relu import BlockReluMethod
from tightrope.models.resnet import ResNet
from tightrope.pipeline import quiet
from tightrope.place import place
from tightrope.runtimes.mpc import MPC
from tightrope.runtimes.plain import Plain
from tightrope.shard import launch
from tightrope.solve.select import select
from tightrope.types import Budget, Problem

METHOD = BlockReluMethod(samples=256, verify=20)
BASE = FULL.recipe
TUNED = replace(FULL.recipe, lr=0.05)
MERGED = replace(FULL.recipe, lr=0.005)  # without batch-norm: at 0.05 the loss is soon infinite
SEED = 0  # of the searches
RESNET = "resnet18"
ALONE = None  # instead of a limit: the network as it is
CURVE: dict[str, tuple[int | None, ...]] = {
    RESNET: (ALONE, 2000, 4000, 8000),
    "4000": (ALONE, 1000, 2000),
    "8000": (ALONE, 4000),
    "14000": (ALONE,),
}


def narrow(num_classes: int, in_channels: int) -> ResNet:
    """ResNet-18 with 8 to 64 channels."""
    return ResNet(8, ((8, 2, 1), (16, 2, 2), (32, 2, 2), (64, 2, 2)), num_classes, in_channels)


@dataclass(frozen=True)
class Point:
    """block_relu on the ResNet-18, or on what seesaw found for as many DReLUs as `base` says."""

    base: str
    limit: int | None

    def file(self, work: Path) -> Path:
        return work / f"{FULL.key}-curve-{self.base}-{self.limit}.json"


def base(name: str, data: Data, work: Path) -> nn.Module:
    """The network that block_relu starts with."""
    if name == RESNET:
        net = narrow(len(data.classes), data.input_shape[0])
        net.load_state_dict(load_file(work / f"{FULL.key}-{RESNET}.safetensors"))
        return net.eval()
    job = Job(int(name), SEARCHED, SEED)
    trained(job, FULL, work)  # unless it is there
    learned = searched(int(name), SEED, FULL, work)
    weights = load_file(job.file(FULL, work).with_suffix(".safetensors"))
    graph = trace(models.resolve("demo"), data.input_shape)
    model = FULL.method.rebuild(graph, learned.choices, weights)
    return FULL.method.finish(model, data.input_shape, MPC().pricing())


def measurements(name: str, work: Path) -> Path:
    return work / f"{FULL.key}-curve-{name}.npz"


def measured(name: str, work: Path) -> float:
    """Measure the options once, in a file; test accuracy of the network before."""
    torch.set_num_threads(1)
    data = datasets.load("fashion-mnist")
    weights = work / f"{FULL.key}-{RESNET}.safetensors"
    if name == RESNET and not weights.exists():
        torch.manual_seed(0)
        net = narrow(len(data.classes), data.input_shape[0])
        net = finetune(net, data, teacher=models.resolve("demo"), recipe=BASE)
        save_file({k: v.contiguous() for k, v in net.state_dict().items()}, weights)
    net = base(name, data, work)
    path = measurements(name, work)
    if not path.exists():
        METHOD.measure(
            trace(net, data.input_shape), data, cost=Plain(), workdir=None, progress=quiet,
            shard=launch(accelerator=ACCELERATOR),
        ).save(path)  # fmt: skip
    return accuracy(net, data, "test")


def tuned(point: Point, work: Path) -> Json:
    path = point.file(work)
    if not path.exists():
        torch.set_num_threads(1)
        data = datasets.load("fashion-mnist")
        net = base(point.base, data, work)
        graph: Graph = trace(net, data.input_shape)
        start, drelus = copy.deepcopy(net), counts(net, data.input_shape).drelus
        if point.limit is not ALONE:
            problem = Problem.load(measurements(point.base, work))
            try:
                selection = select(problem, Budget.parse(f"drelus<={point.limit}"))
            except BudgetError as error:  # max-pools that seesaw chose cost more
                print(error, flush=True)
                return {}
            start = place(graph, METHOD.choices(problem, selection.picked), METHOD.rewrite).module
            drelus = selection.cost.drelus
        recipe = TUNED if point.base == RESNET else MERGED
        result = finetune(start, data, teacher=net, recipe=replace(recipe, seed=0))
        found = {"drelus": drelus, "test": accuracy(result, data, "test")}
        path.write_text(json.dumps(found | {"trained_on": trained_on()}))
    read: Json = json.loads(path.read_text())
    return read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bases", nargs="+", default=list(CURVE), choices=list(CURVE))
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, default=Path("runs/bench_seesaw"))
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    before: dict[str, float] = {}
    found: dict[Point, Json] = {}
    options.work.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(options.processes, mp_context=context) as pool:
        bases = {pool.submit(measured, name, options.work): name for name in options.bases}
        points = {}
        for future in as_completed(bases):
            name = bases[future]
            before[name] = future.result()
            print(name, before[name], flush=True)
            points |= {pool.submit(tuned, p, options.work): p for p in (Point(name, n) for n in CURVE[name])}
        for future in as_completed(points):
            found[points[future]] = future.result()
            print(points[future], future.result(), flush=True)
    if set(options.bases) != set(CURVE):
        return
    rows = []
    names = {RESNET: "ResNet-18 of 8 to 64 channels"}
    for name, limits in CURVE.items():
        network = names.get(name, f"seesaw's network for {name} DReLUs")
        rows.append(row(f"{network}, trained once", 100 * before[name], "%"))
        for limit in limits:
            what = network if limit is ALONE else f"block_relu on {network}"
            run = found[Point(name, limit)]
            if not run:
                continue
            where = f", trained on {run['trained_on']}" if run["trained_on"] else ""
            rows.append(row(f"{what}, {run['drelus']:,.0f} DReLUs{where}", 100 * run["test"], "%"))
    command = "python benchmarks/bench_seesaw_curve.py"
    what = f"test accuracy, Fashion-MNIST{FULL.words}: "
    write("seesaw_curve", [{"issue": 6, "command": command, **r, "bar": what + str(r["bar"])} for r in rows])


if __name__ == "__main__":
    main()
