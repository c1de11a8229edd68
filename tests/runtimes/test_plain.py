"""The reference runtime against torch, and its accounts against torch's own."""

from __future__ import annotations

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from networks import NETWORKS, Chain, TinyResNet, conv, settle
from tightrope.errors import InputError
from tightrope.lower import lower
from tightrope.nn import BlockReLU
from tightrope.program import Conv2d, Program, base_cost
from tightrope.runtimes import RUNTIMES, runtime_type
from tightrope.runtimes.plain import Plain, evaluate, ranges
from tightrope.types import Cost, total

SHAPE = (3, 8, 8)
PATCHES = [(1, 1), (0, 0), (2, 3), (8, 8), (3, 8)]


def convolutional() -> nn.Module:
    """No batch-norm that stays: torch counts no operations for it."""
    return Chain(
        conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8, groups=8, stride=2), nn.ReLU6(), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, (3, 1), groups=4, padding=(2, 0), dilation=(2, 1)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip


@pytest.mark.parametrize("make", [convolutional, TinyResNet])
def test_macs_are_half_of_what_torch_counts(make):
    model = settle(make())
    x = torch.randn(3, *SHAPE)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    with Plain().open(lower(model, SHAPE)) as session:
        _, measured = session.run(x.numpy())
    assert measured.total.macs == counter.get_total_flops() / 2


def test_a_measurement_adds_up_and_names_every_op():
    program = lower(settle(convolutional()), SHAPE)
    x = np.random.default_rng(0).standard_normal((3, *SHAPE))
    _, measured = Plain().open(program).run(x)
    assert (measured.runtime, measured.batch) == ("plain", 3)
    assert [(t.op, t.kind) for t in measured.ops] == [(op.name, op.kind) for op in program.ops]
    assert measured.total == total(t.cost for t in measured.ops)
    assert measured.total.drelus == 3 * (8 * 64 + 2 * 8 * 16 + 3 * 8 * 4)
    assert measured.total.weights == sum(t.size for t in program.tensors.values())
    assert all(t.cost.online_ms > 0 for t in measured.ops)
    shown = measured.to_dict()
    assert shown["total"]["drelus"] == measured.total.drelus
    assert shown["ops"][1]["op"] == program.ops[1].name


def test_predicted_cost_is_measured_cost():
    program = lower(settle(convolutional()), SHAPE)
    plain = Plain()
    predicted = total(plain.price(op) for op in program.ops)
    _, measured = plain.open(program, "simulate").run(np.zeros((1, *SHAPE)))
    assert replace(measured.total, online_ms=0) == predicted == total(map(base_cost, program.ops))
    assert plain.ops >= {op.kind for op in program.ops}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_run_equals_torch(name):
    model = settle(NETWORKS[name]())
    x = torch.randn(4, *SHAPE)
    before = x.clone()
    got, _ = Plain().open(lower(model, SHAPE)).run(x.numpy())
    with torch.no_grad():
        expected = model.double()(x.double()).numpy()
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    assert got.dtype == np.float64
    assert torch.equal(x, before)


def test_inputs_of_any_layout_and_type():
    session = Plain().open(lower(settle(TinyResNet()), SHAPE))
    x = np.random.default_rng(0).integers(0, 255, (2, 8, 8, 3), dtype=np.uint8)
    expected, _ = session.run(np.ascontiguousarray(x.transpose(0, 3, 1, 2)[..., ::-1]).astype(float))
    flipped = x.transpose(0, 3, 1, 2)[..., ::-1]
    flipped.flags.writeable = False
    got, _ = session.run(flipped)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((1, 3, 8, 7)), r"wrong input shape(.|\n)*\(1, 3, 8, 7\)(.|\n)*\(N, 3, 8, 8\)"),
        (np.zeros(SHAPE), "wrong input shape"),
        (np.full((1, *SHAPE), np.nan), "NaN"),
        (np.full((1, *SHAPE), np.inf), "infinity"),
    ],
)
def test_wrong_inputs_are_refused(x, message):
    session = Plain().open(lower(settle(TinyResNet()), SHAPE))
    with pytest.raises(InputError, match=message):
        session.run(x)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(1, 2), st.integers(1, 5))
