"""Tournaments, products, hard activations, enlarging and labels: against torch, and by paper and pencil."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from small_networks import images, network
from tightrope.errors import InputError, TraceError
from tightrope.lower import lower
from tightrope.program import MaxPool2d, Program, Relu, Upsample
from tightrope.runtimes.mpc import MPC, compile_program, costs, gates, oracle
from tightrope.runtimes.mpc.fixed import bilinear_divisor, local
from tightrope.runtimes.mpc.frame import HEADER_BYTES
from tightrope.runtimes.mpc.prg import WORDS, Stream
from tightrope.runtimes.mpc.steps import Gate, Local, Piece, Product, RevealLabel, Wire
from tightrope.runtimes.mpc.team import LocalTeam
from tightrope.runtimes.mpc.tournament import Axis, comparisons, max_pool_stages
from tightrope.runtimes.plain import evaluate, ranges

EXACT = MPC(noise_bits=0)


def calibrated(model: nn.Module, shape: tuple[int, ...], scale: float = 1.0) -> Program:
    generator = torch.Generator().manual_seed(0)
    return ranges(lower(model.eval(), shape), [scale * torch.randn(16, *shape, generator=generator)])


def secure(program: Program, x: Tensor, config: MPC = EXACT) -> np.ndarray:
    with config.open(program, "simulate") as session:
        return session.run(x.numpy())[0]


def pool(size: tuple[int, int], kernel, stride, padding=(0, 0), dilation=(1, 1), ceil=False) -> MaxPool2d:
    """Raises RuntimeError where torch refuses."""
    shape = F.max_pool2d(torch.zeros(1, 1, *size), kernel, stride, padding, dilation, ceil).shape
    return MaxPool2d(
        name="p",
        inputs=("x",),
        shape=tuple(shape[1:]),
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        ceil_mode=ceil,
    )


def play(op: MaxPool2d, x: Tensor) -> tuple[Tensor, int, int]:
    """(maxima, comparisons per channel, levels) of a tournament in the clear."""
    count = levels = 0
    for axis, level in max_pool_stages(op, (x.shape[2], x.shape[3])):
        earlier = x.index_select(axis, torch.tensor(level.earlier, dtype=torch.long))
        later = x.index_select(axis, torch.tensor(level.later, dtype=torch.long))
        count += later[0, 0].numel()
        levels += bool(level.later)
        x = torch.cat([x, torch.maximum(earlier, later)], axis)
        x = x.index_select(axis, torch.tensor(level.take))
    return x, count, levels


@given(
    size=st.tuples(*[st.integers(1, 12)] * 2),
    kernel=st.tuples(*[st.integers(1, 6)] * 2),
    stride=st.tuples(*[st.integers(1, 4)] * 2),
    dilation=st.tuples(*[st.integers(1, 3)] * 2),
    fraction=st.floats(0, 1),
    ceil=st.booleans(),
)
def test_a_tournament_gives_the_maxima_in_few_comparisons(size, kernel, stride, dilation, fraction, ceil):
    padding = tuple(int(k // 2 * fraction) for k in kernel)
    try:
        op = pool(size, kernel, stride, padding, dilation, ceil)
    except RuntimeError:
        return
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)).double()
    want = F.max_pool2d(x, kernel, stride, padding, dilation, ceil)
    if torch.isinf(want).any():  # a window outside
        return
    got, count, levels = play(op, x)
    assert torch.equal(got, want)
    assert count <= (math.prod(kernel) - 1) * math.prod(op.shape[1:])
    assert levels <= sum(math.ceil(math.log2(k)) for k in kernel)


def test_overlapping_windows_share_comparisons() -> None:
    """3x3 at stride 2: 6 an output instead of 8; 5x5 at stride 1: about 6 instead of 24."""
    stem = pool((112, 112), (3, 3), (2, 2), (1, 1))
    _, count, levels = play(stem, torch.randn(1, 1, 112, 112))
    # columns: 55 windows of three and one of two in 112 rows; rows: the same in 56 columns
    assert count == (2 * 55 + 1) * (112 + 56) and levels == 4
    plain = pool((8, 8), (2, 2), (2, 2))
    assert play(plain, torch.randn(1, 1, 8, 8))[1] == 3 * 16
    wide = pool((20, 20), (5, 5), (1, 1))
    # along an axis: 18 pairs, 16 runs of four, 16 of five
    assert play(wide, torch.randn(1, 1, 20, 20))[1] == (18 + 16 + 16) * (20 + 16)
    sparse = pool((7, 9), (1, 2), (3, 2))
    assert play(sparse, torch.randn(1, 1, 7, 9))[1] == 3 * 4  # no row that no window reads


@given(st.integers(1, 70))
def test_a_vector_needs_one_comparison_less_than_it_has_values(count: int) -> None:
    levels = Axis(count, (tuple(range(count)),)).levels()
    assert comparisons(levels) == count - 1
    assert len(levels) == max(1, math.ceil(math.log2(count)))


def test_a_window_outside_of_its_input_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.MaxPool2d(2, 1, 1, dilation=3))
    program = lower(model.eval(), (1, 2, 2))
    program = replace(program, ranges={"input": 1.0, "0": 1.0, "1": 1.0})
    with pytest.raises(TraceError, match="outside") as error:
        compile_program(program, MPC())
    assert "where:   1" in str(error.value)


def test_a_pool_of_large_values_is_truncated_first() -> None:
    program = calibrated(nn.Sequential(nn.Conv2d(2, 2, 1), nn.MaxPool2d(2)), (2, 4, 4))
    program = replace(program, ranges=program.ranges | dict.fromkeys(program.ranges, 2.0**15))
    x = torch.randn(2, 2, 4, 4)
    gate = next(s for s in compile_program(program, EXACT).steps if isinstance(s, Gate))
    assert gate.input.scale == 22
    assert np.abs(secure(program, x) - evaluate(program, x).numpy()).max() < 2**-16


def test_max_pool_costs_what_paper_and_pencil_say() -> None:
    """conv 1->2 on 4x4, 2x2 pool: 8 + 4 comparisons a channel; the first opening is half ahead; batch 3."""
    program = calibrated(nn.Sequential(nn.Conv2d(1, 2, 1), nn.MaxPool2d(2)), (1, 4, 4))
    cost = costs(program, MPC(), 3)
    H, first, second = HEADER_BYTES, 2 * 8, 2 * 4
    bits = sum(math.ceil(3 * n / 8) for n in (first, second))
    result = H + 8 * 3 * 8
    assert cost.ops["1"].drelus == 3 * (first + second)
    assert cost.ops["1"].online_bytes == 7 * H + 8 * 3 * (first + 2 * second) + 2 * bits + result
    assert cost.ops["1"].rounds == 5  # z1 + r1 with X0 - A before, then bits, opening, bits, and the result


def test_a_product_opens_each_factor_as_small_as_it_is() -> None:
    """Squeeze-and-excitation on 6 channels: 16 bytes a value and a factor, one round, 8 offline."""
    program = network("squeeze")
    schedule = compile_program(program, MPC())
    step = next(s for s in schedule.steps if isinstance(s, Product) and s.right.shape == (6, 1, 1))
    assert step.left.shape == (6, 4, 5)
    sent = [m.payload_bytes(1) for m in step.online[0]]
    assert sent == [8 * (6 * 20 + 6)] * 2 and len(step.online) == 1
    assert [m.payload_bytes(1) for m in step.offline] == [8 * 6 * 20]


class Square(nn.Module):
    def __init__(self, reverse: bool = False) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
        self.reverse = reverse

    def forward(self, x: Tensor) -> Tensor:
        y, factor = self.one(x), self.two(x).mean((2, 3), True)
        return factor * y if self.reverse else (y * y) * x * self.two(x)


@pytest.mark.parametrize("reverse", [False, True])
def test_products_of_layers_of_one_value_and_of_the_input(reverse: bool) -> None:
    """Layers are truncated first, as twice their bits would not fit the ring."""
    program, x = calibrated(Square(reverse), (2, 3, 3)), torch.randn(4, 2, 3, 3)
    want = evaluate(program, x).numpy()
    assert np.abs(secure(program, x) - want).max() < 2**-15
    model = oracle.evaluate(program, compile_program(program, EXACT), x.numpy())
    assert np.abs(model - want).max() < 2**-15


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.hardsigmoid(x) * self.layer(x)


@pytest.mark.parametrize(
    ("model", "ahead"), [(Square(), 2), (Square(True), 2), (Gated(), 1)], ids=["same", "small", "mixed"]
)
def test_masked_shares_of_layers_go_ahead(model: nn.Module, ahead: int) -> None:
    """With fewer bits the factors are untruncated: what the client knows of them is sent offline."""
    config = replace(EXACT, fraction_bits=12, weight_bits=8)
    program, x = calibrated(model, (2, 3, 3)), torch.randn(4, 2, 3, 3)
    first = next(s for s in compile_program(program, config).steps if isinstance(s, Product))
    assert first.left.static + first.right.static == ahead
    assert [m.sender for m in first.online[0]] == ["client"] * (ahead < 2) + ["server"]
    assert [m.sender for m in first.offline] == ["dealer", "client"]
    assert len(first.offline[1].fields) == ahead
    assert np.abs(secure(program, x, config) - evaluate(program, x).numpy()).max() < 2**-4
    with config.open(program, "simulate") as session:
        _, measured = session.run(x.numpy())
    predicted = costs(program, config, 4)
    assert (measured.links, measured.offline_links) == (predicted.links, predicted.offline_links)


def points(limit: float) -> Tensor:
    """Around the edges -3, 0 and 3, and out to the limit."""
    unit = 2.0**-22
    near = [v + k * unit for v in (-3.0, 0.0, 3.0) for k in (-2, -1, 0, 1, 2)]
    return torch.tensor([*near, *torch.linspace(-limit, limit, 49).tolist()]).reshape(1, 8, 8).double()


@pytest.mark.parametrize("activation", [nn.Hardsigmoid(), nn.Hardswish()])
@pytest.mark.parametrize("pooled", [False, True])
def test_hard_activations_at_their_edges(activation: nn.Module, pooled: bool) -> None:
    """On the input itself, and on averages of three, whose scale is no power of two."""
    model = nn.Sequential(*[nn.AvgPool2d((1, 3), 1, (0, 1), count_include_pad=False)] * pooled, activation)
    x = points(100.0)[None]
    program = ranges(lower(model.eval(), (1, 8, 8)), [x])
    got, want = secure(program, x), evaluate(program, x).numpy()
    # of the square of a number with an error of one unit, relative to the number
    assert (np.abs(got - want) < 2**-20 * (1 + np.abs(want))).all()
    assert costs(program, EXACT).total.drelus == 2 * 64


def test_hard_activations_refuse_what_the_square_cannot_hold() -> None:
    program = replace(
        lower(nn.Sequential(nn.Hardswish()).eval(), (1, 2, 2)), ranges={"input": 8.0, "0": 2.0**16}
    )
    with pytest.raises(InputError, match="overflow") as error:
        compile_program(program, MPC())
    assert "fraction_bits=" in str(error.value)
    fix = int(str(error.value).rpartition("fraction_bits=")[2].split(")")[0])
    compile_program(program, MPC(fraction_bits=fix))
    with pytest.raises(InputError):
        compile_program(program, MPC(fraction_bits=fix + 1))


@given(
    factor=st.tuples(*[st.integers(1, 6)] * 2),
    size=st.tuples(*[st.integers(1, 5)] * 2),
    mode=st.sampled_from(["nearest", "bilinear"]),
)
def test_enlarging_equals_torch(factor, size, mode) -> None:
    """Integers times the divisor, exactly."""
    x = torch.randint(-99, 99, (2, 3, *size), generator=torch.Generator().manual_seed(1))
    shape = (3, size[0] * factor[0], size[1] * factor[1])
    op = Upsample(name="u", inputs=("x",), shape=shape, factor=factor, mode=mode)
    wire = Wire("x", (3, *size), 0, 1.0, 1.0, static=False)
    step = Local(index=0, op="u", kernel=op, inputs=(wire,), output=wire, factors=(1,))
    divisor = bilinear_divisor(factor) if mode == "bilinear" else 1
    want = F.interpolate(x.double(), scale_factor=factor, mode=mode)
    assert torch.allclose(local(step, x).double() / divisor, want, rtol=0, atol=1e-12)


def labelled(logits: Tensor, config: MPC | None = None) -> np.ndarray:
    program = replace(lower(nn.Sequential(nn.Flatten()).eval(), (logits.shape[1], 1, 1)))
    program = ranges(program, [logits[:, :, None, None]])
    return secure(program, logits[:, :, None, None], config or MPC(reveal="label"))


@pytest.mark.parametrize("classes", [2, 3, 5, 16, 33])
def test_the_label_is_the_first_of_the_largest(classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(40, classes, generator=generator).double()
    logits[:20] = (2 * logits[:20]).round() / 2  # many ties
    got = labelled(logits)
    assert got.shape == logits.shape and (got.sum(1) == 1).all()
    assert (got.argmax(1) == logits.numpy().argmax(1)).all()


def test_ties_of_all_and_of_negative_values_go_to_the_first() -> None:
    logits = torch.tensor([[0.0] * 7, [-5.0] * 7, [-5.0, -4, -4, -9, -4, -4, -6], [1, 2, 3, 4, 5, 6, 6.0]])
    for _ in range(5):
        assert labelled(logits.double()).argmax(1).tolist() == [0, 0, 1, 5]


@pytest.mark.parametrize("name", ["residual", "pools", "squeeze"])
def test_labels_of_networks_are_those_of_plain_and_of_the_model(name: str) -> None:
    program, x, config = network(name), images(24, seed=9), MPC(reveal="label")
    got = secure(program, x, config)
    assert (got.argmax(1) == evaluate(program, x).numpy().argmax(1)).all()
    schedule = compile_program(program, config)
    assert (got == oracle.evaluate(program, schedule, x.numpy())).all()
    predicted = costs(program, config, 24)
    with config.open(program, "simulate") as session:
        _, measured = session.run(x.numpy())
    assert (measured.links, measured.offline_links) == (predicted.links, predicted.offline_links)
    assert measured.total.rounds == predicted.total.rounds
    assert measured.total.drelus == predicted.total.drelus


def test_the_server_sends_no_more_than_the_label_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the low bits of its share: any other would tell how large the largest value is."""
    program, config = network("residual"), MPC(reveal="label")
    schedule = compile_program(program, config)
    assert isinstance(schedule.steps[-1], RevealLabel) and schedule.steps[-1].bits == 3
    team = LocalTeam(program, config, bytes(16))
    party, sent = team.workers["client"].party, []
    receive = party.receive

    def spied(step, message, batch):
        arrays = receive(step, message, batch)
        if isinstance(step, RevealLabel):
            sent.append(arrays["label"])
        return arrays

    monkeypatch.setattr(party, "receive", spied)
    team.call("setup", 0)
    team.call("offline", 64)
    team.call("online", 64, images(64).numpy())
    team.close()
    assert len(sent) == 1 and sent[0].shape == (64,) and sent[0].max() < 8
    assert len(set(sent[0].tolist())) == 8  # a share, not the label


