"""Depthwise convolutions that train several times faster on a CPU, for kernels above 3x3.

oneDNN has no fast gradient of their weights: at 5x5 it takes 15 times that of 3x3, half of the time of a
training step of MobileNetV3's family. The sum is written out here, channels innermost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

Maps = NDArray[np.float32]  # (N, H, W, C)
Function = TypeVar("Function", bound=Callable[..., object])


def quicken(model: nn.Module) -> None:
    """Let every depthwise convolution of `model` that can be faster be so: same tensors, same outputs."""
    for module in model.modules():
        if type(module) is nn.Conv2d and _covered(module):
            module.__class__ = QuickDepthwise


class QuickDepthwise(nn.Conv2d):
    """A depthwise convolution with its own weight gradient in float32 on a CPU; elsewhere as ever."""

    def forward(self, x: Tensor) -> Tensor:
        plain = x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
        if plain or not torch.is_grad_enabled():
            return super().forward(x)
        made: Tensor = _Depthwise.apply(x, self.weight, self.stride[0], self.padding[0])  # type: ignore[no-untyped-call]
        return made


def _covered(conv: nn.Conv2d) -> bool:
    kernel, stride, padding = conv.kernel_size, conv.stride, conv.padding
    square = len({*kernel}) == len({*stride}) == 1 and isinstance(padding, tuple) and len({*padding}) == 1
    depthwise = conv.groups == conv.in_channels == conv.out_channels and conv.bias is None
    return square and depthwise and kernel[0] > 3 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, None, stride, padding, 1, len(weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        into_x, into_weight = None, None
        if ctx.needs_input_grad[0]:
            into_x, _, _ = torch.ops.aten.convolution_backward(
                gradient, x, weight, None, [ctx.stride] * 2, [ctx.padding] * 2, [1, 1], False, [0, 0],
                len(weight), [True, False, False],
            )  # fmt: skip
        if ctx.needs_input_grad[1]:
            found = np.zeros((*weight.shape[2:], len(weight)), np.float32)
            _weight_gradient(_channels_last(gradient), _channels_last(x), ctx.stride, ctx.padding, found)
            into_weight = torch.from_numpy(found).permute(2, 0, 1)[:, None]
        return into_x, into_weight, None, None


def _channels_last(x: Tensor) -> Maps:
    return cast(Maps, x.detach().contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).numpy())


def _compiled(function: Function) -> Function:
    """On first use, kept on disk, multiplying and adding in one instruction."""
    return cast(Function, numba.njit(cache=True, nogil=True, fastmath={"contract"})(function))


@_compiled
def _weight_gradient(gradient: Maps, x: Maps, stride: int, padding: int, found: Maps) -> None:
    """found[k, m, c] += sum of gradient[n, i, j, c] x[n, stride i - p + k, stride j - p + m, c]."""
    count, height, width, channels = gradient.shape
    for n in range(count):
        for i in range(height):
            top = i * stride - padding
            for j in range(width):
                left = j * stride - padding
                for k in range(max(0, -top), min(found.shape[0], x.shape[1] - top)):
                    for m in range(max(0, -left), min(found.shape[1], x.shape[2] - left)):
                        for c in range(channels):
                            found[k, m, c] += gradient[n, i, j, c] * x[n, top + k, left + m, c]
