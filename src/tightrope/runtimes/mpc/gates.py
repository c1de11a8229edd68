"""The arithmetic of `Truncate` and `Gate`: what the dealer shares, and what client and server make of it.

One opening z + r serves everything: truncation (exact wrap from MSB(r) and the opened MSB, so never a large
error), the tile sums z_P + r_P that the comparison reads, and the selection b * x by the dealer's shares of
c and of c times the truncated mask (b = opened bit xor c). Patch ReLU: Gorski and Avidan 2023.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tightrope.runtimes.mpc import _tiles as kernels
from tightrope.runtimes.mpc import fss
from tightrope.runtimes.mpc._halftree import U8, U64
from tightrope.runtimes.mpc._tiles import I64, Words
from tightrope.runtimes.mpc.prg import WORDS, Stream
from tightrope.runtimes.mpc.steps import UNIT_BITS, Field, Gate, Truncate

Shares = dict[str, NDArray[Any]]
CLIENT, SERVER = 0, 1


@dataclass(frozen=True)
class Layout:
    """Where the gated channels and their tiles are; see `_tiles`."""

    channel: I64  # in the input and the output
    place: I64  # in the opened maps
    patch: I64
    first: I64
    elements: I64  # of every tile


@lru_cache(maxsize=1024)
def layout(step: Gate) -> Layout:
    opened = {channel: k for k, channel in enumerate(step.opened)}
    tiles = [step.kernel.tiles[c] for c in step.gated]
    patches = np.array([step.kernel.patches[c] for c in step.gated], np.int64).reshape(-1, 2)
    first = np.concatenate([[0], np.cumsum(tiles)[:-1]]).astype(np.int64)
    places = np.array([opened[c] for c in step.gated], np.int64)
    _, H, W = step.map_shape
    elements = np.zeros((1, step.tiles), np.uint64)
    ones = np.ones((1, len(opened), H, W), np.uint64)
    kernels.tile_sums(ones, places, patches, first, elements)
    return Layout(np.array(step.gated, np.int64), places, patches, first, elements[0].astype(np.int64))


def draw(stream: Stream, field: Field, batch: int) -> NDArray[Any]:
    """A party's part of a dealer's sharing: uniform words, half-words or bits."""
    count = field.items(batch)
    return stream.bits(count) if field.unit == "bit" else stream.ring(count, UNIT_BITS[field.unit])


def share_truncation(step: Truncate, r: Words, client: Stream) -> Shares:
    """The server's shares of r >> shift and MSB(r); the client's come from `client`."""
    trunc, wrap = step.share_fields
    batch = r.size // step.input.size
    r = _reduced(r, step)
    return {
        "trunc": _minus(r >> step.shift, draw(client, trunc, batch)),
        "wrap": _minus(r >> (step.input.ring_bits - 1), draw(client, wrap, batch)),
    }


def _reduced(x: Words, step: Truncate | Gate) -> Words:
    """x modulo the ring of the step's input: what is shifted needs its upper bits to be zero."""
    bits = step.input.ring_bits
    return x if bits == 8 * x.itemsize else x & np.uint64((1 << bits) - 1)


def _minus(secret: NDArray[Any], share: NDArray[Any]) -> NDArray[Any]:
    """secret - share modulo 2^32 or 2^64, as the share's type says."""
    difference: NDArray[Any] = secret.astype(share.dtype) - share
    return difference


def share_gate(step: Gate, r: Words, c: U8, client: Stream) -> Shares:
    """The server's shares of everything in `step.share_fields` but the comparison's bit.

    r: N * opened_size masks of the opening; c: uint8[pieces * N * tiles] masks of the bits.
    The client's parts are drawn from `client`, in the order of the fields.
    """
    at = layout(step)
    _, H, W = step.map_shape
    N = r.size // step.opened_size
    K = len(step.pieces)
    r = _reduced(r, step)
    value = {"trunc": r >> step.shift, "wrap": r >> (step.input.ring_bits - 1)}
    word = WORDS[step.output.ring_bits]
    if step.squares:
        t = value["trunc"].astype(word)
        value |= {"square": t * t, "cross": t * value["wrap"].astype(word)}
    choices = c.reshape(K, N, step.tiles)

    def product(name: str) -> Words:
        out = np.empty((K, N, len(step.gated), H, W), value[name].dtype)
        maps = value[name].reshape(N, len(step.opened), H, W)
        for k in range(K):
            kernels.spread(maps, choices[k], at.place, at.patch, at.first, out[k])
        return out.reshape(-1)

    shares: Shares = {}
    for field in step.share_fields[:-1]:
        name = field.name.removeprefix("choice_")
        secret = c if field.name == "choice" else value[name] if name == field.name else product(name)
        shares[field.name] = _minus(secret, draw(client, field, N))
    return shares


def tile_sums(step: Gate, x: Words) -> Words:
    """Sums over the tiles of opened maps (N * opened_size elements) in the ring, [N, tiles]."""
    if all(patch == (1, 1) for patch in step.kernel.patches):
        return x.reshape(-1, step.tiles)
    at = layout(step)
    _, H, W = step.map_shape
    maps = x.reshape(-1, len(step.opened), H, W)
    sums = np.zeros((len(maps), step.tiles), x.dtype)
    kernels.tile_sums(maps, at.place, at.patch, at.first, sums)
    return sums


