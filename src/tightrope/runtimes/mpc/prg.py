"""Pseudorandom streams that two parties expand from one shared seed, each keystream used once.

Key of a stream: HKDF-SHA256 (RFC 5869) of the pairwise seed with salt = session id and info = the encoding of
(label, op, counter); the stream is the AES-256 counter-mode keystream under that key, from block 0 (NIST SP
800-38A, section 6.5). Two different (session, label, op, counter) therefore have independent keys; the same
one asked for twice is refused, because reusing a mask reveals the difference of two secrets.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from tightrope.errors import ProtocolError
from tightrope.runtimes.mpc.packing import unpacked

U8 = NDArray[np.uint8]
U64 = NDArray[np.uint64]

WORDS = {64: np.uint64, 48: np.uint64, 40: np.uint64, 32: np.uint32}  # what holds an element of a ring
SEED_BYTES = 32
SESSION_BYTES = 16
CHUNK_BYTES = 1 << 18  # zeros encrypted per call: large enough to hide the call, small enough for the cache


class Stream:
    """One keystream, used front to back; both holders of the seed draw the same things in the same order."""

    def __init__(self, key: bytes) -> None:
        self._aes = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        self._zeros = memoryview(bytes(CHUNK_BYTES))

    def fill(self, out: NDArray[Any]) -> None:
        """Overwrite a contiguous array with the next out.nbytes bytes of the keystream, without copies."""
        target = out.reshape(-1).view(np.uint8).data
        for start in range(0, len(target), CHUNK_BYTES):
            part = target[start : start + CHUNK_BYTES]
            self._aes.update_into(self._zeros[: len(part)], part)

    def ring(self, shape: int | Sequence[int], bits: int = 64) -> NDArray[Any]:
        """Uniform elements of Z_2^bits, WORDS[bits][shape]; they take bits/8 bytes of the keystream each."""
        out = np.empty(shape, WORDS[bits])
        if bits == 8 * out.itemsize:
            self.fill(out)
            return out
        raw = np.empty(out.size * bits // 8, np.uint8)
        self.fill(raw)
        return unpacked(raw, bits).reshape(out.shape)

    def blocks(self, count: int) -> U64:
        """Uniform 128-bit blocks, uint64[count, 2]."""
        return self.ring((count, 2))

    def bits(self, count: int) -> U8:
        """Uniform bits, uint8[count] of 0 and 1; they take ceil(count/8) bytes of the keystream."""
        packed = np.empty((count + 7) // 8, np.uint8)
        self.fill(packed)
        return np.unpackbits(packed, count=count, bitorder="little")

    def raw(self, count: int) -> bytes:
        """The next `count` bytes, for keys."""
        out = np.empty(count, np.uint8)
        self.fill(out)
        return out.tobytes()


class Streams:
    """All streams of one pair of parties in one session.

    seed: 32 secret bytes that only the two parties have; session: 16 public bytes, new for every session.
    Raises ProtocolError if either has another length.
    """

    def __init__(self, seed: bytes, session: bytes) -> None:
        for name, value, size in (("seed", seed, SEED_BYTES), ("session id", session, SESSION_BYTES)):
            if len(value) != size:
                raise ProtocolError(f"wrong {name}", got=f"{len(value)} bytes", allowed=f"{size} bytes")
        self._seed = seed
        self._session = session
        self._next: dict[tuple[str, int], int] = {}

    def open(self, label: str, op: int, counter: int) -> Stream:
        """The stream of one use of one op: op indexes the Program, counter the inference.

        Raises ProtocolError unless the counter is greater than every one opened before for (label, op): that
        is what makes each keystream single-use, and it needs one number of memory per (label, op).
        """
        allowed = self._next.get((label, op), 0)
        if counter < allowed:
            raise ProtocolError(
                "a one-time mask was asked for twice",
                where=f"stream {label}, op {op}",
                got=f"counter {counter}",
                allowed=f"{allowed} or more",
            )
        self._next[label, op] = counter + 1
        name = label.encode()
        info = b"tightrope mpc stream v1" + struct.pack("<HIQ", len(name), op, counter) + name
        return Stream(HKDF(algorithm=SHA256(), length=32, salt=self._session, info=info).derive(self._seed))
