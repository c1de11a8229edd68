"""Compiled inner loops of the half-tree comparison (`fss.py`): everything between two AES calls.

A 128-bit tree seed is s = (a, b), two uint64 words with its control bit t = lsb(a). Seeds are stored only as
sigma(s) = (a xor b, a), the input of the next hash, so one buffer is both state and AES plaintext.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
U64 = NDArray[np.uint64]
F = TypeVar("F", bound=Callable[..., object])

LEAF_BITS = 7  # a leaf is one 128-bit block, one bit for each value of the last seven bits


def compiled(function: F) -> F:
    """`function` compiled by numba on first use, cached on disk, running without the interpreter lock."""
    return cast(F, numba.njit(cache=True, nogil=True, error_model="numpy")(function))


@compiled
def load_roots(roots: U64, party: int, sigma: U64) -> None:
    """sigma[i] = sigma(roots[i]) with the control bit of the root forced to `party`."""
    one = np.uint64(1)
    bit = np.uint64(party)
    for i in range(roots.shape[0]):
        a = (roots[i, 0] & ~one) | bit
        sigma[i, 0] = a ^ roots[i, 1]
        sigma[i, 1] = a


@compiled
def descend(sigma: U64, aes: U64, cw: U64, x: U64, shift: int, parity: U64) -> None:
    """One level for one party: step from node s to its child on bit `shift` of x.

    child(bit) = H(s) xor bit*s xor t*cw with H(s) = aes xor sigma(s). Where the bit is 0 the control bit of
    the right sibling is added to bit 0 of `parity` (the others are noise): over both parties these bits sum
    to [x < alpha] above the leaf. Flat arrays and words only, so that the compiler makes vectors of it.
    """
    one = np.uint64(1)
    zero = np.uint64(0)
    position = np.uint64(shift)
    seeds, hashes, words = sigma.reshape(-1), aes.reshape(-1), cw.reshape(-1)
    for i in range(sigma.shape[0]):
        j = 2 * i
        mixed = seeds[j]
        a = seeds[j + 1]
        take = zero - (a & one)
        bit = (x[i] >> position) & one
        left_a = hashes[j] ^ mixed ^ (take & words[j])
        left_b = hashes[j + 1] ^ a ^ (take & words[j + 1])
        parity[i] ^= (left_a ^ a) & ~bit
        right = zero - bit
        left_a ^= right & a
        left_b ^= right & (mixed ^ a)
        seeds[j] = left_a ^ left_b
        seeds[j + 1] = left_a


@compiled
def finish(
    sigma: U64, aes: U64, cw: U64, x: U64, sign_shift: int, party: int, parity: U64, bit: U8, out: U8
) -> None:
    """Leaf look-up, plus the public sign bit of x (added by party 1 only) and this party's constant bit."""
    one = np.uint64(1)
    zero = np.uint64(0)
    position = np.uint64(sign_shift)
    own = np.uint64(party)
    for i in range(sigma.shape[0]):
        take = zero - (sigma[i, 1] & one)
        low = x[i]
        if position < np.uint64(LEAF_BITS):  # no more than 2^(n-1) of the 128 entries are in use
            low &= (one << position) - one
        if low & np.uint64(64):
            word = aes[i, 1] ^ sigma[i, 1] ^ (take & cw[i, 1])
        else:
            word = aes[i, 0] ^ sigma[i, 0] ^ (take & cw[i, 0])
        leaf = (word >> (low & np.uint64(63))) & one
        sign = (x[i] >> position) & own
        out[i] = bit[i] ^ np.uint8((parity[i] & one) ^ leaf ^ sign)


@compiled
def correct(sigma0: U64, sigma1: U64, aes0: U64, aes1: U64, alpha: U64, shift: int, cw: U64) -> None:
    """One level for the dealer: cw = H(s0) xor H(s1) xor (1-bit)*Delta, then both seeds follow alpha.

    On alpha's path s1 = s0 xor Delta at every level, so only s0 is computed.
    """
    one = np.uint64(1)
    zero = np.uint64(0)
    position = np.uint64(shift)
    seeds, others, words = sigma0.reshape(-1), sigma1.reshape(-1), cw.reshape(-1)
    hashes, other_hashes = aes0.reshape(-1), aes1.reshape(-1)
    for i in range(sigma0.shape[0]):
        j = 2 * i
        a = seeds[j + 1]
        b = seeds[j] ^ a
        delta_a = a ^ others[j + 1]
        delta_b = b ^ others[j] ^ others[j + 1]
        h_a = hashes[j] ^ seeds[j]
        h_b = hashes[j + 1] ^ a
        right = zero - ((alpha[i] >> position) & one)
        cw_a = h_a ^ other_hashes[j] ^ others[j] ^ (~right & delta_a)
        cw_b = h_b ^ other_hashes[j + 1] ^ others[j + 1] ^ (~right & delta_b)
        words[j] = cw_a
        words[j + 1] = cw_b
        take = zero - (a & one)
        a_next = h_a ^ (right & a) ^ (take & cw_a)
        b_next = h_b ^ (right & b) ^ (take & cw_b)
        seeds[j] = a_next ^ b_next
        seeds[j + 1] = a_next
        others[j] = a_next ^ delta_a ^ b_next ^ delta_b
        others[j + 1] = a_next ^ delta_a


@compiled
def correct_leaf(
    sigma0: U64, sigma1: U64, aes0: U64, aes1: U64, alpha: U64, compared_bits: int, cw: U64
) -> None:
    """Leaf correction: H'(s0) xor H'(s1) xor the table whose bit j is [j < low bits of alpha]."""
    one = np.uint64(1)
    zero = np.uint64(0)
    mask = (one << np.uint64(min(compared_bits, LEAF_BITS))) - one
    for i in range(sigma0.shape[0]):
        low = alpha[i] & mask
        if low < np.uint64(64):
            first, second = (one << low) - one, zero
        else:
            first, second = ~zero, (one << (low - np.uint64(64))) - one
        cw[i, 0] = aes0[i, 0] ^ sigma0[i, 0] ^ aes1[i, 0] ^ sigma1[i, 0] ^ first
        cw[i, 1] = aes0[i, 1] ^ sigma0[i, 1] ^ aes1[i, 1] ^ sigma1[i, 1] ^ second
