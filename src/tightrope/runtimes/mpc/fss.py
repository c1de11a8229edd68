"""DReLU by function secret sharing: both servers turn one public masked value into shares of its sign.

For a secret x = xhat - r mod 2^n (signed), r known to the dealer only, with ' meaning the low n-1 bits,

    [x >= 0] = 1 xor MSB(xhat) xor MSB(r) xor [xhat' < r']                     (borrow of the subtraction)

The comparison with the dealer's point alpha = r' is a distributed point function tree for alpha, cut seven
levels early into leaves of 128 one-bit entries. At every level where xhat' has a 0 the control bit of the
right sibling is added up; the two parties' sums differ exactly if alpha leaves xhat' upwards there, that is
if xhat' < alpha, and the leaf table finishes the comparison inside alpha's block.

* Tree: the half-tree (correlated GGM) of Guo, Yang, Wang, Zhang, Xie, Zhang, Liu, "Half-Tree: Halving the
  Cost of Tree Expansion in COT and DPF", EUROCRYPT 2023 (ePrint 2022/1431), section on DPF: children of s
  are H(s) and H(s) xor s, correction words H(s0) xor H(s1) xor (1-alpha_i)*Delta; one AES per level.
* Hash: H(s) = AES_k(sigma(s)) xor sigma(s), sigma(a||b) = (a xor b)||a, circular correlation robust in the
  ideal-permutation model (Guo, Katz, Wang, Yu, IEEE S&P 2020, ePrint 2019/074, section 7.3). k is fresh for
  every batch and chosen by the dealer; leaves are converted under a second key.
* Comparison from a point function by prefix parity: Storrier, Vadapalli, Lyons, Henry, "Grotto", CCS 2023
  (ePrint 2023/108). DReLU on n-1 bits with 128-bit leaves: Gupta et al., "SIGMA", PETS 2024.

A party's key is its root, the words (the same for both parties) and one bit; the words and bits are
pseudorandom given the root, whatever alpha is, because the parity only adds local work on an ordinary key.
Roots, words and bits are one-time, for one opened value x + r. Comparing this x with several public
thresholds reads one key at several points (as in Grotto: a party can evaluate its key wherever it likes),
each with an output mask c and constant bits of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from tightrope.errors import ProtocolError
from tightrope.runtimes.mpc import _halftree as kernels
from tightrope.runtimes.mpc._halftree import LEAF_BITS, U8, U64
from tightrope.runtimes.mpc.chunks import over_chunks

BLOCK_BYTES = 16
HASH_KEY_BYTES = 32  # AES-128 keys of the tree and of the leaves
TILE = 4096  # seeds of a tile, their AES output and their masks stay in the second-level cache
CHUNK = 16 * TILE  # what a thread takes at a time


def word_levels(n: int) -> int:
    """Correction words of one key for an n-bit comparison, 2 <= n <= 64: the tree depth max(0, n-8) + 1 leaf.

    Raises ProtocolError for any other n.
    """
    if not 2 <= n <= 64:
        raise ProtocolError("comparison width out of range", got=f"n = {n} bits", allowed="2 to 64")
    return max(0, n - 1 - LEAF_BITS) + 1


def words_bytes(n: int, count: int) -> int:
    """Bytes of the correction words for `count` DReLUs of n effective bits, sent to each of the parties."""
    return word_levels(n) * count * BLOCK_BYTES


def gen(
    r: U64,
    c: U8,
    n: int,
    root0: U64,
    root1: U64,
    bit0: U8,
    hash_key: bytes,
    *,
    threads: int = 1,
    out: U64 | None = None,
) -> tuple[U64, U8]:
    """The dealer's side: keys for N masked values.

    r: uint64[N] input masks (bits from n upwards are ignored); c: uint8[K * N] output masks, 0 or 1, for K
    points at which each key will be evaluated; root0, root1: uint64[N, 2] roots of the client (party 0) and
    the server (party 1), from their streams; bit0: uint8[K * N] the client's constant bits, from its stream;
    hash_key: 32 fresh random bytes.

    Returns (words uint64[word_levels(n), N, 2] for both parties, written into `out` if given; bit1
    uint8[K * N] for the server). Raises ProtocolError if a shape or dtype is not as stated.
    """
    levels = word_levels(n)
    count = r.shape[0]
    _check("r", r, np.uint64, (count,))
    uses = c.size // count if count else 1
    for name, bits in (("c", c), ("bit0", bit0)):
        _check(name, bits, np.uint8, (uses * count,))
    for name, root in (("root0", root0), ("root1", root1)):
        _check(name, root, np.uint64, (count, 2))
    words = np.empty((levels, count, 2), np.uint64) if out is None else out
    _check("out", words, np.uint64, (levels, count, 2))

    def work(start: int, stop: int) -> None:
        tree, leaf = _hashes(hash_key, 2 * TILE)
        state = np.empty((2 * TILE, 2), np.uint64)
        for lo in range(start, stop, TILE):
            hi = min(lo + TILE, stop)
            size = hi - lo
            sigma = state[: 2 * size]
            sigma0, sigma1 = sigma[:size], sigma[size:]
            kernels.load_roots(root0[lo:hi], 0, sigma0)
            kernels.load_roots(root1[lo:hi], 1, sigma1)
            for level in range(levels - 1):
                aes = tree(sigma)
                kernels.correct(
                    sigma0, sigma1, aes[:size], aes[size:], r[lo:hi], n - 2 - level, words[level, lo:hi]
                )
            aes = leaf(sigma)
            kernels.correct_leaf(sigma0, sigma1, aes[:size], aes[size:], r[lo:hi], n - 1, words[-1, lo:hi])

    _shared(work, count, threads)
    sign = ((r >> np.uint64(n - 1)) & np.uint64(1)).astype(np.uint8)
    return words, np.tile(sign, uses) ^ c ^ bit0 ^ np.uint8(1)


def evaluate(
    party: int, xhat: U64, n: int, root: U64, words: U64, bit: U8, hash_key: bytes, *, threads: int = 1
) -> U8:
    """A party's shares of [x >= 0] xor c for N DReLUs; the shares of the two parties xor to that bit.

    party: 0 client, 1 server; xhat: uint64[N] public masked values x + r (bits from n upwards are ignored);
    root: uint64[N, 2], words: uint64[word_levels(n), N, 2], bit: uint8[N] and hash_key as in `gen`.

    Returns uint8[N] of 0 and 1. Raises ProtocolError if a shape or dtype is not as stated.
    """
    levels = word_levels(n)
    count = xhat.shape[0]
    if party not in (0, 1):
        raise ProtocolError("only client and server hold keys", got=f"party {party}", allowed="0 or 1")
    _check("xhat", xhat, np.uint64, (count,))
    _check("root", root, np.uint64, (count, 2))
    _check("words", words, np.uint64, (levels, count, 2))
    _check("bit", bit, np.uint8, (count,))
    shares = np.empty(count, np.uint8)

    def work(start: int, stop: int) -> None:
        tree, leaf = _hashes(hash_key, TILE)
        state = np.empty((TILE, 2), np.uint64)
        sums = np.empty(TILE, np.uint64)
        for lo in range(start, stop, TILE):
            hi = min(lo + TILE, stop)
            sigma, parity, x = state[: hi - lo], sums[: hi - lo], xhat[lo:hi]
            parity.fill(0)
            kernels.load_roots(root[lo:hi], party, sigma)
            for level in range(levels - 1):
                kernels.descend(sigma, tree(sigma), words[level, lo:hi], x, n - 2 - level, parity)
            kernels.finish(
                sigma, leaf(sigma), words[-1, lo:hi], x, n - 1, party, parity, bit[lo:hi], shares[lo:hi]
            )

    _shared(work, count, threads)
    return shares


def pack_bits(bits: U8) -> U8:
    """uint8[N] of 0 and 1 -> uint8[ceil(N/8)], first bit lowest, as sent on the wire."""
    return np.packbits(bits, bitorder="little")


def unpack_bits(packed: U8, count: int) -> U8:
    """Inverse of `pack_bits`."""
    return np.unpackbits(packed, count=count, bitorder="little")


def _hashes(hash_key: bytes, rows: int) -> tuple[Callable[[U64], U64], Callable[[U64], U64]]:
    """AES of a contiguous uint64[<= rows, 2] under the tree key and the leaf key, into one shared buffer."""
    if len(hash_key) != HASH_KEY_BYTES:
        raise ProtocolError("wrong hash key", got=f"{len(hash_key)} bytes", allowed=f"{HASH_KEY_BYTES} bytes")
    output = np.empty(rows * BLOCK_BYTES + BLOCK_BYTES - 1, np.uint8)  # update_into asks for one spare block
    blocks = output[: rows * BLOCK_BYTES].view(np.uint64).reshape(rows, 2)

    def under(key: bytes) -> Callable[[U64], U64]:
        # Electronic code book here is the bare block cipher that the hash is built from, not a mode.
        aes = Cipher(algorithms.AES(key), modes.ECB()).encryptor()

        def encrypt(sigma: U64) -> U64:
            aes.update_into(sigma.reshape(-1).view(np.uint8).data, output.data)
            return blocks[: sigma.shape[0]]

        return encrypt

    return under(hash_key[:BLOCK_BYTES]), under(hash_key[BLOCK_BYTES:])


def _shared(work: Callable[[int, int], None], count: int, threads: int) -> None:
    """Call work(start, stop) over 0..count in chunks, on `threads` threads."""
    if threads <= 1 or count <= TILE:
        work(0, count)
        return
    over_chunks(work, count, min(CHUNK, -(-count // threads)), threads)


def _check(name: str, array: U8 | U64, dtype: type, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        raise ProtocolError(
            f"`{name}` does not fit the other key material",
            got=f"{array.dtype}{list(array.shape)}{'' if array.flags.c_contiguous else ', not contiguous'}",
            allowed=f"contiguous {np.dtype(dtype)}{list(shape)}",
        )
