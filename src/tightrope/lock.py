"""Whether a directory can be written, and by one writer at a time: a lock ends with its process."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tightrope.errors import BundleError, InputError

NAME = ".lock"


def check_writable(directory: Path, fix: str = "another --out") -> None:
    """Raise InputError unless `directory` can be written, or made; nothing is left there."""
    there = next(p for p in (directory, *directory.absolute().parents) if os.path.lexists(p))
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        got = error.strerror if there == directory else f"{there}: {error.strerror}"
        raise InputError("nothing can be written there", where=str(directory), got=got, fix=fix) from error


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Nobody else gets this lock meanwhile; the file that carries it goes at the end.

    Raises BundleError at once when another process has it. A file left by a process that was killed does
    not block. Where the file system has no locks, nothing is locked.
    """
    path = directory / NAME
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _take(handle, directory, shared=False)
            if not _is(path, handle):  # its last holder removed it in between
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
        finally:
            os.close(handle)


def check_unlocked(directory: Path) -> None:
    """Raise BundleError when another process holds the lock."""
    try:
        handle = os.open(directory / NAME, os.O_RDWR)
    except OSError:  # no lock, or not ours to write: that is found out in its own time
        return
    try:
        _take(handle, directory, shared=True)
    finally:
        os.close(handle)


def _take(handle: int, directory: Path, *, shared: bool) -> None:
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BundleError(
            "another command is writing this bundle",
            where=str(directory),
            fix="wait until it ends, or work on a copy: tightrope solve --out",
        ) from None
    except OSError:  # a file system without locks
        return


def _is(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False
