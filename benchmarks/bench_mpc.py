"""Issue 2: what one conv + ReLU layer and whole networks cost in the mpc runtime, and how often it is right.

    python benchmarks/bench_mpc.py [layer] [resnet18] [resnet50] [accuracy] [lite0 --packages SITE_PACKAGES]

Three processes on this machine over TLS; times are medians over runs of one session after a first one,
offline and online one after the other. Each part writes `results/mpc_PART.json`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from _lite0 import NEEDED, lite0, photographs
from _mpc import GIB, Runs, calibrated, planned, runs, settled
from _rows import row, write
from tightrope import models, trace
from tightrope.data import load
from tightrope.program import Program
from tightrope.runtimes.mpc import MPC, fit
from tightrope.runtimes.plain import Plain

Rows = list[dict[str, object]]
REPEATS = 5
IMAGES = 2000
BATCH = 50
TRIM_BITS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    choices, shown = [*PARTS, []], f"default: {', '.join(PARTS)}"
    parser.add_argument("parts", nargs="*", choices=choices, metavar="part", help=shown)
    parser.add_argument("--packages", type=Path, help="site-packages with weights and photographs for lite0")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for part in options.parts or PARTS:
        rows = PARTS[part](options.packages)
        for found in rows:
            print(f"{found['bar']}: {found['value']} {found['unit']}", flush=True)
        command = f"python benchmarks/bench_mpc.py {part}"
        write(f"mpc_{part}", [{"issue": 2, "command": command, **found} for found in rows])


def phases(what: str, measured: Runs) -> Rows:
    """Everything without a bar."""
    total = measured.last.total
    return [
        row(f"{what}: online bytes", total.online_bytes, "bytes"),
        row(f"{what}: offline bytes (material)", total.offline_bytes, "bytes"),
        row(f"{what}: bytes of the weights, once", sum(measured.last.setup_links.values()), "bytes"),
        row(f"{what}: rounds", total.rounds, "rounds"),
        row(f"{what}: DReLUs", total.drelus, "DReLUs"),
        row(f"{what}: start, handshake and weights, once", round(measured.setup_s, 2), "s"),
        row(f"{what}: offline phase", round(measured.offline_s, 3), "s"),
        row(f"{what}: online phase", round(measured.online_s, 3), "s"),
        row(f"{what}: memory of all processes together, peak", round(measured.peak_bytes / GIB, 2), "GiB"),
    ]


def layer(_: Path | None) -> Rows:
    """Bytes, with frame headers, and rounds of one conv + ReLU in a network, as the parties count them."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 8, 1),
    ).eval()  # fmt: skip
    shape = (16, 32, 32)
    x = torch.randn(16, *shape)
    graph = trace(net, shape)
    rows = []
    for what, module in (("all", graph.module), ("10 % of the", planned(graph, "drelus<=10%")[0].module)):
        program = calibrated(module, shape, x)
        conv, relu = program.ops[2], program.ops[3]
        small, _error = fit(program, MPC(ring_bits=32), x[:2].double().numpy())
        for config in (MPC(), small):
            measured = runs(program, config, x[:1].double().numpy(), 1)
            cost = measured.online_of(conv.name) + measured.online_of(relu.name)
            per_value = (cost.online_bytes - cost.drelus / 4) / int(np.prod(relu.shape))
            limit = 24 * config.ring_bits / 64
            name = f"conv + ReLU, {config.ring_bits}-bit ring, {what} DReLUs"
            bar = f"{name}: online bytes a value beside 2 bits a patch <= {limit:g}"
            rows += [
                row(bar, round(per_value, 3), "bytes", per_value <= limit),
                row(f"{name}: rounds <= 3", cost.rounds, "rounds", cost.rounds <= 3),
            ]
    return rows


def resnet18(_: Path | None) -> Rows:
    """CIFAR shape, random weights, one image."""
    torch.manual_seed(0)
    shape = (3, 32, 32)
    net = settled(models.resolve("resnet18", num_classes=10, in_channels=3), shape, 128)
    x = torch.randn(32, *shape)
    graph = trace(net, shape)
    rows = []
    for what, module, limit_s in (
        ("all ReLUs", graph.module, 2.0),
        ("6 % of the DReLUs", planned(graph, "drelus<=6%")[0].module, 1.0),
    ):
        program = calibrated(module, shape, x)
        measured = runs(program, MPC(), x[:1].double().numpy(), REPEATS)
        name = f"ResNet-18 (CIFAR), one image, {what}"
        online_s = measured.online_s
        rows += [row(f"{name}: online <= {limit_s:g} s", round(online_s, 3), "s", online_s <= limit_s)]
        rows += [*error(name, program, measured, x[:1]), *phases(name, measured)]
    return rows


