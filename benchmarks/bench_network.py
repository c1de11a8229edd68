"""Predicted against measured times on loopback, lan and wan, links shaped: embedded network, three processes.

    OMP_WAIT_POLICY=passive python benchmarks/bench_network.py [--ship]

The machine is calibrated first, in the same run; with --ship that profile becomes the one in the package
(on an idle machine only). Predictions are made before anything is measured. On a machine that does other
things too a single run says little: every value is the median of RUNS.
"""

from __future__ import annotations

import json
import statistics
import sys
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch

from _rows import row, write
from tightrope import models
from tightrope.choose import freeze
from tightrope.data import load
from tightrope.graph import trace
from tightrope.place import place
from tightrope.program import Program
from tightrope.runtimes.mpc import MPC
from tightrope.runtimes.mpc.timing import SHIPPED
from tightrope.types import Cost

ISSUE, COMMAND = 2, "python benchmarks/bench_network.py"
BAR = 0.15
RUNS, TURNS = 25, 5  # two parties now and then share a core for a while, which takes up to 1.8 times as long
CASES = [("lan", 1), ("wan", 1), ("1e8,5", 1), ("lan", 4), ("wan", 4), ("loopback", 1), ("loopback", 16)]


def measured(config: MPC, program: Program, images: np.ndarray) -> dict[tuple[str, int], list[Cost]]:
    """The totals of every run, all cases taking turns: a machine may be slower for minutes."""
    with ExitStack() as stack:
        sessions = {
            network: stack.enter_context(replace(config, network=network).open(program, "execute"))
            for network in dict(CASES)
        }
        spent: dict[tuple[str, int], list[Cost]] = {case: [] for case in CASES}
        for _ in range(TURNS):
            for network, batch in CASES:
                sessions[network].run(images[:batch])
                runs = [sessions[network].run(images[:batch])[1].total for _ in range(RUNS // TURNS)]
                spent[network, batch] += runs
        return spent


def main() -> None:
    torch.set_num_threads(1)
    data = load("embedded")
    graph = trace(models.resolve("demo"), data.input_shape)
    program = freeze(place(graph, {}, lambda site, module, choice: module).module, data)
    images = torch.cat([x for x, _ in data.batches("validation", 16, limit=16)]).numpy()
    config = MPC()
    profile = config.calibrate(lambda what, done, of: print(f"calibrating: {what} {done}/{of}", flush=True))
    if "--ship" in sys.argv[1:]:
        SHIPPED.write_text(json.dumps(profile, indent=1) + "\n")
    expected = {
        (network, batch): replace(config, network=network)
        .pricing(profile=profile)
        .estimate(program, batch)
        .total
        for network, batch in CASES
    }
    rows = []
    for (network, batch), seen in measured(config, program, images).items():
        want = expected[network, batch]
        counted = ("online_bytes", "offline_bytes", "rounds")
        same = all(getattr(s, m) == getattr(want, m) for s in seen for m in counted)
        name = f"{network}, batch of {batch}"
        rows.append(row(f"{name}: bytes and rounds as predicted", float(same), "1 = equal", same))
        for phase in ("online", "offline"):
            predicted = getattr(want, f"{phase}_ms")
            ms = statistics.median(getattr(s, f"{phase}_ms") for s in seen)
            gap = abs(predicted - ms) / ms
            rows.append(row(f"{name}: {phase} time, median of {len(seen)}", round(ms, 2), "ms"))
            rows.append(row(f"{name}: {phase} time predicted", round(predicted, 2), "ms"))
            rows.append(row(f"{name}: {phase} prediction off by <= 15 %", round(gap, 4), "1", gap <= BAR))
            print(
                f"{name}: {phase} {predicted:.1f} ms predicted, {ms:.1f} measured, {gap:.1%} off", flush=True
            )
    print(write("network", [r | {"issue": ISSUE, "command": COMMAND} for r in rows]))


if __name__ == "__main__":
    main()
