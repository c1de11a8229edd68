"""Networks trained on Fashion-MNIST, of which tasks need a part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from tightrope import models
from tightrope.data import Data

ACCELERATOR = "cuda" if torch.cuda.is_available() else "cpu"
BATCH = 128


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


def donor(name: str, epochs: int, data: Data, work: Path) -> nn.Module:
    """SGD under one cycle; the weights of a finished training are read again."""
    path = work / f"{name}-{epochs}.safetensors"
    torch.manual_seed(0)
    net = DONORS[name]()
    if not path.exists():
        steps = epochs * -(-data.size("train") // BATCH)
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
        net.to(ACCELERATOR, memory_format=torch.channels_last).train()
        for epoch in range(epochs):
            for x, y in data.batches("train", BATCH, shuffle=True, seed=epoch, augment=True):
                optimizer.zero_grad()
                x, y = x.to(ACCELERATOR, memory_format=torch.channels_last), y.to(ACCELERATOR)
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
                schedule.step()
        work.mkdir(parents=True, exist_ok=True)
        save_file({k: v.cpu().contiguous() for k, v in net.state_dict().items()}, path)
    net = DONORS[name]()
    net.load_state_dict(load_file(path))
    return net.eval()
