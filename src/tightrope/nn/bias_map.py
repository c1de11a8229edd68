"""A bias of its own at every position: what constant channels leave at the padded borders of a map."""

from __future__ import annotations

from torch import Tensor, nn


class BiasMap(nn.Module):
    """Adds a constant (C, H, W) to maps (N, C, H, W) of exactly this size."""

    bias: Tensor

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias
