"""What the schedule promises: few openings, values that fit, costs that can be worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from small_networks import NETWORKS, Residual, network
from tightrope.errors import InputError, TraceError
from tightrope.lower import lower
from tightrope.nn import BlockReLU
from tightrope.program import MaxPool2d, Program, Relu, Silu
from tightrope.runtimes.mpc import MPC, compile_program, costs, oracle
from tightrope.runtimes.mpc.compiler import normal
from tightrope.runtimes.mpc.frame import HEADER_BYTES
from tightrope.runtimes.mpc.steps import Gate, Local, Multiply, Open, Product, Truncate
from tightrope.runtimes.plain import ranges


def calibrated(model: nn.Module, shape: tuple[int, ...]) -> Program:
    return ranges(lower(model.eval(), shape), [torch.randn(16, *shape)])


def steps(program: Program, kind: type) -> list:
    return [step for step in compile_program(program, MPC()).steps if isinstance(step, kind)]


def test_a_value_read_by_two_layers_is_opened_once() -> None:
    opened = [step.wire.name for step in steps(network("residual"), Open)]
    assert opened.count("relu") == 1  # conv1 and the shortcut read it
    assert len(opened) == len(set(opened))


def test_the_pieces_of_a_gate_share_their_keys() -> None:
    """ReLU6 compares twice as often as ReLU, but with as many keys; by hand, from a gate's fields."""
    for layer, pieces in ((nn.ReLU(), 1), (nn.ReLU6(), 2), (nn.Hardswish(), 2)):
        model = nn.Sequential(nn.Conv2d(2, 3, 1), layer)
        (gate,) = steps(calibrated(model, (2, 4, 4)), Gate)
        assert gate.drelus == pieces * 3 * 16
        words = next(f for f in gate.key_fields if f.name == "words")
        assert words.count == 3 * 16 * (gate.bits - 8 + 1)
        assert {f.count for f in gate.share_fields if f.name in ("bit", "choice")} == {gate.drelus}


def test_the_parts_of_a_concatenation_are_truncated_and_opened_once() -> None:
    program = network("dense")
    truncated = [step.input.name for step in steps(program, Truncate)]
    opened = [step.wire.name for step in steps(program, Open)]
    assert len(truncated) == len(set(truncated)) and len(opened) == len(set(opened))
    assert not any(name.startswith("cat") for name in truncated + opened)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_wire_is_made_before_it_is_read_and_forgotten_after(name: str) -> None:
    schedule = compile_program(network(name), MPC())
    finished = [wire for names in schedule.finished for wire in names]
    assert len(finished) == len(set(finished))
    shares, masks = {Program.INPUT}, set()
    for step in schedule.steps:
        if isinstance(step, Local):
            known, made = (masks, masks) if step.masks else (shares, shares)
            assert all(w.name in known for w in step.inputs)
            made.add(step.output.name)
        elif isinstance(step, Open):
            assert step.wire.name in shares
            masks.add(step.wire.name)
        elif isinstance(step, Multiply):
            assert step.input.name in masks
            shares.add(step.output.name)
        elif isinstance(step, Truncate | Gate | Product):
            assert all(wire.name in shares for wire in oracle.sources(step))
            shares.add(step.output.name)
        for wire in schedule.finished[step.index]:
            (masks if wire.startswith("mask of ") else shares).discard(wire.removeprefix("mask of "))


@pytest.mark.parametrize("name", NETWORKS)
def test_opened_values_and_compared_sums_fit(name: str) -> None:
    schedule = compile_program(network(name), MPC())
    program = network(name)
    for step in schedule.steps:
        if isinstance(step, Truncate | Gate):
            assert step.input.ring_limit < 2**62
        if isinstance(step, Truncate):
            assert step.output.scale == 22 == step.input.scale - step.shift
        if isinstance(step, Gate):
            assert step.trim == step.input.scale - 22 and step.shift in (0, step.trim)
        if isinstance(step, Gate) and isinstance(program.op(step.op), Relu):
            largest = 4.0 * program.ranges[f"{step.op}:tiles"] / step.input.mu * 2.0**22
            assert largest + 2 <= 2 ** (step.bits - 1) < 2 * (largest + 2)


@given(st.floats(2.0**-60, 2.0**20))
def test_only_what_is_no_power_of_two_stays_in_the_multiplier(mu: float) -> None:
    k, m = normal(mu)
    assert 0.5 < m <= 1 and m * 2.0**-k == mu


