"""Gradients of gates and costs, sampled branches, prices, and networks taken out of the supernet."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

from methods.seesaw.small import DATA, SHAPE
from networks import settle
from tightrope.lower import lower
from tightrope.methods.seesaw import SeesawMethod
from tightrope.methods.seesaw.decide import (
    Judge,
    Wanted,
    expendable,
    importances,
    prune,
    sensitivities,
)
from tightrope.methods.seesaw.decide import settle as set_options
from tightrope.methods.seesaw.network import assemble
from tightrope.methods.seesaw.objectives import Dual, Reference, learned
from tightrope.methods.seesaw.operators import ALL, LOW_MEMORY
from tightrope.methods.seesaw.options import project
from tightrope.methods.seesaw.prices import Prices, PublishedRates
from tightrope.methods.seesaw.space import POOLS, resolve
from tightrope.methods.seesaw.supernet import Choice, Mixture, Supernet
from tightrope.program import base_cost
from tightrope.runtimes.mpc import MPC
from tightrope.runtimes.plain import Plain
from tightrope.shard import Shard
from tightrope.types import total

SPACE = replace(
    resolve("1,1", SHAPE, 3, stem=4), operators=LOW_MEMORY, pools=POOLS, free=True, borders="mergeable"
)
COST = MPC().pricing()
PRICES = Prices(SPACE, COST, COST)


def a_net(favoured: float = 1.0) -> Supernet:
    torch.manual_seed(0)
    return Supernet(SPACE, favoured)


def batches(count: int = 16):
    draw = torch.Generator().manual_seed(0)
    return [(torch.randn(count, *SHAPE, generator=draw), torch.randint(3, (count,), generator=draw))]


@pytest.mark.parametrize("metric", ["drelus", "online_bytes", "offline_bytes", "online_ms", "offline_ms"])
def test_the_expected_cost_has_a_gradient_in_every_gate(metric):
    """The release's had none. Compared with differences of the cost itself."""
    net = a_net()
    expected, largest = PRICES.expectation(net, metric)
    assert expected().item() < largest
    torch.autograd.backward(expected())
    for name, choice in net.choices.items():
        assert (choice.logits.grad != 0).all(), name
        for k in range(len(choice.options)):
            step = 1e-2
            with torch.no_grad():
                choice.logits[k] += step
                above = expected().item()
                choice.logits[k] -= 2 * step
                slope = (above - expected().item()) / (2 * step)
                choice.logits[k] += step
            assert slope == pytest.approx(
                float(choice.logits.grad[k]), rel=0.05, abs=0.002 * expected().item()
            )
    relus = [float(c.logits.grad[1]) for name, c in net.choices.items() if name.startswith("block")]
    assert min(relus) > 0  # more ReLU, more cost


def test_operators_have_a_gradient_where_they_cost():
    net = a_net()
    expected, _ = PRICES.expectation(net, "macs")
    torch.autograd.backward(expected())
    grads = dict(zip(LOW_MEMORY, net.mixtures[0].weights.grad.tolist(), strict=True))
    assert grads["sep_conv_5"] > 0 > grads["skip"]
    assert PRICES.block(0, ["skip", "conv_1", "conv_3"]).macs == PRICES.block(0, ["conv_3"]).macs


def test_the_largest_expectation_is_what_the_network_counts():
    net = a_net()
    for choice in net.choices.values():
        with torch.no_grad():
            choice.logits.copy_(
                torch.tensor([60.0 * (o in (("", True), ("max", True))) for o in choice.options])
            )
    network = SPACE.network(["conv_3"], relu=True, pool="max")
    expected, largest = PRICES.expectation(net, "drelus")
    assert expected().item() == largest == SPACE.drelus(network)