def error(what: str, program: Program, measured: Runs, x: torch.Tensor) -> Rows:
    plain, _ = Plain().open(program).run(x.double().numpy())
    largest = float(np.abs(measured.outputs - plain).max())
    return [row(f"{what}: largest difference of a logit to plain (noise 2^-8 included)", largest, "logits")]


def resnet50(_: Path | None) -> Rows:
    """ImageNet shape, torchvision's random weights, a plan of synthetic losses, average for max pool."""
    torch.manual_seed(0)
    shape = (3, 224, 224)
    x = torch.randn(4, *shape)
    net = models.resolve("torchvision:resnet50").eval()
    graph, selection = planned(trace(net, shape), "drelus<=6%")
    program = calibrated(settled(graph.module, shape, 4), shape, x)
    del net, graph
    measured = runs(program, MPC(), x[:1].double().numpy(), 3)
    name = "ResNet-50 (224x224), one image, 6 % of the DReLUs"
    peak_gib, online = measured.peak_bytes / GIB, measured.last.total.online_bytes
    extra = measured.last.total.drelus - selection.cost.drelus
    return [
        row(f"{name}: memory of all processes together <= 12 GiB", round(peak_gib, 2), "GiB", peak_gib <= 12),
        row(f"{name}: online bytes <= 0.30 GB", online, "bytes", online <= 0.30e9),
        row(f"{name}: DReLUs executed minus planned", extra, "DReLUs", extra == 0),
        *error(name, program, measured, x[:1]),
        *phases(name, measured),
    ]


def lite0_part(packages: Path | None) -> Rows:
    """Real ImageNet weights on a photograph; the ranges are from other photographs."""
    if packages is None:
        raise SystemExit("lite0 needs --packages: " + NEEDED)
    net, shape = lite0(packages), (3, 224, 224)
    x, others, names = photographs(packages)
    program = calibrated(trace(net, shape).module, shape, others)
    plain, _ = Plain().open(program).run(x.double().numpy())
    rows = []
    for what, config in (("all bits", MPC()), (f"{TRIM_BITS} low bits trimmed", MPC(trim_bits=TRIM_BITS))):
        measured = runs(program, config, x[:1].double().numpy(), 2)
        name = f"EfficientNet-Lite0 (224x224), {names[0]}, {what}"
        largest = float(np.abs(measured.outputs - plain[:1]).max())
        same = bool(measured.outputs.argmax() == plain[0].argmax())
        rows += [
            row(f"{name}: online <= 20 s", round(measured.online_s, 2), "s", measured.online_s <= 20),
            row(f"{name}: largest logit error < 0.05", largest, "logits", largest < 0.05),
            row(f"{name}: same top-1 class as plain", int(same), "images", same),
            *phases(name, measured),
        ]
    return rows


def accuracy(_: Path | None) -> Rows:
    """The demo network with all its ReLUs on test images of Fashion-MNIST, by which nothing is chosen."""
    data = load("fashion-mnist")
    shape = data.input_shape
    seen = next(data.batches("train", 512, shuffle=True, limit=512))[0]
    program = calibrated(trace(models.resolve("demo"), shape).module, shape, seen)
    x = torch.cat([batch for batch, _ in data.batches("test", 500, limit=IMAGES)])[:IMAGES].double().numpy()
    plain, _ = Plain().open(program).run(x)
    with MPC().open(program, "execute") as session:
        secure = np.concatenate([session.run(x[k : k + BATCH])[0] for k in range(0, len(x), BATCH)])
    share = float((secure.argmax(1) == plain.argmax(1)).mean())
    largest = float(np.abs(secure - plain).max())
    name = f"{len(x)} Fashion-MNIST test images, no sign trimmed away"
    return [
        row(f"{name}: same top-1 class as plain >= 99.5 %", 100 * share, "%", share >= 0.995),
        row(f"{name}: largest difference of a logit", largest, "logits"),
    ]


PARTS: Mapping[str, Callable[[Path | None], Rows]] = {
    "layer": layer,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "lite0": lite0_part,
    "accuracy": accuracy,
}

if __name__ == "__main__":
    main()