def test_conv_relu_linear_costs_what_paper_and_pencil_say() -> None:
    """conv 2->3 on 4x4, ReLU with patches 1x1, 2x3 and identity, flatten, linear to 5; batch 3."""
    patches = [(1, 1), (2, 3), (0, 0)]
    model = nn.Sequential(nn.Conv2d(2, 3, 3, 1, 1), BlockReLU(patches), nn.Flatten(), nn.Linear(48, 5))
    cost = costs(calibrated(model, (2, 4, 4)), MPC(), batch=3)
    conv, relu, linear = (cost.ops[name] for name in ("0", "1", "3"))
    H, tiles = HEADER_BYTES, 16 + 2 * 2
    assert conv.online_bytes == H + 8 * 3 * 32  # X0 - A
    assert conv.offline_bytes == H + 8 * 3 * 48  # C0
    # z1 + r1 back, and a bit per tile from both; the client's z0 + r0 went ahead
    assert relu.online_bytes == H + 8 * 3 * 48 + 2 * (H + math.ceil(3 * tiles / 8))
    assert relu.drelus == 3 * tiles
    # the last layer's input again, and the server's share of the result
    assert linear.online_bytes == H + 8 * 3 * 48 + H + 8 * 3 * 5
    assert (conv.rounds, relu.rounds, linear.rounds) == (1, 2, 1)  # X0 - A, z1 + r1, bits with X0 - A, result
    assert cost.total.rounds == 4
    assert cost.links == {
        "client->server": 3 * H + 8 * 3 * (32 + 48) + 8,
        "server->client": 3 * H + 8 * 3 * (48 + 5) + 8,
    }
    assert cost.setup_links == {"server->client": 2 * H + 8 * (3 * 2 * 9 + 48 * 5)}
    levels = next(s.bits for s in steps(calibrated(model, (2, 4, 4)), Gate)) - 8 + 1
    key = 32 + 16 * levels * 3 * tiles
    shares = 8 * 3 * (48 + 32 + tiles) + 4 * 3 * (48 + 32) + 8  # r >> s, c*(r >> s), c; wraps; constant bits
    assert relu.offline_bytes == (H + key) + (H + key + shares) + (H + 8 * 3 * 48)


def test_linear_layers_and_identity_cost_nothing_more_than_their_openings() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), BlockReLU([(0, 0)] * 3), nn.AvgPool2d(2), nn.Flatten())
    cost = costs(calibrated(model, (2, 4, 4)), MPC())
    assert not any(cost.ops[name].as_dict() for name in ("1", "2"))
    assert cost.ops["3"].online_bytes == HEADER_BYTES + 8 * 3 * 4  # the result
    assert cost.total.rounds == 2


def test_a_layer_after_a_layer_is_truncated_in_between() -> None:
    program = calibrated(nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 2, 1)), (2, 4, 4))
    assert [(s.op, s.input.name, s.shift) for s in steps(program, Truncate)] == [("1", "0", 22)]
    assert costs(program, MPC()).total.rounds == 4


