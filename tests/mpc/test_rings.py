"""Sums of patches that do not fit the small ring: wires of 40 or 48 bits, where they can be had."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from small_networks import images, network
from tightrope.errors import InputError
from tightrope.lower import lower
from tightrope.nn import BlockReLU
from tightrope.program import Program
from tightrope.runtimes.mpc import MPC, compile_program, compiler, costs, oracle
from tightrope.runtimes.mpc.compiler import Calculation, may_follow
from tightrope.runtimes.mpc.frame import HEADER_BYTES
from tightrope.runtimes.mpc.schedule import Schedule
from tightrope.runtimes.mpc.steps import Gate, Truncate, Wire
from tightrope.runtimes.mpc.timing import shipped
from tightrope.runtimes.plain import ranges

SMALL = MPC(noise_bits=0, ring_bits=32, fraction_bits=11, weight_bits=11, margin=2.0)


def rings(schedule: Schedule) -> dict[str, int]:
    return {s.output.name: s.output.ring_bits for s in schedule.steps if isinstance(s, Calculation)}


def count(schedule: Schedule, kind: type) -> int:
    return sum(isinstance(step, kind) for step in schedule.steps)


def run(program: Program, config: MPC, x: torch.Tensor) -> np.ndarray:
    with config.open(program, "simulate") as session:
        got, measured = session.run(x.numpy())
    predicted = costs(program, config, len(x))
    assert (measured.links, measured.offline_links) == (predicted.links, predicted.offline_links)
    assert measured.total.rounds == predicted.total.rounds
    return got


def test_wider_wires_spare_a_round_and_bytes_for_every_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the layers whose sums ask for it, and what they read."""
    program, x = network("whole maps"), images(6)
    schedule = compile_program(program, SMALL)
    found = rings(schedule)
    assert schedule.input.ring_bits == 40
    wide = {"stem", "acts.0", "conv1", "acts.1", "conv2", "add"}
    assert {name for name, bits in found.items() if bits > 32} == wide
    assert set(found.values()) == {32, 40} and not count(schedule, Truncate)
    got, cost = run(program, SMALL, x), costs(program, SMALL).total
    assert np.abs(got - oracle.evaluate(program, schedule, x.numpy())).max() < 2**-9

    monkeypatch.setattr(compiler, "WIDER", {})
    narrow = compile_program(program, SMALL)
    assert set(rings(narrow).values()) == {32} and count(narrow, Truncate) == 3
    before = costs(program, SMALL).total
    assert cost.rounds == before.rounds - 2 * 3  # what was truncated has no part that goes ahead
    assert cost.online_bytes < before.online_bytes
    assert np.abs(run(program, SMALL, x) - got).max() < 2**-8


