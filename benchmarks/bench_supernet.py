"""Issue 5: what a step of one-shot training costs in the `fashion` space, and what evaluating networks costs.

    OMP_WAIT_POLICY=passive python benchmarks/bench_supernet.py      # about a minute on one core

CPU time of one thread, so that other load changes little; the least of several runs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from _rows import row, write
from tightrope.methods.binas import resolve
from tightrope.methods.binas.bank import Bank
from tightrope.methods.binas.oneshot import heaviest_network
from tightrope.methods.binas.paths import random_paths
from tightrope.methods.binas.supernet import Supernet
from tightrope.nn.depthwise import quicken


def least_ms(run: Callable[[], object], repeats: int) -> float:
    """CPU time; the first run is not counted."""
    run()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return 1000 * min(times)


def step(net: nn.Module, x: torch.Tensor, y: torch.Tensor, bf16: bool = False) -> Callable[[], None]:
    net = net.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs = net(x)
        optimizer.zero_grad()
        cross_entropy(outputs.float(), y).backward()
        optimizer.step()

    return run


def quick(net: nn.Module) -> nn.Module:
    quicken(net)
    return net


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=128)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    space = resolve("fashion")
    n, repeats = options.batch_size, options.repeats
    x = torch.randn(n, *space.input_shape).to(memory_format=torch.channels_last)
    y = torch.randint(0, space.classes, (n,))
    steps = {
        "heaviest network, torch's depthwise gradients": step(heaviest_network(space), x, y),
        "heaviest network": step(quick(heaviest_network(space)), x, y),
        "heaviest network, bf16": step(heaviest_network(space), x, y, bf16=True),
        "supernet, norms per path": step(quick(Supernet(space, "path")), x, y),
        "supernet, shared norms": step(quick(Supernet(space, "shared")), x, y),
        "supernet, norms per path, bf16": step(Supernet(space, "path"), x, y, bf16=True),
    }
    rows = [
        row(f"training step of {n} images, {name} (no bar)", least_ms(run, repeats), "ms of CPU")
        for name, run in steps.items()
    ]
    images = 1000
    x = torch.randn(images, *space.input_shape).to(memory_format=torch.channels_last)
    supernet = Supernet(space).eval()
    bank, paths = Bank(supernet), random_paths(space, images)
    ways: dict[str, Callable[[], object]] = {
        "grouped by option": lambda: bank.mixed(paths, x),
        "masked at full width": lambda: supernet(x, paths),
        "one network, the largest": lambda: bank.one(space.largest(), x),
        "one network, the smallest": lambda: bank.one(space.smallest(), x),
    }
    with torch.inference_mode():
        rows += [
            row(f"evaluating {images} images, {name} (no bar)", least_ms(run, repeats), "ms of CPU")
            for name, run in ways.items()
        ]
    command = "OMP_WAIT_POLICY=passive python benchmarks/bench_supernet.py"
    for one in rows:
        print(f"{one['value']:9.1f} {one['unit']}  {one['bar']}")
    write("supernet", [{**one, "issue": 5, "command": command} for one in rows])


if __name__ == "__main__":
    main()
