"""Compiled element-wise loops of truncation and of the gates, on uint64 words that wrap modulo 2^64.

Maps are (N, C, H, W). A gated channel g sits at channel `place[g]` of the opened maps, has patches of
`patch[g]` = (rows, columns) and its tiles, row by row, from `first[g]` on. Branches depend
on public values only.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tightrope.runtimes.mpc._halftree import U8, U64, compiled

I64 = NDArray[np.int64]
HALVES = NDArray[np.uint32]


@compiled
def tile_sums(x: U64, place: I64, patch: I64, first: I64, sums: U64) -> None:
    """sums[n, tile] = sum of the tile's elements; sums is zero on entry."""
    N, _, H, W = x.shape
    for n in range(N):
        for g in range(place.shape[0]):
            p, q = patch[g, 0], patch[g, 1]
            columns = (W + q - 1) // q
            for h in range(H):
                row = first[g] + (h // p) * columns
                for tile in range(columns):
                    total = np.uint64(0)
                    for w in range(tile * q, min(tile * q + q, W)):
                        total += x[n, place[g], h, w]
                    sums[n, row + tile] += total


@compiled
def spread(value: U64, choice: U8, place: I64, patch: I64, first: I64, out: U64) -> None:
    """out[n, g, h, w] = the value where the bit of its tile is 1, else 0."""
    N, _, H, W = value.shape
    for n in range(N):
        for g in range(place.shape[0]):
            p, q = patch[g, 0], patch[g, 1]
            columns = (W + q - 1) // q
            for h in range(H):
                row = first[g] + (h // p) * columns
                for w in range(W):
                    take = np.uint64(0) - np.uint64(choice[n, row + w // q])
                    out[n, g, h, w] = value[n, place[g], h, w] & take


@compiled
def repeated(value: U64, patch: I64, first: I64, out: U64) -> None:
    """out[n, g, h, w] = the value of its tile."""
    N, G, H, W = out.shape
    for n in range(N):
        for g in range(G):
            p, q = patch[g, 0], patch[g, 1]
            columns = (W + q - 1) // q
            for h in range(H):
                row = first[g] + (h // p) * columns
                for w in range(W):
                    out[n, g, h, w] = value[n, row + w // q]


@compiled
def truncated(opened: U64, trunc: U64, wrap: U64 | HALVES, shift: int, party: int, out: U64) -> None:
    """A party's share of floor(z / 2^shift) (or + 1) from opened = z + r and shares of r >> shift and MSB(r).

    With Z = z + 2^62 below 2^63: Z + r wraps exactly if MSB(r) = 1 and MSB(Z + r) = 0.
    """
    s = np.uint64(shift)
    up = np.uint64(64 - shift)
    offset = np.uint64(1 << 62)
    own = np.uint64(party)
    for i in range(opened.shape[0]):
        Z = opened[i] + offset
        wrapped = (wrap[i] * (np.uint64(1) - (Z >> np.uint64(63)))) << up
        out[i] = own * ((Z >> s) - (offset >> s)) - trunc[i] + wrapped


@compiled
def selected(
    opened: U64, x: U64, bit: U8, choice: U64, choice_trunc: U64, choice_wrap: U64 | HALVES, shift: int,
    negate: bool, place: I64, patch: I64, first: I64, channel: I64, out: U64,
) -> None:  # fmt: skip
    """Add a party's share of (bit xor c) * x, or its negative, to `out`; c * x from the dealer's products.

    c*x = public*c - c*(r >> shift) + wrap term, and b*x = c*x where the opened bit is 0, else x - c*x.
    x holds the opened channels, `channel[g]` is the place of a gated one in `out`.
    """
    N, _, H, W = x.shape
    s = np.uint64(shift)
    up = np.uint64(64 - shift)
    offset = np.uint64(1 << 62)
    for n in range(N):
        for g in range(place.shape[0]):
            p, q = patch[g, 0], patch[g, 1]
            columns = (W + q - 1) // q
            for h in range(H):
                row = first[g] + (h // p) * columns
                for w in range(W):
                    tile = row + w // q
                    z = opened[n, place[g], h, w]
                    if shift == 0:
                        product = z * choice[n, tile] - choice_trunc[n, g, h, w]
                    else:
                        Z = z + offset
                        public = (Z >> s) - (offset >> s)
                        wrapped = choice_wrap[n, g, h, w] * (np.uint64(1) - (Z >> np.uint64(63)))
                        product = public * choice[n, tile] - choice_trunc[n, g, h, w] + (wrapped << up)
                    if bit[n, tile]:
                        product = x[n, place[g], h, w] - product
                    if negate:
                        product = np.uint64(0) - product
                    out[n, channel[g], h, w] += product
