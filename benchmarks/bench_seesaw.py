"""Does a searched network beat random gates, its gates without extra operators, a wide residual network?

All four are trained anew by one recipe with the demo network as teacher, so that only what was chosen
differs, and compared on test images. Without --full: a small space, few images and two seeds, to see whether
the script works and which way it points.

    python benchmarks/bench_seesaw.py [--full]
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from _rows import row, write
from tightrope import data as datasets
from tightrope import models
from tightrope.choose import freeze
from tightrope.data import Data
from tightrope.evaluate import accuracy
from tightrope.finetune import Recipe, finetune
from tightrope.graph import trace
from tightrope.lower import lower
from tightrope.methods import Learned
from tightrope.methods.seesaw import SeesawMethod
from tightrope.methods.seesaw.network import assemble
from tightrope.methods.seesaw.space import Aggregate, Architecture, Block, Space
from tightrope.program import base_cost
from tightrope.runtimes.mpc import MPC
from tightrope.types import Budget, Cost, total

RUNS = 5  # of one image, for the median time
TOLERANCE = 0.10  # of the multiplications and ReLUs of a wide residual network


@dataclass(frozen=True)
class Size:
    """How much work: the space, its search, the training of every network, and over how many seeds."""

    data: str
    method: SeesawMethod
    budgets: tuple[int, ...]
    seeds: int
    recipe: Recipe


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
        space="2,2,2", width=8, epochs=20, limit=16000, keep=4, branches=3, samples=2000, recovery=0
    ),
    (8000, 16000, 32000),
    3,
    Recipe(epochs=8, lr=0.1, ema=0.998),
)


@dataclass(frozen=True)
class Shape:
    """Of a residual network: every stage but the first halves the image and doubles the channels."""

    channels: int
    stages: int
    blocks: int  # of a stage
    kernel: int
    stride: int  # of the stem

    def costs(self, side: int, classes: int) -> tuple[int, int]:
        """ReLUs and multiplications of a grey image."""
        size, width, k2 = -(-side // self.stride), self.channels, self.kernel**2
        relus = width * size**2
        macs = relus * (2 * self.stride + 1) ** 2
        for stage in range(self.stages):
            before = width
            if stage:
                size, width = -(-size // 2), 2 * width
            values = width * size**2
            relus += values * 2 * self.blocks
            macs += values * (k2 * (before + width * (2 * self.blocks - 1)) + before * (stage > 0))
        return relus, macs + width * classes


class Wide(nn.Sequential):
    def __init__(self, shape: Shape, classes: int) -> None:
        width, k = shape.channels, 2 * shape.stride + 1
        layers: list[nn.Module] = [_normed(1, width, k, shape.stride, k // 2), nn.ReLU()]
        for stage in range(shape.stages):
            for block in range(shape.blocks):
                halves = stage > 0 and block == 0
                layers.append(_Residual(width, 2 * width if halves else width, shape.kernel))
                width *= 2 if halves else 1
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def _normed(before: int, after: int, kernel: int, stride: int = 1, padding: int = 0) -> nn.Sequential:
    conv = nn.Conv2d(before, after, kernel, stride, padding, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after))


class _Residual(nn.Module):
    def __init__(self, before: int, after: int, kernel: int) -> None:
        super().__init__()
        stride = after // before
        self.first = _normed(before, after, kernel, stride, kernel // 2)
        self.second = _normed(after, after, kernel, 1, kernel // 2)
        self.shortcut = nn.Identity() if stride == 1 else _normed(before, after, 1, stride)
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act2(self.shortcut(x) + self.second(self.act1(self.first(x))))
        return y


def wide(side: int, classes: int, stages: int, macs: float, drelus: float) -> Shape:
    """Equal to both numbers within the tolerance, and as like the searched network as may be: of as many
    stages, if there is one, then with the smallest kernel, then the nearest. Where no shape is that near, the
    nearest that is over neither number by more than the tolerance.
    """
    best: tuple[tuple[float, ...], Shape] | None = None
    freedom = (range(1, stages + 1), range(1, 7), (3, 5, 7, 9), (1, 2, 4))
    for number, blocks, kernel, stride in itertools.product(*freedom):
        for channels in range(2, 257):
            shape = Shape(channels, number, blocks, kernel, stride)
            ratios = [
                found / given for found, given in zip(shape.costs(side, classes), (drelus, macs), strict=True)
            ]
            if max(ratios) > 1 + TOLERANCE:
                break  # more channels are more of both
            apart = sum(abs(math.log(ratio)) for ratio in ratios)
            equal = min(ratios) >= 1 - TOLERANCE
            rank = (0.0, -number, kernel, apart) if equal else (1.0, apart)
            if best is None or rank < best[0]:
                best = (rank, shape)
    assert best is not None
    return best[1]


def counts(net: nn.Module, shape: tuple[int, ...]) -> Cost:
    return total(base_cost(op) for op in lower(net.eval(), shape).ops)


def random_gates(space: Space, network: Architecture, drelus: float, seed: int) -> Architecture:
    """The same operators and other gates: as many comparisons, in a random order of what is turned on."""
    draw = np.random.default_rng(seed)
    blocks = [Block(b.operators, False) for b in network.blocks]
    aggregates = [Aggregate("avg", False) for _ in network.aggregates]
    for k in draw.permutation(len(blocks) + len(aggregates)):
        tried_blocks, tried = list(blocks), list(aggregates)
        if k < len(blocks):
            tried_blocks[k] = replace(blocks[k], relu=True)
        else:
            tried[k - len(blocks)] = Aggregate("avg", True)
        if space.drelus(Architecture(tuple(tried_blocks), tuple(tried))) <= drelus:
            blocks, aggregates = tried_blocks, tried
    return Architecture(tuple(blocks), tuple(aggregates))


def scores(make, data: Data, teacher: nn.Module, size: Size) -> list[float]:
    """Test accuracy of new weights, by seed."""
    found = []
    for seed in range(size.seeds):
        torch.manual_seed(seed)
        tuned = finetune(make(seed), data, teacher=teacher, recipe=replace(size.recipe, seed=seed))
        found.append(accuracy(tuned, data, "test"))
    return found


def compare(size: Size, command: str) -> list[dict[str, object]]:
    data = datasets.load(size.data)
    teacher = models.resolve("demo")
    graph = trace(teacher, data.input_shape)
    space = size.method.space_for(data.input_shape, len(data.classes))
    rows: list[dict[str, object]] = []
    for limit in size.budgets:
        budget = Budget.parse(f"drelus<={limit}")
        learned = size.method.learn(graph, data, task=None, budget=budget, cost=MPC().pricing())
        network = Architecture.from_json(learned.choices, space)
        drelus = learned.predicted.drelus
        bare = replace(network, blocks=tuple(Block(("conv_3",), b.relu) for b in network.blocks))
        bare_space = replace(space, operators=tuple(dict.fromkeys((*space.operators, "conv_3"))))
        predicted, stages = learned.predicted, len(space.blocks)
        shape = wide(data.input_shape[1], len(data.classes), stages, predicted.macs, predicted.drelus)
        rivals = {
            "random gates": lambda seed, n=network, d=drelus: assemble(
                space, random_gates(space, n, d, seed)
            ),
            "no extra operators": lambda seed, s=bare_space, b=bare: assemble(s, b),
            "wide residual": lambda seed, s=shape: Wide(s, len(data.classes)),
        }
        mine = scores(lambda seed, n=network: assemble(space, n), data, teacher, size)
        print(
            f"{budget}: {drelus:,.0f} DReLUs, {learned.predicted.macs:,.0f} MACs, {_said(mine)}", flush=True
        )
        print(*(f"  {row}" for row in learned.shown[0].rows), sep="\n", flush=True)
        rows.append(_row(size, command, f"accuracy at {budget}", 100 * statistics.mean(mine), "%", None))
        rows += timed(size, learned, data, command, budget)
        for name, make in rivals.items():
            other = scores(make, data, teacher, size)
            cost = counts(make(0), data.input_shape)
            margin = statistics.mean(mine) - statistics.mean(other)
            error = (_variance(mine) + _variance(other)) ** 0.5 / size.seeds**0.5
            print(f"  {name}: {_said(other)}, {cost.drelus:,.0f} DReLUs, {cost.macs:,.0f} MACs", flush=True)
            holds = margin >= 0.005 or 0 < 2 * error <= margin
            bar = f"points above {name} at {budget} (bar: 0.5, or 2 standard errors)"
            rows.append(_row(size, command, bar, 100 * margin, "points", holds))
    return rows


def timed(size: Size, learned: Learned, data: Data, command: str, budget: Budget) -> list[dict[str, object]]:
    """One image at a time under mpc, on loopback: what its cost model says of it, and what it takes."""
    graph = trace(models.resolve("demo"), data.input_shape)
    model = size.method.rebuild(graph, learned.choices, learned.tensors)
    program = freeze(size.method.finish(model, data.input_shape, MPC().pricing()), data)
    predicted = MPC().pricing().estimate(program).total
    x = next(data.batches("validation", 1))[0].numpy()
    times, drelus = [], 0.0
    with MPC().open(program, "execute") as session:
        for _ in range(RUNS):
            _, measured = session.run(x)
            times.append(measured.total.online_ms)
            drelus = measured.total.drelus
    off = abs(statistics.median(times) / predicted.online_ms - 1)
    what = f"online time predicted, off by, at {budget} (bar: 15 %)"
    more = drelus - learned.predicted.drelus
    return [
        _row(size, command, what, 100 * off, "%", off <= 0.15),
        _row(size, command, f"executed minus planned DReLUs at {budget}", more, "", more == 0),
    ]


def _variance(values: list[float]) -> float:
    return statistics.variance(values) if len(values) > 1 else 0.0


def _said(values: list[float]) -> str:
    return " ".join(f"{v:.2%}" for v in values)


def _row(
    size: Size, command: str, bar: str, value: float, unit: str, holds: bool | None
) -> dict[str, object]:
    where = "" if size is FULL else f", reduced: {size.recipe.limit:,} images, {size.seeds} seeds"
    return row(bar + where, value, unit, holds) | {"issue": 6, "command": command}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="full Fashion-MNIST, three seeds")
    full = parser.parse_args().full
    torch.set_num_threads(1)
    command = "python benchmarks/bench_seesaw.py" + (" --full" if full else "")
    write("seesaw" if full else "seesaw_reduced", compare(FULL if full else REDUCED, command))


if __name__ == "__main__":
    main()