def test_depthwise_convolutions_equal_torch(kh, kw, stride, dilation, channels):
    layer = nn.Conv2d(channels, channels, (kh, kw), stride, 2, dilation, groups=channels)
    program = lower(Chain(layer), (channels, 6, 5))
    op = program.ops[0]
    assert isinstance(op, Conv2d) and op.groups == op.in_channels == channels
    x = torch.randn(2, channels, 6, 5).double()
    torch.testing.assert_close(evaluate(program, x), layer.double()(x).detach(), rtol=1e-12, atol=1e-12)


def naive_tile_sum(z: torch.Tensor, patches, upper: float | None) -> float:
    """The largest |sum| over any tile of any channel, pixel by pixel; with `upper`, of z - upper too."""
    largest = 0.0
    for shift in (0.0,) if upper is None else (0.0, upper):
        for sample in (z - shift).tolist():
            for channel, (p, q) in zip(sample, patches, strict=True):
                sums: dict[tuple[int, int], float] = {}
                for i, row in enumerate(channel):
                    for j, value in enumerate(row):
                        if p:
                            sums[i // p, j // q] = sums.get((i // p, j // q), 0.0) + value
                largest = max([largest, *(abs(v) for v in sums.values())])
    return largest


@pytest.mark.parametrize("upper", [None, 6.0])
def test_ranges_are_the_largest_values_and_tile_sums(upper):
    first, last = conv(3, 5), conv(5, 2)
    model = Chain(first, BlockReLU(PATCHES, upper), last).eval()
    batches = [torch.randn(4, *SHAPE), 3 * torch.randn(2, *SHAPE), torch.randn(1, *SHAPE)]
    program = ranges(lower(model, SHAPE), batches)
    with torch.no_grad():
        z = [first(x) for x in batches]
        y = [model.steps[1](v) for v in z]
        expected = {
            "input": max(float(x.abs().max()) for x in batches),
            "parts.0": max(float(v.abs().max()) for v in z),
            "parts.1": max(float(v.abs().max()) for v in y),
            "parts.1:tiles": max(naive_tile_sum(v, PATCHES, upper) for v in z),
            "parts.2": max(float(last(v).abs().max()) for v in y),
        }
    assert program.ranges == pytest.approx(expected, rel=1e-5)
    assert replace(program, ranges={}).ops == lower(model, SHAPE).ops


def test_ranges_of_flat_and_untouched_activations():
    model = Chain(nn.Flatten(), nn.Linear(192, 4), BlockReLU([(1, 1), (0, 0)] * 2), nn.Linear(4, 3)).eval()
    x = torch.randn(5, *SHAPE)
    program = ranges(lower(model, SHAPE), [x])
    with torch.no_grad():
        gated = model.steps[1](x.flatten(1))[:, ::2]
    assert program.ranges["parts.2:tiles"] == pytest.approx(float(gated.abs().max()), rel=1e-5)
    untouched = Chain(conv(3, 2), BlockReLU([(0, 0)] * 2)).eval()
    assert ranges(lower(untouched, SHAPE), [x]).ranges["parts.1:tiles"] == 0


def test_no_value_is_kept_longer_than_it_is_read():
    """Peak memory of a long chain is that of two values, not of all."""
    program = lower(Chain(*(conv(3, 3) for _ in range(6))).eval(), SHAPE)
    values: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def seen(op, value, ms):
        values.append(weakref.ref(value))
        alive.append(sum(v() is not None for v in values))

    evaluate(program, torch.randn(7, *SHAPE), seen)
    assert alive == [1, 2, 2, 2, 2, 2]


def test_an_empty_program_is_the_identity():
    x = np.random.default_rng(0).standard_normal((2, *SHAPE))
    got, measured = Plain().open(Program((), SHAPE, Program.INPUT)).run(x)
    np.testing.assert_array_equal(got, x)
    assert measured.total == Cost()


def test_runtimes_are_found_by_name():
    assert runtime_type("plain") is Plain
    with pytest.raises(InputError, match=r"unknown runtime(.|\n)*plian(.|\n)*plain"):
        runtime_type("plian")
    assert Plain.name in RUNTIMES
