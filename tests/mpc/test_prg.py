"""Pairwise streams: the documented construction, exactly, and never the same keystream twice."""

from __future__ import annotations

import hashlib
import hmac
import struct

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from tightrope.errors import ProtocolError
from tightrope.runtimes.mpc.packing import packed, unpacked
from tightrope.runtimes.mpc.prg import CHUNK_BYTES, Stream, Streams

SEED, SESSION = bytes(range(32)), bytes(range(16))


def stream_key(label: str, op: int, counter: int) -> bytes:
    """HKDF (RFC 5869) from the standard library's HMAC."""
    name = label.encode()
    info = b"tightrope mpc stream v1" + struct.pack("<HIQ", len(name), op, counter) + name
    return hmac.digest(hmac.digest(SESSION, SEED, hashlib.sha256), info + b"\x01", hashlib.sha256)


def keystream(key: bytes, blocks: int) -> bytes:
    """Counter mode from single-block AES."""
    counters = b"".join(i.to_bytes(16, "big") for i in range(blocks))
    return Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(counters)


def test_is_the_documented_construction() -> None:
    want = keystream(stream_key("mask", 7, 3), 40)
    stream = Streams(SEED, SESSION).open("mask", 7, 3)
    got = stream.ring((2, 3)).tobytes() + stream.blocks(2).tobytes() + stream.raw(5)
    assert got == want[: len(got)]
    bits = stream.bits(19)
    whole = np.packbits(bits, bitorder="little")
    assert whole[:2].tobytes() == want[85:87] and whole[2] == want[87] & 0b111
    assert stream.raw(3) == want[88:91]


def test_first_block_of_counter_mode_is_the_aes_vector() -> None:
    """AES-256 of the zero block under the zero key (NIST CAVP ECBGFSbox/KeySbox family)."""
    assert Stream(bytes(32)).raw(16).hex() == "dc95c078a2408989ad48a21492842087"


@pytest.mark.parametrize("count", [0, 1, CHUNK_BYTES // 8 - 1, CHUNK_BYTES // 8 + 1, CHUNK_BYTES])
def test_chunks_join_into_one_keystream(count: int) -> None:
    whole = Streams(SEED, SESSION).open("x", 0, 0).ring(count).tobytes()
    assert whole == keystream(stream_key("x", 0, 0), len(whole) // 16 + 1)[: len(whole)]


@pytest.mark.parametrize("bits", [40, 48])
def test_elements_smaller_than_a_word_take_their_bytes_of_the_keystream(bits: int) -> None:
    """Little-endian, one after the other, and only their low bits travel."""
    size = bits // 8
    want = keystream(stream_key("x", 0, 0), 8)  # 15 elements: one whole group, and seven that are not
    stream = Streams(SEED, SESSION).open("x", 0, 0)
    got = stream.ring((3, 5), bits)
    assert got.shape == (3, 5) and got.max() < 1 << bits
    assert got.reshape(-1).tolist() == [
        int.from_bytes(want[size * k : size * (k + 1)], "little") for k in range(15)
    ]
    assert stream.raw(4) == want[15 * size : 15 * size + 4]
    above = got + np.uint64(5 << bits)
    assert packed(above, bits).tobytes() == want[: 15 * size]
    assert (unpacked(packed(above, bits), bits) == got.reshape(-1)).all()


labels = st.text(max_size=6)
uses = st.tuples(labels, st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))


@settings(max_examples=200, deadline=None)
@given(uses, uses)
def test_other_uses_have_other_keystreams(one: tuple[str, int, int], two: tuple[str, int, int]) -> None:
    first, second = (Streams(SEED, SESSION).open(*use).raw(16) for use in (one, two))
    assert (first == second) == (one == two)


def test_seeds_and_sessions_separate_streams() -> None:
    outputs = {
        Streams(seed, session).open("a", 0, 0).raw(16)
        for seed in (SEED, bytes(32))
        for session in (SESSION, bytes(16))
    }
    assert len(outputs) == 4


def test_a_use_cannot_be_repeated_or_rewound() -> None:
    streams = Streams(SEED, SESSION)
    streams.open("mask", 1, 0)
    streams.open("mask", 1, 5)
    streams.open("mask", 2, 0)
    streams.open("other", 1, 0)
    for counter in (0, 4, 5):
        with pytest.raises(ProtocolError, match="twice"):
            streams.open("mask", 1, counter)
    streams.open("mask", 1, 6)


def test_material_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ProtocolError, match="seed"):
        Streams(bytes(16), SESSION)
    with pytest.raises(ProtocolError, match="session id"):
        Streams(SEED, b"")


def test_output_is_uniform() -> None:
    stream = Streams(SEED, SESSION).open("mask", 0, 0)
    counts = np.bincount(stream.ring(1 << 17).view(np.uint8), minlength=256)
    assert ((counts - 4096) ** 2 / 4096).sum() < chi2.isf(1e-9, 255)
    assert abs(int(stream.bits(1 << 20).sum()) - (1 << 19)) < 6.5 * 512