def test_a_layer_in_the_wider_ring_keeps_the_bytes_and_rounds_of_the_small_one() -> None:
    """At most 12 bytes a value and 2 bits a patch beside frames, and two rounds."""
    program = network("whole maps")
    found = costs(program, SMALL)
    layer = found.ops["conv1"] + found.ops["acts.1"]
    values, tiles = int(np.prod(program.shape("acts.1"))), found.ops["acts.1"].drelus
    frames = 4 * HEADER_BYTES
    assert layer.online_bytes == 5 * values + 5 * values + 2 * -(-tiles // 8) + frames <= 12 * values + frames
    assert layer.rounds == 2


@pytest.mark.parametrize(
    "times, ring, truncated", [(2.0**5, 40, 0), (2.0**9, 48, 0), (2.0**14, 40, 2), (2.0**19, 48, 2)]
)
def test_sums_take_the_ring_that_holds_them_or_are_truncated_into_it(
    times: float, ring: int, truncated: int
) -> None:
    """Where not even 48 bits hold the sums of the layer's result, they may hold those of its high bits.

    A gate that reads those truncates nothing, so its result has no larger ring: the next gate pays as well.
    """
    program, x = network("whole maps"), images(4)
    key = "acts.1:tiles"
    large = replace(program, ranges=program.ranges | {key: program.ranges[key] * times})
    schedule = compile_program(large, SMALL)
    gate = next(step for step in schedule.steps if isinstance(step, Gate) and step.op == "acts.1")
    assert (gate.input.ring_bits, count(schedule, Truncate)) == (ring, truncated)
    assert gate.input.name == ("conv1:narrow" if truncated else "conv1")
    got = run(large, SMALL, x)
    assert np.abs(got - oracle.evaluate(large, schedule, x.numpy())).max() < 2**-9


class Linears(nn.Module):
    """Residual blocks with a linear bottleneck, and one gate on whole maps behind them all."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 1)
        nn.init.constant_(self.stem.bias, 12.0)
        self.grow = nn.ModuleList(nn.Conv2d(4, 24, 1) for _ in range(blocks))
        self.shrink = nn.ModuleList(nn.Conv2d(24, 4, 1) for _ in range(blocks))
        self.act, self.fc = BlockReLU([(7, 9)] * 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for grow, shrink in zip(self.grow, self.shrink, strict=True):
            x = x + shrink(torch.relu(grow(x)))
        return self.fc(self.act(x).mean((2, 3)))


@pytest.mark.parametrize("blocks", [0, 1, 4])
def test_no_larger_ring_where_truncating_first_is_cheaper(
    blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the last gate reads goes back through every block: soon that costs more than it spares."""
    torch.manual_seed(0)
    program = ranges(lower(Linears(blocks).eval(), (2, 7, 9)), [images(16)])
    found, cost = rings(compile_program(program, SMALL)), costs(program, SMALL).total
    assert (max(found.values()) > 32) == (blocks == 0)
    monkeypatch.setattr(compiler, "WIDER", {})
    before = costs(program, SMALL).total
    assert cost.rounds <= before.rounds
    assert (cost.online_bytes < before.online_bytes) == (blocks == 0)
    assert cost.online_bytes <= before.online_bytes


def test_what_another_layer_reads_truncated_keeps_the_small_ring() -> None:
    """Where the gate is granted its layer, the truncated value that it would have read is not asked for."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 3, 1)
            self.act, self.fc = BlockReLU([(7, 9)] * 3), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            return self.fc((self.act(x) + self.second(x)).mean((2, 3)))

    torch.manual_seed(0)
    program, x = ranges(lower(Two().eval(), (2, 7, 9)), [images(16)]), images(3)
    for times in (2.0**10, 2.0**14, 2.0**20):  # narrow sums that fit, that ask for 40 bits, and for more
        large = replace(program, ranges=program.ranges | {"act:tiles": program.ranges["act:tiles"] * times})
        schedule = compile_program(large, SMALL)
        found = rings(schedule)
        read = next(step for step in schedule.steps if isinstance(step, Gate)).input
        assert all(bits == 32 or name in (read.name, "first") for name, bits in found.items())
        assert times < 2.0**14 or found[read.name] > 32
        assert np.abs(run(large, SMALL, x) - oracle.evaluate(large, schedule, x.numpy())).max() < 2**-9


def test_sums_that_no_ring_holds_are_refused() -> None:
    program = network("whole maps")
    large = replace(program, ranges=program.ranges | {"acts.1:tiles": 2.0**40})
    with pytest.raises(InputError, match=r"overflow[\s\S]*acts\.1"):
        compile_program(large, SMALL)


def test_what_a_product_makes_is_truncated_first() -> None:
    """A product passes no larger ring on: its gate pays the round, and the result is the same."""

    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act, self.fc = nn.Conv2d(2, 3, 1), BlockReLU([(7, 9)] * 3), nn.Linear(3, 2)
            nn.init.constant_(self.conv.bias, 12.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            return self.fc(self.act(x * x).mean((2, 3)))

    torch.manual_seed(1)
    program, x = ranges(lower(Squared().eval(), (2, 7, 9)), [images(32)]), images(5)
    config = replace(SMALL, fraction_bits=8, weight_bits=8)
    schedule = compile_program(program, config)
    gate = next(step for step in schedule.steps if isinstance(step, Gate))
    assert set(rings(schedule).values()) == {32}
    assert gate.input.name.endswith(":narrow")
    assert np.abs(run(program, config, x) - oracle.evaluate(program, schedule, x.numpy())).max() < 0.25


def test_no_step_makes_a_larger_ring_than_it_reads_but_a_truncation() -> None:
    one, two = (Wire("w", (1,), 11, 1.0, 1.0, static=False, ring_bits=bits) for bits in (32, 40))
    step = Truncate(index=0, op="t", input=one, output=two, shift=3)
    assert may_follow(step) and not may_follow(replace(step, shift=0))
    assert may_follow(replace(step, input=two, output=one, shift=0))
    made = compiler.Compiler(network("whole maps"), SMALL)
    with pytest.raises(AssertionError, match="smaller ring"):
        made.emit(Truncate, "t", input=one, output=two, shift=0)


def test_the_large_ring_is_large_enough() -> None:
    program = network("whole maps")
    assert set(rings(compile_program(program, MPC())).values()) == {64}


def test_the_model_of_an_overflow_wraps_as_the_parties_do() -> None:
    """Values far beyond their range come out as the same wrong numbers, in a ring that is no machine word."""
    program, x = network("whole maps"), images(4)
    beyond = replace(
        program, tensors={k: v * (1.0 if "fc" in k else 2.0**10) for k, v in program.tensors.items()}
    )
    schedule = compile_program(beyond, SMALL)
    found: list[torch.Tensor] = []
    model = oracle.evaluate(beyond, schedule, x.numpy(), lambda step, z: found.append(z))
    assert rings(schedule)["conv1"] == 40 and max(int(z.abs().max()) for z in found) <= 2**39
    assert ranges(beyond, [x]).ranges["conv1"] * 2**22 > 2**41
    assert np.isfinite(model).all()


def test_layers_in_a_larger_ring_take_its_time() -> None:
    """The profile of 64-bit words counts for their work, that of the small ring for all else."""
    profile = shipped()
    free = dict.fromkeys(profile["rings"]["64"], 0.0)

    def mac(small: float, large: float) -> float:
        body = {"host": {}, "rings": {"32": free | {"mac": small}, "64": free | {"mac": large}}}
        return SMALL.pricing(profile=body).exact(program).online_ms * 1e6

    program = network("whole maps")
    assert mac(0.0, 0.0) == 0.0
    assert mac(1.0, 0.0) == pytest.approx(4 * 5)
    assert mac(0.0, 1.0) == pytest.approx(63 * 9 * (2 * 4 + 4 * 4 + 4 * 4))
