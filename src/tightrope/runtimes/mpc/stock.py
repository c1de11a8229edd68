"""Material made ahead, on disk: lots of batches, each batch used once.

A lot is made by the dealer alone (`supply.LotMaker`): its frames for client and server, one file per batch
and party, each after the 32-byte seed of that party's streams for that batch. Handed over, it lies as

    DIRECTORY/seen             the names of all lots that ever came: none comes twice
    DIRECTORY/owner            a random name of this stock, by which the server keeps its clients apart
    DIRECTORY/LOT/lot.json     what the lot is for
    DIRECTORY/LOT/next         the number of the first batch that is not used
    DIRECTORY/LOT/000001       one batch, and behind it the digest that the dealer made

Single use rests on the order of `Lot.take`: `next` is on disk (fsync), then the file is mapped and unlinked
(fsync of the directory), and only then does anybody read it. A crash between wastes a batch and never gives
it twice; the seed goes with the file. What is given away is renamed and deleted, never kept. Files have mode
0600, directories 0700; one process at a time holds the directory's lock.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import re
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from tightrope.errors import InputError, ProtocolError
from tightrope.runtimes.mpc.prg import SESSION_BYTES
from tightrope.runtimes.mpc.settings import StockSettings
from tightrope.types import Json

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

SCHEMA = 1
NAME = re.compile(f"[0-9a-f]{{{2 * SESSION_BYTES}}}")
UNFINISHED, GIVEN = ".unfinished-", ".given-"
OURS = re.compile(f"({re.escape(UNFINISHED)}|{re.escape(GIVEN)})?{NAME.pattern}")  # no other name is touched
DIGEST_BYTES = 32
DAY_S = 86400.0


@dataclass(frozen=True)
class About:
    """What a lot is for. terms: program and protocol settings, which must be those of its use; weights_seed
    and weights: at the server, the seed of the mask of its weights and the SHA-256 of these."""

    terms: Mapping[str, Json]
    batch: int
    batches: int
    owner: str = ""
    weights_seed: str = field(default="", repr=False)
    weights: str = ""
    made: float = 0.0


@dataclass
class Lot:
    """A lot on disk; its name is also the session id of its streams."""

    path: Path
    about: About
    next: int
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def name(self) -> str:
        return self.path.name.removeprefix(GIVEN)

    @property
    def left(self) -> int:
        return self.about.batches - self.next + 1

    def take(self, number: int) -> mmap.mmap:
        """The material of batch `number`, which from now on does not exist on disk, nor any before it.

        Raises ProtocolError if it was used before, there is none, or it is damaged.
        """
        with self._lock, _reported(self):
            if not self.next <= number <= self.about.batches:
                raise ProtocolError(
                    "this batch's material is used or was never there",
                    where=f"lot {self.name[:8]}",
                    got=f"batch {number}",
                    allowed=f"{self.next} to {self.about.batches}",
                )
            write_private(self.path / "next", str(number + 1).encode())
            skipped, self.next = range(self.next, number), number + 1
            path = self.path / batch_file(number)
            with path.open("rb") as file:
                material = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            for used in (*skipped, number):
                (self.path / batch_file(used)).unlink(missing_ok=True)
            sync(self.path)
            whole = memoryview(material)
            seal = seal_of(self.name, number)
            seal.update(whole[:-DIGEST_BYTES])
            if seal.digest() != whole[-DIGEST_BYTES:]:
                raise ValueError("it is not what the dealer wrote for this batch")
        return material


@contextmanager
def _reported(lot: Lot) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise ProtocolError(
            "a batch's material cannot be read", where=f"lot {lot.name[:8]}", got=str(error)
        ) from error


def seal_of(lot: str, number: int) -> Hash:
    """What has to be updated with a batch's material to give the digest behind it."""
    return sha256(f"{lot} {number} ".encode())


def batch_file(number: int) -> str:
    return f"{number:06d}"


