"""VGG with batch-norm in the CIFAR shape: 3x3 convolutions, five max-poolings, one linear layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

DEPTHS = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}  # Simonyan & Zisserman 2015, table 1, columns D and E
WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Input (N, in_channels, H, W) with H, W >= 32, output (N, num_classes). `depth` is 16 or 19."""

    def __init__(self, depth: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = in_channels
        for width, convolutions in zip(WIDTHS, DEPTHS[depth], strict=True):
            for _ in range(convolutions):
                layers += [nn.Conv2d(before, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                before = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(WIDTHS[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.flatten(self.pool(self.features(x)), 1))
        return logits
