"""Solvers of staged problems on the published BINAS space: exact against exact, and against two heuristics.

    python benchmarks/bench_staged.py [synthetic|onnx|openvino ...]       about a minute each

Costs: MACs of every block times log-normal noise of 10 %, read as milliseconds (synthetic), or a table that
bench_latency.py has measured. Gains rise with the square root of the cost, times noise of 40 %; the dense
problem adds a normal term for every pair of an option and a depth. Times are CPU seconds of one process.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

import _rows
from tightrope.methods.binas.counts import count_tables
from tightrope.methods.binas.latency import load
from tightrope.methods.binas.space import PRESETS
from tightrope.solve import evolution, frank_wolfe, pareto, staged_milp
from tightrope.solve.staged import Stage, Staged
from tightrope.types import FloatArray

COMMAND = "python benchmarks/bench_staged.py"
LIMITS, SAMPLED = 50, 5
SPACE, TABLES = PRESETS["imagenet"], Path(__file__).parent / "tables"
Result = TypeVar("Result")


def synthetic(generator: np.random.Generator) -> tuple[float, list[FloatArray]]:
    """(fixed, per stage (B, K)) in ms."""
    macs = count_tables(SPACE)["macs"]
    counted = [
        np.stack([macs[s, b] for b in range(stage.depths[-1])]) for s, stage in enumerate(SPACE.stages)
    ]
    return 5.0, [c * 1e-7 * generator.lognormal(0, 0.1, c.shape) for c in counted]


def measured(device: str) -> tuple[float, list[FloatArray]]:
    fixed, prices = load(TABLES / f"imagenet-{device}.json", SPACE).priced(SPACE)
    stages = enumerate(SPACE.stages)
    return fixed, [np.stack([prices[s, b] for b in range(stage.depths[-1])]) for s, stage in stages]


def problem(generator: np.random.Generator, costs: tuple[float, list[FloatArray]]) -> Staged:
    stages = []
    for stage, cost in zip(SPACE.stages, costs[1], strict=True):
        gain = 0.3 * np.sqrt(cost / cost.max()) * generator.lognormal(0, 0.4, cost.shape)
        stages.append(Stage(stage.depths, gain, np.sort(generator.uniform(0, 0.3, 3)), cost[None]))
    return Staged(tuple(stages), ("online_ms",), (np.inf,), (costs[0],), 70.0)


def seconds(work: Callable[[], Result]) -> tuple[Result, float]:
    start = time.process_time()
    return work(), time.process_time() - start


def rows_of(name: str, costs: tuple[float, list[FloatArray]], generator: np.random.Generator) -> list[Any]:
    """Of one table of costs."""
    plain = problem(generator, costs)
    pareto.frontier(plain)
    line, frontier_s = seconds(lambda: pareto.frontier(plain))
    limits = np.linspace(line.cost[0], line.cost[-1], LIMITS + 2)[1:-1]
    apart, slowest, over = 0.0, 0.0, 0
    short: dict[str, list[float]] = {"evolution": [], "bcfw": []}
    for k, limit in enumerate(limits):
        limited = replace(plain, limits=(float(limit),))
        best = line.best(float(limit))
        other, taken = seconds(lambda p=limited: staged_milp.solve(p))
        apart, slowest = max(apart, abs(best.gain - other.gain), other.gap), max(slowest, taken)
        answers = [best, other]
        if k % (LIMITS // SAMPLED) == SAMPLED:
            for heuristic, solver in (("evolution", evolution.solve), ("bcfw", frank_wolfe.solve)):
                answers.append(solver(limited))
                short[heuristic].append(best.gain - answers[-1].gain)
        over += sum(not limited.fits(answer.choice) for answer in answers)
    pair = generator.normal(0, 0.02, (plain.blocks * plain.options, 15))
    dense = replace(plain, pair=pair)
    dense_line, dense_s = seconds(lambda: pareto.frontier(dense))
    dense_apart, highs_s, gap = 0.0, 0.0, 0.0
    for limit in limits[:: LIMITS // SAMPLED]:
        limited = replace(dense, limits=(float(limit),))
        highs, taken = seconds(lambda p=limited: staged_milp.solve(p))
        dense_apart = max(dense_apart, abs(highs.gain - dense_line.best(float(limit)).gain))
        highs_s, gap = max(highs_s, taken), max(gap, highs.gap)
        over += not limited.fits(highs.choice)
    within = dense_apart < 1e-6 and gap < 1e-6
    rows = [
        _rows.row(
            f"{name}: MILP and frontier apart at 50 limits, gap included: at most 1e-6",
            apart,
            "points",
            apart < 1e-6,
        ),
        _rows.row(f"{name}: the whole frontier: at most 1 s", frontier_s, "s", frontier_s <= 1),
        _rows.row(f"{name}: slowest MILP of 50", slowest, "s"),
        _rows.row(f"{name}: dense bilinear, the whole frontier: at most 10 s", dense_s, "s", dense_s <= 10),
        _rows.row(
            f"{name}: dense bilinear by HiGHS (iqcp), slowest of {SAMPLED}: at most 10 s",
            highs_s,
            "s",
            highs_s <= 10,
        ),
        _rows.row(
            f"{name}: dense: HiGHS and frontier apart, gap: at most 1e-6",
            max(dense_apart, gap),
            "points",
            within,
        ),
        _rows.row(f"{name}: answers over their limit: none", over, "answers", over == 0),
    ]
    for heuristic, gains in short.items():
        bar = f"{name}: {heuristic} behind the optimum, mean of {len(gains)} limits: never ahead"
        rows.append(_rows.row(bar, float(np.mean(gains)), "points", min(gains) >= -1e-9))
    return rows


def main() -> None:
    for name in sys.argv[1:] or ["synthetic", "onnx", "openvino"]:
        generator = np.random.default_rng(0)
        if name == "synthetic":
            rows = rows_of(name, synthetic(generator), generator)
        else:
            rows = rows_of(f"{name}, measured", measured(name), generator)
        _rows.write(f"staged_{name}", [r | {"issue": 5, "command": COMMAND} for r in rows])
    print(_rows.table([r for r in _rows.read() if r["command"] == COMMAND]))


if __name__ == "__main__":
    main()
