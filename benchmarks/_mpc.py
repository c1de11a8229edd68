"""What the benchmarks of mpc share: sessions with their memory watched, plans without training."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from os import getpid
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tightrope import Budget, select
from tightrope.graph import Graph
from tightrope.lower import lower
from tightrope.methods.block_relu import BlockReluMethod
from tightrope.methods.block_relu.patches import label, patches
from tightrope.nn.block_relu import tiles
from tightrope.place import place
from tightrope.program import Program
from tightrope.runtimes.mpc import MPC
from tightrope.runtimes.plain import ranges
from tightrope.solve.select import Selection
from tightrope.types import Cost, Measurement, Problem, Table

GIB = 2**30
SAMPLE_S = 0.25


class Memory:
    """Samples the proportional set size of this process and its children; `peak_bytes` is of their sum."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_S):
            own = getpid()
            family = [own, *(pid for pid in _processes() if _parent(pid) == own)]
            self.peak_bytes = max(self.peak_bytes, sum(_pss_bytes(pid) for pid in family))


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _pss_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


@dataclass(frozen=True)
class Runs:
    """Several runs of one input in one session: medians of the times; everything else is the same each time.

    setup_s: start of the processes, handshake and the weights' frames.
    """

    outputs: NDArray[np.float64]
    last: Measurement
    setup_s: float
    offline_s: float
    online_s: float
    peak_bytes: int

    def online_of(self, op: str) -> Cost:
        return next(trace.cost for trace in self.last.ops if trace.op == op)


def runs(program: Program, config: MPC, x: NDArray[Any], repeats: int) -> Runs:
    """Run x in three processes, `repeats` times after one that warms up (none where repeats is 1)."""
    with Memory() as memory:
        begun = time.perf_counter()
        with config.open(program, "execute") as session:
            setup_s = time.perf_counter() - begun
            if repeats > 1:
                session.run(x)
            found = [session.run(x) for _ in range(repeats)]
    totals = [measured.total for _, measured in found]
    online = [t.online_ms / 1e3 for t in totals]
    offline_s = statistics.median(t.offline_ms for t in totals) / 1e3
    return Runs(*found[-1], setup_s, offline_s, statistics.median(online), memory.peak_bytes)


def planned(graph: Graph, budget: str, seed: int = 0) -> tuple[Graph, Selection]:
    """The network with the block_relu plan that the solver finds for `budget`, max-pools made averages.

    The losses are synthetic, no network was trained: a channel's share of pixels without a sign of their own
    times a log-normal weight. What is measured on such a plan are costs, never accuracy.
    """
    method = BlockReluMethod(max_pool="avg")
    prepared = method.preparation(graph)
    generator = np.random.default_rng(seed)
    tables, drelus = [], 0
    for site in graph.match("*", method.kinds):
        size = (site.shape[1], site.shape[2])
        options = patches(size)
        counts = np.array([tiles(patch, size) for patch in options], np.float64)
        weights = generator.lognormal(sigma=1.0, size=(site.shape[0], 1))
        loss = weights * size[0] * size[1] * (1 - counts / counts.max()) ** 2
        tables.append(Table(site.name, tuple(label(p) for p in options), loss, {"drelus": counts}))
        drelus += int(counts.max()) * site.shape[0]
    problem = Problem(tuple(tables), Cost(), Cost(drelus=drelus), {"prepared": prepared})
    selection = select(problem, Budget.parse(budget))
    return place(graph, method.choices(problem, selection.picked), method.rewrite), selection


def settled(net: torch.nn.Module, shape: Sequence[int], batch: int) -> torch.nn.Module:
    """A network of random weights with the batch-norm statistics of noise, so that values keep their size."""
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the mean over what follows
            module.train()
    with torch.no_grad():
        net(torch.randn(batch, *shape, generator=generator))
    return net.eval()


def calibrated(module: torch.nn.Module, shape: tuple[int, ...], x: torch.Tensor) -> Program:
    return ranges(lower(module, shape), (part[None] for part in x))
