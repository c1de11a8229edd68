"""What Lattigo's bootstrapping adds to a chain of primes, and which keys it asks for.

Bootstrapping evaluates two homomorphic DFTs, CoeffsToSlots and SlotsToCoeffs, around a polynomial of
x mod 1 (Bossuat et al. 2021, section 5), with a sparse ephemeral secret (Bossuat et al. 2022). These are the
library's default circuits; what is said here of their rotations was compared with the keys that it makes.
"""

from __future__ import annotations

import math

from tightrope.runtimes.ckks.diagonals import best_split

SLOTS_TO_COEFFS = (39,) * 3  # bits of the primes of each part, from the lowest
MOD_1 = (60,) * 8
COEFFS_TO_SLOTS = (56,) * 4
PRIMES = (*SLOTS_TO_COEFFS, *MOD_1, *COEFFS_TO_SLOTS)
SPECIAL_BITS = 61
MAX_SPECIAL = 12
LEAST_LEVEL = 1  # before a bootstrap: the mask of the slots takes it
LEAST_SLOTS = 32  # refreshed by one: for fewer the library makes other keys than `rotations` says
NOISE = 2.0**-22.5  # standard deviation of a slot; measured 2^-24 to 2^-27 on rings of 2^11 to 2^16
PRODUCTS = 28  # of two ciphertexts, in the polynomial of both halves of the coefficients


def special_primes(q_bits: int, most: int) -> tuple[int, ...]:
    """As many key-switching primes as there is room for: they make keys smaller and switches faster."""
    return (SPECIAL_BITS,) * max(0, min(MAX_SPECIAL, (most - q_bits - sum(PRIMES)) // SPECIAL_BITS))


def rotations(log_n: int, log_slots: int) -> tuple[int, ...]:
    """Every rotation of a bootstrap of 2^log_slots slots; a conjugation comes on top."""
    found = {1 << k for k in range(log_slots, log_n - 1)}  # sums over the gaps between sparse slots
    slots, sparse = 1 << log_slots, log_slots < log_n - 1
    if sparse:
        found.add(slots)
    for encode in (True, False):
        for k, shifts in enumerate(dft_shifts(log_n, log_slots, encode)):
            size = best_split(shifts, 2 * slots if sparse else slots)
            wrap = 2 * slots if sparse and not encode and k == 0 else slots
            found |= {s // size * size % wrap for s in shifts} | {s % size for s in shifts}
    return tuple(sorted(found - {0}))


def dft_shifts(log_n: int, log_slots: int, encode: bool) -> list[set[int]]:
    """Per matrix of CoeffsToSlots (`encode`) or SlotsToCoeffs, the diagonals that it has.

    A matrix merges several butterfly layers, each with the diagonals 0 and +-r. With sparse slots the first
    matrix of SlotsToCoeffs also moves the imaginary halves beside the real ones.
    """
    depth = len(COEFFS_TO_SLOTS if encode else SLOTS_TO_COEFFS)
    merged, left = [], log_slots
    for k in range(depth):
        merged.append(math.ceil(left / (depth - k)))
        left -= merged[-1]
    made, level = [], log_slots
    for k, layers in enumerate(merged if encode else merged[::-1]):
        repack = log_slots < log_n - 1 and not encode and k == 0
        size = (2 if repack else 1) << log_slots
        shifts = {0, size // 2} if repack else {0}
        for _ in range(layers):
            r = 1 << (level - 1 if encode else log_slots - level)
            shifts = {(s + d) % size for s in shifts for d in (0, r, -r)}
            level -= 1
        made.append(shifts)
    return made
