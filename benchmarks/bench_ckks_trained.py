"""A trained polynomial network of a bundle on Fashion-MNIST test images, encrypted, leveled, two processes.

`python benchmarks/bench_ckks_trained.py BUNDLE --images 100`, the bundle of `train_paf.py --network small
--budget 'ckks_levels<=17'`: with fewer images in `--minutes` the rows say how many. Classes are compared with
those of the plain polynomial network; its accuracy on the whole test split, which `train_paf.py` read, with
the ReLU network's.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np
import torch

import _rows
from tightrope.data import load
from tightrope.program import Program
from tightrope.runtimes.ckks import CKKS
from tightrope.runtimes.plain import evaluate

MEMORY_BYTES = 16 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--scale-bits", type=int, default=40)
    asked = parser.parse_args()
    program = Program.load(asked.bundle)
    batches = list(load("fashion-mnist").batches("test", asked.images, limit=asked.images))
    x = torch.cat([images for images, _ in batches])[: asked.images]
    labels = torch.cat([label for _, label in batches])[: asked.images].numpy()
    runtime = CKKS(scale_bits=asked.scale_bits, bootstrap="never", memory_bytes=MEMORY_BYTES, timeout_s=1e5)
    with runtime.open(program, "simulate") as session:
        _, predicted = session.run(x[:2].numpy())
    limit = predicted.config["predicted_error"]
    want, got, elapsed_ms, cpu_ms = evaluate(program, x).numpy(), [], 0.0, 0.0
    with runtime.open(program, "execute") as session:
        end = time.monotonic() + 60 * asked.minutes
        while len(got) < len(x) and time.monotonic() < end:
            y, measured = session.run(x[len(got) : len(got) + runtime.threads].numpy())
            got += list(y)
            elapsed_ms += measured.total.online_ms
            cpu_ms += measured.config["server_cpu_ms"]
            print(f"{len(got)} images, {elapsed_ms / len(got) / 1e3:.1f} s each", flush=True)
        setup_s = session.setup_ms / 1e3
    count = len(got)
    error = float(np.abs(np.stack(got) - want[:count]).max())
    classes = np.stack(got).argmax(-1)
    same = float((classes == want[:count].argmax(-1)).mean())
    memory = measured.peak_memory_bytes + resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    spent = measured.total.ckks_levels - measured.config["levels_planned"]
    seconds = elapsed_ms / count / 1e3
    name = f"trained residual network, {count} encrypted test images"
    found = json.loads((asked.bundle / "accuracy.json").read_text())
    lost = 100 * (found["test_base"] - found["test"])
    rows = [
        _rows.row(
            "trained residual network: points of test accuracy lost <= 1.5", lost, "points", lost <= 1.5
        ),
        _rows.row("trained residual network: test accuracy", 100 * found["test"], "%"),
        _rows.row(f"{name}: same class as plain", same, "share", same >= 0.99),
        _rows.row(f"{name}: seconds per image, elapsed", seconds, "s", seconds <= 60),
        _rows.row(f"{name}: seconds per image, server CPU", cpu_ms / count / 1e3, "s"),
        _rows.row(f"{name}: accuracy", float((classes == labels[:count]).mean()), "share"),
        _rows.row(f"{name}: levels used minus planned", spent, "levels", spent == 0),
        _rows.row(f"{name}: levels", measured.total.ckks_levels, "levels"),
        _rows.row(f"{name}: largest error below the predicted {limit:.1e}", error, "logit", error < limit),
        _rows.row(f"{name}: keys made, sent and read, elapsed", setup_s, "s"),
        _rows.row(f"{name}: peak memory of both processes", memory / 2**30, "GiB", memory < 24 * 2**30),
        _rows.row(f"{name}: predicted over measured memory", predicted.peak_memory_bytes / memory, "x"),
    ]
    command = f"python benchmarks/bench_ckks_trained.py BUNDLE --images {count}"
    _rows.write("ckks_trained", [{"issue": 3, **row, "command": command} for row in rows])
    print(_rows.table([row for row in _rows.read() if row["command"] == command]))


if __name__ == "__main__":
    main()
