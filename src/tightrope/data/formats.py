"""Readers of the two binary formats: IDX (MNIST family) and the CIFAR binary version."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tightrope.errors import InputError

Bytes = npt.NDArray[np.uint8]


def read_idx(path: Path) -> Bytes:
    """The uint8 array in an IDX file, gzipped if its name ends in .gz.

    Layout (yann.lecun.com/exdb/mnist): two zero bytes, type 0x08, number of dimensions, each dimension as
    big-endian uint32, then the values. Raises InputError, naming the file, when anything else is found.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError("cannot read the IDX file", where=str(path), got=str(error)) from error
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise InputError("not an IDX file of bytes", where=str(path), got=raw[:4].hex(), allowed="000008..")
    header = 4 + 4 * raw[3]
    if len(raw) < header:
        raise InputError("the IDX header is cut short", where=str(path), got=f"{len(raw)} bytes")
    shape = struct.unpack(f">{raw[3]}I", raw[4:header])
    values = np.frombuffer(raw, dtype=np.uint8, offset=header)
    if values.size != np.prod(shape, dtype=np.int64):
        raise InputError(
            "the IDX file does not hold what its header says",
            where=str(path),
            got=f"{values.size} bytes of values",
            allowed=f"{np.prod(shape, dtype=np.int64)} for the shape {shape}",
        )
    return values.reshape(shape)


def read_cifar(path: Path, label_bytes: int) -> tuple[Bytes, npt.NDArray[np.int64]]:
    """Images (N, 3, 32, 32) and labels (N,) of one .bin file of the CIFAR binary version.

    Each record is `label_bytes` labels (1 for CIFAR-10; 2, coarse then fine, for CIFAR-100: the last one is
    used) and 3072 pixels, channel by channel (www.cs.toronto.edu/~kriz/cifar.html).
    Raises InputError, naming the file, when it is not a whole number of records.
    """
    try:
        raw = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    except OSError as error:
        raise InputError("cannot read the CIFAR file", where=str(path), got=str(error)) from error
    record = label_bytes + 3072
    if raw.size == 0 or raw.size % record:
        raise InputError(
            "not a CIFAR binary file",
            where=str(path),
            got=f"{raw.size} bytes",
            allowed=f"a multiple of {record}",
        )
    rows = raw.reshape(-1, record)
    return rows[:, label_bytes:].reshape(-1, 3, 32, 32), rows[:, label_bytes - 1].astype(np.int64)
