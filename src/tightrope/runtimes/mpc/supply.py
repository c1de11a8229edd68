"""Lots of material: the dealer makes them with the code of a live session, writing frames to files instead of
sockets; client and server read them as if the dealer were there.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING

from tightrope.errors import ProtocolError
from tightrope.program import Program
from tightrope.runtimes.mpc import dealer
from tightrope.runtimes.mpc.channel import Channel, Clock, LinkError
from tightrope.runtimes.mpc.config import MPC
from tightrope.runtimes.mpc.cost import frame_bytes
from tightrope.runtimes.mpc.frame import ANSWER, STOCK
from tightrope.runtimes.mpc.keys import Role
from tightrope.runtimes.mpc.party import Party, PhaseReport, read_json, terms
from tightrope.runtimes.mpc.prg import SEED_BYTES, SESSION_BYTES, Streams
from tightrope.runtimes.mpc.schedule import Schedule
from tightrope.runtimes.mpc.stock import DIGEST_BYTES, About, Lot, Stock, batch_file, seal_of, sync
from tightrope.runtimes.mpc.team import threads_of
from tightrope.types import Json

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

HOLDERS: tuple[Role, ...] = ("client", "server")
CHUNK_BYTES = 1 << 20
MAX_HEADER_BYTES = 4096
SEED_HEX = f"[0-9a-f]{{{2 * SEED_BYTES}}}"


def batch_bytes(schedule: Schedule, size: int, role: Role) -> int:
    """Of one batch's file for `role`: the seed, the dealer's frames, and the digest of both."""
    messages = (m for step in schedule.steps for m in step.offline)
    return (
        SEED_BYTES
        + DIGEST_BYTES
        + sum(frame_bytes(m, size) for m in messages if (m.sender, m.receiver) == ("dealer", role))
    )


class FileSink:
    """A link that only takes: frames go to a file, behind the seed and before the digest."""

    def __init__(self, file: IO[bytes], seed: bytes, seal: Hash) -> None:
        self._file = file
        self._seal = seal
        self.send([memoryview(seed)])

    def send(self, parts: list[memoryview]) -> None:
        for part in parts:
            self._seal.update(part)
            self._file.write(part)

    def recv_into(self, target: memoryview, silence_s: float | None = None) -> None:
        raise LinkError("is a file")

    def flush(self) -> None:
        """`finish` does."""

    def finish(self) -> None:
        """Nothing more comes: write the digest, and all of it to the disk."""
        self._file.write(self._seal.digest())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """The file belongs to who opened it."""


class FileSource:
    """A link that only gives: the frames in a mapped file, after the seed."""

    def __init__(self, material: mmap.mmap) -> None:
        self._material = material
        self._at = SEED_BYTES

    def send(self, parts: list[memoryview]) -> None:
        raise LinkError("is a file")

    def recv_into(self, target: memoryview, silence_s: float | None = None) -> None:
        if self.left < len(target):
            raise LinkError("the file ends")
        with memoryview(self._material) as whole, whole[self._at : self._at + len(target)] as part:
            target[:] = part
        self._at += len(target)

    @property
    def left(self) -> int:
        return len(self._material) - DIGEST_BYTES - self._at

    def flush(self) -> None:
        """Nothing is sent."""

    def close(self) -> None:
        self._material.close()


@dataclass(frozen=True)
class LotMaker:
    """What a dealer makes lots from."""

    program: Program
    schedule: Schedule
    config: MPC
    stock: Stock

    def fits(self, lot: Lot, batch: int, batches: int) -> bool:
        about = lot.about
        return about.terms == terms(self.program, self.config) and (about.batch, about.batches) == (
            batch,
            batches,
        )

    def make(self, batch: int, batches: int, stopped: Callable[[], bool] = lambda: False) -> None:
        """Add a lot to the stock, unless `stopped` says so between two batches.

        Raises InputError if the quota or the disk has no room for it.
        """
        size_bytes = batches * sum(batch_bytes(self.schedule, batch, role) for role in HOLDERS)
        name = secrets.token_hex(SESSION_BYTES)
        session, weights_seed = bytes.fromhex(name), secrets.token_bytes(SEED_BYTES)
        party = Party(
            role="dealer",
            program=self.program,
            schedule=self.schedule,
            config=self.config,
            channels={},
            clock=Clock(),
            streams={"server": Streams(weights_seed, session)},
            threads=threads_of(self.config),
        )
        dealer.setup(party)
        about = About(terms(self.program, self.config), batch, batches, self.stock.owner, weights_seed.hex())
        with suppress(_StoppedError), self.stock.adding(name, about, size_bytes) as directory:
            for number in range(1, batches + 1):
                if stopped():
                    raise _StoppedError
                _make_batch(party, session, directory, number, batch)
            sync(directory)

    def hand_over(self, batch: int, batches: int, channels: Mapping[Role, Channel]) -> str:
        """Give a lot, made now if there is none, to client and server; its name.

        Once the first byte may have left it is gone here, also when the transfer fails.
        """
        while (lot := self.stock.claim(lambda lot: self.fits(lot, batch, batches))) is None:
            self.make(batch, batches)
        try:
            for role in HOLDERS:
                _send(lot, role, channels[role])
            for role in HOLDERS:
                stored = read_json(
                    channels[role].recv_bounded(0, ANSWER, MAX_HEADER_BYTES), "an answer", role
                )
                if stored != {"stored": lot.name}:
                    raise ProtocolError(f"{role} did not store the lot", where="dealer")
        finally:
            self.stock.discard(lot)
        return lot.name


class _StoppedError(Exception):
    """The dealer ends."""


def _make_batch(party: Party, session: bytes, directory: Path, number: int, size: int) -> None:
    with ExitStack() as stack:
        streams: dict[Role, Streams] = {"dealer": Streams(secrets.token_bytes(SEED_BYTES), session)}
        channels: dict[Role, Channel] = {}
        sinks = []
        for role in HOLDERS:
            file = stack.enter_context(_new_file(directory / given_file(number, role)))
            seed = secrets.token_bytes(SEED_BYTES)
            sinks.append(FileSink(file, seed, seal_of(session.hex(), number)))
            streams[role] = Streams(seed, session)
            channels[role] = Channel("dealer", role, sinks[-1], Clock())
        party.streams, party.channels = streams, channels
        dealer.offline(party, size)
        for sink in sinks:
            sink.finish()


def given_file(number: int, role: Role) -> str:
    return f"{batch_file(number)}.{role}"


def _new_file(path: Path) -> IO[bytes]:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")


def _send(lot: Lot, role: Role, channel: Channel) -> None:
    header: dict[str, Json] = {"lot": lot.name, "batch": lot.about.batch, "batches": lot.about.batches}
    if role == "server":
        header["weights_seed"] = lot.about.weights_seed
    channel.send(0, STOCK, json.dumps(header).encode())
    for number in range(1, lot.about.batches + 1):
        with (lot.path / given_file(number, role)).open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                channel.send(number, STOCK, chunk)
                channel.flush()


@contextmanager
def receiving(stock: Stock, channel: Channel, schedule: Schedule, about: About) -> Iterator[str]:
    """Store a lot that the dealer sends; gives its name. The lot is in stock once the block ends well.

    Raises InputError without room, ProtocolError for anything but a new lot of that form.
    """
    size_bytes = batch_bytes(schedule, about.batch, channel.own)
    stock.check_room(about.batches * size_bytes)  # before the dealer is asked to send
    header = read_json(channel.recv_bounded(0, STOCK, MAX_HEADER_BYTES), "a lot", "dealer")
    name, seed = header.get("lot"), header.get("weights_seed", "")
    agreed = (header.get("batch"), header.get("batches")) == (about.batch, about.batches)
    if not agreed or not isinstance(name, str) or not isinstance(seed, str):
        raise ProtocolError("another lot than was asked for", where=channel.own)
    if (channel.own == "server") != (re.fullmatch(SEED_HEX, seed) is not None):
        raise ProtocolError("a lot without the seed that belongs to it", where=channel.own)
    with stock.adding(name, replace(about, weights_seed=seed), about.batches * size_bytes) as directory:
        for number in range(1, about.batches + 1):
            with _new_file(directory / batch_file(number)) as file:
                for start in range(0, size_bytes, CHUNK_BYTES):
                    count = min(CHUNK_BYTES, size_bytes - start)
                    file.write(channel.recv(number, STOCK, count).data)
                file.flush()
                os.fsync(file.fileno())
        sync(directory)
        yield name


def weights_streams(lot: Lot) -> Streams:
    """At the server: the streams of the mask of its weights."""
    return Streams(bytes.fromhex(lot.about.weights_seed), bytes.fromhex(lot.name))


@contextmanager
def supplied(party: Party, lot: Lot, number: int) -> Iterator[None]:
    """Use up batch `number`: in the block, the party's dealer is the file that the dealer once wrote."""
    material = lot.take(number)
    source = FileSource(material)
    others: dict[Role, Channel] = {
        peer: channel for peer, channel in party.channels.items() if peer != "dealer"
    }
    streams = Streams(material[:SEED_BYTES], bytes.fromhex(lot.name))
    try:
        party.channels = {**others, "dealer": Channel(party.role, "dealer", source, party.clock)}
        party.streams = {**party.streams, "dealer": streams}
        party.counter = number - 1
        yield
        if source.left:
            raise ProtocolError("a batch's material is longer than its use", where=f"lot {lot.name[:8]}")
    finally:
        party.channels = others
        source.close()


def as_dealer(reports: Mapping[Role, PhaseReport]) -> PhaseReport:
    """What the dealer would have reported: it sent ahead of time what the others received from it now."""
    sent = {
        (role, step): count
        for role, report in reports.items()
        for (peer, step), count in report.received.items()
        if peer == "dealer"
    }
    steps = max(len(report.rounds) for report in reports.values())
    return PhaseReport(sent, {}, (0,) * steps, {}, {}, 0.0)
