"""Where the elements of a value stand in ciphertext slots.

All maps of a program share one canvas: channel blocks of `pitch` slots with rows of `width` slots. A map that
strides have shrunk keeps its pixels where they were, `gap` slots apart, and fills the gaps with further
channels (multiplexed packing: Lee et al. 2022, section 4; Ebel et al. 2025, section 4). So every convolution,
strided or not, shifts by the same few distances and is one linear map of few diagonals.

A value repeats through the ciphertext with its own period, a power of two: rotations are then cyclic over
the value, not only over the ring.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tightrope.ops import AvgPool2d, Conv2d, GlobalAvgPool, MaxPool2d, Pair, Shape, Upsample
from tightrope.program import Program

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """positions: per element, in C order, its ciphertext times `slots` plus its slot below `period`."""

    shape: Shape
    positions: Indices
    period: int
    slots: int

    @property
    def ciphertexts(self) -> int:
        return int(self.positions.max()) // self.slots + 1

    def pack(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """One sample -> (ciphertexts, slots), repeated with the period."""
        flat = np.zeros(self.ciphertexts * self.slots)
        flat[self.positions] = x.reshape(-1)
        first = flat.reshape(self.ciphertexts, self.slots)[:, : self.period]
        return np.tile(first, (1, self.slots // self.period))

    def unpack(self, slots: NDArray[np.float64]) -> NDArray[np.float64]:
        """(ciphertexts, slots) -> one sample."""
        return slots.reshape(-1)[self.positions].reshape(self.shape)


@dataclass(frozen=True)
class Canvas:
    """Rows and columns that hold every map of a program; `gaps` per value."""

    height: int
    width: int
    gaps: dict[str, Pair]

    @classmethod
    def of(cls, program: Program) -> Canvas:
        gaps = {Program.INPUT: (1, 1)}
        for op in program.ops:
            gaps[op.name] = _gap(op, gaps[op.inputs[0]], program.shape(op.inputs[0]))
        maps = [(program.shape(v), gap) for v, gap in gaps.items() if len(program.shape(v)) == 3]
        height = max((s[1] * gap[0] for s, gap in maps), default=1)
        width = max((s[2] * gap[1] for s, gap in maps), default=1)
        return cls(height, width, gaps)

    def layout(self, value: str, shape: Shape, slots: int) -> Layout:
        """Flat values, and maps of one pixel, stand one element beside the other."""
        size = math.prod(shape)
        if len(shape) != 3 or shape[1:] == (1, 1):
            return _finished(shape, np.arange(size), slots)
        pitch = _power(self.height * self.width)
        gap_h, gap_w = self.gaps[value]
        c, y, x = np.indices(shape)
        block, place = np.divmod(c, gap_h * gap_w)
        down, right = np.divmod(place, gap_w)
        positions = block * pitch + (y * gap_h + down) * self.width + x * gap_w + right
        return _finished(shape, positions.reshape(-1), slots)


def _finished(shape: Shape, positions: Indices, slots: int) -> Layout:
    period = min(slots, _power(int(positions.max()) + 1))
    return Layout(shape, positions.astype(np.int64), period, slots)


def _power(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def _gap(op: object, gap: Pair, shape: Shape) -> Pair:
    if isinstance(op, Conv2d | AvgPool2d | MaxPool2d):
        return (gap[0] * op.stride[0], gap[1] * op.stride[1])
    if isinstance(op, Upsample):
        return (max(1, gap[0] // op.factor[0]), max(1, gap[1] // op.factor[1]))
    if isinstance(op, GlobalAvgPool):
        return (1, 1)
    return gap
