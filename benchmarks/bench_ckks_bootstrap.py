"""A network of ResNet-20's shape on a 28x28 image, encrypted, with real bootstrapping, two processes.

Quadratic activations; random weights with batch-norm statistics of Fashion-MNIST images: levels, bootstraps,
memory, time and noise do not depend on training. `--refresh-levels N` sets the levels after a bootstrap.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time

import numpy as np
import torch
from torch import nn

import _rows
from tightrope.data import load
from tightrope.lower import lower
from tightrope.models import resolve
from tightrope.nn import PolynomialActivation
from tightrope.program import Program
from tightrope.runtimes.ckks import CKKS
from tightrope.runtimes.plain import evaluate, ranges

QUADRATIC = [[0.1, 0.5, 0.05]]  # a larger square explodes on the shortcuts, which no batch-norm tames


def quadratic(model: nn.Module) -> nn.Module:
    """Every ReLU replaced; one module may serve several calls, since the polynomial has no state."""
    for name, child in model.named_children():
        if isinstance(child, nn.ReLU):
            setattr(model, name, PolynomialActivation(QUADRATIC, gated=False))
        else:
            quadratic(child)
    return model


def network() -> tuple[Program, torch.Tensor]:
    torch.manual_seed(0)
    model = quadratic(resolve("resnet20", num_classes=10, in_channels=1)).train()
    x = next(iter(load("embedded").batches("train", 128)))[0]
    with torch.no_grad():
        for _ in range(40):
            model(x)
    return ranges(lower(model.eval(), (1, 28, 28)), [x]), x[:1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--refresh-levels", type=int, default=0)
    levels = parser.parse_args().refresh_levels
    program, x = network()
    runtime = CKKS(bootstrap="always", refresh_levels=levels, threads=1, memory_bytes=20 << 30, timeout_s=1e5)
    with runtime.open(program, "simulate") as session:
        _, predicted = session.run(x.numpy())
    limit = predicted.config["predicted_error"]
    print(f"simulated: error at most {limit:.2g}", predicted.config, flush=True)
    start = time.monotonic()
    with runtime.open(program, "execute") as session:
        setup_s = time.monotonic() - start
        print(f"keys after {setup_s:.0f} s", file=sys.stderr, flush=True)
        y, measured = session.run(x.numpy())
    for op in measured.ops:
        if op.cost.online_ms:
            print(f"{op.op:40} {op.cost.online_ms / 1e3:8.1f} s", file=sys.stderr)
    want = evaluate(program, x).numpy()
    error = float(np.abs(y - want).max())
    client = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    maker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    server = measured.peak_memory_bytes
    memory = client + max(server, maker)
    config = measured.config
    spent = config["bootstraps"] - config["bootstraps_planned"]
    minutes = measured.total.online_ms / 6e4
    name = f"ResNet-20 shape, bootstraps to {config['levels']} levels"
    rows = [
        _rows.row(f"{name}: bootstraps per image", config["bootstraps"], "bootstraps"),
        _rows.row(f"{name}: bootstraps used minus planned", spent, "bootstraps", spent == 0),
        _rows.row(f"{name}: minutes per image, elapsed", minutes, "min", minutes <= 30),
        _rows.row(f"{name}: minutes per image, server CPU", config["server_cpu_ms"] / 6e4, "min"),
        _rows.row(f"{name}: minutes for the keys, elapsed", setup_s / 60, "min"),
        _rows.row(f"{name}: peak memory", memory / 2**30, "GiB", memory <= 20 * 2**30),
        _rows.row(f"{name}: predicted over measured memory", predicted.peak_memory_bytes / memory, "x"),
        _rows.row(
            f"{name}: predicted over server CPU milliseconds",
            predicted.total.online_ms / config["server_cpu_ms"],
            "x",
        ),
        _rows.row(f"{name}: largest error below the predicted {limit:.1e}", error, "logit", error < limit),
        _rows.row(f"{name}: largest logit", float(np.abs(want).max()), "logit"),
        _rows.row(f"{name}: same class as plain", float((y.argmax() == want.argmax()).mean()), "share"),
    ]
    command = f"python benchmarks/bench_ckks_bootstrap.py --refresh-levels {levels}"
    _rows.write("ckks_bootstrap", [{"issue": 3, **row, "command": command} for row in rows])
    print(_rows.table([row for row in _rows.read() if row["command"] == command]))


if __name__ == "__main__":
    main()
