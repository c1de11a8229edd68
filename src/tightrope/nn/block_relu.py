"""ReLU whose sign is shared over a patch (Gorski & Avidan 2023, section 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tightrope.errors import InputError

Patch = tuple[int, int]
IDENTITY: Patch = (0, 0)


def tile_gate(x: Tensor, patch: Patch) -> Tensor:
    """One bit per tile of floating-point `x` (..., H, W): 1 where the sum over the tile is > 0.

    Tiles start at the top left; the last ones may be partial. Shape (..., ceil(H/p), ceil(W/q)). On a CPU
    the sum runs row by row, whatever the memory format, so a gate whose sum rounds to about 0 is the same
    everywhere.
    """
    p, q = patch
    if (p, q) == (1, 1):
        return x > 0
    H, W = x.shape[-2:]
    maps = x if x.dim() == 4 else x.reshape(-1, 1, H, W)
    # Pooling averages the pixels that exist, and the mean has the sign of the sum.
    gate = F.avg_pool2d(maps, (min(p, H), min(q, W)), ceil_mode=True) > 0
    return gate if x.dim() == 4 else gate.reshape(*x.shape[:-2], *gate.shape[-2:])


def expand_gate(gate: Tensor, patch: Patch, size: tuple[int, int]) -> Tensor:
    """Repeat tile bits (..., ceil(H/p), ceil(W/q)) over their pixels: (..., H, W), where `size` is (H, W)."""
    for dim, side, length in ((-1, patch[1], size[1]), (-2, patch[0], size[0])):
        if side > 1:
            gate = gate.index_select(dim, torch.arange(length, device=gate.device) // side)
    return gate


class BlockReLU(nn.Module):
    """ReLU with one DReLU per tile of each channel; values are not averaged.

    `patches` holds one (rows, columns) per channel; (1, 1) is the plain ReLU and (0, 0) the identity.
    `upper` clips the gated value from above by a second DReLU per tile (ReLU6: 6.0): a tile whose
    mean exceeds `upper` takes the value `upper`, without a gradient.

    Input and output (N, C, H, W), or (N, C) where every patch must be (0, 0) or (1, 1).
    The gate is a constant in the backward pass: gradient = gate * upstream.

    Raises InputError for a patch with a negative or a single zero side, an `upper` that is not positive,
    and an input of another shape.
    """

    order: Tensor
    inverse: Tensor

    def __init__(self, patches: Sequence[Sequence[int]], upper: float | None = None) -> None:
        super().__init__()
        self.patches: tuple[Patch, ...] = tuple((int(p), int(q)) for p, q in patches)
        self.upper = upper
        for c, (p, q) in enumerate(self.patches):
            if min(p, q) < 0 or (min(p, q) == 0 and max(p, q) > 0):
                raise InputError(
                    "not a patch", where=f"channel {c}", got=f"{p}x{q}", allowed="0x0 or positive"
                )
        if not self.patches:
            raise InputError("BlockReLU needs at least one channel", got="no patches")
        if upper is not None and not 0 < upper < math.inf:
            raise InputError("BlockReLU clips above 0", got=f"upper={upper}", allowed="None or positive")
        groups: dict[Patch, list[int]] = {}
        for c, patch in enumerate(self.patches):
            groups.setdefault(patch, []).append(c)
        order = [c for members in groups.values() for c in members]
        self.groups = tuple((patch, len(members)) for patch, members in groups.items())
        self.register_buffer("order", torch.tensor(order), persistent=False)
        self.register_buffer("inverse", torch.tensor(order).argsort(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() not in (2, 4) or x.shape[1] != len(self.patches):
            raise InputError(
                "BlockReLU has one patch per channel",
                got=f"input {tuple(x.shape)}",
                allowed=f"(N, {len(self.patches)}, H, W) or (N, {len(self.patches)})",
            )
        if x.dim() == 2:
            tiled = [f"{p}x{q}" for (p, q), _ in self.groups if max(p, q) > 1]
            if tiled:
                raise InputError("a flat input has no tiles", got=", ".join(tiled), allowed="0x0 or 1x1")
            return self.forward(x[:, :, None, None]).flatten(1)
        with torch.no_grad():
            # Picking and pooling channels is several times faster in NCHW; the rest keeps the format of `x`.
            dense = x.contiguous()
            gate = self._gates(dense, identity=True).contiguous(memory_format=_format(x))
        # A product, not a selection, so that NaN survives a gate of 0. uint8 multiplies faster than bool.
        y = x * gate.view(torch.uint8)
        if self.upper is None:
            return y
        with torch.no_grad():
            above = self._gates(dense - self.upper, identity=False).contiguous(memory_format=_format(x))
        return y.masked_fill_(above, self.upper)  # out of place it would lose the memory format

    def _gates(self, x: Tensor, *, identity: bool) -> Tensor:
        """Every pixel's bit, bool (N, C, H, W); `identity` is the bit of channels without tiles."""
        size = (x.shape[-2], x.shape[-1])
        parts = []
        start = 0
        for patch, count in self.groups:
            part = x if len(self.groups) == 1 else x.index_select(1, self.order[start : start + count])
            start += count
            if patch == IDENTITY:
                parts.append(torch.full_like(part, identity, dtype=torch.bool))
            else:
                parts.append(expand_gate(tile_gate(part, patch), patch, size))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1).index_select(1, self.inverse)

    def extra_repr(self) -> str:
        counts = ", ".join(f"{p}x{q}: {n}" for (p, q), n in self.groups)
        return counts if self.upper is None else f"{counts}, upper={self.upper:g}"


def _format(x: Tensor) -> torch.memory_format:
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def tiles(patch: Patch, size: tuple[int, int]) -> int:
    """How many tiles, and so DReLUs, one channel of `size` (H, W) has; 0 for the identity."""
    p, q = patch
    return 0 if patch == IDENTITY else -(-size[0] // p) * -(-size[1] // q)
