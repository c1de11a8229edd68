"""Residual networks of the CIFAR shape: a 3x3 stem, stages of basic blocks, global average pooling."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, figure 2); one ReLU module, called twice.

    The shortcut is a 1x1 convolution with batch-norm where the shape changes (their option B), since the
    padded identity of option A is not a layer that a Program has.
    """

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        out: Tensor = self.relu(y + self.shortcut(x))
        return out


class ResNet(nn.Module):
    """A stem of `stem` channels at full resolution, then one stage per entry of `stages`.

    A stage is (width, blocks, stride of its first block).
    Input (N, in_channels, H, W), output (N, num_classes).
    """

    def __init__(
        self, stem: int, stages: tuple[tuple[int, int, int], ...], num_classes: int, in_channels: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU()
        widths = (stem, *(width for width, _, _ in stages))
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    BasicBlock(before, width, stride),
                    *(BasicBlock(width, width, 1) for _ in range(blocks - 1)),
                )
                for (before, _), (width, blocks, stride) in zip(pairwise(widths), stages, strict=True)
            )
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.fc(torch.flatten(self.pool(x), 1))
        return logits


def cifar_resnet(blocks: int, num_classes: int, in_channels: int) -> ResNet:
    """ResNet-(6*blocks+2) with widths 16, 32, 64 (He et al. 2016, section 4.2)."""
    return ResNet(16, ((16, blocks, 1), (32, blocks, 2), (64, blocks, 2)), num_classes, in_channels)


def resnet18(num_classes: int, in_channels: int) -> ResNet:
    """ResNet-18 with the CIFAR stem: widths 64 to 512, two blocks each, no max-pooling."""
    return ResNet(64, ((64, 2, 1), (128, 2, 2), (256, 2, 2), (512, 2, 2)), num_classes, in_channels)


def demo_shape(num_classes: int, in_channels: int) -> ResNet:
    """The embedded network's shape: 37,632 ReLUs at 28x28, since private inference pays per ReLU."""
    return ResNet(16, ((32, 1, 2), (64, 1, 2), (64, 1, 1)), num_classes, in_channels)
