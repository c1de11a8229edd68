"""How long a schedule takes: a clock per party goes through the steps of all, as they depend on each other.

What a unit of work takes comes from a `Profile` measured on a machine, the links from a `Network`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from tightrope.errors import InputError
from tightrope.runtimes.mpc.compiler import wires
from tightrope.runtimes.mpc.keys import ROLES, Role
from tightrope.runtimes.mpc.network import Network
from tightrope.runtimes.mpc.steps import HALF_BITS, Message, Step
from tightrope.runtimes.mpc.work import OFFLINE, ONLINE, Part, Work
from tightrope.types import Json

CLIENT: Sequence[Role] = ("client",)
SHIPPED = Path(__file__).parent / "profile.json"
Size = Callable[[Message], float]  # bytes of a message
Spent = Callable[[Work], float]  # nanoseconds
Moves = Iterable[tuple[str, Spent, Sequence[Part], Sequence[tuple[Message, ...]]]]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Nanoseconds that a unit of work takes a party, in one ring. `calibrate` measures; `host` says where.

    frame: a message's way to the other process, whatever its size; late: what it takes longer over a network
    than delay and bandwidth say, as timers and idle processors wake late; byte: of a message, at both ends;
    bulk: the same offline, where messages are long and nobody waits for the next one;
    step, gate: the fixed part of a step, of a `Gate`; mac: a multiplication in the ring with its addition;
    row: a weight of a convolution times all that it meets in a sample; gathered: a value that a convolution
    collects, once per group; beside: a product between the rows of its result; group: a group of a
    convolution; element: read and written in a local step;
    opened: masked, summed over its tile and truncated; selected: multiplied with the bit of its tile;
    compared: a DReLU; level: one level of its tree. Offline: deal: the fixed part of a step; drawn: a byte of
    a keystream; shared: an element that the dealer shares; keyed: one level of a key that it makes.

    wider: of the steps with a wire in a larger ring; None where there is none.
    """

    frame: float
    late: float
    byte: float
    bulk: float
    step: float
    gate: float
    mac: float
    row: float
    gathered: float
    beside: float
    group: float
    element: float
    opened: float
    selected: float
    compared: float
    level: float
    deal: float
    drawn: float
    shared: float
    keyed: float
    host: Mapping[str, Json] = field(default_factory=dict)
    wider: Profile | None = None

    def __post_init__(self) -> None:
        for unit in UNITS:
            value = getattr(self, unit)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise InputError("not a time per unit of work", where=unit, got=value, allowed="0 or more")

    def ns(self, work: Work) -> float:
        return sum((float(getattr(self, unit)) * count for unit, count in work.items()), 0.0)

    def of(self, step: Step) -> Profile:
        """The profile of the step's ring."""
        wide = any(wire.ring_bits > HALF_BITS for wire in wires(step))
        return self.wider if wide and self.wider is not None else self

    @property
    def variable(self) -> Profile:
        """Without what a step takes whatever its size."""
        wider = None if self.wider is None else self.wider.variable
        return replace(self, frame=0.0, late=0.0, step=0.0, gate=0.0, deal=0.0, wider=wider)

    @property
    def cores(self) -> int:
        """Of the machine, as far as a run's three processes can use them."""
        found = self.host.get("cores")
        return min(found, len(ROLES)) if type(found) is int and found > 0 else len(ROLES)

    @property
    def units(self) -> dict[str, float]:
        return {unit: getattr(self, unit) for unit in UNITS}

    @classmethod
    def read(cls, body: Json, ring_bits: int, where: str) -> Profile:
        """From what `MPC.calibrate` makes: {"host", "rings": {bits: units}}. Raises InputError else.

        Earlier profiles, those in bundles too, have no `group`, no `beside` and no `bulk`: a byte was a byte.
        """
        try:
            host, rings = body["host"], body["rings"]
            units = {
                "group": 0.0,
                "beside": 0.0,
                "bulk": rings[str(ring_bits)]["byte"],
                **rings[str(ring_bits)],
            }
            wrong = sorted(units.keys() ^ set(UNITS))
            fits = isinstance(host, dict) and not wrong
            larger = ring_bits == HALF_BITS and "64" in rings
        except (TypeError, KeyError, AttributeError):
            fits, wrong = False, []
        if not fits:
            raise InputError(
                f"not a profile of a ring of {ring_bits} bits",
                where=where,
                got=f"missing or unknown: {', '.join(wrong)}" if wrong else None,
                allowed=", ".join(UNITS),
                fix="tightrope calibrate",
            )
        return cls(**units, host=host, wider=cls.read(body, 64, where) if larger else None)


