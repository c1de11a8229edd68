"""1x1 convolutions with a stride, whose weight gradients oneDNN gets wrong where there are few inputs.

On images with channels innermost and fewer inputs than a vector holds, its kernel writes past its workspace:
wrong gradients, or a crash (oneDNN issue 6035; seen with torch 2.13 on AVX2, stride 2 and up to 7 inputs).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VECTOR = 16  # float32 values, of the widest processors


def repair(model: nn.Module) -> None:
    """Let every such convolution of `model` pick its pixels itself: same tensors, same outputs."""
    for module in model.modules():
        if type(module) is nn.Conv2d and _affected(module):
            module.__class__ = Strided1x1


def restore(model: nn.Module) -> None:
    """Undo `repair`, before tracing."""
    for module in model.modules():
        if type(module) is Strided1x1:
            module.__class__ = nn.Conv2d  # type: ignore[assignment]


class Strided1x1(nn.Conv2d):
    """On a CPU, where gradients are wanted, it picks its pixels before it multiplies; elsewhere as ever."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not torch.is_grad_enabled():
            return super().forward(x)
        down, across = self.stride
        return F.conv2d(x[..., ::down, ::across], self.weight, self.bias, groups=self.groups)


def _affected(conv: nn.Conv2d) -> bool:
    pointwise = conv.kernel_size == (1, 1) and conv.padding in ((0, 0), "valid")
    return pointwise and conv.stride != (1, 1) and conv.in_channels // conv.groups < VECTOR
