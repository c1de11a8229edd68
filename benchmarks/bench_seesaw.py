"""Does a searched network beat random gates, its gates without extra operators, a wide residual network?

A seed is a search of its own, a training of what it found, and of three rivals of that: other gates of as
many DReLUs, the same gates without extra operators, a residual network of as many DReLUs and multiplications.
All four are trained anew by one recipe with the demo network as teacher, so that only what was chosen
differs, and compared on test images. Without --full: a small space, few images and two seeds, to see whether
the script works and which way it points. With it: a small space and part of the training images, so that two
slow cores need about an hour. Times under mpc need an otherwise idle machine and so a run of their own, which
calibrates that machine first.

    python benchmarks/bench_seesaw.py [--full]              # resumes when interrupted
    python benchmarks/bench_seesaw.py [--full] --times      # of the networks found
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import itertools
import json
import multiprocessing
import os
import statistics
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import _wide
from _rows import row, trained_on, write
from _wide import Wide, wide
from tightrope import data as datasets
from tightrope import models, training
from tightrope.choose import freeze
from tightrope.data import Data
from tightrope.evaluate import accuracy
from tightrope.finetune import Recipe, finetune
from tightrope.graph import trace
from tightrope.lower import lower
from tightrope.methods import Learned, Shown
from tightrope.methods.seesaw import SeesawMethod
from tightrope.methods.seesaw.network import assemble
from tightrope.methods.seesaw.space import Architecture, Block, Space
from tightrope.nn import strided
from tightrope.program import base_cost
from tightrope.runtimes import Estimate
from tightrope.runtimes.mpc import MPC
from tightrope.shard import launch
from tightrope.types import Budget, Cost, Measurement, total

Json = dict[str, Any]
SEARCHED = "searched"
BARS = ("random gates", "no extra operators", "wide residual")
NETWORKS = (SEARCHED, *BARS)
ACCELERATOR = "cuda" if torch.cuda.is_available() else "cpu"
SESSIONS, RUNS, WARM_UP = 9, 15, 5  # of one image: some sessions are slow all the time
METHOD_CODE = Path(inspect.getfile(SeesawMethod)).parent


@dataclass(frozen=True)
class Size:
    """How much work: the space, its search, the training of every network, and over how many seeds."""

    data: str
    method: SeesawMethod
    budgets: tuple[int, ...]
    seeds: int
    recipe: Recipe

    @property
    def key(self) -> str:
        """Of the files of a size: results of other settings or of another search are not reused."""
        used = [Path(inspect.getfile(module)) for module in (_wide, strided, training)]
        code = b"".join(path.read_bytes() for path in [*sorted(METHOD_CODE.glob("*.py")), *used])
        return hashlib.sha256(repr(self).encode() + code).hexdigest()[:8]

    @property
    def words(self) -> str:
        images = f"{self.recipe.limit:,}" if self.recipe.limit else "all"
        return f", {self.recipe.epochs:g} epochs of {images} images"


REDUCED = Size(
    "embedded",
    SeesawMethod(space="2,2", width=4, epochs=6, limit=1536, keep=3, branches=2, samples=256, recovery=0),
    (4000, 8000, 14000),
    2,
    Recipe(epochs=2, limit=4000, lr=0.1, ema=0.99),
)
FULL = Size(
    "fashion-mnist",
    SeesawMethod(
        space="2,2,2",
        width=4,
        epochs=4,
        limit=9600,
        keep=3,
        branches=3,
        samples=512,
        recovery=0,
        operators="skip,conv_1,conv_3,sep_conv_3,dil_conv_3,conv_3x1_1x3,conv_7x1_1x7,van_conv_3",
    ),
    (4000, 8000, 14000),
    3,
    Recipe(epochs=5, limit=10000, lr=0.1, ema=0.99),
)


def counts(net: nn.Module, shape: tuple[int, ...]) -> Cost:
    return total(base_cost(op) for op in lower(net.eval(), shape).ops)


def other_gates(space: Space, network: Architecture) -> list[Architecture]:
    """The same operators and pools with every other setting of the gates that has as many comparisons, or
    where there is none, the most below that.
    """
    switches = len(network.blocks) + len(network.aggregates)
    found: dict[float, list[Architecture]] = {}
    for on in itertools.product((False, True), repeat=switches):
        blocks = tuple(replace(b, relu=r) for b, r in zip(network.blocks, on, strict=False))
        gates = on[len(blocks) :]
        tried = replace(
            network,
            blocks=blocks,
            aggregates=tuple(replace(a, relu=r) for a, r in zip(network.aggregates, gates, strict=True)),
        )
        if tried != network and (count := space.drelus(tried)) <= space.drelus(network):
            found.setdefault(count, []).append(tried)
    return found[max(found)] if found else [network]  # there are no others


def random_gates(space: Space, network: Architecture, seed: int) -> Architecture:
    """One of them."""
    others = other_gates(space, network)
    return others[np.random.default_rng(seed).integers(len(others))]


@dataclass(frozen=True)
class Job:
    """One training: of the network searched for `limit` DReLUs, or of one of its rivals."""

    limit: int
    network: str
    seed: int

    def file(self, size: Size, work: Path) -> Path:
        return work / f"{size.key}-{self.limit}-{self.network.replace(' ', '-')}-{self.seed}.json"


def searched(limit: int, seed: int, size: Size, work: Path) -> Learned:
    """What the search of a seed found, kept in files."""
    path = work / f"{size.key}-{limit}-{seed}"
    if not path.with_suffix(".json").exists():
        torch.set_num_threads(1)
        path.mkdir(exist_ok=True)
        data = datasets.load(size.data)
        graph = trace(models.resolve("demo"), data.input_shape)
        learned = replace(size.method, seed=seed).learn(
            graph, data, task=None, budget=Budget.parse(f"drelus<={limit}"), cost=MPC().pricing(),
            workdir=path, shard=launch(accelerator=ACCELERATOR),
        )  # fmt: skip
        save_file({k: v.contiguous() for k, v in learned.tensors.items()}, path.with_suffix(".safetensors"))
        said = {"choices": learned.choices, "predicted": asdict(learned.predicted),
                "rows": learned.shown[0].rows, "accuracy": learned.accuracy}  # fmt: skip
        path.with_suffix(".json").write_text(json.dumps(said))
    said = json.loads(path.with_suffix(".json").read_text())
    return Learned(
        choices=said["choices"],
        tensors=load_file(path.with_suffix(".safetensors")),
        predicted=Cost(**said["predicted"]),
        baseline=Cost(),
        loss=1 - said["accuracy"],
        accuracy=said["accuracy"],
        shown=(Shown(title="", columns=(), rows=tuple(tuple(row) for row in said["rows"])),),
    )


def makers(learned: Learned, size: Size, data: Data) -> dict[str, Callable[[int], nn.Module]]:
    """By name, a network with new weights, of a seed."""
    space = size.method.space_for(data.input_shape, len(data.classes))
    network = Architecture.from_json(learned.choices, space)
    bare = replace(network, blocks=tuple(Block(("conv_3",), b.relu) for b in network.blocks))
    bare_space = replace(space, operators=tuple(dict.fromkeys((*space.operators, "conv_3"))))
    macs, drelus = learned.predicted.macs, learned.predicted.drelus
    size_of = (data.input_shape[1], len(data.classes), len(space.blocks), macs, drelus)
    return {
        SEARCHED: lambda seed: assemble(space, network),
        "random gates": lambda seed: assemble(space, random_gates(space, network, seed)),
        "no extra operators": lambda seed: assemble(bare_space, bare),
        "wide residual": lambda seed: Wide(wide(*size_of), len(data.classes)),
    }


def trained(job: Job, size: Size, work: Path) -> Json:
    """Test accuracy, and what it costs; the weights of a searched network are kept beside."""
    path = job.file(size, work)
    if not path.exists():
        torch.set_num_threads(1)
        data = datasets.load(size.data)
        torch.manual_seed(job.seed)
        net = makers(searched(job.limit, job.seed, size, work), size, data)[job.network](job.seed)
        cost = counts(net, data.input_shape)
        teacher, recipe = models.resolve("demo"), replace(size.recipe, seed=job.seed)
        tuned = finetune(net, data, teacher=teacher, recipe=recipe)
        found = {split: accuracy(tuned, data, split) for split in ("validation", "test")}
        found |= {"drelus": cost.drelus, "macs": cost.macs, "trained_on": trained_on()}
        if job.network == SEARCHED:
            save_file(
                {k: v.contiguous() for k, v in tuned.state_dict().items()}, path.with_suffix(".safetensors")
            )
        path.write_text(json.dumps(found))
    read: Json = json.loads(path.read_text())
    return read


def rows(results: Mapping[Job, Json], size: Size, data: Data, work: Path) -> list[Json]:
    found: list[Json] = []
    for limit in size.budgets:
        for seed in range(size.seeds):
            learned = searched(limit, seed, size, work)
            space = size.method.space_for(data.input_shape, len(data.classes))
            others = other_gates(space, Architecture.from_json(learned.choices, space))
            print(
                f"drelus<={limit}, seed {seed}: {learned.predicted.drelus:,.0f} DReLUs, {len(others)} others"
            )
            print(*(f"  {row}" for row in learned.shown[0].rows), sep="\n", flush=True)
        runs = {name: [results[Job(limit, name, s)] for s in range(size.seeds)] for name in NETWORKS}
        scores = {name: [r["test"] for r in of_name] for name, of_name in runs.items()}
        devices = {r["trained_on"] for of_name in runs.values() for r in of_name} - {""}
        where = "".join(f", trained on {device}" for device in sorted(devices)) + size.words
        for name, values in scores.items():
            drelus = " ".join(f"{n:,.0f}" for n in sorted({r["drelus"] for r in runs[name]}))
            macs = " ".join(f"{n / 1e6:.1f}" for n in sorted({r["macs"] for r in runs[name]}))
            size_of = f"{drelus} DReLUs, {macs} million MACs"
            what = f"drelus<={limit}: {name}, {size_of}"
            mean = 100 * statistics.mean(values)
            found.append(row(f"{what}, test accuracy, mean of {size.seeds} seeds{where}", mean, "%"))
            found.append(row(f"{what}, standard deviation{where}", 100 * _variance(values) ** 0.5, "%"))
        mine = scores.pop(SEARCHED)
        for name, other in scores.items():
            margin = statistics.mean(mine) - statistics.mean(other)
            error = (_variance(mine) + _variance(other)) ** 0.5 / size.seeds**0.5
            holds = margin >= 0.005 or 0 < 2 * error <= margin
            what = f"drelus<={limit}: points above {name} (bar: 0.5, or 2 standard errors){where}"
            found.append(row(what, 100 * margin, "points", holds))
    return found


def timed(size: Size, learned: Mapping[str, Learned], data: Data) -> list[Json]:
    """One image at a time under mpc, on loopback: what its cost model says by the machine's profile, and what
    it takes. Predictions come first; then the networks take turns, as a machine may be slower for minutes.
    """
    profile = MPC().calibrate()
    pricing = MPC().pricing(profile=profile)
    graph = trace(models.resolve("demo"), data.input_shape)
    programs, expected = {}, {}
    for what, one in learned.items():
        model = size.method.rebuild(graph, one.choices, one.tensors)
        programs[what] = freeze(size.method.finish(model, data.input_shape, pricing), data)
        expected[what] = pricing.estimate(programs[what])
    x = next(data.batches("validation", 1))[0].numpy()
    spent: dict[str, list[Measurement]] = {what: [] for what in programs}
    for turn in range(SESSIONS):
        for what in np.random.default_rng(turn).permutation(list(programs)):
            with MPC().open(programs[what], "execute") as session:
                spent[what] += [session.run(x)[1] for _ in range(RUNS)][WARM_UP:]
    found = []
    for what, runs in spent.items():
        median = statistics.median(run.total.online_ms for run in runs)
        off = median / expected[what].total.online_ms - 1
        more = runs[-1].total.drelus - learned[what].predicted.drelus
        found += [
            row(f"{what}: online time under mpc, median of {SESSIONS} sessions", median, "ms"),
            row(f"{what}: above its prediction by (bar: 15 % off)", 100 * off, "%", abs(off) <= 0.15),
            row(f"{what}: executed minus planned DReLUs", more, "DReLUs", more == 0),
        ]
        print(
            what,
            f"{median:.2f} ms, {100 * off:+.1f} %",
            *by_kind(expected[what], runs),
            sep="\n  ",
            flush=True,
        )
    return found


def by_kind(expected: Estimate, runs: list[Measurement]) -> list[str]:
    """Milliseconds by kind of op, predicted and measured, and what no op has."""
    kinds: dict[str, list[float]] = {}
    for k, one in enumerate(runs[0].ops):
        of_kind = kinds.setdefault(one.kind, [0.0, 0.0, 0.0])
        of_kind[0] += 1
        of_kind[1] += expected.ops[one.op].online_ms
        of_kind[2] += statistics.median(run.ops[k].cost.online_ms for run in runs)
    left = statistics.median(r.total.online_ms - sum(o.cost.online_ms for o in r.ops) for r in runs)
    rows = [f"{kind}, {n:g}: {one:.2f} predicted, {seen:.2f}" for kind, (n, one, seen) in kinds.items()]
    return [*rows, f"of no op: {left:.2f}"]


def _variance(values: list[float]) -> float:
    return statistics.variance(values) if len(values) > 1 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="three stages, Fashion-MNIST, three seeds")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, default=Path("runs/bench_seesaw"))
    parser.add_argument("--train", action="store_true", help="no rows: the next run has them")
    parser.add_argument("--times", action="store_true", help="only times, of networks found before")
    options = parser.parse_args()
    size = FULL if options.full else REDUCED
    options.work.mkdir(parents=True, exist_ok=True)
    data = datasets.load(size.data)
    command = "python benchmarks/bench_seesaw.py" + (" --full" if options.full else "")
    name = "seesaw" if options.full else "seesaw_reduced"
    torch.set_num_threads(1)
    if options.times:
        every = itertools.product(size.budgets, range(size.seeds))
        learned = {f"drelus<={n}, search {seed}": searched(n, seed, size, options.work) for n, seed in every}
        found = timed(size, learned, data)
        write(f"{name}_times", [{"issue": 6, "command": f"{command} --times", **r} for r in found])
        return
    context = multiprocessing.get_context("spawn")
    results: dict[Job, Json] = {}
    with ProcessPoolExecutor(options.processes, mp_context=context) as pool:
        order = itertools.product(range(size.seeds), size.budgets)  # a seed of everything before the next
        searches = {pool.submit(searched, n, seed, size, options.work): (n, seed) for seed, n in order}
        waiting = {}
        for search in as_completed(searches):
            limit, seed = searches[search]
            print(limit, seed, search.result().shown[0].rows, flush=True)
            jobs = [Job(limit, network, seed) for network in NETWORKS]
            waiting |= {pool.submit(trained, job, size, options.work): job for job in jobs}
        for future in as_completed(waiting):
            results[waiting[future]] = future.result()
            print(waiting[future], future.result(), flush=True)
    if options.train:
        return
    write(name, [{"issue": 6, "command": command, **r} for r in rows(results, size, data, options.work)])


if __name__ == "__main__":
    main()
