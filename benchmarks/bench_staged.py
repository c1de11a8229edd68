"""Solvers of staged problems on the published BINAS space: exact against exact, and against two heuristics.

    python benchmarks/bench_staged.py            about two minutes

Costs: MACs of every block times log-normal noise of 10 %, read as milliseconds (synthetic, not measured).
Gains rise with the square root of the cost, times noise of 40 %; the dense problem adds a normal term for
every pair of an option and a depth. Times are CPU seconds of one process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import numpy as np

import _rows
from tightrope.methods.binas.counts import count_tables
from tightrope.methods.binas.space import PRESETS
from tightrope.solve import evolution, frank_wolfe, pareto, staged_milp
from tightrope.solve.staged import Stage, Staged

COMMAND = "python benchmarks/bench_staged.py"
LIMITS, SAMPLED = 50, 5
Result = TypeVar("Result")


def problem(generator: np.random.Generator) -> Staged:
    space = PRESETS["imagenet"]
    macs = count_tables(space)["macs"]
    stages = []
    for s, stage in enumerate(space.stages):
        counted = np.stack([macs[s, b] for b in range(stage.depths[-1])])
        cost = counted * 1e-7 * generator.lognormal(0, 0.1, counted.shape)
        gain = 0.3 * np.sqrt(cost / cost.max()) * generator.lognormal(0, 0.4, cost.shape)
        stages.append(Stage(stage.depths, gain, np.sort(generator.uniform(0, 0.3, 3)), cost[None]))
    return Staged(tuple(stages), ("latency_ms",), (np.inf,), (5.0,), 70.0)


def seconds(work: Callable[[], Result]) -> tuple[Result, float]:
    start = time.process_time()
    return work(), time.process_time() - start


def main() -> None:
    generator = np.random.default_rng(0)
    plain = problem(generator)
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
            for name, solver in (("evolution", evolution.solve), ("bcfw", frank_wolfe.solve)):
                answers.append(solver(limited))
                short[name].append(best.gain - answers[-1].gain)
        over += sum(not limited.fits(answer.choice) for answer in answers)
    pair = generator.normal(0, 0.02, (plain.blocks * plain.options, 15))
    dense = replace(plain, pair=pair)
    dense_line, dense_s = seconds(lambda: pareto.frontier(dense))
    middle = replace(dense, limits=(float(limits[LIMITS // 4]),))
    highs, highs_s = seconds(lambda: staged_milp.solve(middle))
    dense_apart = abs(highs.gain - dense_line.best(middle.limits[0]).gain)
    same, pairs_same = apart < 1e-6, dense_apart < 1e-6
    rows = [
        _rows.row("MILP and frontier apart at 50 limits, gap included: at most 1e-6", apart, "points", same),
        _rows.row("the whole frontier: at most 1 s", frontier_s, "s", frontier_s <= 1),
        _rows.row("slowest MILP of 50", slowest, "s"),
        _rows.row("dense bilinear, the whole frontier: at most 10 s", dense_s, "s", dense_s <= 10),
        _rows.row("dense bilinear by HiGHS (iqcp), one limit: at most 10 s", highs_s, "s", highs_s <= 10),
        _rows.row("dense: HiGHS and frontier apart: at most 1e-6", dense_apart, "points", pairs_same),
        _rows.row("answers over their limit: none", over, "answers", over == 0),
    ]
    for name, gains in short.items():
        bar = f"{name} behind the optimum, mean of {len(gains)} limits: never ahead"
        rows.append(_rows.row(bar, float(np.mean(gains)), "points", min(gains) >= -1e-9))
    _rows.write("staged", [r | {"issue": 5, "command": COMMAND} for r in rows])
    print(_rows.table([r for r in _rows.read() if r["command"] == COMMAND]))


if __name__ == "__main__":
    main()
