"""Encrypted inference of small polynomial networks on 28x28 images, end to end, two processes.

Two convolutions (8 and 16 channels, stride 2) and a classifier, with quadratic activations (N = 2^14) or
ReLUs of degree f1 o g2 (N = 2^15). Random weights: time, levels and error do not depend on training.
"""

from __future__ import annotations

import resource

import numpy as np
import torch
from torch import nn

import _rows
from tightrope.data import load
from tightrope.lower import lower
from tightrope.nn import PolynomialActivation
from tightrope.runtimes.ckks import CKKS
from tightrope.runtimes.plain import evaluate, ranges

G2 = [0, 3334 / 1024, 0, -6108 / 1024, 0, 3796 / 1024]
F1 = [0, 1.5, 0, -0.5]
ACTIVATIONS = {
    "quadratic": lambda: PolynomialActivation([[0.2, 0.5, 0.2]], gated=False),
    "f1 o g2": lambda: PolynomialActivation.relu([G2, F1], scale=6.0),
}
IMAGES = 4


def measure(name: str) -> list[dict[str, object]]:
    torch.manual_seed(0)
    act = ACTIVATIONS[name]
    net = nn.Sequential(
        nn.Conv2d(1, 8, 5, 2, 2), act(), nn.Conv2d(8, 16, 3, 2, 1), act(), nn.Flatten(), nn.Linear(784, 10)
    )
    x = next(iter(load("embedded").batches("train", 64)))[0]
    program = ranges(lower(net.eval(), (1, 28, 28)), [x])
    runtime = CKKS(threads=1)
    with runtime.open(program, "simulate") as session:
        _, predicted = session.run(x[:1].numpy())
    with runtime.open(program, "execute") as session:
        session.run(x[:1].numpy())  # the library fills its caches
        y, measured = session.run(x[:IMAGES].numpy())
        setup_ms = session.setup_ms
    error = float(np.abs(y - evaluate(program, x[:IMAGES]).numpy()).max())
    client = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    memory = measured.peak_memory_bytes + client
    cpu_ms = measured.config["server_cpu_ms"] / IMAGES
    limit = predicted.config["predicted_error"]
    levels = measured.config["levels_planned"] - measured.total.ckks_levels
    return [
        _rows.row(f"{name}: seconds per image, elapsed", measured.total.online_ms / IMAGES / 1e3, "s"),
        _rows.row(f"{name}: seconds per image, server CPU", cpu_ms / 1e3, "s"),
        _rows.row(f"{name}: predicted over server CPU milliseconds", predicted.total.online_ms / cpu_ms, "x"),
        _rows.row(f"{name}: keys made, sent and read, elapsed", setup_ms / 1e3, "s"),
        _rows.row(f"{name}: levels planned minus used", levels, "levels", levels == 0),
        _rows.row(f"{name}: largest error below the predicted {limit:.1e}", error, "logit", error < limit),
        _rows.row(f"{name}: peak memory of both processes", memory / 1e9, "GB", memory < 1.1e10),
        _rows.row(f"{name}: predicted over measured memory", predicted.peak_memory_bytes / memory, "x"),
    ]


if __name__ == "__main__":
    made = [row for name in ACTIVATIONS for row in measure(name)]
    command = "python benchmarks/bench_ckks.py"
    _rows.write("ckks", [{"issue": 3, **row, "command": command} for row in made])
    print(_rows.table([row for row in _rows.read() if row["command"] == command]))
