"""The algebra of convolutions: one after another, or several of one input added, as one convolution.

Everything here is exact, borders included, or refused. Weights are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tightrope.program import Conv2d

Pair = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """A convolution without its weights; dilation is written out. `constant`: whether it adds one."""

    inputs: int
    outputs: int
    kernel: Pair
    stride: Pair
    padding: Pair
    depthwise: bool
    constant: bool

    def size(self, size: Pair) -> Pair:
        """(H, W) of the output for that of the input."""
        sides = zip(size, self.padding, self.kernel, self.stride, strict=True)
        h, w = ((n + 2 * p - k) // s + 1 for n, p, k, s in sides)
        return (h, w)

    def op(self, size: Pair) -> Conv2d:
        """What a Program would hold, for pricing; `size` (H, W) of the output."""
        (rows, columns), groups = self.padding, self.inputs if self.depthwise else 1
        return Conv2d(
            name="merged", inputs=("input",), shape=(self.outputs, *size), kernel=self.kernel,
            stride=self.stride, padding=(columns, columns, rows, rows), groups=groups,
            in_channels=self.inputs,
        )  # fmt: skip


@dataclass(frozen=True)
class Map:
    """Weight (outputs, inputs or 1, *kernel) and bias (outputs,)."""

    geometry: Geometry
    weight: Tensor
    bias: Tensor

    def module(self) -> nn.Conv2d:
        g = self.geometry
        conv = nn.Conv2d(
            g.inputs, g.outputs, g.kernel, g.stride, g.padding, groups=g.inputs if g.depthwise else 1
        ).double()
        with torch.no_grad():
            conv.weight.copy_(self.weight)
            conv.bias.copy_(self.bias)  # type: ignore[union-attr]
        return conv


def geometry(conv: nn.Conv2d) -> Geometry | None:
    """None for what is not written with one padding a side of zeros."""
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return None
    spread = [d * (k - 1) + 1 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    return Geometry(
        conv.in_channels,
        conv.out_channels,
        (spread[0], spread[1]),
        (conv.stride[0], conv.stride[1]),
        (conv.padding[0], conv.padding[1]),
        conv.groups == conv.in_channels == conv.out_channels,
        conv.bias is not None and bool((conv.bias != 0).any()),
    )


def unit(channels: int) -> Map:
    """The identity."""
    shape = Geometry(channels, channels, (1, 1), (1, 1), (0, 0), True, False)
    ones = torch.ones(channels, 1, 1, 1, dtype=torch.float64)
    return Map(shape, ones, torch.zeros(channels, dtype=torch.float64))


def averaging(pool: nn.AvgPool2d, channels: int) -> Map | None:
    """The average pool as a convolution, where it divides by the same number everywhere."""
    (kh, kw), (sh, sw), (ph, pw) = (
        (v, v) if isinstance(v, int) else v for v in (pool.kernel_size, pool.stride, pool.padding)
    )
    if (pool.count_include_pad or (ph, pw) == (0, 0)) and not pool.ceil_mode and not pool.divisor_override:
        shape = Geometry(channels, channels, (kh, kw), (sh, sw), (ph, pw), True, False)
        weight = torch.full((channels, 1, kh, kw), 1 / (kh * kw), dtype=torch.float64)
        return Map(shape, weight, torch.zeros(channels, dtype=torch.float64))
    return None


def convolution(conv: nn.Conv2d) -> Map | None:
    """A module's map, its groups and dilation written out."""
    shape = geometry(conv)
    if shape is None:
        return None
    weight = conv.weight.detach().double()
    (H, W), (dh, dw) = shape.kernel, conv.dilation
    spread = weight.new_zeros(*weight.shape[:2], H, W)
    spread[:, :, ::dh, ::dw] = weight
    if conv.groups > 1 and not shape.depthwise:
        parts = zip(spread.chunk(conv.groups), range(conv.groups), strict=True)
        width = shape.inputs // conv.groups
        spread = torch.cat(
            [F.pad(part, (0, 0, 0, 0, k * width, shape.inputs - (k + 1) * width)) for part, k in parts]
        )
    bias = torch.zeros(shape.outputs) if conv.bias is None else conv.bias.detach()
    return Map(shape, spread, bias.double())


