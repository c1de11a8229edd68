"""BlockReLU against a loop over tiles and pixels, written from the definition."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from tightrope.errors import InputError
from tightrope.nn import BlockReLU
from tightrope.nn.block_relu import IDENTITY, expand_gate, tile_gate, tiles

Patches = list[tuple[int, int]]
MIX: Patches = [(2, 2), (0, 0), (3, 1), (1, 1), (2, 2), (5, 9), (1, 4)]


def loop_gates(x: np.ndarray[Any, Any], patches: Patches, threshold: float) -> np.ndarray[Any, Any]:
    """1 where the sum of (x - threshold) over the pixel's tile is positive, summed in reading order."""
    N, _, H, W = x.shape
    gates = np.zeros(x.shape, dtype=bool)
    for n in range(N):
        for c, (p, q) in enumerate(patches):
            for top in range(0, H, p or H):
                for left in range(0, W, q or W):
                    total = x.dtype.type(0)
                    rows, columns = range(top, min(top + p, H)), range(left, min(left + q, W))
                    for i in rows:
                        for j in columns:
                            total = total + (x[n, c, i, j] - x.dtype.type(threshold))
                    for i in rows:
                        for j in columns:
                            gates[n, c, i, j] = total > 0
    return gates


def loop_forward(x: Tensor, patches: Patches, upper: float | None) -> tuple[Tensor, Tensor]:
    """(output, gradient of its sum) by definition."""
    values = x.numpy()
    gate = loop_gates(values, patches, 0.0)
    for c, patch in enumerate(patches):
        if patch == IDENTITY:
            gate[:, c] = True
    above = loop_gates(values, patches, upper) if upper is not None else np.zeros_like(gate)
    gradient = (gate & ~above).astype(values.dtype)
    ceiling = values.dtype.type(0 if upper is None else upper)
    return torch.from_numpy(values * gradient + ceiling * above), torch.from_numpy(gradient)