@pytest.mark.parametrize("network", ["loopback", "wan"])
@pytest.mark.parametrize(("relu", "apart"), [(True, 0.05), (False, 0.6)])
def test_the_expected_time_of_a_certain_network_is_about_its_own(network, relu, apart):
    """Of one without ReLUs it is less: layers that stay apart truncate then, which a ReLU would do."""
    cost = MPC(network=network).pricing()
    space = resolve("2,2", (1, 28, 28), 10, stem=8, operators=("conv_3", "conv_7"), pools=POOLS, free=True)
    prices, net = Prices(space, cost, cost), Supernet(space)
    for mixture in net.mixtures:
        mixture.alive = mixture.picked = [0]
    for choice in net.choices.values():
        wanted = [o[1] == relu and o[0] in ("", "avg") for o in choice.options]
        choice.logits.data = 60.0 * torch.tensor(wanted, dtype=torch.float32)
    exact = prices.whole(space.network(["conv_3"], relu=relu, pool="avg")).online_ms
    expected, _ = prices.expectation(net, "online_ms")
    assert (1 - apart) * exact < expected().item() < (1 + min(apart, 0.05)) * exact


def test_a_drawn_gate_has_the_gradient_of_proxylessnas():
    """sum over j of <out_j, d loss / d out> p_j (1[i = j] - p_i), by finite sums of its own."""
    torch.manual_seed(0)
    choice = Choice([("max", False), ("max", True), ("avg", True)])
    outputs, upstream = torch.randn(3, 5), torch.randn(5)
    choice.draw(torch.Generator().manual_seed(1), learn=True)
    assert sorted(choice.bits.detach().tolist()) == pytest.approx([0, 0, 1], abs=1e-6)
    torch.autograd.backward(((choice.bits[:, None] * outputs).sum(0) * upstream).sum())
    p, g = choice.probabilities().detach(), outputs @ upstream
    wanted = [sum(g[j] * p[j] * (float(i == j) - p[i]) for j in range(3)) for i in range(3)]
    torch.testing.assert_close(choice.logits.grad, torch.stack(wanted))


def test_branches_are_sampled_and_gone_for_good():
    mixture = Mixture({str(k): torch.nn.Identity() for k in range(5)})
    draw = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(40):
        mixture.draw(2, draw)
        assert len(mixture.picked) == 2
        assert mixture.coefficients().sum().item() == pytest.approx(1)
        seen |= set(mixture.picked)
    assert seen == set(range(5))
    mixture.drop(3)
    assert mixture.alive == [0, 1, 2, 4]
    assert mixture.shares()[3].item() == 0
    assert mixture.shares().sum().item() == pytest.approx(1)


@pytest.mark.parametrize("operators", [ALL, LOW_MEMORY])
def test_a_network_taken_out_computes_what_the_supernet_does(operators):
    torch.manual_seed(0)
    space = replace(SPACE, operators=operators)
    net = settle(Supernet(space))
    options = [1, 0, 3]
    set_options(net, options)
    network = net.architecture(options)
    plain = net.extract(network).eval()
    x = torch.randn(4, *SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), net(x), rtol=1e-4, atol=1e-5)
    found = total(base_cost(op) for op in lower(plain, SHAPE).ops)
    assert found.drelus == space.drelus(network)


def test_prices_of_choices_add_up_to_those_of_the_network():
    """Exactly in what is counted, for choices that nothing merges across."""
    prices = Prices(SPACE, Plain(), Plain())
    network = SPACE.network(["conv_3", "conv_1", "skip"], relu=True, pool="avg")
    exact = prices.exact(assemble(SPACE, network))
    summed = prices.fixed + total(prices.block(s, network.blocks[0].operators) for s in SPACE.stages())
    summed += total(prices.option(site, ("", True)) for site in ("block1", "block2"))
    summed += prices.option("aggregate1", ("avg", True))
    assert (exact.drelus, exact.macs) == (summed.drelus, summed.macs)


def test_the_published_rates():
    """Their rule is a balance of 0.529; 36,864 ReLUs take 6.4 s online, and pay for 1.26 GMAC."""
    rates = PublishedRates()
    relus = PRICES._option_ops("block1", ("", True))[0]
    one = rates.price(relus)
    assert one.online_ms / one.drelus * 36_864 == pytest.approx(6448, abs=1)
    assert one.offline_ms / one.drelus * 36_864 == pytest.approx(1985, abs=1)
    per_relu = rates.per_relu_online_ms + rates.per_relu_offline_ms
    assert 0.529 * per_relu * 36_864 / rates.per_mac_ms == pytest.approx(1.26e9, rel=0.01)