def after(first: Geometry, second: Geometry) -> Geometry | None:
    """`second` after `first` as one convolution; None where that is not exact at every border.

    A padding between the two puts zeros where the first would have gone on. That is the same only where
    the first adds no constant and does not see across the border in that direction.
    """
    for axis in (0, 1):
        narrow = first.kernel[axis] == 1 and first.padding[axis] == 0 and first.stride[axis] == 1
        if second.padding[axis] and (first.constant or not narrow):
            return None
        if first.stride[axis] > 1 and second.kernel[axis] > 1:
            return None
    pairs = list(zip(first.kernel, second.kernel, strict=True))
    strides = list(zip(first.stride, second.stride, strict=True))
    paddings = list(zip(first.padding, second.padding, strict=True))
    return Geometry(
        first.inputs,
        second.outputs,
        (pairs[0][0] + pairs[0][1] - 1, pairs[1][0] + pairs[1][1] - 1),
        (strides[0][0] * strides[0][1], strides[1][0] * strides[1][1]),
        (sum(paddings[0]), sum(paddings[1])),
        first.depthwise and second.depthwise,
        first.constant or second.constant,
    )


def composed(first: Map, second: Map) -> Map:
    """W[o, i, t] = sum over m and a + b = t of W2[o, m, a] W1[m, i, b]."""
    shape = after(first.geometry, second.geometry)
    assert shape is not None
    kh, kw = second.geometry.kernel
    if shape.depthwise:
        C = shape.inputs
        one, two = first.weight.transpose(0, 1), second.weight.flip(2, 3)
        weight = F.conv2d(one, two, padding=(kh - 1, kw - 1), groups=C).transpose(0, 1)
        bias = second.bias + second.weight.sum((1, 2, 3)) * first.bias
        return Map(shape, weight, bias)
    dense_1, dense_2 = _dense(first), _dense(second)
    weight = F.conv2d(dense_1.transpose(0, 1), dense_2.flip(2, 3), padding=(kh - 1, kw - 1)).transpose(0, 1)
    bias = second.bias + dense_2.sum((2, 3)) @ first.bias
    return Map(shape, weight, bias)


def beside(parts: Sequence[Geometry]) -> Geometry:
    """The sum of convolutions of one input, of equal strides and equal outputs, as one."""
    first = parts[0]
    sides = []
    for axis in (0, 1):
        before = max(g.padding[axis] for g in parts)
        behind = max(g.kernel[axis] - 1 - g.padding[axis] for g in parts)
        sides.append((before + behind + 1, before))
    return Geometry(
        first.inputs,
        first.outputs,
        (sides[0][0], sides[1][0]),
        first.stride,
        (sides[0][1], sides[1][1]),
        all(g.depthwise for g in parts),
        any(g.constant for g in parts),
    )


def added(parts: Sequence[Map]) -> Map:
    shape = beside([part.geometry for part in parts])
    total: Tensor | None = None
    for part in parts:
        weight = part.weight if shape.depthwise else _dense(part)
        (H, W), (kh, kw) = shape.kernel, weight.shape[2:]
        top, left = (a - b for a, b in zip(shape.padding, part.geometry.padding, strict=True))
        padded = F.pad(weight, (left, W - kw - left, top, H - kh - top))
        total = padded if total is None else total + padded
    assert total is not None
    return Map(shape, total, torch.stack([part.bias for part in parts]).sum(0))


def _dense(part: Map) -> Tensor:
    if not part.geometry.depthwise:
        return part.weight
    weight = part.weight.new_zeros(part.geometry.outputs, part.geometry.inputs, *part.geometry.kernel)
    index = torch.arange(part.geometry.inputs)
    weight[index, index] = part.weight[:, 0]
    return weight
