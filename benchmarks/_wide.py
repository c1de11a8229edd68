"""A residual network of as many multiplications and ReLUs as another, the rival in `bench_seesaw.py`."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from torch import Tensor, nn

TOLERANCE = 0.10  # of both


@dataclass(frozen=True)
class Shape:
    """Of a residual network: every stage but the first halves the image and doubles the channels."""

    channels: int
    stages: int
    blocks: int  # of a stage
    kernel: int
    stride: int  # of the stem

    def costs(self, side: int, classes: int) -> tuple[int, int]:
        """ReLUs and multiplications of a grey image."""
        size, width, k2 = -(-side // self.stride), self.channels, self.kernel**2
        relus = width * size**2
        macs = relus * (2 * self.stride + 1) ** 2
        for stage in range(self.stages):
            before = width
            if stage:
                size, width = -(-size // 2), 2 * width
            values = width * size**2
            relus += values * 2 * self.blocks
            macs += values * (k2 * (before + width * (2 * self.blocks - 1)) + before * (stage > 0))
        return relus, macs + width * classes


class Wide(nn.Sequential):
    def __init__(self, shape: Shape, classes: int) -> None:
        width, k = shape.channels, 2 * shape.stride + 1
        layers: list[nn.Module] = [_normed(1, width, k, shape.stride, k // 2), nn.ReLU()]
        for stage in range(shape.stages):
            for block in range(shape.blocks):
                halves = stage > 0 and block == 0
                layers.append(_Residual(width, 2 * width if halves else width, shape.kernel))
                width *= 2 if halves else 1
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def _normed(before: int, after: int, kernel: int, stride: int = 1, padding: int = 0) -> nn.Sequential:
    conv = nn.Conv2d(before, after, kernel, stride, padding, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after))


class _Residual(nn.Module):
    def __init__(self, before: int, after: int, kernel: int) -> None:
        super().__init__()
        stride = after // before
        self.first = _normed(before, after, kernel, stride, kernel // 2)
        self.second = _normed(after, after, kernel, 1, kernel // 2)
        self.shortcut = nn.Identity() if stride == 1 else _normed(before, after, 1, stride)
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act2(self.shortcut(x) + self.second(self.act1(self.first(x))))
        return y


def wide(side: int, classes: int, stages: int, macs: float, drelus: float) -> Shape:
    """Equal to both numbers within the tolerance, and as like the searched network as may be: of as many
    stages, if there is one, then with the smallest kernel, then the nearest. Where no shape is that near, the
    nearest that is over neither number by more than the tolerance.
    """
    best: tuple[tuple[float, ...], Shape] | None = None
    freedom = (range(1, stages + 1), range(1, 7), (3, 5, 7, 9), (1, 2, 4))
    for number, blocks, kernel, stride in itertools.product(*freedom):
        for channels in range(2, 257):
            shape = Shape(channels, number, blocks, kernel, stride)
            ratios = [
                found / given for found, given in zip(shape.costs(side, classes), (drelus, macs), strict=True)
            ]
            if max(ratios) > 1 + TOLERANCE:
                break  # more channels are more of both
            apart = sum(abs(math.log(ratio)) for ratio in ratios)
            equal = min(ratios) >= 1 - TOLERANCE
            rank = (0.0, -number, kernel, apart) if equal else (1.0, apart)
            if best is None or rank < best[0]:
                best = (rank, shape)
    assert best is not None
    return best[1]
