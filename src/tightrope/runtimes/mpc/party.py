"""What all three parties do alike: handshake, typed frames, phases step by step with time and rounds."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tightrope.errors import ProtocolError
from tightrope.program import Program, Relu
from tightrope.runtimes.mpc import fss
from tightrope.runtimes.mpc.channel import Channel, Clock, Count
from tightrope.runtimes.mpc.config import MPC
from tightrope.runtimes.mpc.frame import CONTROL
from tightrope.runtimes.mpc.keys import KeyExchange, Role
from tightrope.runtimes.mpc.packing import packed, unpacked
from tightrope.runtimes.mpc.prg import SEED_BYTES, Streams
from tightrope.runtimes.mpc.schedule import MASK, Schedule
from tightrope.runtimes.mpc.steps import Field, Message, Step, Tag, Unit
from tightrope.types import Json

PROTOCOL_VERSION = 2
MAX_HELLO_BYTES = 4096
MAX_SHOWN = 200
MAX_DIFFERENCES = 4
Arrays = dict[str, NDArray[Any]]


@dataclass
class Batch:
    """One batch on its way: shares of wires, masks of opened wires, one-time material by step.

    `counter` numbers the batches of a session from 1; 0 is the setup.
    """

    size: int
    counter: int
    wires: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    material: dict[int, Any] = field(default_factory=dict)
    result: NDArray[np.float64] | None = None  # what was revealed, at the client


@dataclass(frozen=True)
class PhaseReport:
    """What one party spent in one phase.

    `rounds`: its Lamport clock after each step; `sent` and `received`: bytes by (peer, step); `milliseconds`
    and `drelus` by Program op.
    """

    sent: Mapping[tuple[Role, int], int]
    received: Mapping[tuple[Role, int], int]
    rounds: tuple[int, ...]
    milliseconds: Mapping[str, float]
    drelus: Mapping[str, int]
    elapsed_ms: float


@dataclass
class Party:
    """A party after the handshake.

    `streams` holds the pairwise randomness, and under its own role the party's private one.
    """

    role: Role
    program: Program
    schedule: Schedule
    config: MPC
    channels: Mapping[Role, Channel]
    clock: Clock
    streams: Mapping[Role, Streams]
    threads: int
    weights: dict[int, Tensor] = field(default_factory=dict)  # by step: client F, server W, dealer B
    biases: dict[int, Tensor] = field(default_factory=dict)  # the server's
    drelus: dict[str, int] = field(default_factory=dict)
    counter: int = 0

    def send(self, step: Step, message: Message, batch: int, values: Mapping[str, NDArray[Any]]) -> None:
        """Send a message of the schedule; bits, and elements smaller than a word, are packed here."""
        parts = []
        for f in message.fields:
            value = values[f.name]
            part = PACK[f.unit](value) if f.unit in PACK else value
            if part.nbytes != f.bytes(batch):
                raise ProtocolError(
                    f"`{f.name}` is not as long as the schedule says",
                    where=f"{self.role}, step {step.index} ({step.op})",
                    got=f"{part.nbytes} bytes",
                    allowed=f"{f.bytes(batch)} bytes",
                )
            parts.append(part)
        self.channels[message.receiver].send(step.index, message.tag, *parts)

    def receive(self, step: Step, message: Message, batch: int) -> Arrays:
        """The fields of a message of the schedule, flat and unpacked; blocks as pairs of words."""
        arrays = {f.name: _empty(f, batch) for f in message.fields}
        self.channels[message.sender].recv_into(step.index, message.tag, *arrays.values())
        small = [f for f in message.fields if f.unit in UNPACK]
        return arrays | {f.name: UNPACK[f.unit](arrays[f.name], f.items(batch)) for f in small}

    def new_batch(self, size: int) -> Batch:
        """A batch under a number that no earlier one of this session had; the same at all parties."""
        self.counter += 1
        return Batch(size, self.counter)

    def play(
        self, handlers: Mapping[type[Step], Callable[..., None]], batch: Batch, *, online: bool
    ) -> PhaseReport:
        """Run every step that has a handler, then wait until all frames have left. What a step takes includes
        letting go of what nobody needs after it."""
        self.drelus = {}
        spent: dict[str, float] = {}
        rounds = []
        start = before = time.perf_counter()
        for step in self.schedule.steps:
            handler = handlers.get(type(step))
            if handler is not None:
                handler(self, step, batch)
            for name in self.schedule.finished[step.index]:
                if name.startswith(MASK):
                    batch.masks.pop(name.removeprefix(MASK), None)
                elif online:  # shares made offline are still needed online
                    batch.wires.pop(name, None)
            now = time.perf_counter()
            if handler is not None:
                spent[step.op] = spent.get(step.op, 0.0) + (now - before) * 1e3
            before = now
            rounds.append(self.clock.round)
        for channel in self.channels.values():
            channel.flush()
        elapsed_ms = (time.perf_counter() - start) * 1e3
        traffic = {peer: channel.traffic.take() for peer, channel in self.channels.items()}
        sent = _by_step({peer: counts.sent for peer, counts in traffic.items()})
        received = _by_step({peer: counts.received for peer, counts in traffic.items()})
        return PhaseReport(sent, received, tuple(rounds), spent, dict(self.drelus), elapsed_ms)

    def close(self) -> None:
        for channel in self.channels.values():
            channel.close()


def _by_step(traffic: Mapping[Role, Mapping[tuple[int, int], Count]]) -> dict[tuple[Role, int], int]:
    """Bytes by peer and step, without hellos and control."""
    bytes_: dict[tuple[Role, int], int] = {}
    for peer, counts in traffic.items():
        for (step, tag), count in counts.items():
            if tag != Tag.HELLO and tag < CONTROL:
                bytes_[peer, step] = bytes_.get((peer, step), 0) + count.bytes
    return bytes_


DTYPES: dict[Unit, type[np.unsignedinteger[Any]]] = {
    "byte": np.uint8,
    "block": np.uint64,
    "word": np.uint64,
    "word48": np.uint8,
    "word40": np.uint8,
    "half": np.uint32,
    "bit": np.uint8,
}
PACK: Mapping[Unit, Callable[[NDArray[Any]], NDArray[np.uint8]]] = {
    "bit": fss.pack_bits,
    "word48": lambda words: packed(words, 48),
    "word40": lambda words: packed(words, 40),
}
UNPACK: Mapping[Unit, Callable[[NDArray[Any], int], NDArray[Any]]] = {
    "bit": fss.unpack_bits,
    "word48": lambda raw, count: unpacked(raw, 48),
    "word40": lambda raw, count: unpacked(raw, 40),
}


def _empty(f: Field, batch: int) -> NDArray[Any]:
    """Room for a field as it is on the wire, packed."""
    dtype = DTYPES[f.unit]
    return np.empty(f.bytes(batch) // np.dtype(dtype).itemsize, dtype)


def terms(program: Program, config: MPC) -> dict[str, Json]:
    """What all parties must have in common, whoever they are: protocol version, SHA-256 of the whole public
    structure (with the calibrated ranges) and of the plan alone (every patch), ring, precision, margins."""
    patches = [[op.name, op.patches] for op in program.ops if isinstance(op, Relu)]
    plan = hashlib.sha256(json.dumps(patches).encode()).hexdigest()
    common = {"protocol version": PROTOCOL_VERSION, "program": program.sha256(), "plan": plan}
    return common | config.agreed()


def introduce(
    role: Role,
    channels: Mapping[Role, Channel],
    session: bytes,
    program: Program,
    config: MPC,
    certificate: str = "",
) -> dict[Role, Streams]:
    """Compare with every peer what all must agree on, and agree on pairwise seeds (X25519).

    `certificate`: the own one's fingerprint, where there is TLS. Returns the streams shared with each peer,
    and under `role` private ones. Raises ProtocolError, with both values of all that differs: protocol
    version, session, program, plan, ring, precision, or who the parties are.
    """
    own = {
        "session": session.hex(),
        **terms(program, config),
        f"certificate of {role}": certificate,
        **{f"certificate of {peer}": channel.certificate for peer, channel in channels.items()},
    }
    exchanges = {peer: KeyExchange() for peer in channels}
    for peer, channel in channels.items():
        hello = {"agreed": own, "key": exchanges[peer].public.hex()}
        channel.send(0, Tag.HELLO, json.dumps(hello).encode())
    streams = {role: Streams(secrets.token_bytes(SEED_BYTES), session)}
    for peer, channel in channels.items():
        theirs, key = _read_hello(peer, channel.recv_bounded(0, Tag.HELLO, MAX_HELLO_BYTES))
        differ = [name for name in {**own, **theirs} if own.get(name) != theirs.get(name)][:MAX_DIFFERENCES]
        if differ:
            raise ProtocolError(
                f"{peer} and {role} disagree about the {', '.join(map(_shown, differ))}",
                where=role,
                got=", ".join(_shown(theirs.get(name)) for name in differ) + f" ({peer})",
                allowed=", ".join(_shown(own.get(name)) for name in differ) + f" ({role})",
                fix="give all parties the same program, configuration and release",
            )
        streams[peer] = Streams(exchanges[peer].seed(key, role, peer, session), session)
    return streams


def _shown(value: Json) -> str:
    """A value that a peer sent, safe to print: one short line of ASCII."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode("unicode_escape").decode()[:MAX_SHOWN]


def read_json(data: bytes, what: str, peer: Role) -> dict[str, Json]:
    """A JSON object that a peer sent; `data` is bounded by its caller. Raises ProtocolError for all else."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:  # 4 kB of brackets exhaust the parser's stack
        raise ProtocolError(f"{what} that cannot be read", where=f"from {peer}", got=str(error)) from error
    if not isinstance(body, dict):
        raise ProtocolError(f"{what} that cannot be read", where=f"from {peer}", got="no JSON object")
    return body


def _read_hello(peer: Role, data: bytes) -> tuple[dict[str, Json], bytes]:
    hello = read_json(data, "a hello", peer)
    agreed, key = hello.get("agreed"), hello.get("key")
    if not isinstance(agreed, dict) or not isinstance(key, str):
        raise ProtocolError("a hello that cannot be read", where=f"from {peer}", got="no `agreed` or `key`")
    try:
        return agreed, bytes.fromhex(key)
    except ValueError as error:
        raise ProtocolError("a hello that cannot be read", where=f"from {peer}", got=str(error)) from error
