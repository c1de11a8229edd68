"""DReLU by function secret sharing: correct on every input, and one key alone says nothing."""

from __future__ import annotations

from dataclasses import dataclass

import halftree_reference as reference
import numpy as np
import pytest
from numpy.typing import NDArray
from randomness import Material
from scipy.stats import chi2

from tightrope.errors import ProtocolError
from tightrope.runtimes.mpc import fss

U8 = NDArray[np.uint8]
U64 = NDArray[np.uint64]
FALSE_ALARM = 1e-9


@dataclass(frozen=True)
class Batch:
    n: int
    c: U8
    roots: tuple[U64, U64]
    bits: tuple[U8, U8]
    words: U64
    key: bytes

    def shares(self, xhat: U64, threads: int = 1) -> tuple[U8, U8]:
        def share(party: int) -> U8:
            root, bit = self.roots[party], self.bits[party]
            return fss.evaluate(party, xhat, self.n, root, self.words, bit, self.key, threads=threads)

        return share(0), share(1)

    def drelu(self, xhat: U64, threads: int = 1) -> U8:
        first, second = self.shares(xhat, threads)
        return first ^ second ^ self.c


def batch(r: U64, n: int, seed: int = 1, threads: int = 1) -> Batch:
    source = Material(seed)
    count = len(r)
    c, bit0 = source.bits(count), source.bits(count)
    roots = source.words(count, 2), source.words(count, 2)
    key = source.raw(32)
    words, bit1 = fss.gen(r, c, n, *roots, bit0, key, threads=threads)
    return Batch(n, c, roots, (bit0, bit1), words, key)


def sign_of(x: U64, n: int) -> U8:
    """[x >= 0] of the low n bits read as a signed number, by numpy's own signed comparison."""
    return ((x << np.uint64(64 - n)).view(np.int64) >= 0).astype(np.uint8)


@pytest.mark.parametrize("n", range(2, 11))
def test_every_mask_and_every_input(n: int) -> None:
    r = np.arange(1 << n, dtype=np.uint64)
    keys = batch(r, n)
    for xhat in range(1 << n):
        public = np.full(1 << n, xhat, np.uint64)
        np.testing.assert_array_equal(keys.drelu(public), sign_of(public - r, n))


@pytest.mark.parametrize("n", [4, 9, 10])
def test_one_key_at_several_points(n: int) -> None:
    """As a gate with several thresholds reads it: every point has its own output mask and constant bits."""
    r = np.arange(1 << n, dtype=np.uint64)
    source, uses = Material(n), 3
    c, bit0 = source.bits(uses * len(r)), source.bits(uses * len(r))
    roots, key = (source.words(len(r), 2), source.words(len(r), 2)), source.raw(32)
    words, bit1 = fss.gen(r, c, n, *roots, bit0, key)
    points = [r + np.uint64(offset) for offset in (0, 3, (1 << n) - 5)]
    for x, *own in zip(points, *(np.split(bits, uses) for bits in (bit0, bit1, c)), strict=True):
        shares = [fss.evaluate(p, x, n, roots[p], words, own[p], key) for p in (0, 1)]
        np.testing.assert_array_equal(shares[0] ^ shares[1] ^ own[2], sign_of(x - r, n))
    with pytest.raises(ProtocolError, match="does not fit"):
        fss.gen(r, c[:-1], n, *roots, bit0, key)


@pytest.mark.parametrize(
    ("n", "count"),
    [(n, 1 << 20) for n in (12, 16, 20, 32, 48, 64)]
    + [pytest.param(n, 10_000_000, marks=pytest.mark.slow) for n in (12, 16, 20, 32, 48, 64)],
)
def test_random_inputs(n: int, count: int) -> None:
    source = Material(1000 + n)
    for part in range(0, count, 1 << 17):
        size = min(1 << 17, count - part)
        r, x = source.words(size), source.words(size)
        x[::2] >>= np.uint64(65 - n)  # half of them small and nonnegative, so that both signs stay frequent
        keys = batch(r, n, seed=part + n, threads=2)
        np.testing.assert_array_equal(keys.drelu(x + r, threads=2), sign_of(x, n))


