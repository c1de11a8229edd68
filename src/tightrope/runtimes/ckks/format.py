"""The bytes of ciphertexts and keys as Lattigo v6 writes them, checked before the library reads them.

The library's reader recurses without end on input that is too short, which kills the process, and allocates
what lengths inside ask for. So every length in what a peer sends is compared with the only one it can have.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from mmap import mmap

from tightrope.errors import ProtocolError
from tightrope.runtimes.ckks.circuit import Circuit
from tightrope.runtimes.ckks.parameters import Parameters

METADATA_BYTES = 278  # a flag and JSON: the scale with a fixed number of digits at #, log2(slots) at ?
METADATA = (
    b'\x01{"PlaintextMetaData":{"Scale":{"Value":"#","Mod":"0.000000000000000000000000000000000000000e+00"},'
    b'"IsBatched":"0x01","IsBitReversed":"0x00","LogDimensions":["0x00","0x?"]},'
    b'"CiphertextMetaData":{"IsNTT":"0x01","IsMontgomery":"0x00"}}'
)
SCALE_DIGITS = METADATA_BYTES - len(METADATA)
WORD = struct.Struct("<Q")
COUNT = struct.Struct("<I")
BOOT_FLAGS = b"\0\0\0\0\1"  # no keys for other rings; then one from the dense secret to the sparse one
HAS = b"\1"


def ciphertext_size(parameters: Parameters, level: int) -> int:
    """Bytes of a ciphertext: the metadata, the numbers, and the lengths between them."""
    return METADATA_BYTES + parameters.ciphertext_bytes(level) + 8 * (1 + 2 * (1 + level + 1))


def key_size(parameters: Parameters, *, element: bool) -> int:
    """Bytes of a Galois key (`element`) or a relinearisation key."""
    q, p = len(parameters.q_bits), len(parameters.p_bits)
    return _key_size(parameters.log_n, parameters.digits, q, p) + 16 * element


def _key_size(log_n: int, digits: int, q: int, p: int) -> int:
    numbers = digits * 2 * (q + p) * (8 << log_n)
    return numbers + 8 * (2 + digits * (2 + 2 * (2 + q + p)))


def boot_key_size(circuit: Circuit) -> int:
    """Bytes of all keys of bootstrapping: two that change the secret, then a set as for the other steps."""
    if not circuit.boot_slots:
        return 0
    ring = circuit.parameters.during_bootstrap()
    elements = len(circuit.boot_elements())
    set_size = 2 + COUNT.size + elements * (8 + key_size(ring, element=True))
    sparse = _key_size(ring.log_n, 1, 1, 1)
    return len(BOOT_FLAGS) + sparse + 1 + key_size(ring, element=False) * 2 + 1 + set_size


def check_ciphertext(data: bytes, parameters: Parameters, where: str) -> int:
    """The level of a ciphertext. Raises ProtocolError unless every length in it is right."""
    rows = (len(data) - METADATA_BYTES - 24) // (2 * (8 + (8 << parameters.log_n)))
    if not 1 <= rows <= len(parameters.q_bits) or len(data) != ciphertext_size(parameters, rows - 1):
        raise _damaged("the ciphertext is truncated or of other parameters", where, f"{len(data)} bytes")
    _check_metadata(data, parameters, where)
    _check_lengths(data, METADATA_BYTES, _polynomials(2, [rows], 1 << parameters.log_n), where)
    return rows - 1


def scale_of(data: bytes) -> float:
    """The scale that a checked ciphertext has."""
    start = METADATA.index(b"#")
    return float(data[start : start + SCALE_DIGITS])


def with_scale(data: bytes, scale: float) -> bytes:
    """The same numbers as a ciphertext of this scale."""
    start = METADATA.index(b"#")
    text = format(scale, f".{SCALE_DIGITS - 6}e").encode()
    return data[:start] + text + data[start + SCALE_DIGITS :]


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


def check_boot_keys(data: bytes | mmap, circuit: Circuit, where: str) -> None:
    """Raises ProtocolError unless these are the keys of the circuit's bootstraps, by every length in them."""
    if len(data) != boot_key_size(circuit):
        raise _damaged(
            "the keys are truncated or of other parameters",
            where,
            f"{len(data)} of {boot_key_size(circuit)} bytes",
        )
    ring = circuit.parameters.during_bootstrap()
    at = _expect(data, 0, BOOT_FLAGS, where)
    at = _check_lengths(data, at, _lengths_of_key(1, [1, 1], 1 << ring.log_n), where)
    at = _check_lengths(data, _expect(data, at, HAS, where), _key_lengths(ring), where)
    at = _check_lengths(data, _expect(data, at, HAS * 2, where), _key_lengths(ring), where)
    elements = circuit.boot_elements()
    at = _expect(data, at, HAS + COUNT.pack(len(elements)), where)
    for element in elements:
        head = WORD.pack(element) * 2 + WORD.pack(2 << ring.log_n)
        at = _check_lengths(data, _expect(data, at, head, where), _key_lengths(ring), where)


def _expect(data: bytes | mmap, at: int, wanted: bytes, where: str) -> int:
    """Where what follows `wanted` begins."""
    if data[at : at + len(wanted)] != wanted:
        raise _damaged("these are not the keys that were asked for", where, data[at : at + len(wanted)].hex())
    return at + len(wanted)


Lengths = Iterator[tuple[int, int]]  # a length, and how many bytes of numbers follow it


def _key_lengths(parameters: Parameters) -> Lengths:
    rows = [len(parameters.q_bits), len(parameters.p_bits)]
    return _lengths_of_key(parameters.digits, rows, 1 << parameters.log_n)


def _lengths_of_key(digits: int, rows: list[int], degree: int) -> Lengths:
    yield 0, 0  # no base-two decomposition
    yield digits, 0
    for _ in range(digits):
        yield 1, 0
        yield from _polynomials(2, rows, degree)


def _polynomials(count: int, rows: list[int], degree: int) -> Lengths:
    yield count, 0
    for _ in range(count):
        for part in rows:
            yield part, 0
            for _ in range(part):
                yield degree, 8 * degree


def _check_lengths(data: bytes | mmap, at: int, lengths: Lengths, where: str) -> int:
    """Where what follows begins."""
    for length, numbers in lengths:
        if WORD.unpack_from(data, at)[0] != length:
            raise _damaged(
                "a length inside is wrong", where, f"{WORD.unpack_from(data, at)[0]}, not {length}"
            )
        at += 8 + numbers
    return at


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
