"""The half-tree comparison written again from the paper, one key at a time on Python integers.

A seed is one 128-bit integer whose low 64 bits are the word `a` of the package and whose bit 0 is the control
bit. Slow and plain on purpose: it shares no code with the package.
"""

from __future__ import annotations

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

LOW = (1 << 64) - 1


def ccr_hash(key: bytes, s: int) -> int:
    """AES_key(sigma(s)) xor sigma(s) with sigma(a || b) = (a xor b) || a."""
    a, b = s & LOW, s >> 64
    sigma = (a ^ b) | a << 64
    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(sigma.to_bytes(16, "little"))
    return int.from_bytes(block, "little") ^ sigma


def gen(alpha: int, bits: int, s0: int, s1: int, key: bytes) -> list[int]:
    """Correction words for [x < alpha] over `bits`-bit x."""
    tree, leaf = key[:16], key[16:]
    s0, s1 = s0 & ~1, s1 | 1
    words = []
    for level in range(max(0, bits - 7)):
        bit = alpha >> (bits - 1 - level) & 1
        h0, h1 = ccr_hash(tree, s0), ccr_hash(tree, s1)
        cw = h0 ^ h1 ^ (0 if bit else s0 ^ s1)
        words.append(cw)
        s0, s1 = h0 ^ s0 * bit ^ cw * (s0 & 1), h1 ^ s1 * bit ^ cw * (s1 & 1)
    table = (1 << (alpha & 127)) - 1
    return [*words, ccr_hash(leaf, s0) ^ ccr_hash(leaf, s1) ^ table]


def evaluate(party: int, x: int, bits: int, s: int, words: list[int], key: bytes) -> int:
    """This party's share of [x < alpha]."""
    s = s | 1 if party else s & ~1
    total = 0
    for level, cw in enumerate(words[:-1]):
        h, t = ccr_hash(key[:16], s), s & 1
        left, right = h ^ cw * t, h ^ s ^ cw * t
        if x >> (bits - 1 - level) & 1:
            s = right
        else:
            total ^= right & 1
            s = left
    block = ccr_hash(key[16:], s) ^ words[-1] * (s & 1)
    return total ^ (block >> (x & 127) & 1)
