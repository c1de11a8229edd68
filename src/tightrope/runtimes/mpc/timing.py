"""How long a schedule takes online: a clock per party goes through the steps of both, as they depend on each
other. What a unit of work takes comes from a `Profile` measured on a machine, the link from a `Network`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from tightrope.errors import InputError
from tightrope.program import Conv2d
from tightrope.runtimes.mpc.fss import word_levels
from tightrope.runtimes.mpc.keys import Role
from tightrope.runtimes.mpc.steps import (
    Gate,
    Local,
    Message,
    Multiply,
    Open,
    Product,
    Reveal,
    RevealLabel,
    Step,
    Truncate,
)
from tightrope.types import Json

SHIPPED = Path(__file__).parent / "profile.json"
Work = Mapping[str, float]  # unit -> how many
Size = Callable[[Message], float]  # bytes of a message


@dataclass(frozen=True)
class Network:
    """A link between client and server: bits per second each way, and the round-trip time.

    Loopback adds nothing to what a profile measures, which includes it.
    """

    bits_per_second: float = math.inf
    rtt_ms: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Network:
        """`loopback`, `lan`, `wan`, or bits per second and milliseconds: `1e9,0.5`. Raises InputError."""
        if text in NETWORKS:
            return NETWORKS[text]
        try:
            bits, rtt = (float(part) for part in text.split(","))
        except ValueError:
            bits = rtt = math.nan
        if not (0 < bits < math.inf and 0 <= rtt < math.inf):
            raise InputError(
                "cannot read the network",
                got=repr(text),
                allowed=f"{', '.join(NETWORKS)}, or bits per second and round-trip milliseconds",
                fix="--network 1e9,0.5",
            )
        return cls(bits, rtt)


NETWORKS: Mapping[str, Network] = {
    "loopback": Network(),
    "lan": Network(1e9, 0.5),
    "wan": Network(1e8, 40.0),
}


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Nanoseconds that a unit of work takes a party. Measured by `calibrate`; `host` says where.

    frame: a message's way to the other process, whatever its size; byte: of a message, at both ends;
    step, gate: the fixed part of a step, of a `Gate`; mac: a multiplication in the ring with its addition;
    gathered: a value that a convolution collects, once per group; element: read and written in a local step;
    opened: masked, summed over its tile and truncated; selected: multiplied with the bit of its tile;
    compared: a DReLU; level: one level of its tree.
    """

    frame: float
    byte: float
    step: float
    gate: float
    mac: float
    gathered: float
    element: float
    opened: float
    selected: float
    compared: float
    level: float
    host: Mapping[str, Json] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for unit in UNITS:
            value = getattr(self, unit)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise InputError("not a time per unit of work", where=unit, got=value, allowed="0 or more")

    def ns(self, work: Work) -> float:
        return sum((float(getattr(self, unit)) * count for unit, count in work.items()), 0.0)

    @property
    def variable(self) -> Profile:
        """Without what a step takes whatever its size."""
        return replace(self, frame=0.0, step=0.0, gate=0.0)

    @classmethod
    def read(cls, body: Json, where: str) -> Profile:
        """Raises InputError unless `body` is a profile as JSON."""
        wanted = {f.name for f in fields(cls)}
        if not isinstance(body, dict) or body.keys() != wanted or not isinstance(body["host"], dict):
            raise InputError(
                "not a profile", where=where, allowed=", ".join(UNITS), fix="tightrope calibrate"
            )
        return cls(**body)

    @classmethod
    def shipped(cls) -> Profile:
        """The one that comes with the package; its host says where it was measured."""
        return cls.read(json.loads(SHIPPED.read_text()), SHIPPED.name)


UNITS: tuple[str, ...] = tuple(f.name for f in fields(Profile) if f.name != "host")


@dataclass(frozen=True)
class Part:
    """What the parties compute between two exchanges of a step."""

    client: Work
    server: Work


