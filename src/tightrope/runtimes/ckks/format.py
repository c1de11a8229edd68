"""The bytes of ciphertexts and keys as Lattigo v6 writes them, checked before the library reads them.

The library's reader recurses without end on input that is too short, which kills the process, and allocates
what lengths inside ask for. So every length in what a peer sends is compared with the only one it can have.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from tightrope.errors import ProtocolError
from tightrope.runtimes.ckks.parameters import Parameters

METADATA_BYTES = 278  # a flag and JSON: the scale with a fixed number of digits at #, log2(slots) at ?
METADATA = (
    b'\x01{"PlaintextMetaData":{"Scale":{"Value":"#","Mod":"0.000000000000000000000000000000000000000e+00"},'
    b'"IsBatched":"0x01","IsBitReversed":"0x00","LogDimensions":["0x00","0x?"]},'
    b'"CiphertextMetaData":{"IsNTT":"0x01","IsMontgomery":"0x00"}}'
)
WORD = struct.Struct("<Q")


def ciphertext_size(parameters: Parameters, level: int) -> int:
    """Bytes of a ciphertext: the metadata, the numbers, and the lengths between them."""
    return METADATA_BYTES + parameters.ciphertext_bytes(level) + 8 * (1 + 2 * (1 + level + 1))


def key_size(parameters: Parameters, *, element: bool) -> int:
    """Bytes of a Galois key (`element`) or a relinearisation key."""
    q, p, digits = len(parameters.q_bits), len(parameters.p_bits), parameters.digits
    lengths = 2 + digits * (2 + 2 * (2 + q + p))
    return parameters.key_bytes + 8 * (lengths + 2 * element)


def check_ciphertext(data: bytes, parameters: Parameters, where: str) -> int:
    """The level of a ciphertext. Raises ProtocolError unless every length in it is right."""
    rows = (len(data) - METADATA_BYTES - 24) // (2 * (8 + (8 << parameters.log_n)))
    if not 1 <= rows <= len(parameters.q_bits) or len(data) != ciphertext_size(parameters, rows - 1):
        raise _damaged("the ciphertext is truncated or of other parameters", where, f"{len(data)} bytes")
    _check_metadata(data, parameters, where)
    _check_lengths(data, METADATA_BYTES, _polynomials(2, [rows], 1 << parameters.log_n), where)
    return rows - 1


def check_key(data: bytes, parameters: Parameters, element: int | None, where: str) -> None:
    """Raises ProtocolError unless it is a key for this Galois element (None: for relinearisation)."""
    size = key_size(parameters, element=element is not None)
    if len(data) != size:
        raise _damaged("the key is truncated or of other parameters", where, f"{len(data)} of {size} bytes")
    at = 0
    if element is not None:
        if WORD.unpack_from(data)[0] != element or WORD.unpack_from(data, 8)[0] != 2 << parameters.log_n:
            raise _damaged("the key is for another rotation", where, f"element {WORD.unpack_from(data)[0]}")
        at = 16
    _check_lengths(data, at, _key_lengths(parameters), where)


Lengths = Iterator[tuple[int, int]]  # a length, and how many bytes of numbers follow it


def _key_lengths(parameters: Parameters) -> Lengths:
    yield 0, 0  # no base-two decomposition
    yield parameters.digits, 0
    rows = [len(parameters.q_bits), len(parameters.p_bits)]
    for _ in range(parameters.digits):
        yield 1, 0
        yield from _polynomials(2, rows, 1 << parameters.log_n)


def _polynomials(count: int, rows: list[int], degree: int) -> Lengths:
    yield count, 0
    for _ in range(count):
        for part in rows:
            yield part, 0
            for _ in range(part):
                yield degree, 8 * degree


def _check_lengths(data: bytes, at: int, lengths: Lengths, where: str) -> None:
    for length, numbers in lengths:
        if WORD.unpack_from(data, at)[0] != length:
            raise _damaged(
                "a length inside is wrong", where, f"{WORD.unpack_from(data, at)[0]}, not {length}"
            )
        at += 8 + numbers


def _check_metadata(data: bytes, parameters: Parameters, where: str) -> None:
    own = METADATA.replace(b"?", f"{parameters.log_n - 1:02x}".encode())
    before, after = own.split(b"#")
    digits = data[len(before) : METADATA_BYTES - len(after)]
    try:
        scale = float(digits)
    except ValueError:
        scale = 0.0
    known = data.startswith(before) and data[METADATA_BYTES - len(after) : METADATA_BYTES] == after
    if not known or not 0.5 < scale * 2.0**-parameters.scale_bits < 2.0:
        raise _damaged("the ciphertext's metadata is not as it must be", where, f"scale {scale:.3g}")


def _damaged(what: str, where: str, got: str) -> ProtocolError:
    return ProtocolError(what, where=where, got=got, fix="run the same release of tightrope on both sides")
