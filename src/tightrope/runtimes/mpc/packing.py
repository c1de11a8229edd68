"""Elements of rings that are no machine word: 40 or 48 bits each where they are drawn or sent, else 64."""

from __future__ import annotations

import numpy as np

from tightrope.runtimes.mpc._halftree import U8, U64, compiled

GROUP = 8  # elements: whole words whatever their bytes


def packed(words: U64, bits: int) -> U8:
    """The `bits` low bits of every word, one after the other, whole bytes: uint8[words.size * bits / 8]."""
    words, size = words.reshape(-1), bits // 8
    whole = len(words) - len(words) % GROUP
    raw = np.empty(len(words) * size, np.uint8)
    _join(words[:whole], bits, raw[: whole * size].view(np.uint64))
    raw[whole * size :].reshape(-1, size)[:] = words[whole:].view(np.uint8).reshape(-1, 8)[:, :size]
    return raw


def unpacked(raw: U8, bits: int) -> U64:
    """The reverse: uint64[raw.size * 8 / bits], below 2^bits."""
    size = bits // 8
    words = np.zeros(len(raw) // size, np.uint64)
    whole = len(words) - len(words) % GROUP
    _split(raw[: whole * size].view(np.uint64), bits, words[:whole])
    words[whole:].view(np.uint8).reshape(-1, 8)[:, :size] = raw[whole * size :].reshape(-1, size)
    return words


@compiled
def _join(words: U64, bits: int, out: U64) -> None:
    mask = (np.uint64(1) << np.uint64(bits)) - np.uint64(1)
    out[:] = 0
    for i in range(words.shape[0]):
        word, place = (i * bits) // 64, (i * bits) % 64
        value = words[i] & mask
        out[word] |= value << np.uint64(place)
        if place + bits > 64:
            out[word + 1] |= value >> np.uint64(64 - place)


@compiled
def _split(joined: U64, bits: int, out: U64) -> None:
    mask = (np.uint64(1) << np.uint64(bits)) - np.uint64(1)
    for i in range(out.shape[0]):
        word, place = (i * bits) // 64, (i * bits) % 64
        value = joined[word] >> np.uint64(place)
        if place + bits > 64:
            value |= joined[word + 1] << np.uint64(64 - place)
        out[i] = value & mask
