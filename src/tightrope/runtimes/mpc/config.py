"""MPC: the configuration of the secure runtime, which is also the runtime (`tightrope.runtimes.mpc`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from tightrope.errors import InputError, TraceError
from tightrope.program import (
    Add,
    AvgPool2d,
    Concat,
    Conv2d,
    Flatten,
    GlobalAvgPool,
    HardSigmoid,
    HardSwish,
    Linear,
    MaxPool2d,
    Mul,
    Op,
    Pad,
    Polynomial,
    Program,
    Relu,
    Upsample,
)
from tightrope.runtimes.mpc.network import Network
from tightrope.types import Cost, Json

if TYPE_CHECKING:
    from tightrope.runtimes.mpc.pricing import Pricing
    from tightrope.runtimes.mpc.session import MPCSession

RINGS = (64, 32)
FEWEST_BITS = 4  # of a number's fraction
REVEALS = ("logits", "label")
PORTS = 2  # consecutive ports that a session listens on: server, dealer


@dataclass(frozen=True, kw_only=True)
class MPC:
    """Client, server and dealer over the ring Z_2^ring_bits with fixed-point numbers.

    ring_bits: 64, or 32 for half of the bytes and little precision (`widths.fit` finds what fits).
    fraction_bits: of activations; weight_bits: fractional bits of weights; a layer's result has both until
    it is truncated. margin: how far beyond its calibrated range a value may go before the ring or the
    comparison could overflow, of polynomials of high degree less (`polynomial.py`); input_margin: how far
    beyond its own an input may be, at most `margin`, else it is refused, because it uses up the margin of all
    that follows. noise_bits: the server adds fresh uniform
    noise below 2^-noise_bits to what it reveals, which hides the truncation carries from the client; 0 for
    none. trim_bits: how many of the fraction_bits the comparisons ignore: smaller keys, but a gate may stay
    shut up to 2^(trim_bits - fraction_bits) above its threshold (`sign_flips` measures how often). reveal:
    `logits`, or `label`: the client learns which output is the largest (the first of equal ones) and nothing
    else, as a one-hot vector. material_bytes: larger batches run in pieces, so that the dealer's material
    stays below this. port: first of two consecutive loopback ports, 0 for free ones; timeout_s: how long a
    party waits for another that gives no sign of life; threads: per party, 0 for half of the cores. network:
    `loopback`, `lan`, `wan`, or bits per second and round-trip milliseconds (`1e8,40`): every link is slowed
    down to it, and times are predicted for it.

    Raises InputError for a value out of range.
    """

    ring_bits: int = 64
    fraction_bits: int = 22
    weight_bits: int = 22
    margin: float = 4.0
    input_margin: float = 1.25
    noise_bits: int = 8
    trim_bits: int = 0
    reveal: Literal["logits", "label"] = "logits"
    material_bytes: int = 1 << 31
    port: int = 0
    timeout_s: float = 60.0
    threads: int = 0
    network: str = "loopback"

    name: ClassVar[str] = "mpc"
    ops: ClassVar[frozenset[str]] = frozenset(
        cls.kind
        for cls in (
            Conv2d, Linear, Add, Mul, Concat, AvgPool2d, GlobalAvgPool, MaxPool2d, Relu, HardSigmoid,
            HardSwish, Polynomial, Pad, Upsample, Flatten,
        )
    )  # fmt: skip

    def __post_init__(self) -> None:
        limits = {
            "fraction_bits": (FEWEST_BITS, 28),
            "weight_bits": (FEWEST_BITS, 28),
            "margin": (1.0, 2.0**20),
            "input_margin": (1.0, 2.0**20),
            "noise_bits": (0, 28),
            "trim_bits": (0, 28),
            "material_bytes": (1, 2**50),
            "port": (0, 65536 - PORTS),
            "timeout_s": (0.1, 86400.0),
            "threads": (0, 1024),
        }
        for key, (low, high) in limits.items():
            value = getattr(self, key)
            if not low <= value <= high:
                raise InputError(f"{key} is out of range", where="MPC", got=value, allowed=f"{low} to {high}")
        if self.ring_bits not in RINGS:
            raise InputError("no such ring", where="MPC", got=f"ring_bits={self.ring_bits}", allowed=RINGS)
        if self.reveal not in REVEALS:
            raise InputError("reveal is unknown", where="MPC", got=self.reveal, allowed=", ".join(REVEALS))
        Network.parse(self.network)

    def agreed(self) -> dict[str, Json]:
        """What the three parties must have in common; compared in the handshake."""
        own = ("input_margin", "material_bytes", "port", "timeout_s", "threads", "network")
        return {k: v for k, v in asdict(self).items() if k not in own}

    def check(self, op: Op) -> None:
        """Raise TraceError, naming the op's kind and its name, if this runtime cannot execute it."""
        unknown = isinstance(op, Upsample) and op.mode not in ("nearest", "bilinear")
        if op.kind not in self.ops or unknown:
            raise TraceError(
                "the mpc runtime cannot execute this op",
                where=op.name,
                got=f"{op.kind} ({op.mode})" if isinstance(op, Upsample) else op.kind,
                allowed=", ".join(sorted(self.ops)),
                fix="replace it before lowering, or use another runtime",
            )

    def price(self, op: Op) -> Cost:
        """What one op adds per sample, taken alone (`cost.price`): how a method compares options."""
        from tightrope.runtimes.mpc.cost import price

        return price(op, self)

    def prices(self, program: Program) -> dict[str, Cost]:
        """What every op adds per sample among the others (`cost.prices`); needs no calibrated ranges."""
        from tightrope.runtimes.mpc.cost import prices

        return prices(program, self)

    def pricing(self, network: str | None = None, profile: Mapping[str, Json] | None = None) -> Pricing:
        """What this runtime charges a method for its options, and what a program will cost.

        network: another than `network`; profile: what `calibrate` made, None for the one that comes with the
        package. Raises InputError for one that is none.
        """
        from tightrope.runtimes.mpc.pricing import Pricing
        from tightrope.runtimes.mpc.timing import shipped

        config = self if network is None else replace(self, network=network)
        return Pricing(config, shipped() if profile is None else profile)

    def calibrate(self, progress: Callable[[str, int, int], None] = lambda *_: None) -> dict[str, Json]:
        """Measure this machine, in minutes: a `profile` for `pricing`, as JSON, for both rings."""
        from tightrope.runtimes.mpc.calibrate import calibrate

        return calibrate(self, progress)

    def open(self, program: Program, mode: Literal["simulate", "execute"] = "execute") -> MPCSession:
        """Start the parties: threads of this process (`simulate`) or three processes (`execute`).

        Both run the same code and messages; only `execute` has sockets, TLS and separate memories.
        Raises InputError or TraceError if the program cannot be executed, ProtocolError if a party fails.
        """
        from tightrope.runtimes.mpc.session import open_session

        return open_session(program, self, mode)