def run(m: BlockReLU, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = m(x)
    y.sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


side = st.integers(1, 9)
patch = st.one_of(st.just(IDENTITY), st.tuples(side, side))


@settings(max_examples=60, deadline=None)
@given(
    patches=st.lists(patch, min_size=1, max_size=6),
    size=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    batch=st.integers(1, 3),
    upper=st.sampled_from([None, 0.3, 6.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    channels_last=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_equals_the_loop(
    patches: Patches,
    size: tuple[int, int],
    batch: int,
    upper: float | None,
    dtype: torch.dtype,
    channels_last: bool,
    seed: int,
) -> None:
    # Tenths cancel to sums that round to about 0, where the order of summation decides the gate.
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-9, 10, (batch, len(patches), *size), generator=generator).to(dtype) / 10
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    expected, gradient = loop_forward(x, patches, upper)
    y, got_gradient = run(BlockReLU(patches, upper), x)
    assert y.dtype == dtype
    assert torch.equal(y, expected)
    assert torch.equal(got_gradient, gradient)
    assert y.stride() == x.stride() or 1 in x.shape  # keeps the memory format


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gates_do_not_depend_on_the_memory_format(dtype: torch.dtype) -> None:
    x = (
        torch.randint(-9, 10, (4, len(MIX), 13, 11), generator=torch.Generator().manual_seed(0)).to(dtype)
        / 10
    )
    m = BlockReLU(MIX, 0.5)
    expected, _ = loop_forward(x, MIX, 0.5)
    for view in (
        x,
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        torch.cat([x, x], 3)[..., : x.shape[3]],
    ):
        assert torch.equal(m(view), expected)


def test_plain_relu_and_identity() -> None:
    x = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(BlockReLU([(1, 1)] * 4)(x), torch.relu(x))
    assert torch.equal(BlockReLU([(1, 1)] * 4, 0.5)(x), x.clamp(0, 0.5))
    assert torch.equal(BlockReLU([IDENTITY] * 4)(x), x)
    assert torch.equal(BlockReLU([IDENTITY] * 4, 0.5)(x), x)


def test_gradient_is_gate_times_upstream() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, len(MIX), 7, 9, generator=generator, dtype=torch.float64)
    upstream = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    _, gate = loop_forward(x, MIX, None)
    x.requires_grad_()
    BlockReLU(MIX)(x).backward(upstream)
    assert x.grad is not None
    assert torch.equal(x.grad, gate * upstream)


@pytest.mark.parametrize("ndim", [2, 3, 4, 5])
@pytest.mark.parametrize("patch", [(1, 1), (2, 3), (4, 1), (7, 7), (20, 20)])
def test_tile_gate_of_any_rank(ndim: int, patch: tuple[int, int]) -> None:
    shape = (2, 1, 3, 7, 5)[5 - ndim :]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    expected = loop_gates(x.reshape(1, -1, 7, 5).numpy(), [patch] * math.prod(shape[:-2]), 0.0).reshape(shape)
    gate = tile_gate(x, patch)
    assert gate.shape == (*shape[:-2], -(-7 // patch[0]), -(-5 // patch[1]))
    assert gate.shape[-2] * gate.shape[-1] == tiles(patch, (7, 5))
    assert torch.equal(expand_gate(gate, patch, (7, 5)), torch.from_numpy(expected))


def test_flat_input() -> None:
    x = torch.tensor([[-1.0, -2.0, 3.0], [4.0, 5.0, -6.0]])
    m = BlockReLU([(1, 1), (0, 0), (1, 1)])
    assert m(x).tolist() == [[0.0, -2.0, 3.0], [4.0, 5.0, 0.0]]


def test_nan_survives_a_closed_gate() -> None:
    x = torch.full((1, 2, 2, 2), -1.0)
    x[0, 0, 0, 0] = torch.nan
    y = BlockReLU([(2, 2), (1, 1)])(x)
    assert y.isnan().tolist() == x.isnan().tolist()


def test_copies_traces_and_casts() -> None:
    x = torch.randn(2, len(MIX), 6, 6, generator=torch.Generator().manual_seed(3))
    m = BlockReLU(MIX, 6.0)
    net = nn.Sequential(copy.deepcopy(m))
    assert torch.equal(net(x), m(x))
    assert net.state_dict() == {}

    class Tracer(fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, BlockReLU)

    traced = fx.GraphModule(net, Tracer().trace(net))
    assert torch.equal(traced(x), m(x))
    assert torch.equal(m.double()(x.double()).float(), m(x))
    assert m.patches == tuple(MIX)
    assert m.upper == 6.0
    assert "2x2: 2" in repr(m)


def test_exports() -> None:
    x = torch.randn(2, len(MIX), 6, 6, generator=torch.Generator().manual_seed(4))
    m = BlockReLU(MIX)
    assert torch.equal(torch.export.export(m, (x,)).module()(x), m(x))


@pytest.mark.parametrize(
    ("patches", "upper", "message"),
    [
        ([(1, 1), (0, 2)], None, "not a patch"),
        ([(-1, -1)], None, "not a patch"),
        ([], None, "at least one channel"),
        ([(1, 1)], 0.0, "clips above 0"),
        ([(1, 1)], math.nan, "clips above 0"),
    ],
)
def test_refuses_bad_patches(patches: Patches, upper: float | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        BlockReLU(patches, upper)


@pytest.mark.parametrize(
    ("patches", "shape", "message"),
    [
        ([(1, 1)] * 3, (2, 4, 5, 5), r"one patch per channel[\s\S]*\(N, 3, H, W\)"),
        ([(1, 1)] * 3, (2, 3, 5), "one patch per channel"),
        ([(1, 1), (2, 2)], (3, 2), "no tiles"),
    ],
)
def test_refuses_bad_inputs(patches: Patches, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BlockReLU(patches)(torch.zeros(shape))
