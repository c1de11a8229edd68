"""Compiled element-wise loops of truncation and of the gates, on uint64 or uint32 words.

They compute modulo 2^64; what is stored in a uint32 word is right modulo 2^32. `ring_bits` is the ring of
what was opened, whose upper bits in a word may be anything; results may be in another ring.

Maps are (N, C, H, W). A gated channel g sits at channel `place[g]` of the opened maps, has patches of
`patch[g]` = (rows, columns) and its tiles, row by row, from `first[g]` on. Branches depend
on public values only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tightrope.runtimes.mpc._halftree import U8, U64, compiled

I64 = NDArray[np.int64]
Words = NDArray[Any]  # uint64 or uint32


@compiled
def tile_sums(x: Words, place: I64, patch: I64, first: I64, sums: Words) -> None:
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
def beyond(sums: Words, limits: U64, trim: int, ring_bits: int, points: U64) -> None:
    """points[n * tiles + tile] = sums[n, tile] - limits[tile], in the ring, without `trim` low bits."""
    N, tiles = sums.shape
    mask = ~np.uint64(0) >> np.uint64(64 - ring_bits)
    for n in range(N):
        for tile in range(tiles):
            points[n * tiles + tile] = ((sums[n, tile] - limits[tile]) & mask) >> np.uint64(trim)


@compiled
def spread(value: Words, choice: U8, place: I64, patch: I64, first: I64, out: Words) -> None:
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
def _public(opened: np.uint64, shift: int, ring_bits: int) -> tuple[np.uint64, np.uint64]:
    """(U, k), public, of floor(z / 2^shift) (or + 1) = U - (r >> shift) + k * MSB(r), from opened = z + r.

    In the ring Z_2^64, with Z = z + 2^62 below 2^63: Z + r wraps exactly if MSB(r) = 1 and MSB(Z + r) = 0.
    """
    if shift == 0:
        return opened, np.uint64(0)
    s = np.uint64(shift)
    top = np.uint64(ring_bits - 1)
    offset = np.uint64(1) << np.uint64(ring_bits - 2)
    Z = (opened + offset) & (~np.uint64(0) >> np.uint64(64 - ring_bits))
    return (Z >> s) - (offset >> s), (np.uint64(1) - (Z >> top)) << np.uint64(ring_bits - shift)


@compiled
def truncated(
    opened: Words, trunc: Words, wrap: Words, shift: int, ring_bits: int, party: int, out: Words
) -> None:
    """A party's share of the truncated value, from shares of r >> shift and MSB(r)."""
    own = np.uint64(party)
    for i in range(opened.shape[0]):
        U, k = _public(np.uint64(opened[i]), shift, ring_bits)
        out[i] = own * U - trunc[i] + wrap[i] * k


@compiled
def selected(
    opened: Words, x: Words, bit: U8, choice: Words, choice_trunc: Words, choice_wrap: Words, shift: int,
    ring_bits: int, party: int, linear: np.uint64, constant: np.uint64, place: I64, patch: I64, first: I64,
    channel: I64, out: Words,
) -> None:  # fmt: skip
    """Add a party's share of b * (linear * x + constant) to `out`, b = bit xor c.

    c*x = public*c - c*(r >> shift) + wrap term, by the dealer's products; b*x = c*x where the opened bit is
    0, else x - c*x. x holds the opened channels, `channel[g]` is the place of a gated one in `out`.
    """
    N, _, H, W = x.shape
    own = np.uint64(party)
    plain = linear == np.uint64(1) and constant == np.uint64(0)  # a ReLU needs no products
    for n in range(N):
        for g in range(place.shape[0]):
            p, q = patch[g, 0], patch[g, 1]
            columns = (W + q - 1) // q
            for h in range(H):
                row = first[g] + (h // p) * columns
                for w in range(W):
                    c = np.uint64(choice[n, row + w // q])
                    public, up = _public(np.uint64(opened[n, place[g], h, w]), shift, ring_bits)
                    product = public * c - choice_trunc[n, g, h, w] + choice_wrap[n, g, h, w] * up
                    if bit[n, row + w // q]:
                        product = x[n, place[g], h, w] - product
                        c = own - c
                    if not plain:
                        product = linear * product + constant * c
                    out[n, channel[g], h, w] += product


@compiled
def selected_squares(
    opened: Words, x: Words, bit: U8, choice: Words, wrap: Words, square: Words, cross: Words,
    choice_trunc: Words, choice_wrap: Words, choice_square: Words, choice_cross: Words, shift: int,
    ring_bits: int, party: int, factor: np.uint64, out: Words,
) -> None:  # fmt: skip
    """Add a party's share of factor * b * x^2 to `out`, every array flat (one bit per element).

    With t = r >> shift, w = MSB(r) and x = U - t + k*w: x^2 = 2*U*x - U^2 + t^2 - 2*k*t*w + k^2*w, and the
    same times c.
    """
    own = np.uint64(party)
    for i in range(x.shape[0]):
        U, k = _public(np.uint64(opened[i]), shift, ring_bits)
        c = np.uint64(choice[i])
        product = U * c - choice_trunc[i] + choice_wrap[i] * k
        chosen = np.uint64(2) * U * product - U * U * c + choice_square[i]
        chosen += k * (k * choice_wrap[i] - np.uint64(2) * choice_cross[i])
        if bit[i]:
            whole = np.uint64(2) * U * x[i] - own * U * U + square[i]
            whole += k * (k * wrap[i] - np.uint64(2) * cross[i])
            chosen = whole - chosen
        out[i] += factor * chosen
