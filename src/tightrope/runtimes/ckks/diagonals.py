"""A sparse matrix between two layouts as rotations: out[s] = sum over k of d_k[s] * in[s + k].

Where the result has the smaller period, the diagonals are taken modulo that period and hold partial sums,
which log2(slots / period) rotations add up (the hybrid method of Juvekar et al. 2018, section 4.2): every
slot ends as a complete sum, so none shows a part of one. The rotations of a matrix are those of Lattigo's
baby-step giant-step evaluation, whose split must be reproduced to know which keys it asks for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tightrope.runtimes.ckks.layout import Layout

LOG_RATIO = 1  # baby steps per giant step, as a power of two: what the container asks for
MAX_DIAGONALS = 256  # encoded at a time
GENERATOR = 5  # of the rotations, Lattigo ring/ring.go


@dataclass(frozen=True)
class Block:
    """The diagonals between one input and one output ciphertext.

    Sparse: values[e] stands at slot at[e] of the diagonal shifts[which[e]]. They repeat with `period`; with
    `fold` they fill the first `period` slots only.
    """

    shifts: tuple[int, ...]
    which: NDArray[np.int32]
    at: NDArray[np.int32]
    values: NDArray[np.float64]
    period: int
    fold: bool

    def bare(self) -> Block:
        """Without the numbers: which diagonals there are."""
        return replace(
            self, which=self.which[:0].copy(), at=self.at[:0].copy(), values=self.values[:0].copy()
        )

    def dense(self, slots: int) -> NDArray[np.float64]:
        """(diagonals, slots)."""
        first = np.zeros((len(self.shifts), self.period))
        np.add.at(first, (self.which, self.at), self.values)
        if not self.fold:
            return np.tile(first, (1, slots // self.period))
        full = np.zeros((len(self.shifts), slots))
        full[:, : self.period] = first
        return full


def chunks(found: Mapping[tuple[int, int], Block]) -> list[dict[tuple[int, int], Block]]:
    """The same blocks in as few parts as keep the diagonals of an input ciphertext in each to MAX_DIAGONALS.

    The evaluator holds all diagonals of an input encoded at a time, so a wide layer reads its input in turns.
    """
    columns: dict[int, int] = {}
    for (_, c), block in found.items():
        columns[c] = columns.get(c, 0) + len(block.shifts)
    count = -(-max(columns.values()) // MAX_DIAGONALS)
    parts: list[dict[tuple[int, int], Block]] = [{} for _ in range(count)]
    for pair, block in found.items():
        for part, piece in zip(parts, _pieces(block, count), strict=True):
            if piece.shifts:
                part[pair] = piece
    return parts


def _pieces(block: Block, count: int) -> Iterator[Block]:
    """Neighbouring diagonals together, so that they share baby steps."""
    bounds = [len(block.shifts) * k // count for k in range(count + 1)]
    for begin, end in pairwise(bounds):
        mine = (block.which >= begin) & (block.which < end)
        yield replace(
            block, shifts=block.shifts[begin:end], which=block.which[mine] - begin, at=block.at[mine],
            values=block.values[mine],
        )  # fmt: skip


def folds(source: Layout, target: Layout) -> int:
    """How many rotations add up the partial sums of a map between these layouts."""
    if target.ciphertexts > 1 or target.period >= source.period:
        return 0
    return (target.slots // target.period).bit_length() - 1


def blocks(matrix: Any, source: Layout, target: Layout, rotations: int) -> dict[tuple[int, int], Block]:
    """The blocks (output ciphertext, input ciphertext) of a sparse matrix that are not empty.

    rotations: as `folds` says, or more where another source of the same sum needs them.
    """
    entries = matrix.tocoo()
    to, of = target.positions[entries.row], source.positions[entries.col]
    r, i = np.divmod(to, target.slots)
    c, j = np.divmod(of, target.slots)
    shift = (j - i) % min(source.period, target.period)
    period = max(source.period, target.period)
    at = (j - shift) % period if source.period > target.period else i
    found = {}
    for pair in sorted(set(zip(r.tolist(), c.tolist(), strict=True))):
        mine = (r == pair[0]) & (c == pair[1])
        shifts, which = np.unique(shift[mine], return_inverse=True)
        values = entries.data[mine].astype(np.float64)
        places = which.astype(np.int32), at[mine].astype(np.int32)
        found[pair] = Block(tuple(map(int, shifts)), *places, values, period, rotations > 0)
    return found


def steps(shifts: Iterable[int], slots: int) -> tuple[set[int], set[int]]:
    """The baby and giant steps with which Lattigo evaluates these diagonals."""
    shifts = list(shifts)
    return _split(shifts, slots, best_split(shifts, slots))


def best_split(shifts: Iterable[int], slots: int) -> int:
    """How many baby steps there are, whether diagonals need them or not (Lattigo's FindBestBSGSRatio)."""
    shifts = list(shifts)
    size = 1
    while size < slots:
        baby, giant = _split(shifts, slots, size)
        ratio = (len(baby) - 1) / (len(giant) - 1) if len(giant) > 1 else 0.0
        if ratio == 1 << LOG_RATIO:
            return size
        if ratio > 1 << LOG_RATIO:
            return max(1, size // 2)
        size <<= 1
    return 1


def _split(shifts: Iterable[int], slots: int, size: int) -> tuple[set[int], set[int]]:
    shifts = [k % slots for k in shifts]
    return {k % size for k in shifts}, {k // size * size for k in shifts}


def galois_element(rotation: int, log_n: int) -> int:
    return pow(GENERATOR, rotation, 2 << log_n)


def conjugation(log_n: int) -> int:
    """The Galois element that conjugates every slot."""
    return (2 << log_n) - 1
