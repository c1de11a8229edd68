"""Issue 1, bar 4: search, rewrite, lower and run networks we did not write; plain against torch.

    python benchmarks/bench_networks.py

Random weights, 64x64 colour images made from the embedded ones. torch runs in float32 and in float64: a patch
whose sum is near zero may change sign by rounding, so the bar is on float64 and both are shown.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from _rows import row, write
from tightrope import models, pipeline
from tightrope.data import load
from tightrope.runtimes.plain import Plain

NETWORKS = ("torchvision:resnet18", "torchvision:mobilenet_v2", "torchvision:densenet121", "timm:regnetx_002")
SIZE = 64
BAR = 1e-4
COMMAND = "python benchmarks/bench_networks.py"


def colour_images(root: Path) -> Path:
    source = load("embedded")
    images, labels = next(source.batches("train", 200, limit=200))
    generator = torch.Generator().manual_seed(0)
    for k, (image, label) in enumerate(zip(images, labels, strict=True)):
        tint = torch.rand(3, 1, 1, generator=generator)
        grey = (image - image.min()) / (image.max() - image.min()) * 255
        pixels = (grey * tint).permute(1, 2, 0).numpy().astype(np.uint8)
        path = root / source.classes[int(label)].replace("/", "-") / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((SIZE, SIZE)).save(path)
    return root


def random_weights(spec: str, classes: int, path: Path) -> Path:
    """All weights random: timm starts residual branches at zero, where no ReLU has any influence."""
    torch.manual_seed(0)
    model = models.resolve(spec, num_classes=classes, in_channels=3)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return path


def main() -> None:
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as name:
        images = colour_images(Path(name) / "images")
        for spec in NETWORKS:
            weights = random_weights(spec, len(list(images.iterdir())), Path(name) / "weights.safetensors")
            bundle = pipeline.search(
                model=spec,
                weights=weights,
                data=str(images),
                image_size=SIZE,
                budget="drelus<=12%",
                out=Path(name) / "bundle",
                config={"samples": 32, "verify": 0, "batch_size": 16, "max_pool": "avg"},
            )
            plan = bundle.plan()
            model = pipeline.apply_plan(bundle)
            program = bundle.program()
            x = next(bundle.data().batches("validation", 16, limit=16))[0]
            outputs, measured = Plain().open(program).run(x.numpy())
            with torch.no_grad():
                single = model(x).double().numpy()
                double = copy.deepcopy(model).double()(x.double()).numpy()
            scale = max(1.0, float(np.abs(double).max()))
            error = float(np.abs(outputs - double).max()) / scale
            rounded = float(np.abs(outputs - single).max()) / scale
            extra = measured.total.drelus / len(x) - plan.predicted.drelus
            unit = "relative to the largest logit"
            what = f"{spec} at {SIZE}x{SIZE}, 12 %"
            rows += [
                row(f"{what}: plain equals torch float64 within 1e-4", error, unit, error <= BAR),
                row(f"{what}: difference from torch float32 (no bar)", rounded, unit),
                row(f"{what}: DReLUs executed minus planned", extra, "DReLUs", extra == 0),
            ]
            print(spec, error, rounded, plan.predicted.drelus, flush=True)
    write("networks", [{"issue": 1, "command": COMMAND, **found} for found in rows])


if __name__ == "__main__":
    main()
