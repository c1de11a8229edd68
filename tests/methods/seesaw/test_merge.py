"""Merging is exact, borders included, or is not done; and it never costs more."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from networks import NETWORKS, Chain, conv, gap, settle
from tightrope.errors import TraceError
from tightrope.lower import lower
from tightrope.methods.seesaw import merge as merging
from tightrope.methods.seesaw.merge import merge
from tightrope.methods.seesaw.network import Sum, assemble
from tightrope.methods.seesaw.operators import ALL, BORDERS, CONVOLUTIONS, Borders, build
from tightrope.methods.seesaw.operators import POOLS as AVERAGES
from tightrope.methods.seesaw.space import POOLS, Aggregate, Architecture, Block, resolve
from tightrope.program import base_cost
from tightrope.types import total

OPERATORS = [name for name in ALL if name != "none"]


def extent(name: str, borders: Borders) -> tuple[int, int] | None:
    """The kernel of the one convolution that the branch equals; None where there is none."""
    if name == "skip":
        return (1, 1)
    if name in AVERAGES:
        return (AVERAGES[name],) * 2 if borders == "mergeable" else None
    steps = CONVOLUTIONS[name]
    radii = [step.radius for step in steps]
    # Zeros between two padded convolutions stay zeros only where nothing adds a constant, and where the first
    # does not see across the border that the second pads.
    spoiled = any(
        radii[k][axis] and (any(s.norm for s in steps[:k]) or any(r[axis] for r in radii[:k]))
        for k in range(1, len(steps))
        for axis in (0, 1)
    )
    if borders == "published" and spoiled:
        return None
    return (1 + 2 * sum(r[0] for r in radii), 1 + 2 * sum(r[1] for r in radii))


def macs(shape, paths) -> float:
    return float(sum(base_cost(op).macs for path in paths for op in path))


def ops(shape, paths) -> float:
    """Every convolution costs the same: whatever can be merged pays off."""
    return float(sum(len(path) for path in paths))


def spent(model: nn.Module, shape: tuple[int, ...], price) -> float:
    return sum(price(shape, ((op,),)) for op in lower(model, shape).ops if op.kind in ("conv2d", "avg_pool"))


def convolutions(model: nn.Module, shape: tuple[int, ...]) -> int:
    return sum(op.kind == "conv2d" for op in lower(model, shape).ops)


def merged(model: nn.Module, shape: tuple[int, ...], price=ops) -> nn.Module:
    """Checked in float64 against what it was made from, by a runtime that knows nothing of it."""
    settle(model)
    result = merge(model, shape, price)
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    assert gap(model, lower(result, shape), x) < 1e-5
    return result


@pytest.mark.parametrize("borders", BORDERS)
@pytest.mark.parametrize("name", OPERATORS)
def test_each_operator_is_one_convolution_or_stays(name, borders):
    """`extent` says which, and its kernel."""
    shape = (8, 9, 11)
    found = [
        op for op in lower(merged(Chain(build(name, 8, borders)), shape), shape).ops if op.kind == "conv2d"
    ]
    kernel = extent(name, borders)
    if kernel is None:
        assert len(found) > 1 or name.startswith("avg_pool")
    else:
        assert [op.kernel for op in found] == [kernel]


def test_which_operators_cannot_be_merged_as_published():
    kept = {name for name in OPERATORS if extent(name, "published") is None}
    stacked = {f"{kind}_{k}" for kind in ("sep_conv", "dil_sep_conv", "van_conv") for k in (3, 5, 7)}
    assert kept == stacked | {f"avg_pool_{k}" for k in (3, 5, 7)}
    assert not [name for name in OPERATORS if extent(name, "mergeable") is None]


@settings(max_examples=20)
@given(
    names=st.lists(st.sampled_from(OPERATORS), min_size=1, max_size=5, unique=True),
    size=st.tuples(st.integers(3, 12), st.integers(3, 12)),
    borders=st.sampled_from(BORDERS),
    price=st.sampled_from([ops, macs]),
)
def test_sums_of_operators_merge_exactly(names, size, borders, price):
    shape = (8, *size)
    block = Sum({name: build(name, 8, borders) for name in names})
    after = merged(block, shape, price)
    if price is ops:
        left = sum(extent(name, borders) is None for name in names)
        assert left or convolutions(after, shape) == 1
    assert spent(after, shape, price) <= spent(block, shape, price)


@settings(max_examples=6)
@given(
    seed=st.integers(0, 10**6), borders=st.sampled_from(BORDERS), size=st.sampled_from([(10, 14), (6, 18)])
)
def test_random_networks_merge_exactly(seed, borders, size):
    draw = torch.Generator().manual_seed(seed)

    def flip() -> bool:
        return bool(torch.randint(2, (), generator=draw))

    space = replace(resolve("2,1", (1, *size), 4, stem=4), pools=POOLS, free=True, borders=borders)
    picks = [sorted(torch.randperm(len(OPERATORS), generator=draw)[:4].tolist()) for _ in range(3)]
    network = Architecture(
        tuple(Block(tuple(OPERATORS[k] for k in pick), flip()) for pick in picks),
        (Aggregate(POOLS[seed % 3], flip()),),
    )
    plain = assemble(space, network)
    after = merged(plain, space.input_shape, macs)
    counted = total(base_cost(op) for op in lower(after, space.input_shape).ops)
    assert counted.drelus == space.drelus(network)
    assert spent(after, space.input_shape, macs) <= spent(plain, space.input_shape, macs)


def test_a_constant_between_two_padded_convolutions_is_not_merged():
    shape = (3, 8, 8)
    biased = Chain(nn.Conv2d(3, 3, 1), conv(3, 3))
    assert convolutions(merged(biased, shape), shape) == 2
    plain = Chain(nn.Conv2d(3, 3, 1, bias=False), conv(3, 3))
    assert convolutions(merged(plain, shape), shape) == 1
    behind = Chain(conv(3, 3), nn.Conv2d(3, 3, 1))
    assert convolutions(merged(behind, shape), shape) == 1


def test_identity_blocks_collapse_where_the_second_has_no_kernel():
    shape = (8, 7, 7)
    blocks = [
        Sum({"conv_5": build("conv_5", 8, "mergeable"), "skip": build("skip", 8, "mergeable")}),
        Sum({"conv_1": build("conv_1", 8, "mergeable"), "skip": build("skip", 8, "mergeable")}),
    ]
    for act, left in ((nn.Identity(), 1), (nn.ReLU(), 2)):
        found = lower(merged(Chain(blocks[0], act, blocks[1]), shape), shape).ops
        assert sum(op.kind == "conv2d" for op in found) == left


def test_strides_are_merged():
    shape = (4, 9, 9)
    row = Chain(conv(4, 6, stride=2), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1, 2))
    (op,) = lower(merged(row, shape), shape).ops
    assert (op.kernel, op.stride, op.shape) == ((3, 3), (4, 4), (4, 3, 3))
    side = Sum({"a": conv(4, 4, stride=2), "b": nn.Conv2d(4, 4, 1, 2), "c": nn.Conv2d(4, 4, 1, 2)})
    assert convolutions(merged(side, shape), shape) == 1


def test_what_costs_more_is_left_as_it_is():
    """A 25x25 kernel for two depthwise 7x7 would be 40 times the multiplications."""
    shape = (8, 14, 14)
    block = Sum({o: build(o, 8, "mergeable") for o in ("dil_sep_conv_7", "conv_3", "conv_1", "skip")})
    found = [op for op in lower(merged(block, shape, macs), shape).ops if op.kind == "conv2d"]
    assert sorted(op.kernel for op in found) == [(1, 1), (1, 1), (3, 3), (7, 7), (7, 7)]


@pytest.mark.parametrize("name", NETWORKS)
def test_other_networks_stay_what_they_are(name):
    net = settle(NETWORKS[name]())
    merged(net, (3, 16, 16), macs)


def test_values_that_others_read_are_kept():
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(2, 2, bias=False), nn.Conv2d(2, 2, 1)

        def forward(self, x):
            y = self.a(x)
            return self.b(y) + y.relu() + x + 1.0

    assert convolutions(merged(Fork(), (2, 6, 6)), (2, 6, 6)) == 3  # two, and the constant's


@pytest.mark.parametrize(("wrong", "refused"), [(2e-4, True), (5e-5, False)])
def test_a_merge_that_is_wrong_by_more_than_rounding_is_refused(wrong, refused, monkeypatch):
    """In absolute terms, however large the outputs are; here about 100."""
    net = settle(Chain(conv(3, 4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)))
    with torch.no_grad():
        net.parts[2].bias.fill_(100.0)

    def shifted(one, two, right=merging.composed):
        whole = right(one, two)
        return replace(whole, bias=whole.bias + wrong)

    monkeypatch.setattr(merging, "composed", shifted)
    if refused:
        with pytest.raises(TraceError, match=r"outputs apart by 0\.0002"):
            merge(net, (3, 6, 6), ops)
    else:
        assert convolutions(merge(net, (3, 6, 6), ops), (3, 6, 6)) == 1


def test_rounding_of_enormous_outputs_is_no_difference():
    net = settle(Chain(conv(3, 4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)))
    with torch.no_grad():
        net.parts[2].weight.mul_(1e6)
    assert convolutions(merge(net, (3, 6, 6), ops), (3, 6, 6)) == 1
