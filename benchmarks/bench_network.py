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
from dataclasses import replace

import torch

from _rows import row, write
from tightrope import models
from tightrope.choose import freeze
from tightrope.data import load
from tightrope.graph import trace
from tightrope.place import place
from tightrope.runtimes.mpc import MPC
from tightrope.runtimes.mpc.timing import SHIPPED

ISSUE, COMMAND = 2, "python benchmarks/bench_network.py"
BAR = 0.15
RUNS = 25  # two parties now and then share a core for a while, which takes up to 1.8 times as long
CASES = [("lan", 1), ("wan", 1), ("1e8,5", 1), ("lan", 4), ("wan", 4), ("loopback", 1), ("loopback", 16)]


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
    rows = []
    for network, batch in CASES:
        here = replace(config, network=network)
        expected = here.pricing(profile=profile).estimate(program, batch).total
        spent = []
        with here.open(program, "execute") as session:
            session.run(images[:batch])
            for _ in range(RUNS):
                spent.append(session.run(images[:batch])[1].total)
        counted = ("online_bytes", "offline_bytes", "rounds")
        same = all(getattr(s, m) == getattr(expected, m) for s in spent for m in counted)
        name = f"{network}, batch of {batch}"
        rows.append(row(f"{name}: bytes and rounds as predicted", float(same), "1 = equal", same))
        for phase in ("online", "offline"):
            want = getattr(expected, f"{phase}_ms")
            seen = statistics.median(getattr(s, f"{phase}_ms") for s in spent)
            gap = abs(want - seen) / seen
            rows.append(row(f"{name}: {phase} time, median of {RUNS}", round(seen, 2), "ms"))
            rows.append(row(f"{name}: {phase} time predicted", round(want, 2), "ms"))
            rows.append(row(f"{name}: {phase} prediction off by <= 15 %", round(gap, 4), "1", gap <= BAR))
            print(f"{name}: {phase} {want:.1f} ms predicted, {seen:.1f} measured, {gap:.1%} off", flush=True)
    print(write("network", [r | {"issue": ISSUE, "command": COMMAND} for r in rows]))


if __name__ == "__main__":
    main()