def test_a_convolution_as_a_pool_counts_against_the_multiplications():
    """4,096 of them; whatever the gates prefer."""
    net = a_net()
    (conv,) = [k for k, option in enumerate(net.choices["aggregate1"].options) if option == ("conv", False)]
    with torch.no_grad():
        net.choices["aggregate1"].logits[conv] = 50.0
    for mixture in net.mixtures:
        mixture.alive = mixture.picked = [2]  # conv_1
    macs = PRICES.frame_macs + sum(PRICES.block(stage, ["conv_1"]).macs for stage in SPACE.stages())
    for more, pool in ((4096, "conv"), (4095, "avg")):
        wanted = Wanted("drelus", 10, macs + more, float("inf"))
        options = project(net, PRICES, wanted, Judge(net, batches()), rounds=0)
        assert net.architecture(options).aggregates[0].pool == pool


@pytest.mark.parametrize("metric", ["drelus", "online_bytes"])
def test_what_there_is_no_room_for_is_no_option(metric):
    """However much better it is than every other."""
    net = a_net()
    choice = net.choices["aggregate1"]
    conv = [k for k, option in enumerate(choice.options) if option[0] == "conv"]
    wanted = Wanted(metric, 1e9, 0.0, float("inf"))
    options = project(net, PRICES, wanted, lambda: -1e9 * float(choice.bits[conv].sum()), rounds=1)
    assert net.architecture(options).aggregates[0].pool != "conv"


def test_a_runtime_without_times_is_balanced_by_the_published_rates():
    network = SPACE.network(["conv_3"], relu=True, pool="avg")
    clear = Prices(SPACE, Plain(), Plain())
    assert clear.balance(network, 500) == Prices(SPACE, Plain(), PublishedRates()).balance(network, 500) > 0
    assert clear.balance(network, 500) != PRICES.balance(network, 500)


@pytest.mark.parametrize("limit", [0, 63, 64, 200, 511, 512, 513, 1000, 2000])
def test_a_limit_holds_whatever_the_gates_say(limit):
    net = a_net(favoured=5.0)
    wanted = Wanted("drelus", limit, float("inf"), float("inf"))
    options = project(net, PRICES, wanted, Judge(net, batches()), rounds=1)
    assert SPACE.drelus(net.architecture(options)) <= limit


@pytest.mark.parametrize("metric", ["drelus", "online_ms"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_what_is_left_of_a_limit_goes_to_relus(metric, share):
    """Though by the judge every one of them does harm."""
    net = a_net()
    least, most = (
        getattr(PRICES.whole(SPACE.network(["conv_1"], relu=on, pool="avg")), metric) for on in (False, True)
    )
    for mixture in net.mixtures:
        mixture.alive = mixture.picked = [2]  # conv_1
    wanted = Wanted(metric, least + share * (most - least), float("inf"), float("inf"))
    harm = list(net.choices.values())

    def judge() -> float:
        return sum(float(c.bits[[relu for _, relu in c.options]].sum()) for c in harm)

    options = project(net, PRICES, wanted, judge, rounds=3)
    assert getattr(PRICES.whole(net.architecture(options)), metric) <= wanted.limit
    for n, choice in enumerate(harm):
        pool, relu = choice.options[options[n]]
        if not relu:
            more = [*options[:n], choice.options.index((pool, True)), *options[n + 1 :]]
            assert getattr(PRICES.whole(net.architecture(more)), metric) > wanted.limit


@pytest.mark.parametrize(("macs", "balance"), [(300_000, float("inf")), (float("inf"), 0.5)])
def test_operators_go_until_the_linear_work_fits(macs, balance):
    net = a_net()
    judge = Judge(net, batches())
    wanted = Wanted("drelus", 500, macs, balance)
    assert prune(net, PRICES, wanted, judge)
    network = net.architecture([1, 1, 0])
    assert PRICES.balance(network, 500) <= balance
    if macs < float("inf"):
        set_options(net, [1, 1, 0])
        for prices in (PRICES, Prices(SPACE, Plain(), Plain())):
            assert prices.exact(net.extract(network).eval()).macs <= macs
    assert all(block.operators for block in network.blocks)


def test_the_last_operator_is_never_offered():
    net = a_net()
    mixture = net.mixtures[0]
    mixture.alive = [0, 3]
    set_options(net)
    felt = importances(mixture, Judge(net, batches()))
    assert felt.keys() == {0, 3}
    assert expendable(mixture, felt, {0: 2.0, 3: 1.0}).keys() == {3}
    mixture.drop(3)
    assert importances(mixture, Judge(net, batches())) == {}


def test_sensitivities_rank_operators_as_measured_losses_do():
    """After a little training, as when operators go; one backward pass against a forward pass each."""
    net = a_net()
    judge = Judge(net, [next(DATA.batches("validation", 96))])
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.05, 0.9)
    for x, y in DATA.batches("train", 32, shuffle=True):
        set_options(net)
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(net(x), y))
        optimizer.step()
    set_options(net)
    estimated = sensitivities(net, judge.batches, 96)
    assert all(m.gates is None for m in net.mixtures)
    for mixture, felt in zip(net.mixtures, estimated, strict=True):
        measured = importances(mixture, judge)
        assert felt.keys() == measured.keys() == set(range(len(LOW_MEMORY)))
        assert spearmanr([felt[k] for k in measured], [*measured.values()]).statistic > 0.8