UNITS: tuple[str, ...] = tuple(f.name for f in fields(Profile) if f.name not in ("host", "wider"))


def shipped() -> Json:
    """The profile that comes with the package; its host says where it was measured."""
    return json.loads(SHIPPED.read_text())


def online_ms(
    steps: Sequence[Step], batch: int, size: Size, profile: Profile, network: Network, seen: Sequence[Role]
) -> dict[str, float]:
    """By op, how far each moves the latest clock of those `seen`; the sum is the time of the whole.

    A run measures the client's (`CLIENT`): a layer that the server works on shows at the op that follows,
    where the client waits for it. An op alone has none that follows.
    """
    moves = ((s.op, profile.of(s).ns, ONLINE[type(s)](s, batch), s.online) for s in steps)
    return _passed(moves, size, profile, network, seen)


def offline_ms(
    steps: Sequence[Step], batch: int, size: Size, profile: Profile, network: Network
) -> dict[str, float]:
    """By op, how far each moves the latest of the clocks; the sum is the time of the whole. The dealer, who
    waits for nobody, runs ahead of the others. All three have enough to do to fill a machine with fewer
    cores: then what they do in all takes longer than any chain of it."""
    busy_ns, profile = 0.0, replace(profile, byte=profile.bulk)

    def moves() -> Moves:
        nonlocal busy_ns
        for step in steps:
            busy_ns += profile.byte * sum(map(size, step.offline))
            ns = profile.of(step).ns
            for part in OFFLINE[type(step)](step, batch):
                busy_ns += sum(map(ns, part.values()))
            dealt = tuple(m for m in step.offline if m.sender == "dealer")
            ahead = tuple(m for m in step.offline if m.sender != "dealer")
            yield step.op, ns, (*OFFLINE[type(step)](step, batch), {}), (dealt, ahead)

    spent = _passed(moves(), size, profile, network, ROLES)
    least_ms, whole_ms = busy_ns / profile.cores / 1e6, sum(spent.values())
    stretch = max(1.0, least_ms / whole_ms) if whole_ms else 1.0
    return {op: ms * stretch for op, ms in spent.items()}


def _passed(
    moves: Moves, size: Size, profile: Profile, network: Network, seen: Sequence[Role]
) -> dict[str, float]:
    """Parts and the exchanges between them, in turn, by the latest clock of those `seen`. Every link carries
    one message after the other.

    Over a network a message's end, a piece of it at most, is handled when all of it is there.
    """
    clock: dict[Role, float] = dict.fromkeys(ROLES, 0.0)
    left: dict[tuple[Role, Role], float] = {}  # when the last message had left, by link
    per_byte = max(profile.byte, network.ns_per_byte)
    delay, piece_bytes = profile.frame, 0
    if network != Network():
        delay += profile.late + network.delay_s * 1e9
        piece_bytes = network.piece_bytes
    spent: dict[str, float] = {}
    for op, ns, parts, exchanges in moves:
        before = max(clock[role] for role in seen)
        for part, exchange in zip(parts, (*exchanges, ()), strict=True):
            for role, work in part.items():
                clock[role] += ns(work)
            for m in exchange:
                link = (m.sender, m.receiver)
                left[link] = max(left.get(link, 0.0), clock[m.sender]) + size(m) * per_byte
            for m in exchange:
                end = profile.byte * min(size(m), piece_bytes)
                clock[m.receiver] = max(clock[m.receiver], left[m.sender, m.receiver] + delay + end)
        spent[op] = spent.get(op, 0.0) + max(clock[role] for role in seen) - before
    return {op: passed / 1e6 for op, passed in spent.items()}
