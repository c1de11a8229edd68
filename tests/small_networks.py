"""Small random networks that between them use every op of the mpc runtime, lowered and calibrated."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tightrope.lower import lower
from tightrope.nn import BlockReLU, PolynomialActivation
from tightrope.program import Program
from tightrope.runtimes.plain import ranges


class Residual(nn.Module):
    """A downsampling basic block: wide shortcut, then an identity shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, 1, 1)
        self.conv1, self.conv2 = nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, 1, 1)
        self.short = nn.Conv2d(4, 6, 1, 2)
        self.conv3 = nn.Conv2d(6, 6, 3, 1, 1)
        self.norm = nn.BatchNorm2d(6)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        x = self.relu(self.norm(self.conv2(self.relu(self.conv1(x)))) + self.short(x))
        x = self.relu(self.conv3(x) + x)
        return self.fc(x.mean((2, 3)))


class Dense(nn.Module):
    """DenseNet order (norm, ReLU, conv, concat) with a pooled transition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, 1, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 + 3 * k) for k in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(4 + 3 * k, 3, 3, 1, 1) for k in range(3))
        self.transition = nn.Conv2d(13, 6, 1)
        self.head = nn.Sequential(
            nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            parts.append(conv(torch.relu(norm(torch.cat(parts, 1)))))
        x = self.transition(torch.cat(parts, 1))
        return self.head(nn.functional.avg_pool2d(x, 2))


class Branches(nn.Module):
    """Branches of different scale and multiplier: 3x3 average pool, depthwise, dilated, strided, padded."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 6, 3, 1, 1), nn.ReLU6())
        self.deep = nn.Conv2d(6, 6, 3, 1, 1, groups=6)
        self.wide = nn.Conv2d(6, 4, 3, 1, 2, dilation=2, groups=2)
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.pad = nn.ZeroPad2d((1, 0, 2, 1))
        self.tail = nn.Sequential(
            nn.Conv2d(16, 4, 3, 2), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 1)
        )
        self.fc = nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([self.pool(x), self.deep(x), self.wide(x)], 1)
        return self.fc(self.tail(self.pad(x)))


def mixed_patches(channels: int) -> list[tuple[int, int]]:
    options = [(1, 1), (2, 2), (3, 2), (0, 0), (1, 4), (9, 9)]
    return [options[c % len(options)] for c in range(channels)]


class Patches(nn.Module):
    """Patches of several sizes with partial tiles and identity channels; all-identity; clipped patches."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 6, 3, 1, 1),
            BlockReLU(mixed_patches(6)),
            nn.Conv2d(6, 6, 3, 1, 1),
            BlockReLU([(0, 0)] * 6),
            nn.Conv2d(6, 7, 3, 1, 1),
            BlockReLU(mixed_patches(7), upper=1.0),
            nn.AvgPool2d(3, 2, 1),
            BlockReLU(mixed_patches(7)),
        )
        self.fc = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.fc(x.mean((2, 3)))


class WholeMaps(nn.Module):
    """Patches as large as the map, whose sums need more bits than the values; a residual; a max-pool."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1, self.conv2 = (nn.Conv2d(n, 4, 3, 1, 1) for n in (2, 4, 4))
        for conv in (self.stem, self.conv1, self.conv2):
            nn.init.normal_(conv.bias, std=6.0)
        self.acts = nn.ModuleList(BlockReLU([(7, 9), (1, 1), (4, 9), (0, 0)]) for _ in range(3))
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.acts[0](self.stem(x))
        x = self.acts[2](self.conv2(self.acts[1](self.conv1(x))) + x)
        return self.fc(self.pool(x).mean((2, 3)))


class Pools(nn.Module):
    """Max-pools: on untruncated and on truncated values, overlapping, dilated, padded, ragged, of one tap."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 4, 3, 1, 1),
            nn.MaxPool2d(3, 1, 1),
            nn.ReLU(),
            nn.MaxPool2d((3, 2), (2, 1), (1, 0), (1, 2), ceil_mode=True),
            nn.Conv2d(4, 4, 1),
            nn.MaxPool2d((1, 3), 2, ceil_mode=True),
            nn.MaxPool2d(1),
        )
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean((2, 3)))


class Squeeze(nn.Module):
    """MobileNetV3 order: hard-swish, squeeze-and-excitation; products of two maps; bilinear enlarging."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 6, 3, 2, 1), nn.Hardswish())
        self.deep = nn.Sequential(nn.Conv2d(6, 6, 3, 1, 1, groups=6), nn.BatchNorm2d(6), nn.Hardswish())
        self.reduce, self.expand = nn.Conv2d(6, 3, 1), nn.Conv2d(3, 6, 1)
        self.project = nn.Conv2d(6, 6, 1)
        self.grow = nn.Upsample(scale_factor=(2, 3), mode="bilinear")
        self.head = nn.Sequential(nn.Conv2d(6, 4, 3, 2), nn.AvgPool2d(3, 2), nn.Hardswish())
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.deep(x)
        squeezed = nn.functional.hardsigmoid(self.expand(torch.relu(self.reduce(y.mean((2, 3), True)))))
        x = x + self.project(y * squeezed)
        x = self.grow(x * nn.functional.hardsigmoid(x))
        return self.fc(self.head(x).mean((2, 3)))


SIGN = [[0, 2.076171875, 0, -1.3271484375], [0, 1.5, 0, -0.5]]


class Polynomials(nn.Module):
    """A composite ReLU, a quadratic per channel, on averages of nine, on a residual and on a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 4, 3, 1, 1),
            PolynomialActivation.relu(SIGN, scale=4.0),
            nn.Conv2d(4, 4, 3, 2, 1),
            PolynomialActivation(torch.randn(1, 4, 3), gated=False),
            nn.AvgPool2d(3, 1, 1),
            PolynomialActivation.relu([SIGN[0]], scale=8.0),
        )
        self.conv = nn.Conv2d(4, 4, 1)
        self.act = PolynomialActivation.relu([SIGN[1]], scale=12.0)
        self.fc = nn.Sequential(nn.Linear(4, 5), PolynomialActivation([[0.25, 0.5]], gated=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.fc(self.act(self.conv(x) + x).mean((2, 3)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "residual": Residual,
    "dense": Dense,
    "branches": Branches,
    "patches": Patches,
    "whole maps": WholeMaps,
    "pools": Pools,
    "squeeze": Squeeze,
    "polynomials": Polynomials,
}
INPUT = (2, 7, 9)


def images(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, *INPUT, generator=torch.Generator().manual_seed(seed))


def network(name: str, seed: int = 0) -> Program:
    """A lowered network with random weights, batch-norm statistics and ranges from 64 random inputs."""
    torch.manual_seed(seed)
    model = NETWORKS[name]()
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(images(64))
    return ranges(lower(model.eval(), INPUT), [images(64)])