def test_a_gate_of_zero_is_an_operator_less():
    mixture, x = a_net().mixtures[0], torch.randn(4, 8, 8, 8)
    whole = mixture(x)
    mixture.gates = torch.ones(4, len(mixture.picked))
    torch.testing.assert_close(mixture(x), whole)
    mixture.gates[:, 2] = 0
    gated = mixture(x)
    mixture.gates, mixture.picked = None, [k for k in mixture.alive if k != 2]
    torch.testing.assert_close(gated, mixture(x))


def test_a_judge_leaves_statistics_and_modes_alone():
    net = a_net()
    before = {k: v.clone() for k, v in net.state_dict().items() if "running" in k}
    set_options(net)
    net.eval()
    Judge(net, batches())()
    assert not net.training
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())


def test_the_multiplier_follows_the_excess():
    price = torch.tensor(2.0)
    dual = Dual(lambda: price, largest=2.0, limit=1.0, steps=10)
    grown = [float(dual.penalty()) for _ in range(20)]
    assert dual.multiplier > 0.1
    assert grown == sorted(grown)
    price.fill_(0.1)
    for _ in range(60):
        dual.penalty()
    assert dual.multiplier < 0.1


def test_the_published_regulariser_moves_gates_and_weights():
    net = a_net(favoured=0.0)
    loss = Reference(net).penalty()
    torch.autograd.backward(loss)
    assert all((net.choices[f"block{k}"].logits.grad != 0).all() for k in (1, 2))
    assert all((m.weights.grad != 0).any() for m in net.mixtures)


def test_smoothing_spreads_over_the_wrong_classes():
    """As published: 0.9 on the label, 0.1 on the others."""
    outputs = torch.randn(4, 5)
    y = torch.tensor([0, 1, 2, 4])
    target = torch.full((4, 5), 0.1 / 4).scatter_(1, y[:, None], 0.9)
    wanted = -(target * outputs.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(learned(outputs, y, None, 0.0, 0.1), wanted)


def test_gradients_are_averaged_over_processes():
    net = a_net()
    other = torch.arange(3.0)
    shard = Shard(world=2, total=lambda x: x + other)
    search = SeesawMethod(space="1,1", width=4)._search(
        net, DATA, PRICES, Wanted("drelus", 500, 1e9, 1), None, Judge(net, batches()), lambda *_: None, shard
    )
    one, two = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))
    one.grad, two.grad = torch.tensor([4.0, 5.0]), torch.tensor([6.0])
    search._average([one, two])
    assert (one.grad.tolist(), two.grad.tolist()) == ([2.0, 3.0], [4.0])
    assert search.per_epoch == 4  # of 64 images, 32 for each process