def test_only_a_vector_has_a_label() -> None:
    for model in (nn.Conv2d(2, 3, 1), nn.Sequential(nn.Flatten(), nn.Linear(32, 1))):
        program = calibrated(nn.Sequential(model), (2, 4, 4))
        with pytest.raises(InputError, match="label"):
            compile_program(program, MPC(reveal="label"))
    with pytest.raises(InputError, match="reveal"):
        MPC(reveal="everything")  # type: ignore[arg-type]


def test_labels_of_logits_near_the_limit_of_the_ring() -> None:
    """The places do not fit beside 44 fractional bits, so the logits are truncated first."""
    program = calibrated(nn.Sequential(nn.Flatten(), nn.Linear(4, 10)), (1, 2, 2))
    program = replace(program, ranges=program.ranges | {"1": 2.0**12})
    x = torch.randn(32, 1, 2, 2)
    got = secure(program, x, MPC(reveal="label"))
    assert (got.argmax(1) == evaluate(program, x).numpy().argmax(1)).all()


SAME = [(64, 64, s) for s in (0, 5, 22, 32, 33, 40)] + [(32, 32, 0), (32, 32, 11), (40, 40, 0), (48, 48, 12)]
MIXED = [(32, 40, 11), (32, 48, 3), (40, 32, 0), (40, 32, 12), (48, 40, 9)]