@pytest.mark.parametrize("n", [2, 3, 7, 8, 9, 12, 15, 16, 20, 31, 32, 33, 48, 63, 64])
def test_edge_values_under_edge_masks(n: int) -> None:
    top, full = 1 << (n - 1), (1 << n) - 1
    values = sorted({v & full for v in (0, 1, 2, -1, -2, top, top - 1, top + 1, -top + 1, 127, 128, 129)})
    masks = np.array([*values, *(int(v) & full for v in Material(n).words(20))], np.uint64)
    x, r = (grid.ravel() for grid in np.meshgrid(np.array(values, np.uint64), masks))
    np.testing.assert_array_equal(batch(r, n).drelu(x + r), sign_of(x, n))


@pytest.mark.parametrize("n", [2, 5, 8, 9, 13, 20, 40, 64])
def test_equals_the_reference_written_from_the_paper(n: int) -> None:
    r, x = Material(5).words(12), Material(6).words(12)
    keys = batch(r, n)
    low = (1 << (n - 1)) - 1
    shares = keys.shares(x)
    for i in range(12):
        s0, s1 = (int(root[i, 0]) | int(root[i, 1]) << 64 for root in keys.roots)
        words = reference.gen(int(r[i]) & low, n - 1, s0, s1, keys.key)
        assert words == [int(w[0]) | int(w[1]) << 64 for w in keys.words[:, i]]
        for party, s in enumerate((s0, s1)):
            share = reference.evaluate(party, int(x[i]) & low, n - 1, s, words, keys.key)
            sign = int(x[i]) >> (n - 1) & party
            assert shares[party][i] == share ^ sign ^ int(keys.bits[party][i])


def test_tiles_and_threads_do_not_matter() -> None:
    count = 3 * fss.CHUNK + 17
    r, x = Material(1).words(count), Material(2).words(count)
    one, two = batch(r, 12), batch(r, 12, threads=2)
    np.testing.assert_array_equal(one.words, two.words)
    np.testing.assert_array_equal(one.shares(x)[1], two.shares(x, threads=3)[1])


def test_nothing_and_one_element() -> None:
    assert batch(np.empty(0, np.uint64), 20).drelu(np.empty(0, np.uint64)).shape == (0,)
    assert batch(np.array([3], np.uint64), 20).drelu(np.array([3], np.uint64)).tolist() == [1]


def test_sizes() -> None:
    assert [fss.word_levels(n) for n in (2, 8, 9, 20, 64)] == [1, 1, 2, 13, 57]
    assert fss.words_bytes(20, 1000) == batch(Material(1).words(1000), 20).words.nbytes == 208_000


def byte_statistic(data: bytes) -> float:
    """Pearson's chi-square of byte values against uniform: 255 degrees of freedom."""
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    return float(((counts - len(data) / 256) ** 2).sum() / (len(data) / 256))


def worst_bit(view: NDArray[np.generic]) -> float:
    """Over all bit positions of a key, the largest |z| of the count of ones over the keys (axis 0)."""
    ones = np.unpackbits(view.view(np.uint8).reshape(len(view), -1), axis=1).mean(axis=0)
    return float(np.abs(ones - 0.5).max() * 2 * np.sqrt(len(view)))


@pytest.mark.parametrize("alpha", [0, 1, (1 << 19) - 1, (1 << 20) - 1, 0x5A5A5])
@pytest.mark.parametrize("party", [0, 1])
def test_the_key_of_one_party_is_uniform(alpha: int, party: int) -> None:
    count, n = 1 << 14, 20
    keys = batch(np.full(count, alpha, np.uint64), n, seed=alpha + party)
    words = np.ascontiguousarray(keys.words.transpose(1, 0, 2)).reshape(count, -1)
    # What the party can compute itself must not strip the mask: the first level against its own root.
    own = [
        reference.ccr_hash(keys.key[:16], (int(a) & ~1 | party) | int(b) << 64)
        for a, b in keys.roots[party][:2048]
    ]
    hashed = np.array([[h & reference.LOW, h >> 64] for h in own], np.uint64)
    limit = chi2.isf(FALSE_ALARM, 255)
    assert byte_statistic(words.tobytes()) < limit
    assert byte_statistic((words[:2048, :2] ^ hashed).tobytes()) < limit
    assert worst_bit(words) < 8  # 13 * 128 positions, each beyond 8 sigma with probability 1e-15
    assert worst_bit(np.ascontiguousarray(words ^ np.roll(words, 1, axis=0))) < 8
    assert abs(float(keys.bits[party].mean()) - 0.5) * 2 * np.sqrt(count) < 8
    assert abs(float(keys.shares(np.full(count, 77, np.uint64))[party].mean()) - 0.5) * 2 * np.sqrt(count) < 8


