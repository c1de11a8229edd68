"""Packing: what rotations, diagonals and sums make of a value is what the Program makes of it."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ckks_toys import ToyCKKS
from generated import cnns
from networks import Chain, settle
from tightrope.errors import InputError, TraceError
from tightrope.lower import lower
from tightrope.nn import PolynomialActivation
from tightrope.program import Conv2d, Op, Program
from tightrope.runtimes.ckks import CKKS
from tightrope.runtimes.ckks.compiler import compile_program
from tightrope.runtimes.ckks.diagonals import steps
from tightrope.runtimes.ckks.planning import OPS
from tightrope.runtimes.plain import Plain, evaluate, ranges

QUADRATIC = [[0.1, 0.5, 0.25]]


def calibrated(net: nn.Module, shape: tuple[int, ...], seed: int = 0) -> tuple[Program, Tensor]:
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(seed))
    return ranges(lower(nn.Sequential(net).eval(), shape), [x]), x


ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.Sigmoid, nn.Hardsigmoid, F.relu, F.relu6)


def polynomial(net: Chain) -> nn.Module:
    """The network with a quadratic for every activation of its own."""

    def smooth(step: Any) -> Any:
        known = step in ACTIVATIONS or type(step) in ACTIVATIONS
        return PolynomialActivation(QUADRATIC, gated=False) if known else step

    return Chain(*map(smooth, net.steps)).eval()


def reads_values(op: Op, program: Program) -> bool:
    """Whether a convolution does not only see its padding."""
    if not isinstance(op, Conv2d):
        return True
    ones = torch.ones(1, 1, *program.shape(op.inputs[0])[1:])
    left, right, top, bottom = op.padding
    seen = F.conv2d(
        F.pad(ones, (left, right, top, bottom)), torch.ones(1, 1, *op.kernel), None, op.stride, 0, op.dilation
    )
    return bool(seen.any())


def test_a_layer_that_reads_nothing_but_padding_is_refused() -> None:
    net = Chain(nn.Conv2d(1, 1, 1, stride=2, padding=1), nn.Flatten()).eval()
    program, _ = calibrated(net, (1, 1, 1))
    with pytest.raises(TraceError, match="nothing but padding"):
        compile_program(program, ToyCKKS(ring=6).parameters)


def simulated_gap(program: Program, x: Tensor, ring: int) -> float:
    with ToyCKKS(ring=ring).open(program, "simulate") as session:
        y, measured = session.run(x.numpy())
    assert measured.total.ckks_levels == measured.config["levels_planned"]
    want = evaluate(program, x).numpy()
    return float(np.abs(y - want).max() / max(1.0, np.abs(want).max()))


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(made=cnns(), ring=st.sampled_from([6, 8, 12]))
def test_random_networks_are_packed_exactly(made: tuple[Chain, tuple[int, ...]], ring: int) -> None:
    """In rings so small that values take many ciphertexts, and so large that they repeat."""
    net, shape = made
    program, x = calibrated(polynomial(net), shape)
    assume(program.ops and all(op.kind in OPS for op in program.ops))
    assume(all(reads_values(op, program) for op in program.ops))
    assert simulated_gap(program, x[:2], ring) < 1e-11
    circuit = compile_program(program, ToyCKKS(ring=ring).parameters)
    public = compile_program(program.public(), ToyCKKS(ring=ring).parameters)
    zeros = {n: t if ".stage" in n else np.zeros_like(t) for n, t in program.tensors.items()}
    pruned = compile_program(replace(program, tensors=zeros), ToyCKKS(ring=ring).parameters)
    assert circuit.digest() == public.digest() == pruned.digest()  # weights leave no trace in what is public


LAYERS = {
    "strided twice": (nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(4, 8, 3, 2, 1)), (1, 14, 14)),
    "groups and dilation": (nn.Conv2d(8, 6, 3, padding=(2, 1), dilation=2, groups=2), (8, 9, 7)),
    "depthwise, uneven stride": (nn.Conv2d(6, 6, (3, 5), (2, 1), (1, 2), groups=6), (6, 9, 7)),
    "more outputs than inputs": (nn.Conv2d(2, 40, 1), (2, 8, 8)),
    "one by one after a pool": (nn.Sequential(nn.AvgPool2d(3, 2, 1), nn.Conv2d(4, 3, 1)), (4, 9, 9)),
    "ragged pool": (nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), (2, 8, 8)),
    "dense": (nn.Sequential(nn.Flatten(), nn.Linear(75, 300), nn.Linear(300, 3)), (3, 5, 5)),
    "classifier": (
        nn.Sequential(nn.Conv2d(2, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)),
        (2, 12, 12),
    ),
    "enlarged": (
        nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1), nn.Upsample(scale_factor=2, mode="bilinear")), (2, 8, 8)
    ),
}  # fmt: skip


@pytest.mark.parametrize("ring", [7, 10, 13])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_packed_exactly(name: str, ring: int) -> None:
    net, shape = LAYERS[name]
    program, x = calibrated(net, shape)
    assert simulated_gap(program, x[:2], ring) < 1e-12


class Block(nn.Module):
    """Two convolutions and a shortcut, which is a convolution too if `wide`."""

    def __init__(self, wide: bool) -> None:
        super().__init__()
        stride, out = (2, 8) if wide else (1, 4)
        self.conv1, self.conv2 = nn.Conv2d(4, out, 3, stride, 1), nn.Conv2d(out, out, 3, 1, 1)
        self.norm = nn.BatchNorm2d(out)
        self.short = nn.Conv2d(4, out, 1, stride) if wide else nn.Identity()
        self.act1, self.act2 = (PolynomialActivation(QUADRATIC, gated=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.act2(self.norm(self.conv2(self.act1(self.conv1(x)))) + self.short(x))


@pytest.mark.parametrize("wide", [False, True])
def test_a_residual_block_costs_one_level_per_layer(wide: bool) -> None:
    """The sum, batch-norm and the shortcut's convolution are merged into the second convolution."""
    program, x = calibrated(settle(Block(wide)), (4, 8, 8))
    circuit = compile_program(program, ToyCKKS().parameters)
    assert circuit.levels == 1 + 1 + 1 + 2  # the first quadratic is a square, the output cannot be
    assert compile_program(program, ToyCKKS().parameters, squares=False).levels == 1 + 2 + 1 + 2
    assert simulated_gap(program, x, 11) < 1e-12


