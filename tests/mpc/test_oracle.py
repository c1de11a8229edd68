"""Ring arithmetic, truncation and gates in the clear, against Python integers, torch floats and `plain`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

from small_networks import NETWORKS, images, network
from tightrope.errors import InputError
from tightrope.program import AvgPool2d, Conv2d, Linear, Relu
from tightrope.runtimes.mpc import MPC, compile_program, convolution, fss, gates, oracle
from tightrope.runtimes.mpc.convolution import by_torch, direct, direct_matmul
from tightrope.runtimes.mpc.fixed import encode, local, multiply, pool_divisor, tensor, words
from tightrope.runtimes.mpc.prg import WORDS, Stream
from tightrope.runtimes.mpc.steps import Gate, Local, Piece, Truncate, Wire
from tightrope.runtimes.plain import evaluate

EDGES = [0, 1, -1, 2**22 - 1, 2**22, -(2**22), 5 * 2**22, 2**44 + 12345, 2**62 - 1, -(2**62), 1 - 2**62]
MASKS = [0, 1, 2**22 - 1, 2**22, 2**62, 2**63 - 1, 2**63, 2**64 - 2**22, 2**64 - 1]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_integer_model_is_close_to_float64(name: str) -> None:
    program, x = network(name), images(32, seed=7)
    model = oracle.evaluate(program, compile_program(program, MPC()), x.numpy())
    assert np.abs(model - evaluate(program, x).numpy()).max() < 2**-18


@pytest.mark.parametrize("ring_bits", [64, 32])
def test_products_wrap_modulo_the_ring(ring_bits: int) -> None:
    stream = Stream(bytes(32))
    op = Linear(name="f", inputs=("x",), shape=(3,), in_features=4)
    w, x = (tensor(stream.ring(shape, ring_bits), shape) for shape in ((3, 4), (2, 4)))
    half = 2 ** (ring_bits - 1)
    exact = [[sum(int(a) * int(b) for a, b in zip(u, v, strict=True)) for v in w] for u in x]
    assert multiply(op, w, x).tolist() == [[(v + half) % (2 * half) - half for v in row] for row in exact]


@given(
    size=st.tuples(*[st.integers(1, 9)] * 2),
    stride=st.tuples(*[st.integers(1, 5)] * 2),
    dilation=st.tuples(*[st.integers(1, 3)] * 2),
    kernel=st.tuples(*[st.integers(1, 4)] * 2),
    padding=st.tuples(*[st.sampled_from([0, 1, 2, 9])] * 4),
    groups=st.sampled_from([1, 2, 4]),
    batch=st.integers(0, 2),
    channels_last=st.booleans(),
)
def test_convolutions_equal_torch_in_floats(
    size, stride, dilation, kernel, padding, groups, batch, channels_last
) -> None:
    """On numbers that float64 holds exactly."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-99, 99, (batch, 4, *size), generator=generator)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    w = torch.randint(-99, 99, (8, 4 // groups, *kernel), generator=generator)
    padded = F.pad(x.double(), padding)
    assume(all(n > (k - 1) * d for n, k, d in zip(padded.shape[2:], kernel, dilation, strict=True)))
    want = F.conv2d(padded, w.double(), None, stride, 0, dilation, groups)
    op = Conv2d(
        name="c",
        inputs=("x",),
        shape=tuple(want.shape[1:]),
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        in_channels=4,
    )
    for of_ring in (multiply, by_torch, direct):
        assert torch.equal(of_ring(op, w, x).double(), want)
        assert torch.equal(of_ring(op, w.int(), x.int()), want.int())