def test_the_uniformity_test_sees_a_known_offset_between_the_roots() -> None:
    count = 2048
    source = Material(9)
    root0, zeros = source.words(count, 2), np.zeros(count, np.uint8)
    offset = root0 ^ np.array([1, 2], np.uint64)
    key = source.raw(32)
    words, _ = fss.gen(np.zeros(count, np.uint64), zeros, 8, root0, root0, zeros, key)
    other, _ = fss.gen(np.zeros(count, np.uint64), zeros, 8, root0, offset, zeros, key)
    both = [
        reference.ccr_hash(key[16:], s & ~1) ^ reference.ccr_hash(key[16:], s | 1)
        for s in (int(a) | int(b) << 64 for a, b in root0)
    ]
    stripped = words[0] ^ np.array([[h & reference.LOW, h >> 64] for h in both], np.uint64)
    assert byte_statistic(stripped.tobytes()) > chi2.isf(FALSE_ALARM, 255)
    assert byte_statistic(other.tobytes()) < chi2.isf(FALSE_ALARM, 255)


def test_other_seeds_give_independent_keys() -> None:
    r = np.full(1 << 14, 12345, np.uint64)
    first, second = batch(r, 20, seed=1).words, batch(r, 20, seed=2).words
    assert not np.any((first == second).all(axis=2))
    distance = np.bitwise_count(first ^ second).sum(axis=(0, 2)) / (13 * 128)
    assert abs(float(distance.mean()) - 0.5) < 8 * 0.5 / np.sqrt(13 * 128 * len(r))


@pytest.mark.parametrize("level", [0, 5, 12])
def test_a_damaged_key_gives_wrong_signs(level: int) -> None:
    r, x = Material(3).words(4096), Material(4).words(4096)
    keys = batch(r, 20)
    if level:  # deep words only act where xhat follows alpha's path
        x[:] = np.uint64(1 << 19)
    keys.words[level] ^= np.uint64(0xFFFF_0F0F_3333_5555)
    wrong = np.mean(keys.drelu(x + r) != sign_of(x, 20))
    assert wrong > 0.2


def test_a_foreign_hash_key_gives_wrong_signs() -> None:
    r, x = Material(3).words(4096), Material(4).words(4096)
    keys = batch(r, 20)
    other = Batch(20, keys.c, keys.roots, keys.bits, keys.words, bytes(32))
    assert np.mean(other.drelu(x + r) != sign_of(x, 20)) > 0.2


@pytest.mark.parametrize("n", [1, 0, 65, -3])
def test_widths_out_of_range(n: int) -> None:
    with pytest.raises(ProtocolError, match="2 to 64"):
        batch(Material(1).words(4), n)


def test_material_of_the_wrong_shape_is_refused() -> None:
    keys = batch(Material(1).words(8), 20)
    x = Material(2).words(8)
    with pytest.raises(ProtocolError, match="words"):
        fss.evaluate(0, x, 16, keys.roots[0], keys.words, keys.bits[0], keys.key)
    with pytest.raises(ProtocolError, match="root"):
        fss.evaluate(0, x, 20, keys.roots[0][:7], keys.words, keys.bits[0], keys.key)
    with pytest.raises(ProtocolError, match="xhat"):
        fss.evaluate(0, x.astype(np.int64), 20, keys.roots[0], keys.words, keys.bits[0], keys.key)
    with pytest.raises(ProtocolError, match="hash key"):
        fss.evaluate(0, x, 20, keys.roots[0], keys.words, keys.bits[0], bytes(16))
    with pytest.raises(ProtocolError, match="0 or 1"):
        fss.evaluate(2, x, 20, keys.roots[0], keys.words, keys.bits[0], keys.key)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_bits_survive_packing(count: int) -> None:
    bits = Material(count).bits(count)
    packed = fss.pack_bits(bits)
    assert packed.nbytes == -(-count // 8)
    np.testing.assert_array_equal(fss.unpack_bits(packed, count), bits)