class Squeeze(nn.Module):
    """Squeeze-and-excitation with a polynomial gate, then a product of two maps, read or as the output."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.stem, self.reduce, self.expand = nn.Conv2d(2, 6, 3, 1, 1), nn.Conv2d(6, 3, 1), nn.Conv2d(3, 6, 1)
        self.act, self.gate = (PolynomialActivation(QUADRATIC, gated=False) for _ in range(2))
        self.project = nn.Identity() if last else nn.Conv2d(6, 4, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x * self.gate(self.expand(self.act(self.reduce(x.mean((2, 3), True)))))
        return self.project(x * x)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("ring", [7, 11])
def test_products_of_values_are_differences_of_squares(last: bool, ring: int) -> None:
    program, x = calibrated(Squeeze(last), (2, 6, 6))
    assert simulated_gap(program, x, ring) < 1e-11
    circuit = compile_program(program, ToyCKKS(ring=ring).parameters)
    assert circuit.digest() == compile_program(program.public(), ToyCKKS(ring=ring).parameters).digest()
    gate = 1 + 1 + 1 + 2  # the stem; a square; the second quadratic is read as it is, so no square
    assert circuit.levels == gate + 2 + 2 + 1


def test_a_strided_convolution_takes_as_few_diagonals_as_a_plain_one() -> None:
    """Multiplexed packing: 28x28 in blocks of 1024 slots, 8 blocks repeating: 8 * 9 diagonals and a fold."""
    for stride in (1, 2):
        program, _ = calibrated(nn.Conv2d(8, 8, 3, stride, 1), (8, 28, 28))
        (step,) = compile_program(program, CKKS().parameters).steps
        assert step.diagonals <= 72 * (1 if stride == 1 else 2)  # type: ignore[union-attr]
        assert step.outputs == 1  # type: ignore[union-attr]


def test_diagonals_are_split_into_baby_and_giant_steps() -> None:
    """Lattigo's choice for these, as its tests and the published Python port have it."""
    baby, giant = steps(range(64), 4096)
    assert len(baby) * len(giant) == 64
    assert {b + g for b in baby for g in giant} == set(range(64))
    assert steps([5], 4096) == ({0}, {5})