class Stock:
    """A directory of lots, held by one process; see the module.

    Raises InputError if another process holds it, others may read it, or it cannot be written.
    """

    def __init__(self, settings: StockSettings) -> None:
        self.settings = settings
        self.path = settings.directory
        self._guard = threading.RLock()
        self._promised = 0  # bytes of lots under way
        with _readable_errors(self.path):
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.path.stat()
            if found.st_mode & 0o077:
                raise InputError(
                    "others may read the stock", where=str(self.path), fix=f"chmod 700 {self.path}"
                )
            if found.st_uid != os.geteuid():
                raise InputError(
                    "the stock belongs to another user", where=str(self.path), got=f"user id {found.st_uid}",
                    allowed=os.geteuid(), fix="a directory of your own",
                )  # fmt: skip
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._lock)
                raise InputError(
                    "another process uses this stock", where=str(self.path), fix="wait, or another directory"
                ) from None
            try:
                self._lots = self._read()
                self.forget(lambda lot: lot.left == 0 or self._outdated(lot))
            except BaseException:
                self.close()
                raise

    def _read(self) -> dict[str, Lot]:
        """What is there, without what an interrupted process left or nobody can read for certain."""
        lots = {path: _load(path) for path in sorted(self.path.iterdir()) if OURS.fullmatch(path.name)}
        for path, lot in lots.items():
            if lot is None:
                _remove(path)
        if not (self.path / "owner").exists():
            write_private(self.path / "owner", secrets.token_hex(SESSION_BYTES).encode())
        self.owner = (self.path / "owner").read_text(errors="replace")
        if not NAME.fullmatch(self.owner):
            raise InputError(
                "the stock is damaged", where=str(self.path / "owner"), got=self.owner[:64],
                fix="a new directory; what is in this one cannot be used",
            )  # fmt: skip
        return {lot.name: lot for lot in lots.values() if lot is not None}

    def lots(self, terms: Mapping[str, Json], owner: str, weights: str = "") -> dict[str, Lot]:
        """Lots with material left that fit the program, the settings, and at the server its weights."""
        self.forget(self._outdated)
        with self._guard:
            return {
                name: lot
                for name, lot in self._lots.items()
                if lot.left > 0
                and lot.about.terms == terms
                and lot.about.owner == owner
                and lot.about.weights == weights
            }

    def get(self, name: str) -> Lot | None:
        """The lot of that name, if it is here."""
        with self._guard:
            return self._lots.get(name)

    def count(self, wanted: Callable[[Lot], bool]) -> int:
        with self._guard:
            return sum(1 for lot in self._lots.values() if wanted(lot))

    def forget(self, unwanted: Callable[[Lot], bool]) -> None:
        """Delete the lots that are unwanted."""
        with self._guard, _readable_errors(self.path):
            for name in [name for name, lot in self._lots.items() if unwanted(lot)]:
                _remove(self._out(self._lots.pop(name).path))

    def check_room(self, size_bytes: int) -> None:
        """Raises InputError unless the quota leaves size_bytes free, what is being added counted in full."""
        with self._guard:
            there = [
                f
                for f in self.path.rglob("*")
                if not f.relative_to(self.path).parts[0].startswith(UNFINISHED)
            ]
            used = self._promised + sum(_size(f) for f in there)
        if used + size_bytes > self.settings.quota_bytes:
            raise InputError(
                "the stock would exceed its quota",
                where=str(self.path),
                got=f"{used} bytes there, {size_bytes} more",
                allowed=f"quota_bytes = {self.settings.quota_bytes}",
                fix="a larger quota, fewer batches, or use up what is there",
            )

    @contextmanager
    def adding(self, name: str, about: About, size_bytes: int) -> Iterator[Path]:
        """A new directory for a lot; the lot exists, completely and on disk, once the block ends well.

        Raises InputError as `check_room`, ProtocolError for a name that is not one, or was here before.
        """
        if not NAME.fullmatch(name) or name in self._seen():
            raise ProtocolError("no name for a new lot", where=str(self.path), got=name[:64])
        with self._guard:
            self.check_room(size_bytes)
            self._promised += size_bytes
        unfinished = self.path / (UNFINISHED + name)
        try:
            with _readable_errors(self.path):
                unfinished.mkdir(mode=0o700)
                yield unfinished
                body = {"schema": SCHEMA, **vars(about), "terms": dict(about.terms), "made": time.time()}
                write_private(unfinished / "lot.json", json.dumps(body).encode())
                write_private(unfinished / "next", b"1")
                self._keep(unfinished, name)
        finally:
            _remove(unfinished)
            with self._guard:
                self._promised -= size_bytes

    def _keep(self, unfinished: Path, name: str) -> None:
        with self._guard:
            if name in (seen := self._seen()):
                raise ProtocolError("this lot came twice", where=str(self.path), got=name)
            write_private(self.path / "seen", "\n".join([*seen, name]).encode())
            unfinished.rename(self.path / name)
            sync(self.path)
            lot = _load(self.path / name)
            if lot is None:
                raise InputError("a lot cannot be read back", where=str(self.path / name))
            self._lots[name] = lot

    def claim(self, wanted: Callable[[Lot], bool]) -> Lot | None:
        """A lot to give away: from now on in no stock, whatever happens to it. `discard` it afterwards."""
        self.forget(self._outdated)
        with self._guard, _readable_errors(self.path):
            lot = next((lot for lot in self._lots.values() if wanted(lot)), None)
            if lot is not None:
                del self._lots[lot.name]
                lot.path = self._out(lot.path)
            return lot

    def discard(self, lot: Lot) -> None:
        _remove(lot.path)

    def close(self) -> None:
        os.close(self._lock)

    def _outdated(self, lot: Lot) -> bool:
        return lot.about.made < time.time() - self.settings.keep_days * DAY_S

    def _seen(self) -> list[str]:
        path = self.path / "seen"
        return path.read_text().split() if path.exists() else []

    def _out(self, path: Path) -> Path:
        """Rename a lot to what the next start deletes, on disk before this returns."""
        given = self.path / (GIVEN + path.name)
        path.rename(given)
        sync(self.path)
        return given


def write_private(path: Path, content: bytes) -> None:
    """Replace a file of mode 0600, so that after a crash it holds the old or the new content, on disk."""
    beside = path.with_name(f".{path.name}.new")
    handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Make the names in a directory, as they are now, survive a crash."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _size(path: Path) -> int:
    """Bytes of a file; 0 for a directory, or if it is gone by now."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _load(path: Path) -> Lot | None:
    """The lot in a directory, or None: whatever cannot be read for certain is not used."""
    if not NAME.fullmatch(path.name):
        return None
    try:
        body = json.loads((path / "lot.json").read_text())
        following = int((path / "next").read_text())
        if body.pop("schema") != SCHEMA or following < 1:
            return None
        about = About(**body)
        if not (isinstance(about.batch, int) and isinstance(about.batches, int) and about.made > 0):
            return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return Lot(path, about, following)


@contextmanager
def _readable_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError("the stock cannot be used", where=str(path), got=error.strerror) from error