@pytest.mark.parametrize("ring_bits", [64, 32])
@pytest.mark.parametrize(("groups", "outputs"), [(1, 7), (2, 6), (8, 8)])
def test_convolutions_of_ring_elements_are_the_same_by_torch_and_directly(
    groups, outputs, ring_bits, monkeypatch
) -> None:
    """On all of the ring, over more values than a strip has, shared among threads or not."""
    monkeypatch.setattr(convolution, "SHARED", 0)
    stream, sizes = Stream(bytes(32)), ((3, 8, 40, 29), (outputs, 8 // groups, 5, 3))
    x, w = (tensor(stream.ring(shape, ring_bits), shape) for shape in sizes)
    op = Conv2d(
        name="c", inputs=("x",), shape=(outputs, 40, 15), kernel=(5, 3), stride=(1, 2),
        padding=(1, 1, 2, 2), groups=groups, in_channels=8,
    )  # fmt: skip
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            found = direct(op, w, x)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(found, by_torch(op, w, x))


@pytest.mark.parametrize("ring_bits", [64, 32])
def test_matrices_of_ring_elements_are_the_same_by_torch_and_directly(ring_bits) -> None:
    stream = Stream(bytes(32))
    x, w = (tensor(stream.ring(shape, ring_bits), shape) for shape in ((2, 3, 37), (5, 37)))
    assert torch.equal(direct_matmul(w, x), x @ w.T)
    op = Conv2d(name="c", inputs=("x",), shape=(5, 1, 1), kernel=(1, 1), in_channels=37)
    assert torch.equal(direct(op, w[..., None, None], x[0, ..., None, None]).flatten(1), x[0] @ w.T)


def test_nothing_beside_an_input_is_read() -> None:
    op = Conv2d(name="c", inputs=("x",), shape=(2, 4, 4), kernel=(3, 3), padding=(1,) * 4, in_channels=4)
    w, x = torch.ones(op.weight_shape, dtype=torch.int64), torch.ones((1, 4, 4, 4), dtype=torch.int64)
    assert direct(op, w, x).shape == (1, 2, 4, 4)
    for weight, given_ in ((w[:1], x), (w, x[:, :1]), (w, x[..., :3]), (w, x.int())):
        with pytest.raises((ValueError, InputError)):
            direct(op, weight, given_)
    with pytest.raises(InputError, match="do not fit"):
        direct_matmul(w.flatten(1), x.flatten(1))


@given(
    kernel=st.tuples(*[st.integers(1, 4)] * 2),
    stride=st.tuples(*[st.integers(1, 4)] * 2),
    fraction=st.floats(0, 1),
    ceil=st.booleans(),
    count=st.booleans(),
)
def test_window_sums_over_the_divisor_equal_torch_averages(kernel, stride, fraction, ceil, count) -> None:
    padding = (int(kernel[0] // 2 * fraction), int(kernel[1] // 2 * fraction))
    x = torch.randint(-99, 99, (2, 3, 7, 6), generator=torch.Generator().manual_seed(1))
    want = F.avg_pool2d(x.double(), kernel, stride, padding, ceil, count)
    op = AvgPool2d(
        name="p",
        inputs=("x",),
        shape=tuple(want.shape[1:]),
        kernel=kernel,
        stride=stride,
        padding=padding,
        ceil_mode=ceil,
        count_padding=count,
    )
    wire = Wire("x", (3, 7, 6), 0, 1.0, 1.0, static=False)
    step = Local(index=0, op="p", kernel=op, inputs=(wire,), output=wire, factors=(1,))
    assert torch.allclose(local(step, x).double() / pool_divisor(op, (3, 7, 6)), want, rtol=0, atol=1e-12)


def truncate_step(count: int, shift: int, ring_bits: int = 64, after: int | None = None) -> Truncate:
    wire = Wire("z", (count,), 22 + shift, 1.0, 1.0, static=False, ring_bits=ring_bits)
    output = replace(wire, ring_bits=after or ring_bits)
    return Truncate(index=0, op="z", input=wire, output=output, shift=shift)


def truncated(
    z: list[int], r: list[int], shift: int, ring_bits: int = 64, after: int | None = None
) -> list[int]:
    """By both parties, with random shares of everything the dealer shares; into the ring `after`."""
    step = truncate_step(len(z), shift, ring_bits, after)
    mask = np.array(r, WORDS[ring_bits])
    opened = np.array([v % 2**ring_bits for v in z], WORDS[ring_bits]) + mask
    server = gates.share_truncation(step, mask, Stream(bytes(32)))
    stream = Stream(bytes(32))
    client = {f.name: gates.draw(stream, f, 1) for f in step.share_fields}
    shares = [gates.truncate(party, step, opened, held) for party, held in ((0, client), (1, server))]
    total = tensor(shares[0] + shares[1], (len(z),))
    unused = 8 * total.element_size() - step.output.ring_bits
    return (total << unused >> unused).tolist()


@pytest.mark.parametrize("shift", [1, 3, 22, 32, 33, 40])
def test_truncation_is_exact_at_the_edges(shift: int) -> None:
    """Floor, plus one exactly where the dropped bits of z and r carry; never a large error."""
    pairs = [(z, r) for z in EDGES for r in MASKS]
    got = truncated([z for z, _ in pairs], [r for _, r in pairs], shift)
    low = (1 << shift) - 1
    assert got == [(z >> shift) + ((z & low) + (r & low) > low) for z, r in pairs]


@pytest.mark.parametrize("shift", [1, 3, 10, 16, 20])
def test_truncation_is_exact_in_the_small_ring(shift: int) -> None:
    """At the edges, and for random values and masks."""
    numbers = np.random.default_rng(shift)
    edges = [0, 1, -1, 2**10 - 1, 2**20, -(2**20) + 77, 2**30 - 1, -(2**30), 1 - 2**30]
    masks = [0, 1, 2**10 - 1, 2**30, 2**31 - 1, 2**31, 2**32 - 2**10, 2**32 - 1]
    z = edges * len(masks) + numbers.integers(-(2**30), 2**30, 5000).tolist()
    r = sorted(masks * len(edges)) + numbers.integers(0, 2**32, 5000).tolist()
    low = (1 << shift) - 1
    want = [(a >> shift) + ((a & low) + (b & low) > low) for a, b in zip(z, r, strict=True)]
    assert truncated(z, r, shift, 32) == want


@pytest.mark.parametrize("shift", [1, 9, 12, 28])
@pytest.mark.parametrize(
    "before, after", [(32, 40), (32, 48), (40, 40), (40, 32), (40, 48), (48, 40), (48, 32), (64, 32)]
)
def test_truncation_goes_from_any_ring_to_any_other(before: int, after: int, shift: int) -> None:
    """What fits the new ring comes out exactly: at the edges of the old, for random values and masks."""
    numbers = np.random.default_rng(shift)
    top, room = 1 << (before - 2), 1 << min(before - 2, after - 1 + shift - 1)
    edges = [v for v in (0, 1, -1, 2**10 - 1, room - 1, -room, top - 1, -top) if -room <= v < room]
    masks = [0, 1, 2**10 - 1, top, 2 * top - 1, 2 * top, 4 * top - 2**10, 4 * top - 1]
    z = edges * len(masks) + numbers.integers(-room, room, 3000).tolist()
    r = sorted(masks * len(edges)) + numbers.integers(0, 4 * top, 3000, np.uint64).tolist()
    low = (1 << shift) - 1
    want = [(a >> shift) + ((a & low) + (b & low) > low) for a, b in zip(z, r, strict=True)]
    assert truncated(z, r, shift, before, after) == want


@given(st.integers(-(2**62), 2**62 - 1), st.integers(0, 2**64 - 1), st.integers(1, 40))
def test_truncation_is_exact_everywhere(z: int, r: int, shift: int) -> None:
    low = (1 << shift) - 1
    assert truncated([z], [r], shift) == [(z >> shift) + ((z & low) + (r & low) > low)]


def gate_step(patch: tuple[int, int], size: tuple[int, int], shift: int, thresholds: tuple[int, ...]) -> Gate:
    relu = Relu(name="g", inputs=("z",), shape=(1, *size), patches=(patch,))
    wire = Wire("z", (1, *size), 22 + shift, 1.0, 1.0, static=False)
    return Gate(
        index=0,
        op="g",
        kernel=relu,
        input=wire,
        output=wire,
        shift=shift,
        trim=shift,
        bits=42,
        pieces=tuple(Piece(threshold) for threshold in thresholds),
    )


def compared(step: Gate, z: list[int], stream: Stream) -> list[int]:
    """b for one map z, through real comparison keys."""
    r = stream.ring(len(z))
    opened = np.array([v % 2**64 for v in z], np.uint64) + r
    count = step.drelus
    c, bit = stream.bits(count), stream.bits(count)
    roots, key = [stream.blocks(count), stream.blocks(count)], bytes(fss.HASH_KEY_BYTES)
    key_words, bit1 = fss.gen(gates.mask_points(step, r), c, step.bits, *roots, bit, key)
    held = {"words": key_words, "hash_key": np.frombuffer(key, np.uint8)}
    shares = [
        gates.evaluate_bits(party, step, opened, roots[party], held | {"bit": own}, 1)
        for party, own in ((0, bit), (1, bit1))
    ]
    return (shares[0] ^ shares[1] ^ c).tolist()


@pytest.mark.parametrize("shift", [0, 3, 22])
@pytest.mark.parametrize("threshold", [0, 6 << 22])
def test_gates_at_the_edge_of_the_threshold(shift: int, threshold: int) -> None:
    """Never open at or below the threshold, always above it by more than the dropped bits."""
    unit = 1 << shift
    stream = Stream(bytes(32))
    for patch, elements in (((1, 1), 1), ((2, 3), 4)):
        step = gate_step(patch, (2, 2), shift, (threshold,))
        tiles = 4 // elements
        for over in (-(2**40), -unit, -1, 0, unit, unit + 1, 2**40):
            total = threshold * elements + over
            z = [total] * 4 if elements == 1 else [total - 3 * 777, 777, 777, 777]
            for _ in range(20):
                assert compared(step, z, stream) == [int(over >= unit)] * tiles


def test_gates_within_the_dropped_bits_open_as_often_as_they_should() -> None:
    """A sum of u/2^shift of a unit above zero opens with that probability."""
    stream = Stream(bytes(32))
    step = gate_step((1, 1), (100, 100), 8, (0,))
    for u in (32, 128, 224):
        share = np.mean(compared(step, [u] * 10_000, stream))
        assert abs(share - u / 256) < 5 * np.sqrt(u / 256 * (1 - u / 256) / 10_000)


def test_encoding_rounds_to_the_nearest() -> None:
    x = np.array([[1.0, -1.0, 0.3, 2.0**-23, -(2.0**-22)]])
    assert encode(x, 22).tolist() == [[2**22, -(2**22), round(0.3 * 2**22), 0, -1]]
    assert words(encode(x, 22))[0, 1] == 2**64 - 2**22
    assert encode(x, 22, 32).tolist() == encode(x, 22).tolist()
    assert words(encode(x, 22, 32))[0, 1] == 2**32 - 2**22
    with pytest.raises(InputError, match="fit the ring"):
        encode(np.array([256.0]), 22, 32)
