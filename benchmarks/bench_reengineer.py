"""Issue 4, bars 1 and 2: what a task needs of a donor trained on Fashion-MNIST, against all fair donors.

    python benchmarks/bench_reengineer.py                # resumable: one file per run, rows at the end
    python benchmarks/bench_reengineer.py --finished     # times of the networks that are there, and rows

ResNet-20 and a VGG-16 of a quarter of the published widths, one donor each, on a GPU if there is one.
Validation data select; the test split is read once per finished run, and once for its controls. These (new
head, fine-tuning, magnitude, SNIP) train for as many epochs as the search. Networks of whole channels are
then fine-tuned with the donor, which answers within the task, as teacher. Times are measured last, one
network after the other.
`--scratch` trains networks of the same shapes from random weights too, for as many epochs as search and
fine-tuning together. `--controls` adds those of the annealed masks to finished runs, on the CPU: heads for
as many epochs as the search; fine-tuning, the same for every mask, for TUNED. A run that fails leaves
FILE.error, and a row that says so; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from _donors import ACCELERATOR, BATCH, DONORS, donor
from _rows import row, trained_on, write
from tightrope.bundle import write_json
from tightrope.data import Data, load, parse_task, view
from tightrope.data.task import Task
from tightrope.evaluate import accuracy
from tightrope.finetune import Recipe, finetune
from tightrope.graph import Graph, trace
from tightrope.lower import lower
from tightrope.methods.reengineer import ReengineerMethod
from tightrope.methods.reengineer.controls import fine_tuned, with_new_head
from tightrope.nn.group_max import GroupMax
from tightrope.program import Program
from tightrope.runtimes.onnx import Onnx
from tightrope.runtimes.openvino import OpenVino
from tightrope.shard import launch
from tightrope.types import Budget

Json = dict[str, Any]
TASKS = ("3", "6", "8", "0,2,4,6", "5,7,9")
PUBLISHED = {
    "mode": "reference",
    "granularity": "weight",
    "head": "relu_linear",
    "lr_head": 0.1,
    "lr_mask": 0.05,
}
ANNEALED = PUBLISHED | {"decay": True, "margin": 1.0, "controls": False}
CHANNEL = {"granularity": "channel", "controls": False}
ALIGNED = CHANNEL | {"multiple": 8}  # channels, as the kernels of ONNX Runtime want them
CONFIGS = {"channel": CHANNEL, "aligned": ALIGNED}
SINGLE = {"reference": (PUBLISHED, "weights<=1x"), "annealed": (ANNEALED, "weights<=0.15x")}
MODES = (*SINGLE, *CONFIGS)
REPEATS, WARM_UP = 50, 10
TUNED = 12  # epochs of fine-tuning as a control of the annealed masks


def alpha(task: str, mode: str) -> float:
    """In the paper 1 to 2, in 300 epochs. Rates that fall remove less."""
    return 2.0 if "," in task and mode == "reference" else 3.0


@dataclass(frozen=True)
class Job:
    """One search, and how large it is."""

    seed: int
    donor: str
    task: str
    mode: str
    epochs: int
    donor_epochs: int
    images: int
    budget: str
    scratch: bool = False

    @property
    def key(self) -> tuple[str, str, str]:
        return self.donor, self.task, self.mode

    def file(self, work: Path) -> Path:
        how = f"{alpha(self.task, self.mode):g}" if self.mode in SINGLE else self.budget.replace("<=", "-")
        size = f"{self.donor_epochs}-{self.epochs}-{self.images}"
        return work / f"{self.donor}-{self.task}-{self.mode}-{how}-{self.seed}-{size}.json"

    def error(self, work: Path) -> Path:
        """Where it says why it failed, if it did."""
        return self.file(work).with_suffix(".error")

    def uncontrolled(self, work: Path) -> bool:
        """Whether there are annealed masks, and no controls of theirs yet."""
        file = self.file(work)
        there = self.mode == "annealed" and file.exists()
        return there and "test_controls" not in json.loads(file.read_text())

    def waits(self, work: Path) -> bool:
        if not self.file(work).exists():
            return True
        return (
            self.scratch and self.mode in CONFIGS and "scratch" not in json.loads(self.file(work).read_text())
        )


def latencies(first: Program, second: Program) -> dict[str, list[float]]:
    """Milliseconds, one thread, the two networks taking turns: p50 and p95 of each, by runtime and batch."""
    found = {}
    for runtime in (Onnx(), OpenVino()):
        sessions = [runtime.open(program) for program in (first, second)]
        for batch in (1, 16):
            x = np.random.default_rng(0).standard_normal((batch, *first.input_shape))
            times: list[list[float]] = [[], []]
            for _ in range(WARM_UP + REPEATS):
                for session, ms in zip(sessions, times, strict=True):
                    ms.append(session.run(x)[1].total.online_ms)
            kept = [np.percentile(ms[WARM_UP:], (50, 95)) for ms in times]
            found[f"{runtime.name} {batch}"] = [float(v) for pair in kept for v in pair]
    return found


def prepared(job: Job, work: Path) -> tuple[Graph, Data, Task, ReengineerMethod, str]:
    """The donor, the images of its task, and what searches how much of it."""
    torch.set_num_threads(1)
    data = load("fashion-mnist")
    graph = trace(donor(job.donor, job.donor_epochs, data, work), data.input_shape)
    if job.mode in SINGLE:
        config, budget = SINGLE[job.mode]
        config = config | {"alpha": alpha(job.task, job.mode)}
    else:
        config, budget = CONFIGS[job.mode], job.budget
    task = parse_task(data.classes, chosen=job.task, seed=job.seed)
    part = view(data, task)
    if job.images:
        x, y = part.splits["train"]
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(job.seed))[: job.images]
        part = replace(part, splits={**part.splits, "train": (x[order], y[order])})
    method = ReengineerMethod(**config, epochs=job.epochs, seed=job.seed, batch_size=BATCH)
    return graph, part, task, method, budget


def searched(job: Job, work: Path) -> Json:
    """Search, fine-tune what may be, then the test split: the result and the restricted donor.

    Beside the file of the result lies the network, to be timed.
    """
    graph, part, task, method, budget = prepared(job, work)
    start = time.perf_counter()
    learned = method.learn(
        graph, part, task=task, budget=Budget.parse(budget), cost=Onnx(batch=16),
        shard=launch(accelerator=ACCELERATOR),
    )  # fmt: skip
    result = method.rebuild(graph, learned.choices, learned.tensors)
    found = {"validation": learned.accuracy, "trained_on": trained_on()}
    restricted = nn.Sequential(graph.module, GroupMax(task.groups))
    if method.tunable:
        recipe = Recipe(epochs=job.epochs, batch_size=BATCH, seed=job.seed)
        if job.scratch:
            found["scratch"] = scratch(result, part, restricted, replace(recipe, epochs=2 * job.epochs))
        result = finetune(result, part, teacher=restricted, recipe=recipe)
        found["validation_tuned"] = accuracy(result, part, "validation")
    kept = [choice for name, choice in learned.choices.items() if name != "channels"]
    found |= {
        "retained": sum(c["kept"] for c in kept) / sum(c["of"] for c in kept),
        "macs": learned.predicted.macs / learned.baseline.macs,
        "controls": dict(learned.controls),
        "front": list(learned.front),
        "test": accuracy(result, part, "test"),
        "test_restricted": accuracy(restricted, part, "test"),
        "seconds": time.perf_counter() - start,
    }
    lower(result, graph.input_shape).save(job.file(work).with_suffix(""))
    write_json(job.file(work), found)
    return found


def controlled(job: Job, work: Path) -> Json:
    """A finished run of single weights, with the controls that it had not."""
    found: Json = json.loads(job.file(work).read_text())
    graph, part, task, method, _ = prepared(job, work)
    fresh = method.searches(graph, len(part.classes), task.groups, part)
    keep = round(found["retained"] * fresh().masked.total)
    heads = with_new_head(fresh, keep, job.epochs, ("validation", "test"))
    same = replace(job, mode="reference", epochs=TUNED).file(work)  # with the same head
    if same.exists():
        tuned = json.loads(same.read_text())["controls"]["fine_tuned"]
    else:
        search = fresh()
        net = fine_tuned(search.headed.model, part, search.settings, TUNED)
        tuned = accuracy(net, part, "validation")
    found["controls"] |= {name: values[0] for name, values in heads.items()}
    found["controls"][f"fine_tuned for {TUNED} epochs"] = tuned
    found["test_controls"] = {name: values[1] for name, values in heads.items()}
    write_json(job.file(work), found)
    return found


def scratch(net: nn.Module, part: Data, teacher: nn.Module, recipe: Recipe) -> Json:
    """Test accuracy of a network of this shape that starts at random, by what it learns from."""
    torch.manual_seed(recipe.seed)
    fresh = copy.deepcopy(net)
    for module in fresh.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    teachers = {"labels alone": None, "labels and the donor": teacher}
    return {
        name: accuracy(finetune(fresh, part, teacher=taught_by, recipe=recipe), part, "test")
        for name, taught_by in teachers.items()
    }


def timed(job: Job, data: Data, work: Path) -> Json:
    """A finished run, with times: measured here, once."""
    path = job.file(work)
    found: Json = json.loads(path.read_text())
    if job.mode in CONFIGS and "ms" not in found:
        whole = trace(donor(job.donor, job.donor_epochs, data, work), data.input_shape)
        programs = lower(whole.module, data.input_shape), Program.load(path.with_suffix(""))
        found["ms"] = latencies(*programs)
        write_json(path, found)
    return found


def failures(jobs: list[Job], work: Path) -> list[Json]:
    """A row for every (donor, task, mode) of which runs have failed."""
    failed = [job for job in jobs if job.error(work).exists()]
    result = []
    for key in sorted({job.key for job in failed}):
        ones = [job for job in failed if job.key == key]
        why = "; ".join(sorted({job.error(work).read_text() for job in ones}))
        of = sum(job.key == key for job in jobs)
        donor_name, task, mode = key
        what = f"{donor_name}, classes {task}, {mode}: runs that failed, of {of}, 0 ({why})"
        result.append(row(what, len(ones), "runs", False))
    return result


def rows(found: dict[Job, Json]) -> list[Json]:
    """Means over the seeds of each (donor, task, mode)."""
    result = []
    for donor_name, task, mode in sorted({job.key for job in found}):
        runs = [r for job, r in found.items() if job.key == (donor_name, task, mode)]
        gain = 100 * statistics.mean(r["test"] - r["test_restricted"] for r in runs)
        how = "fine-tuned" if mode in CONFIGS else f"alpha {alpha(task, mode):g}"
        what = f"{donor_name}, classes {task}, {mode}, {how}, {len(runs)} seed(s)"
        what += "".join(f", trained on {d}" for d in sorted({r["trained_on"] for r in runs} - {""}))
        result.append(
            row(f"{what}: test accuracy minus the restricted donor's, >= 0", gain, "points", gain >= 0)
        )
        result.append(row(f"{what}: test accuracy (no bar)", 100 * mean(runs, "test"), "%"))
        kept = mean(runs, "retained")
        if mode in SINGLE:
            result.append(row(f"{what}: validation accuracy (no bar)", 100 * mean(runs, "validation"), "%"))
            result.append(row(f"{what}: weights kept, <= 15 %", 100 * kept, "%", kept <= 0.15))
        for name in sorted(set.intersection(*(set(r["controls"]) for r in runs))):
            value = 100 * statistics.mean(r["controls"][name] for r in runs)
            where = ", on the CPU" if all(name in r.get("test_controls", ()) for r in runs) else ""
            result.append(row(f"{what}: validation accuracy of {name}{where} (no bar)", value, "%"))
        for name in runs[0].get("test_controls", {}) if all("test_controls" in r for r in runs) else ():
            value = 100 * statistics.mean(r["test_controls"][name] for r in runs)
            result.append(row(f"{what}: test accuracy of {name}, on the CPU (no bar)", value, "%"))
        if mode in CONFIGS:
            macs = mean(runs, "macs")
            result.append(row(f"{what}: multiplications, <= 0.35x", macs, "x", macs <= 0.35))
            for name in runs[0].get("scratch", {}) if all("scratch" in r for r in runs) else ():
                more = 100 * statistics.mean(r["test"] - r["scratch"][name] for r in runs)
                shape = f"{what}: test accuracy above the same shape from scratch, from {name} (no bar)"
                result.append(row(shape, more, "points"))
            for engine in runs[0]["ms"]:
                ratio = statistics.mean(r["ms"][engine][2] / r["ms"][engine][0] for r in runs)
                name, batch = engine.split()
                if engine == "onnx 16":
                    bar = f"{what}: p50 of {name}, batch {batch}, one thread, <= 0.5x"
                    result.append(row(bar, ratio, "x", ratio <= 0.5))
                else:
                    bar = f"{what}: p50 of {name}, batch {batch}, one thread (no bar)"
                    result.append(row(bar, ratio, "x"))
    return result


def mean(runs: list[Json], key: str) -> float:
    return statistics.mean(r[key] for r in runs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--donors", nargs="+", default=list(DONORS), choices=list(DONORS))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--donor-epochs", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--images", type=int, default=0, help="training images of a task; 0: all")
    parser.add_argument("--budget", default="macs<=0.2x", help="of the channel mode")
    parser.add_argument("--scratch", action="store_true", help="shapes of whole channels from scratch too")
    parser.add_argument("--controls", action="store_true", help="of the annealed masks that are finished")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, default=Path("runs/bench_reengineer"))
    parser.add_argument("--search", action="store_true", help="no times, no rows: --finished has them")
    parser.add_argument("--finished", action="store_true", help="rows of the runs that are there")
    options = parser.parse_args()
    data = load("fashion-mnist")
    wanted = product(range(options.seeds), options.donors, options.tasks, options.modes)
    size = (options.epochs, options.donor_epochs, options.images, options.budget)
    jobs = [Job(*key, *size, options.scratch) for key in wanted]
    run = controlled if options.controls else searched
    waits = Job.uncontrolled if options.controls else Job.waits
    waiting = [job for job in jobs if not options.finished and waits(job, options.work)]
    if waiting:
        for name in options.donors:
            donor(name, options.donor_epochs, data, options.work)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.processes, mp_context=context) as pool:
            running = {pool.submit(run, job, options.work): job for job in waiting}
            for future in as_completed(running):
                job, error = running[future], future.exception()  # of one run: the others go on
                if error is None:
                    job.error(options.work).unlink(missing_ok=True)
                    print({k: v for k, v in future.result().items() if k != "front"}, flush=True)
                else:
                    said = str(error).partition("\n")[0]
                    if not options.controls:  # without which the search's result stands
                        job.error(options.work).write_text(f"{type(error).__name__}: {said}")
                    print(job, repr(error), flush=True)
    failed = failures(jobs, options.work)
    if not options.search:
        table(options, data, jobs, failed)
    if failed:
        sys.exit("\n".join(str(one["bar"]) for one in failed))


def table(options: argparse.Namespace, data: Data, jobs: list[Job], failed: list[Json]) -> None:
    """Measure times, and write the rows."""
    torch.set_num_threads(1)
    there = [job for job in jobs if job.file(options.work).exists()]
    found = {job: timed(job, data, options.work) for job in there}
    command = f"python benchmarks/bench_reengineer.py --epochs {options.epochs}"
    command += f" --budget '{options.budget}' --donor-epochs {options.donor_epochs} --seeds {options.seeds}"
    command += " --scratch" if options.scratch else ""
    whole = options.modes == list(MODES)
    if not whole:
        command += f" --modes {' '.join(options.modes)} --tasks {' '.join(options.tasks)}"
    command += f"; {command} --controls" if any("test_controls" in one for one in found.values()) else ""
    write(
        "reengineer" if whole else f"reengineer_{'_'.join(options.modes)}",
        [{"issue": 4, "command": command, **r} for r in [*rows(found), *failed]],
    )


if __name__ == "__main__":
    main()
