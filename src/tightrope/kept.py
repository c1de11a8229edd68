"""What an interrupted measurement finds again: one file of arrays per site, valid under one key."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tightrope.errors import BundleError
from tightrope.types import atomic_write

Arrays = Mapping[str, NDArray[Any]]


def read(workdir: Path | None, name: str, key: str) -> Arrays | None:
    """The arrays saved under `name`; None when there are none, or they belong to another measurement.

    Raises BundleError for a damaged file.
    """
    path = workdir / f"{name}.npz" if workdir is not None else None
    if path is None or not path.exists():
        return None
    try:
        with path.open("rb") as f, np.load(f, allow_pickle=False) as saved:
            if str(saved["key"]) != key:
                return None
            return {part: saved[part] for part in saved.files if part != "key"}
    except Exception as error:  # a damaged zip raises almost anything
        raise BundleError(
            "a saved measurement is damaged",
            where=str(path),
            got=str(error),
            fix="delete the file; it is measured again",
        ) from error


def digest(images: Iterable[Any]) -> str:
    """SHA-256 of batches of tensors: the part of a key that says what was measured on."""
    found = hashlib.sha256()
    for x in images:
        found.update(x.contiguous().numpy().tobytes())
    return found.hexdigest()


def write(workdir: Path | None, name: str, key: str, arrays: Arrays) -> None:
    if workdir is not None:
        named: dict[str, Any] = {"key": np.array(key)} | dict(arrays)
        atomic_write(workdir / f"{name}.npz", lambda f: np.savez(f, **named))