def mask_points(step: Gate, r: Words) -> U64:
    """The masks of the comparisons, r_P >> trim, per tile, whatever the piece: uint64[N * tiles]."""
    return (_reduced(tile_sums(step, r), step) >> step.trim).astype(np.uint64).reshape(-1)


def compared_points(step: Gate, opened: Words) -> U64:
    """The public side of the comparisons [sum > threshold * elements]: uint64[pieces, N * tiles].

    One unit of the compared value (2^trim) is subtracted for the strict comparison: the subtraction of two
    shifted values may carry, so a sum up to that far above the threshold may count as not above it; a sum
    at or below it never counts as above.
    """
    sums = tile_sums(step, opened)
    elements = layout(step).elements.astype(np.uint64)
    points = np.empty((len(step.pieces), sums.size), np.uint64)
    for k, piece in enumerate(step.pieces):
        limits = np.uint64(piece.threshold % 2**64) * elements + np.uint64(1 << step.trim)
        kernels.beyond(sums, limits, step.trim, step.input.ring_bits, points[k])
    return points


def truncate(party: int, step: Truncate | Gate, opened: Words, shares: Shares) -> Words:
    """A party's share of the truncated value, flat, in the ring of the output."""
    out = np.empty(opened.shape, WORDS[step.output.ring_bits])
    bits = step.input.ring_bits
    kernels.truncated(opened, shares["trunc"], shares["wrap"], step.shift, bits, party, out)
    return out


def select(party: int, step: Gate, opened: Words, z: Words, shares: Shares, bits: U8) -> Words:
    """A party's share of the gated maps, (N, C, H, W).

    opened: z + r of the opened channels; z: the party's share of the whole input (N, C, H, W); bits: the
    opened b xor c, uint8[pieces * N * tiles].
    """
    at = layout(step)
    C, H, W = step.map_shape
    N, K = len(z), len(step.pieces)
    maps = opened.reshape(N, len(step.opened), H, W)
    word = WORDS[step.output.ring_bits]
    if step.shift:
        x = truncate(party, step, opened, shares).reshape(maps.shape)
    else:
        z = z.astype(word, copy=False)
        x = np.ascontiguousarray(z[:, list(step.opened)])
    out = np.zeros((N, C, H, W), word)
    identity = [c for c in range(C) if step.kernel.patches[c] == (0, 0)]
    out[:, identity] = x[:, identity] if step.shift else z[:, identity]
    grid = (K, N, len(step.gated), H, W)
    choice = shares["choice"].reshape(K, N, step.tiles)
    product = shares["choice_trunc"].reshape(grid)
    wrap = shares["choice_wrap"].reshape(grid) if step.shift else product  # not used
    opened_bits = bits.reshape(K, N, step.tiles)
    for k, piece in enumerate(step.pieces):
        kernels.selected(
            maps, x, opened_bits[k], choice[k], product[k], wrap[k], step.shift, step.input.ring_bits, party,
            np.uint64(piece.linear % 2**64), np.uint64(piece.constant % 2**64),
            at.place, at.patch, at.first, at.channel, out,
        )  # fmt: skip
        if piece.square:
            _add_squares(party, step, k, opened, x, shares, bits, out)
    return out


def _add_squares(
    party: int, step: Gate, k: int, opened: Words, x: Words, shares: Shares, bits: U8, out: Words
) -> None:
    """Add the square term of piece k. There all channels are gated and each element has its own bit."""

    def piece(name: str) -> NDArray[Any]:
        part: NDArray[Any] = shares[name].reshape(len(step.pieces), -1)[k]
        return part

    square = shares["square"]
    wrap, cross = (shares["wrap"], shares["cross"]) if step.shift else (square, square)  # not used
    choice_square = piece("choice_square")
    choice_wrap, choice_cross = choice_square, choice_square
    if step.shift:
        choice_wrap, choice_cross = piece("choice_wrap"), piece("choice_cross")
    kernels.selected_squares(
        opened, x.reshape(-1), bits.reshape(len(step.pieces), -1)[k], piece("choice"), wrap, square, cross,
        piece("choice_trunc"), choice_wrap, choice_square, choice_cross, step.shift, step.input.ring_bits,
        party, np.uint64(step.pieces[k].square % 2**64), out.reshape(-1),
    )  # fmt: skip


def evaluate_bits(party: int, step: Gate, opened: Words, root: U64, shares: Shares, threads: int) -> U8:
    """A party's shares of (b xor c) for every comparison, with the key in `shares`: words, bit, hash_key.

    The pieces of a tile read one key, at as many public points, each with a mask c of its own.
    """
    points = compared_points(step, opened)
    key_words = shares["words"].reshape(-1, points.shape[1], 2)
    key, bit = shares["hash_key"].tobytes(), shares["bit"].reshape(points.shape)
    parts = [
        fss.evaluate(party, x, step.bits, root, key_words, b, key, threads=threads)
        for x, b in zip(points, bit, strict=True)
    ]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
