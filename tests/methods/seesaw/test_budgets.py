"""Prices are of what is executed, and a budget that some network of the space meets is met."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from methods.seesaw.small import QUICK, SHAPE, learn
from networks import settle
from tightrope.lower import lower
from tightrope.methods.seesaw import SeesawMethod
from tightrope.methods.seesaw.decide import Wanted, cheapest, most_macs, prune
from tightrope.methods.seesaw.merge import merge
from tightrope.methods.seesaw.network import Sum, assemble
from tightrope.methods.seesaw.operators import ALL, BORDERS, LOW_MEMORY, build
from tightrope.methods.seesaw.options import project
from tightrope.methods.seesaw.prices import Prices
from tightrope.methods.seesaw.space import POOLS, Architecture, resolve
from tightrope.methods.seesaw.supernet import Supernet
from tightrope.program import base_cost
from tightrope.runtimes.mpc import MPC
from tightrope.runtimes.plain import Plain
from tightrope.types import Cost, total

COST = MPC().pricing()
NONE = float("inf")
OPERATORS = [name for name in ALL if name != "none"]


def prices_of(cost=COST, **config) -> Prices:
    return Prices(SeesawMethod(**QUICK | config).space_for(SHAPE, 3), cost, cost)


def a_net(prices: Prices, alive: list[str]) -> Supernet:
    torch.manual_seed(0)
    net = Supernet(prices.space)
    for mixture in net.mixtures:
        mixture.alive = mixture.picked = [mixture.names.index(name) for name in alive]
    return net


@settings(max_examples=25)
@given(
    names=st.sets(st.sampled_from(OPERATORS), min_size=1, max_size=7),
    borders=st.sampled_from(BORDERS),
    cost=st.sampled_from([COST, Plain()]),
    stage=st.sampled_from([0, 1]),
)
def test_a_block_costs_what_is_left_of_it_after_merging(names, borders, cost, stage):
    """Trained modules before a ReLU, merged and lowered; what a layer costs whatever its size is in it."""
    space = replace(resolve("1,1", (1, 12, 12), 3, stem=4, operators=tuple(OPERATORS)), borders=borders)
    prices, shape = Prices(space, cost, cost), space.shape(stage)
    block = settle(Sum({o: build(o, shape[0], borders) for o in OPERATORS if o in names}))
    program = lower(merge(nn.Sequential(block, nn.ReLU()), shape, prices.paths), shape)
    spent = cost.prices(program)
    executed = total(spent[op.name] for op in program.ops if op.kind != "relu")
    predicted = prices.block(stage, [o for o in OPERATORS if o in names])
    for metric in ("macs", "online_bytes", "offline_bytes", "online_ms", "offline_ms"):
        assert getattr(predicted, metric) == pytest.approx(getattr(executed, metric), rel=1e-9), metric


@pytest.mark.parametrize("borders", BORDERS)
def test_multiplications_are_those_that_run_or_more(borders):
    """28x28 and 8 channels: there the first steps of a separable convolution become one under mpc."""
    space = resolve(
        "1,1", (1, 28, 28), 10, stem=8, operators=LOW_MEMORY, borders=borders, pools=POOLS, free=True
    )
    prices = Prices(space, COST, COST)
    draw = torch.Generator().manual_seed(0)
    picks = [["sep_conv_3"], ["conv_1"], ["skip"]]
    picks += [[LOW_MEMORY[k] for k in torch.randperm(10, generator=draw)[:4].sort()[0]] for _ in range(5)]
    for pick in picks:
        net = a_net(prices, pick)
        plain = settle(assemble(space, space.network(pick, relu=True, pool="max")))
        executed = prices.exact(plain).macs
        assert executed <= most_macs(net, prices), pick
        if len(pick) > 1:
            assert executed == most_macs(net, prices), pick


@pytest.mark.parametrize("metric", ["online_bytes", "offline_bytes", "online_ms", "offline_ms"])
def test_every_limit_that_the_cheapest_network_meets_is_met(metric):
    least = prices_of().least(metric)
    for times in (1, 1.02, 1.3, 4, 5, 6, 12):
        found = learn(f"{metric}<={least * times!r}", epochs=1, recovery=0)
        assert 0 < getattr(found.predicted, metric) <= least * times


def test_the_cheapest_operator_takes_the_place_of_the_last_one():
    """What a shrinking block kept may be too much on its own."""
    prices = prices_of()
    net = a_net(prices, ["conv_3"])
    for limits in (("offline_bytes", 1.1 * prices.least("offline_bytes"), NONE), ("drelus", 0, 4144.0)):
        wanted = Wanted(*limits, balance=NONE)
        assert prune(net, prices, wanted, lambda: 0.0)
        network = net.architecture(cheapest(net, prices, wanted))
        exact = prices.exact(net.extract(network))
        assert getattr(exact, wanted.metric) <= wanted.limit
        assert exact.macs <= wanted.macs
        assert not any("conv_3" in block.operators for block in network.blocks)


@pytest.mark.parametrize("worth", [(-1, 1, 3, 2), (1, -1, 0, 0), (0, 0, 0, 0)])
def test_for_the_balance_only_operators_that_cost_something_go(worth):
    """Smaller convolutions disappear into the 5x5 ones beside them, which go one after the other."""
    names = ["conv_1", "conv_3", "conv_5", "dil_conv_3"]
    prices = prices_of(operators=",".join(names))
    net = a_net(prices, names)

    def judge() -> float:
        return -sum(worth[names.index(m.names[k])] for m in net.mixtures for k in m.picked)

    middle = prices.space.network(["conv_3"], relu=True, pool="avg")
    balance = 1.001 * prices.balance(middle, 1000)
    assert prune(net, prices, Wanted("drelus", 1000, NONE, balance), judge)
    for block in net.architecture([1, 1, 0]).blocks:
        assert block.operators in [("conv_1",), ("conv_1", "conv_3"), tuple(names)]


def test_multiplications_between_a_merged_and_an_unmerged_network():
    """ReLUs go where only merged blocks are few enough; 111,200 is one operator a block, each on its own."""
    config = {"space": "2,2", "operators": "conv_1,conv_3", "width": 8}
    prices = prices_of(**config)
    least = prices.least("macs")
    assert least < most_macs(a_net(prices, ["conv_1"]), prices)
    drelus = []
    for macs in (least, 60_000, 111_199):
        wanted = Wanted("drelus", 5000, macs, NONE)
        net = a_net(prices, ["conv_1", "conv_3"])
        for choice in net.choices.values():  # every ReLU is wanted
            choice.logits.data = torch.tensor([4.0 * relu for _, relu in choice.options])
        prune(net, prices, wanted, lambda: 0.0)
        network = net.architecture(project(net, prices, wanted, lambda: 0.0, rounds=0))
        assert prices.exact(net.extract(network)).macs <= macs
        drelus.append(prices.space.drelus(network))
    assert drelus == [512, 1280, 3328]
    found = learn("drelus<=100,macs<=111199", epochs=1, recovery=0, **config)
    assert found.predicted.macs <= 111_199


@pytest.mark.parametrize("budget", ["drelus<=1e9", "drelus<=700"])
def test_the_balance_is_of_the_network_that_was_found(budget):
    config = {"operators": "skip,conv_1,conv_3,avg_pool_3,conv_5,conv_7", "keep": 4}
    prices = prices_of(**config)
    for balance in (0.2, 0.01):
        found = learn(budget, balance=balance, recovery=0, **config)
        network = Architecture.from_json(found.choices, prices.space)
        ratio = prices.balance(network, found.predicted.drelus)
        assert found.predicted.drelus > 0
        if balance == 0.2:
            assert (ratio <= balance, found.notes) == (True, ())
        else:
            assert f"{ratio:.3g} times" in found.notes[0]
            assert all(len(block.operators) == 1 for block in network.blocks)


@pytest.mark.parametrize(("network", "merges"), [("loopback", False), ("lan", True)])
def test_a_stack_merges_where_a_message_costs_more_than_a_larger_kernel(network, merges):
    """1x7 and 7x1 on 28x28 maps of 16 channels: as 7x7 they take longer, but wait for one answer less."""
    cost = MPC(network=network).pricing()
    space = resolve("1", (1, 28, 28), 10, stem=8, operators=("conv_7x1_1x7",), borders="mergeable")
    whole = 49 * 16 * 16 * 28 * 28
    assert (Prices(space, cost, cost).block(0, ["conv_7x1_1x7"]).macs == whole) is merges


class PerLayer(Plain):
    """A millisecond a layer, and more where kernels and maps are large."""

    def prices(self, program):
        found = {}
        for op in program.ops:
            size = prod(op.kernel) * prod(op.shape[1:]) if op.kind == "conv2d" else 0
            found[op.name] = base_cost(op) + Cost(online_ms=1 + size / 1e4)
        return found


def test_the_cheapest_operator_is_that_of_its_stage():
    operators = ("conv_7", "conv_7x1_1x7")
    space = resolve("1,1", (1, 32, 32), 3, stem=4, operators=operators, borders="published")
    found = Prices(space, PerLayer(), PerLayer()).cheapest("online_ms")
    assert [block.operators for block in found.blocks] == [("conv_7x1_1x7",), ("conv_7",)]