def _both(work: Work) -> Part:
    return Part(work, work)


NOTHING = _both({})


def _local(step: Local, batch: int) -> tuple[Part, ...]:
    """A static result is made offline at the client, and so is every mask."""
    work = {"step": 1.0, "element": batch * (sum(w.size for w in step.inputs) + step.output.size)}
    return (Part({} if step.masks or step.output.static else work, work),)


def _open(step: Open, batch: int) -> tuple[Part, ...]:
    work = {"step": 1.0, "element": 2.0 * batch * step.wire.size}
    return (Part(work, {}), Part({}, work))


def _multiply(step: Multiply, batch: int) -> tuple[Part, ...]:
    kernel = step.kernel
    macs = batch * math.prod(kernel.weight_shape) * step.output.size // kernel.weight_shape[0]
    gathered = macs / kernel.weight_shape[0] * kernel.groups if isinstance(kernel, Conv2d) else 0.0
    work = {"step": 1.0, "mac": macs, "gathered": gathered, "element": 2.0 * batch * step.output.size}
    return (Part({}, work),)


def _truncate(step: Truncate, batch: int) -> tuple[Part, ...]:
    size = float(batch * step.input.size)
    masked = {"element": 2 * size}
    return (Part({} if step.input.static else masked, masked), _both({"step": 1.0, "opened": size}))


def _gate(step: Gate, batch: int) -> tuple[Part, ...]:
    opened, gated = float(batch * step.opened_size), float(batch * step.gated_size)
    compared = batch * step.drelus
    levels = compared * word_levels(step.bits)
    masked = {"element": 2 * opened}
    squares = sum(1 + (piece.square != 0) for piece in step.pieces)
    return (
        Part({} if step.input.static else masked, masked),
        _both({"gate": 1.0, "opened": opened, "compared": compared, "level": levels}),
        _both({"selected": gated * squares}),
    )


def _product(step: Product, batch: int) -> tuple[Part, ...]:
    size = float(batch * (step.left.size + step.right.size))
    masked = {"element": 2 * size}
    static = step.left.static and step.right.static
    result = {"step": 1.0, "element": 2 * size + 6.0 * batch * step.output.size}
    return (Part({} if static else masked, masked), _both(result))


def _reveal(step: Reveal | RevealLabel, batch: int) -> tuple[Part, ...]:
    work = {"step": 1.0, "element": 2.0 * batch * step.wire.size}
    return (Part({}, work), Part(work, {}))


PARTS: Mapping[type[Step], Callable[..., tuple[Part, ...]]] = {
    Local: _local,
    Open: _open,
    Multiply: _multiply,
    Truncate: _truncate,
    Gate: _gate,
    Product: _product,
    **dict.fromkeys((Reveal, RevealLabel), _reveal),
}


def online_ms(
    steps: Sequence[Step], batch: int, size: Size, profile: Profile, network: Network
) -> dict[str, float]:
    """By op, how far each moves the later of the two clocks; the sum is the time of the whole."""
    clock: dict[Role, float] = {"client": 0.0, "server": 0.0}
    left = dict(clock)  # when a party's last message had left it
    per_byte = profile.byte + 8e9 / network.bits_per_second
    delay = profile.frame + network.rtt_ms * 5e5
    spent: dict[str, float] = {}
    for step in steps:
        before = max(clock.values())
        parts = PARTS[type(step)](step, batch)
        for part, exchange in zip(parts, (*step.online, ()), strict=True):
            clock["client"] += profile.ns(part.client)
            clock["server"] += profile.ns(part.server)
            for m in exchange:  # one message after the other in each direction
                left[m.sender] = max(left[m.sender], clock[m.sender]) + size(m) * per_byte
            for m in exchange:
                clock[m.receiver] = max(clock[m.receiver], left[m.sender] + delay)
        spent[step.op] = spent.get(step.op, 0.0) + max(clock.values()) - before
    return {op: ns / 1e6 for op, ns in spent.items()}
