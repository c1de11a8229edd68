"""What the mpc runtime charges a method for its options, milliseconds on one network included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import ClassVar

from tightrope.program import Op, Program
from tightrope.runtimes.mpc.config import MPC
from tightrope.runtimes.mpc.cost import (
    Costs,
    frame_bytes,
    joined,
    of_schedule,
    payload_bytes,
    pieces,
    price,
    prices,
    steps_alone,
    usual_steps,
)
from tightrope.runtimes.mpc.keys import ROLES, Role
from tightrope.runtimes.mpc.network import Network
from tightrope.runtimes.mpc.schedule import compile_program
from tightrope.runtimes.mpc.steps import Step
from tightrope.runtimes.mpc.timing import CLIENT, Profile, Size, offline_ms, online_ms
from tightrope.types import Cost, Json, total


@dataclass(frozen=True)
class Pricing:
    """Per sample. `measured`: what `MPC.calibrate` made; the network is that of `config`.

    The milliseconds of an op alone are what its channels add: the fixed part of a step and the delay of a
    message are in `prices` only, so that the prices of options add up to what they change.
    """

    config: MPC
    measured: Json

    approximate: ClassVar[frozenset[str]] = frozenset(
        {"online_bytes", "offline_bytes", "online_ms", "offline_ms"}
    )

    def __post_init__(self) -> None:
        _ = self._profile  # refused now, if it is none

    @cached_property
    def _profile(self) -> Profile:
        return Profile.read(self.measured, self.config.ring_bits, "profile")

    @cached_property
    def _link(self) -> Network:
        return Network.parse(self.config.network)

    @property
    def settings(self) -> dict[str, Json]:
        """What `MPC.pricing` makes this again from."""
        return {"network": self.config.network, "profile": self.measured}

    def price(self, op: Op) -> Cost:
        """See `cost.price`."""
        link = replace(self._link, rtt_ms=0.0)
        spent = _spent(steps_alone(op, self.config), 1, payload_bytes, self._profile.variable, link, ROLES)
        return price(op, self.config) + total(spent.values())

    def prices(self, program: Program) -> dict[str, Cost]:
        """See `cost.prices`."""
        steps = [step for steps in usual_steps(program, self.config).values() for step in steps]
        spent = _spent(steps, 1, payload_bytes, self._profile, self._link, ROLES)
        return {name: cost + spent.get(name, Cost()) for name, cost in prices(program, self.config).items()}

    def exact(self, program: Program) -> Cost:
        """Of a calibrated program, for a batch of one. Raises what `compile_program` does."""
        return self.estimate(program).total

    def estimate(self, program: Program, batch: int = 1) -> Costs:
        """What a batch of a calibrated program will cost, in all and by op: exact counts, predicted times.

        Raises what `compile_program` does.
        """
        schedule = compile_program(program, self.config)
        parts = []
        for size in pieces(program, schedule, self.config, batch):
            counted = of_schedule(program, schedule, size)
            size_of = partial(frame_bytes, batch=size)
            spent = _spent(schedule.steps, size, size_of, self._profile, self._link, CLIENT)
            ops = {name: cost + spent.get(name, Cost()) for name, cost in counted.ops.items()}
            parts.append(replace(counted, ops=ops, total=counted.total + total(spent.values())))
        return joined(parts)


def _spent(
    steps: Sequence[Step], batch: int, size: Size, profile: Profile, network: Network, seen: Sequence[Role]
) -> dict[str, Cost]:
    """Milliseconds of both phases, by op; online as those `seen` spend them."""
    online = online_ms(steps, batch, size, profile, network, seen)
    offline = offline_ms(steps, batch, size, profile, network)
    return {op: Cost(online_ms=online[op], offline_ms=offline[op]) for op in online}
