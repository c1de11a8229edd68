"""Issue 4, bars 1 and 2: what a task needs of a donor trained on Fashion-MNIST, against all fair donors.

    python benchmarks/bench_reengineer.py                  # days on one core; resumable, one file per run
    python benchmarks/bench_reengineer.py --donors resnet20 --tasks 3 --seeds 1 --donor-epochs 1 \
        --epochs 5 --limit 20000 --pilot                   # minutes; writes no rows

Every run of (donor, task, mode, seed) is one JSON file under --work. Validation data select; the test split
is read once per finished run. The donor of a seed is trained first and shared by its runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from _rows import row, write
from tightrope import models
from tightrope.data import Data, load, parse_task, view
from tightrope.evaluate import accuracy
from tightrope.graph import Graph, trace
from tightrope.lower import lower
from tightrope.methods.reengineer import ReengineerMethod
from tightrope.nn.group_max import GroupMax
from tightrope.runtimes.onnx import Onnx
from tightrope.runtimes.plain import Plain
from tightrope.types import Budget

TASKS = ("3", "6", "8", "0,2,4,6", "5,7,9")
MODES: dict[str, tuple[dict[str, Any], str]] = {
    "reference": (
        {
            "mode": "reference",
            "granularity": "weight",
            "head": "relu_linear",
            "lr_head": 0.1,
            "lr_mask": 0.05,
        },
        "weights<=1x",
    ),
    "weight": ({"granularity": "weight"}, "weights<=0.15x"),
    "hybrid": ({"granularity": "hybrid"}, "macs<=0.35x"),
}
SEEDS_STRIDE = 1000
REPEATS, WARM_UP, BATCH = 50, 10, 16


def quarter_vgg() -> nn.Module:
    """VGG-16 with batch-norm and a quarter of its channels, on 28x28 images padded to 32x32."""
    layers: list[nn.Module] = [nn.ZeroPad2d(2)]
    before = 1
    for width, count in zip((16, 32, 64, 128, 128), (2, 2, 3, 3, 3), strict=True):
        for _ in range(count):
            layers += [nn.Conv2d(before, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


DONORS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": lambda: models.resolve("resnet20", num_classes=10, in_channels=1),
    "vgg16_quarter": quarter_vgg,
}


def donor(name: str, seed: int, epochs: int, limit: int | None, data: Data, work: Path) -> nn.Module:
    """SGD under one cycle; the weights of a finished training are read again."""
    path = work / f"{name}-{seed}-{epochs}-{limit}.safetensors"
    torch.manual_seed(seed)
    net = DONORS[name]()
    if not path.exists():
        images = min(data.size("train"), limit or data.size("train"))
        steps = epochs * -(-images // 128)
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
        net.train()
        for epoch in range(epochs):
            shuffled = seed * SEEDS_STRIDE + epoch
            for x, y in data.batches("train", 128, shuffle=True, seed=shuffled, augment=True, limit=limit):
                optimizer.zero_grad()
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
                schedule.step()
        work.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in net.state_dict().items()}, path)
    net.load_state_dict(load_file(path))
    return net.eval()


def latency(first: Graph, second: Graph) -> tuple[float, float]:
    """Median milliseconds of ONNX Runtime, one thread, batch 16, the two networks taking turns."""
    x = np.random.default_rng(0).standard_normal((BATCH, *first.input_shape))
    sessions = [Onnx().open(lower(g.module, g.input_shape)) for g in (first, second)]
    times: list[list[float]] = [[], []]
    for k in range(WARM_UP + REPEATS):
        for session, found in zip(sessions, times, strict=True):
            ms = session.run(x)[1].total.online_ms
            if k >= WARM_UP:
                found.append(ms)
    return statistics.median(times[0]), statistics.median(times[1])


def one(graph: Graph, data: Data, task_text: str, mode: str, seed: int, epochs: int) -> dict[str, Any]:
    """Search, then the test split: the result and the restricted donor."""
    config, budget = MODES[mode]
    task = parse_task(data.classes, chosen=task_text, seed=seed)
    part = view(data, task)
    method = ReengineerMethod(**config, epochs=epochs, seed=seed)
    start = time.process_time()
    learned = method.learn(
        graph,
        part,
        task=task,
        budget=Budget.parse(budget),
        cost=Plain(),
        progress=lambda *a: print(*a, flush=True),
    )
    cpu_s = time.process_time() - start
    kept = [choice for name, choice in learned.choices.items() if name != "channels"]
    result = method.rebuild(graph, learned.choices, learned.tensors)
    before, after = latency(graph, trace(result, graph.input_shape))
    return {
        "retained": sum(c["kept"] for c in kept) / sum(c["of"] for c in kept),
        "macs": learned.predicted.macs / learned.baseline.macs,
        "weights": learned.predicted.weights / learned.baseline.weights,
        "validation": learned.accuracy,
        "controls": dict(learned.controls),
        "front": list(learned.front),
        "test": accuracy(result, part, "test"),
        "test_restricted": accuracy(nn.Sequential(graph.module, GroupMax(task.groups)), part, "test"),
        "onnx_ms": [before, after],
        "cpu_s": cpu_s,
    }


def rows(found: dict[tuple[str, str, str, int], dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds of each (donor, task, mode)."""
    result = []
    for donor_name, task, mode in sorted({key[:3] for key in found}):
        runs = [r for key, r in found.items() if key[:3] == (donor_name, task, mode)]
        kept = statistics.mean(r["retained"] for r in runs)
        gain = 100 * statistics.mean(r["test"] - r["test_restricted"] for r in runs)
        what = f"{donor_name}, classes {task}, {mode}, {len(runs)} seeds"
        result += [
            row(f"{what}: weights kept, <= 15 %", 100 * kept, "%", mode == "hybrid" or kept <= 0.15),
            row(f"{what}: test accuracy minus the restricted donor's, >= 0", gain, "points", gain >= 0),
        ]
        for name in runs[0]["controls"]:
            mean = 100 * statistics.mean(r["controls"][name] for r in runs)
            result.append(row(f"{what}: validation accuracy of {name} (no bar)", mean, "%"))
        if mode == "hybrid":
            macs = statistics.mean(r["macs"] for r in runs)
            ratio = statistics.mean(r["onnx_ms"][1] / r["onnx_ms"][0] for r in runs)
            result += [
                row(f"{what}: multiplications, <= 0.35x", macs, "x", macs <= 0.35),
                row(f"{what}: ONNX Runtime, batch 16, one thread, <= 0.5x", ratio, "x", ratio <= 0.5),
            ]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--donors", nargs="+", default=list(DONORS), choices=list(DONORS))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--donor-epochs", type=int, default=15)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--limit", type=int, help="training images per epoch of the donor")
    parser.add_argument("--work", type=Path, default=Path("runs/bench_reengineer"))
    parser.add_argument("--pilot", action="store_true", help="write no rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load("fashion-mnist")
    found = {}
    for name in options.donors:
        for seed in range(options.seeds):
            net = donor(name, seed, options.donor_epochs, options.limit, data, options.work)
            graph = trace(net, data.input_shape)
            for task in options.tasks:
                for mode in options.modes:
                    epochs = options.epochs
                    path = options.work / f"{name}-{task}-{mode}-{seed}-{options.donor_epochs}-{epochs}.json"
                    if not path.exists():
                        path.write_text(json.dumps(one(graph, data, task, mode, seed, epochs)))
                    found[name, task, mode, seed] = json.loads(path.read_text())
                    print(path.name, found[name, task, mode, seed], flush=True)
    if not options.pilot:
        command = f"python benchmarks/bench_reengineer.py --seeds {options.seeds} --epochs {options.epochs}"
        write("reengineer", [{"issue": 4, "command": command, **r} for r in rows(found)])


if __name__ == "__main__":
    main()
