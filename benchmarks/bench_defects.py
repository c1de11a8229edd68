"""Issue 4, bar 5: defects inherited from a donor of six Fashion-MNIST classes by students of the other four.

    python benchmarks/bench_defects.py                     # an hour on one core; `runs/` keeps what is done

Each of the `--donors`, a ResNet-20 of a quarter of the published widths, has never seen the students'
classes, and has students of every seed. These have `--images` training images; no epoch or student is
selected, and the test part is read at the end of each.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from _rows import row, write
from tightrope.data import Data, load, parse_task, view
from tightrope.graph import trace
from tightrope.methods.reengineer.defects import Inherited, Study, study
from tightrope.models.resnet import ResNet

DONOR, STUDENT = "0,2,4,5,6,7", "1,3,8,9"
BAR_RATE, BAR_POINTS = 0.6, -1.0


def train(data: Data, epochs: int, seed: int) -> ResNet:
    """SGD under one cycle."""
    torch.manual_seed(seed)
    net = untrained()
    net.train()
    steps = epochs * -(-data.size("train") // 128)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    for epoch in range(epochs):
        for x, y in data.batches("train", 128, shuffle=True, seed=1000 * seed + epoch):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def untrained() -> ResNet:
    return ResNet(4, ((4, 3, 1), (8, 3, 2), (16, 3, 2)), len(DONOR.split(",")), 1).eval()


def rows(found: list[Inherited], names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Means over the seeds of every student; masked students against standard fine-tuning."""

    def mean(name: str, what: str) -> float:
        return statistics.mean(one.to_dict()[what] for one in found if one.student == name)

    result = []
    for name in names:
        ones = [one for one in found if one.student == name]
        broken, correct = sum(o.broken for o in ones), sum(o.correct for o in ones)
        what = f"{name}, {len(ones)} students"
        robust = 100 * statistics.mean(o.robust / o.images for o in ones)
        result += [
            row(f"{what}: test accuracy (no bar)", 100 * mean(name, "accuracy"), "%"),
            row(f"{what}: defects inherited, {broken} of {correct} (no bar)", 100 * mean(name, "rate"), "%"),
            row(f"{what}: right under the standard attack on itself (no bar)", robust, "%"),
        ]
        if name in ("regrow", "masked", "reinit"):
            rate = mean(name, "rate") / mean("standard", "rate")
            points = 100 * (mean(name, "accuracy") - mean("standard", "accuracy"))
            result += [
                row(f"{what}: defects against standard fine-tuning, <= 0.6x", rate, "x", rate <= BAR_RATE),
                row(f"{what}: accuracy against standard, >= -1", points, "points", points >= BAR_POINTS),
            ]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--donors", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3, help="of the students of each donor")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--donor-epochs", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=30, help="of fine-tuning, for every student")
    parser.add_argument("--test", type=int, default=600, help="test images that are attacked")
    parser.add_argument("--removed", type=float, default=0.6)
    parser.add_argument("--work", type=Path, default=Path("runs/bench_defects"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load("fashion-mnist")
    options.work.mkdir(parents=True, exist_ok=True)
    task = view(data, parse_task(data.classes, chosen=STUDENT))
    x, y = task.splits["train"]
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[: options.images]
    few = replace(task, splits={**task.splits, "train": (x[order], y[order])})
    settings = Study(
        removed=options.removed, epochs=options.epochs, eps=0.1, images=options.test, iterations=20
    )
    known, found = view(data, parse_task(data.classes, chosen=DONOR)), list[Inherited]()
    for d in range(options.donors):
        kept = options.work / f"donor-{options.donor_epochs}-{d}.safetensors"
        if not kept.exists():
            save_file(train(known, options.donor_epochs, d).state_dict(), kept)
        donor = untrained()
        donor.load_state_dict(load_file(kept))
        for seed in range(options.seeds):
            size = f"{options.donor_epochs}-{options.images}-{options.epochs}-{options.test}"
            path = options.work / f"{d}-{seed}-{size}-{options.removed}.json"
            if not path.exists():
                ones = study(
                    trace(donor, data.input_shape), few, replace(settings, seed=seed), lambda *_: None
                )
                path.write_text(json.dumps([asdict(one) for one in ones]))
            found += [Inherited(**one) for one in json.loads(path.read_text())]
            print(path, *(one.to_dict() for one in found[-len(settings.names) :]), sep="\n", flush=True)
    command = f"python benchmarks/bench_defects.py --seeds {options.seeds} --removed {options.removed}"
    command += f" --donors {options.donors} --images {options.images} --donor-epochs {options.donor_epochs}"
    command += f" --epochs {options.epochs} --test {options.test}"
    made = [{"issue": 4, "command": command, **r} for r in rows(found, settings.names)]
    write("reengineer_defects", made)


if __name__ == "__main__":
    main()
