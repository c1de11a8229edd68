"""What the mpc runtime charges a method for its options, milliseconds on one network included."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
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
from tightrope.runtimes.mpc.schedule import compile_program
from tightrope.runtimes.mpc.timing import Network, Profile, online_ms
from tightrope.types import Cost, Json


@dataclass(frozen=True)
class Pricing:
    """Per sample. `network` as `timing.Network.parse` reads it.

    The milliseconds of an op alone are what its channels add: the fixed part of a step and the delay of a
    message are in `prices` only, so that the prices of options add up to what they change.
    """

    config: MPC
    network: str
    profile: Profile

    approximate: ClassVar[frozenset[str]] = frozenset({"online_bytes", "offline_bytes", "online_ms"})

    def __post_init__(self) -> None:
        Network.parse(self.network)

    @cached_property
    def _link(self) -> Network:
        return Network.parse(self.network)

    @property
    def settings(self) -> dict[str, Json]:
        """What `MPC.pricing` makes this again from."""
        return {"network": self.network, "profile": asdict(self.profile)}

    def price(self, op: Op) -> Cost:
        """See `cost.price`."""
        link = replace(self._link, rtt_ms=0.0)
        steps = steps_alone(op, self.config)
        spent = online_ms(steps, 1, payload_bytes, self.profile.variable, link)
        return price(op, self.config) + Cost(online_ms=sum(spent.values()))

    def prices(self, program: Program) -> dict[str, Cost]:
        """See `cost.prices`."""
        steps = [step for steps in usual_steps(program, self.config).values() for step in steps]
        spent = online_ms(steps, 1, payload_bytes, self.profile, self._link)
        return {
            name: cost + Cost(online_ms=spent.get(name, 0.0))
            for name, cost in prices(program, self.config).items()
        }

    def exact(self, program: Program) -> Cost:
        """Of a calibrated program, for a batch of one. Raises what `compile_program` does."""
        return self.estimate(program).total

    def estimate(self, program: Program, batch: int = 1) -> Costs:
        """See `MPC.estimate`."""
        schedule = compile_program(program, self.config)
        parts = []
        for size in pieces(program, schedule, self.config, batch):
            counted = of_schedule(program, schedule, size)
            size_of = partial(frame_bytes, batch=size)
            spent = online_ms(schedule.steps, size, size_of, self.profile, self._link)
            ops = {name: cost + Cost(online_ms=spent.get(name, 0.0)) for name, cost in counted.ops.items()}
            whole = counted.total + Cost(online_ms=sum(spent.values()))
            parts.append(replace(counted, ops=ops, total=whole))
        return joined(parts)