def test_prices_say_what_a_run_counts() -> None:
    program, _ = calibrated(settle(Block(True)), (4, 8, 8))
    prices = CKKS().prices(replace(program, ranges={}))
    levels = {name: cost.ckks_levels for name, cost in prices.items() if cost.ckks_levels}
    assert sorted(levels.values()) == [1, 1, 1, 2]
    assert all(cost.online_ms > 0 for name, cost in prices.items() if name in levels)
    assert CKKS().price(program.ops[0]).ckks_levels == 1


def test_values_beyond_the_calibrated_range_are_counted_and_told() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), PolynomialActivation(QUADRATIC, gated=False))
    program, x = calibrated(net, (1, 4, 4))
    with ToyCKKS().open(program, "simulate") as session:
        with pytest.warns(UserWarning, match="outside the calibrated range"):
            _, measured = session.run(3 * x.numpy())
        assert sum(measured.config["beyond_range"].values()) > 0
        _, measured = session.run(x.numpy())
        assert measured.config["beyond_range"] == {}


@pytest.mark.parametrize("slope", [0.5, -0.5, 8.0])
@pytest.mark.parametrize("squares", [True, False])
def test_values_beyond_the_range_of_a_square_are_counted_on_both_sides(slope: float, squares: bool) -> None:
    """The square is of x + b / 2a, which is in its own range for many x that are not in theirs."""
    act = PolynomialActivation([[0.1, slope, 0.25]], gated=False)
    net = nn.Sequential(nn.Conv2d(1, 1, 1), act, nn.Conv2d(1, 1, 1))
    with torch.no_grad():
        net[0].weight.fill_(1.0)
        net[0].bias.zero_()
    program = ranges(lower(net.eval(), (1, 4, 4)), [torch.linspace(-3, 3, 16).reshape(1, 1, 4, 4)])
    x = np.array([-3.5, -3.1, -3.0, -1.0, 0.0, 2.9, 3.0, 3.1] * 2).reshape(1, 1, 4, 4)
    for runtime in (ToyCKKS(squares=squares), Plain()):
        told = pytest.warns(UserWarning, match=r"outside the calibrated range.*: .* \(12\)$")
        with runtime.open(program, "simulate") as session, told:
            _, measured = session.run(np.concatenate([x, x]))
        assert measured.config["beyond_range"] == {program.ops[1].name: 12}, runtime


def test_a_run_in_the_clear_and_a_simulation_count_the_same() -> None:
    stages = [[[0.1, 0.5, 0.25]], [[0.0, 1.0]], [[0.0, 1.2, 0.1, -0.2]]]
    steps = [(nn.Conv2d(2, 2, 3, padding=1), PolynomialActivation(s, gated=False)) for s in stages]
    net = nn.Sequential(*(module for pair in steps for module in pair), nn.Conv2d(2, 1, 1))
    program, x = calibrated(settle(net), (2, 4, 4))
    counted = []
    for runtime in (ToyCKKS(), Plain()):
        with runtime.open(program, "simulate") as session, pytest.warns(UserWarning):
            counted.append(session.run(2 * x.numpy())[1].config["beyond_range"])
    quadratic, _, cubic = (op.name for op in program.ops if op.kind == "polynomial")
    assert counted[0] == counted[1] and set(counted[0]) == {quadratic, cubic}