def test_prices_of_single_ops_add_up_to_the_online_cost() -> None:
    """All but frame headers and the result, in a chain where nothing is shared; batch 8 fills the bytes."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, 2, 1), BlockReLU([(1, 1), (2, 2), (0, 0), (3, 1)]),
        nn.Conv2d(4, 4, (3, 1), padding=(1, 0)), nn.ReLU6(), nn.Flatten(), nn.Linear(80, 5),
    )  # fmt: skip
    program, config = calibrated(model, (2, 9, 7)), MPC()
    cost = costs(program, config, batch=8)
    frames = sum(len(e) for s in compile_program(program, config).steps for e in s.online)
    prices = [config.price(op) for op in program.ops]
    assert (
        sum(8 * p.online_bytes for p in prices) == cost.total.online_bytes - frames * HEADER_BYTES - 8 * 8 * 5
    )
    assert sum(8 * p.drelus for p in prices) == cost.total.drelus
    assert sum(8 * p.macs for p in prices) == cost.total.macs
    assert sum(p.rounds for p in prices) == cost.total.rounds - 2
    guessed = sum(8 * p.offline_bytes for p in prices)
    assert 0.5 < guessed / cost.total.offline_bytes < 2  # the width of comparisons is a guess


def test_a_larger_patch_is_never_dearer_and_an_op_without_rule_has_no_communication() -> None:
    relu = Relu(name="r", inputs=("x",), shape=(4, 8, 8), patches=((1, 1),) * 4)
    patches = [(1, 1), (1, 2), (2, 2), (4, 4), (8, 8), (0, 0)]
    prices = [MPC().price(replace(relu, patches=(p,) * 4)) for p in patches]
    for metric in ("drelus", "online_bytes", "offline_bytes"):
        values = [getattr(p, metric) for p in prices]
        assert values == sorted(values, reverse=True) and len(set(values)) == len(values)
    assert MPC().price(Silu(name="m", inputs=("x",), shape=(4, 4, 4))).as_dict() == {}


REFUSED = {
    "sigmoid": nn.Sigmoid(),
    "silu": nn.SiLU(),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_op_that_is_missing_is_named(kind: str) -> None:
    program = calibrated(nn.Sequential(nn.Conv2d(2, 3, 1), REFUSED[kind]), (2, 4, 4))
    with pytest.raises(TraceError) as error:
        compile_program(program, MPC())
    assert kind in str(error.value) and "where:   1" in str(error.value)


def test_ranges_are_required_and_checked() -> None:
    program = calibrated(nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU()), (2, 4, 4))
    with pytest.raises(InputError, match="no calibrated range"):
        compile_program(replace(program, ranges={}), MPC())
    far = replace(program, ranges=program.ranges | {"0": 2.0**17})
    with pytest.raises(InputError, match="overflow") as error:
        compile_program(far, MPC())
    assert "where:   0" in str(error.value) and "MPC(weight_bits=20)" in str(error.value)
    compile_program(far, MPC(weight_bits=20))
    sums = replace(program, ranges=program.ranges | {"1:tiles": 2.0**17})  # fit after a truncation
    assert [s.op for s in steps(sums, Truncate)] == ["1"]
    sums = replace(program, ranges=program.ranges | {"1:tiles": 2.0**38})
    with pytest.raises(InputError, match="overflow"):
        compile_program(sums, MPC())


@pytest.mark.parametrize(
    "wrong",
    [
        {"ring_bits": 16},
        {"fraction_bits": 2},
        {"weight_bits": 40},
        {"margin": 0.5},
        {"port": 65536},
        {"timeout_s": 0.0},
    ],
)
def test_a_configuration_out_of_range_is_refused(wrong: dict) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        MPC(**wrong)


def test_prices_of_pools_and_products_are_those_of_a_run() -> None:
    """All but frame headers, where every other value is read by one layer; batch 8 fills the bytes."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, 1, 1), nn.MaxPool2d(3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(),
        nn.MaxPool2d((2, 3), (2, 1), (1, 0), ceil_mode=True), nn.Conv2d(4, 4, 1), nn.Hardsigmoid(),
        nn.Conv2d(4, 4, 1), Excite(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5),
    )  # fmt: skip
    model(torch.zeros(1, 2, 9, 7))
    program, config = calibrated(model, (2, 9, 7)), MPC()
    cost = costs(program, config, batch=8)
    frames = sum(len(e) for s in compile_program(program, config).steps for e in s.online)
    prices = config.prices(program)
    assert 8 * sum(p.online_bytes for p in prices.values()) == cost.total.online_bytes - frames * HEADER_BYTES
    for name, price in prices.items():
        assert 8 * price.drelus == cost.ops[name].drelus
    alone = replace(program.op("1"), shape=(4, 4, 4))  # on 8x8: three in a row three times, then a pair
    assert config.price(alone).drelus == 4 * (2 * 3 + 1) * (8 + 4)
    guessed = sum(8 * p.offline_bytes for p in prices.values())
    assert 0.5 < guessed / cost.total.offline_bytes < 2


class Excite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(x)
        return x * nn.functional.hardsigmoid(self.fc(x.mean((2, 3), True)))


def test_what_a_run_refuses_has_no_communication_in_its_price() -> None:
    pool = MaxPool2d(
        name="p",
        inputs=("x",),
        shape=(1, 1, 1),
        kernel=(2, 2),
        stride=(1, 1),
        padding=(1, 1),
        dilation=(3, 3),
    )
    assert MPC().price(pool).as_dict() == {"drelus": 3}


def test_prices_count_the_truncation_of_a_layer_that_a_layer_reads() -> None:
    """Linear layers in a row, pooled and added; behind a comparison nothing is truncated twice."""
    program, config = calibrated(Linears(), (2, 8, 8)), MPC()
    cost = costs(program, config, batch=8)
    frames = sum(len(e) for s in compile_program(program, config).steps for e in s.online)
    prices = config.prices(program)
    assert 8 * sum(p.online_bytes for p in prices.values()) == cost.total.online_bytes - frames * HEADER_BYTES


class Linears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.third, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(self.first(x))
        return self.last(torch.relu(self.third(y) + y))


def test_prices_in_context_count_shared_openings_once_and_late_ones_twice() -> None:
    """A shortcut shares its opening with the block; behind an identity shortcut both openings are online."""
    program, config = calibrated(Residual(), (2, 8, 8)), MPC()
    cost = costs(program, config, batch=8)
    frames = sum(len(e) for s in compile_program(program, config).steps for e in s.online)
    prices = config.prices(program)
    assert set(prices) == {op.name for op in program.ops}
    assert 8 * sum(p.online_bytes for p in prices.values()) == cost.total.online_bytes - frames * HEADER_BYTES
    assert 8 * sum(p.drelus for p in prices.values()) == cost.total.drelus
    assert prices["short"].online_bytes == 0 < prices["conv1"].online_bytes