@pytest.mark.parametrize("ring_bits, after, shift", SAME + MIXED)
def test_squares_are_exact_for_any_shift_and_mask(ring_bits: int, after: int, shift: int) -> None:
    """b * x^2 from one opening: every combination of extreme values and masks, both halves of the wrap."""
    top = 2 ** (ring_bits - 3)
    values = [0, 1, -1, 2**11 - 1, -(2**22), top // 3, -(top // 5) + 3, top - 1, 1 - top]
    masks = [0, 1, 2**22 - 1, 2 * top, 4 * top - 1, 4 * top, 8 * top - 2**22, 8 * top - 1]
    pairs = [(v % 2**ring_bits, m) for v in values for m in masks]
    z, r = np.array(pairs, WORDS[ring_bits]).T.copy()
    count = len(z)
    relu = Relu(name="", inputs=("",), shape=(1, 1, count), patches=((1, 1),))
    wire = Wire("", relu.shape, 22 + shift, 1.0, 1.0, static=False, ring_bits=ring_bits)
    pieces = (Piece(0, square=3, linear=5, constant=7), Piece(9, square=-1, linear=-2))
    step = Gate(
        index=0, op="", kernel=relu, input=wire, output=replace(wire, ring_bits=after), shift=shift,
        trim=shift, bits=20, pieces=pieces,
    )  # fmt: skip
    unused = 64 - after
    for seed in range(4):
        stream = Stream(bytes([seed]) * 32)
        c, o = stream.bits(2 * count), stream.bits(2 * count)
        share = stream.ring(count, ring_bits)
        server = gates.share_gate(step, r, c, Stream(bytes(32)))
        drawn = Stream(bytes(32))
        client = {f.name: gates.draw(drawn, f, 1) for f in step.share_fields}
        got = sum(
            gates.select(party, step, z + r, part.reshape(1, 1, 1, count), held, o).reshape(-1)
            for party, part, held in ((0, share, client), (1, z - share, server))
        )
        signed = torch.from_numpy(z.astype(np.int64)) << (64 - ring_bits) >> (64 - ring_bits)
        x = signed >> shift
        low = (1 << shift) - 1
        x = x + torch.from_numpy((z & low) + (r & low) > low)
        b = torch.from_numpy(c ^ o).reshape(2, count)
        want = b[0] * (3 * x * x + 5 * x + 7) + b[1] * (-x * x - 2 * x)
        got = torch.from_numpy(got.astype(np.int64))
        assert torch.equal(got << unused, want << unused)