class Product(nn.Module):
    """Of the two channels of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.y, self.last = nn.Conv2d(2, 1, 1), nn.Conv2d(2, 1, 1), nn.Conv2d(1, 1, 1)
        with torch.no_grad():
            for k, layer in enumerate((self.x, self.y)):
                layer.weight.copy_(torch.eye(2)[k].reshape(1, 2, 1, 1))
                layer.bias.zero_()

    def forward(self, z: Tensor) -> Tensor:
        return self.last(self.x(z) * self.y(z))


@pytest.mark.parametrize(
    ("x", "y", "count"),
    [(1.5, 0.2, 1), (3.0, 0.5, 1), (1.5, 0.6, 1), (-1.5, 2.0, 2), (1.0, -1.0, 0), (0.2, -1.1, 1)],
)
def test_factors_of_a_product_are_counted_that_are_out_of_their_own_range(
    x: float, y: float, count: int
) -> None:
    program = ranges(lower(Product().eval(), (2, 1, 1)), [torch.ones(1, 2, 1, 1)])
    program = replace(program, ranges={**program.ranges, "input": 4.0})
    _same_count(program, np.array([x, y]).reshape(1, 2, 1, 1), [count])


def test_products_count_every_factor_once_in_a_run_in_the_clear_and_a_simulation() -> None:
    """Factors of a channel once, not once a pixel; a value times itself once; bootstrapped too."""
    program, x = calibrated(Squeeze(False), (2, 6, 6))
    found = _same_count(program, 3 * x.numpy())
    gated, squared = (found[op.name] for op in program.ops if op.kind == "mul")
    values: dict[str, Tensor] = {}
    evaluate(program, 3 * x, lambda op, value, _: values.update({op.name: value}))
    for number, op in zip((gated, squared), (op for op in program.ops if op.kind == "mul"), strict=True):
        factors = {name: int((values[name].abs() > program.ranges[name]).sum()) for name in op.inputs}
        assert number == sum(factors.values()) > 0
    _same_count(program, 3 * x.numpy(), bootstrap="always", refresh_levels=3)


def _same_count(
    program: Program, x: np.ndarray, counts: list[int] | None = None, **config: Any
) -> dict[str, int]:
    """What both count and say, which is the same."""
    found, said = [], []
    for runtime in (ToyCKKS(**config), Plain()):
        with runtime.open(program, "simulate") as session, warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found.append(session.run(x)[1].config["beyond_range"])
        said.append([str(one.message) for one in told])
    assert found[0] == found[1] and said[0] == said[1]
    if counts is not None:
        assert list(found[0].values()) == [count for count in counts if count]
    return found[0]


def test_what_cannot_be_executed_is_refused_by_name() -> None:
    program, _ = calibrated(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()), (1, 4, 4))
    with pytest.raises(TraceError, match="cannot execute") as error:
        CKKS().open(program)
    assert "relu" in str(error.value) and program.ops[-1].name in str(error.value)
    with pytest.raises(InputError, match="no calibrated ranges"):
        CKKS().open(lower(nn.Sequential(nn.Conv2d(1, 2, 1)), (1, 4, 4)))
    deep = [PolynomialActivation([[0.0, 0.5] + [0.1] * 6], gated=True) for _ in range(12)]
    program, _ = calibrated(nn.Sequential(*deep), (1, 4, 4))
    with pytest.raises(InputError, match="exploded on the calibration data"):
        CKKS().open(program)
    ones = dict.fromkeys(program.ranges, 1.0)
    with pytest.raises(InputError, match="48 levels of 40 bits") as refused:
        CKKS(bootstrap="never").open(replace(program, ranges=ones))
    assert "levels for N = 2^16" in str(refused.value)


def test_channels_of_their_own_are_refused_above_degree_three() -> None:
    net = PolynomialActivation(torch.randn(1, 2, 5), gated=False)
    program, _ = calibrated(net, (2, 4, 4))
    with pytest.raises(TraceError, match="degree 4 with coefficients of their own in 2 channels"):
        ToyCKKS().open(program, "simulate")


@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("ring", [5, 10])
def test_channels_of_their_own(degree: int, ring: int) -> None:
    net = PolynomialActivation(torch.randn(1, 3, degree + 1), gated=True)
    program, x = calibrated(nn.Sequential(nn.Conv2d(1, 3, 3), net), (1, 6, 6))
    assert simulated_gap(program, x, ring) < 1e-12
