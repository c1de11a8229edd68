"""What a patch costs: the fast estimate against Jacobians, the exact one against whole reruns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import nn
from torch.func import jacrev

from networks import NETWORKS, Chain, Concat, TinyResNet, conv, settle
from tightrope.graph import Graph, trace
from tightrope.methods.block_relu import BlockReluMethod
from tightrope.methods.block_relu.distortion import (
    Distortion,
    Suffix,
    accumulate,
    directions,
    exact,
    upper_of,
)
from tightrope.methods.block_relu.patches import patches
from tightrope.nn import BlockReLU
from tightrope.place import place
from tightrope.types import Site

SHAPE = (3, 8, 8)
OPTIONS = [(1, 1), (2, 2), (3, 5), (1, 8), (8, 8), (0, 0)]


def zeros(site: Site, options) -> Distortion:
    return Distortion.zeros(site.shape[0], len(options))


def fast(graph: Graph, site: Site, options, x) -> torch.Tensor:
    """(C, K) mean squared change by the first-order estimate."""
    sums, given = {site.name: zeros(site, options)}, {site.name: options}
    generator = torch.Generator().manual_seed(0)
    for part in x.split(3):  # batches must add up
        accumulate(graph, [site], given, part, sums, most_directions=16, generator=generator)
    assert sums[site.name].images == len(x)
    return sums[site.name].squares / (len(x) * graph.outputs)


def slow(graph: Graph, site: Site, options, x) -> torch.Tensor:
    """(C, K) mean squared change by rerunning what comes after."""
    suffix = Suffix(graph, site, x)
    upper = upper_of(graph, site)
    found = [[exact(suffix, c, patch, upper) for patch in options] for c in range(site.shape[0])]
    return torch.tensor(found, dtype=torch.float64)


class Split(nn.Module):
    """A network in two halves, so that a Jacobian can be taken of the second alone."""

    def __init__(self, stem: nn.Module, activation: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.stem, self.activation, self.head = stem, activation, head

    def forward(self, x):
        return self.head(self.activation(self.stem(x)))


def spatial(activation: nn.Module) -> tuple[Split, list]:
    head = Chain(conv(4, 5), nn.ReLU(), conv(5, 3, stride=2), nn.SiLU(), nn.Flatten(), nn.Linear(48, 4))
    return Split(Chain(conv(3, 4), lambda x: 6 * x), activation, head), OPTIONS


def flat(activation: nn.Module) -> tuple[Split, list]:
    head = Chain(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 4))
    return Split(Chain(nn.Flatten(), nn.Linear(192, 6), lambda x: 20 * x), activation, head), [(1, 1), (0, 0)]


@pytest.mark.parametrize("make", [spatial, flat])
@pytest.mark.parametrize(("activation", "upper"), [(nn.ReLU(), None), (nn.ReLU6(), 6.0)])
def test_the_fast_estimate_is_the_jacobian_times_the_change(make, activation, upper):
    model, options = make(activation)
    model = model.double().eval()
    x = torch.randn(5, *SHAPE).double()
    graph = trace(model, SHAPE)
    site = graph.sites[0]
    with torch.no_grad():
        z = model.stem(x)
        y = model.activation(z)
        assert upper is None or (z > 6).any()
    expected = torch.zeros(site.shape[0], len(options), dtype=torch.float64)
    for n in range(len(x)):
        jacobian = jacrev(lambda value: model.head(value[None])[0])(y[n])  # (4, C, H, W) or (4, C)
        for k, patch in enumerate(options):
            changed = BlockReLU([patch] * site.shape[0], upper)(z[n : n + 1])[0]
            per_channel = (jacobian * (changed - y[n])).flatten(2).sum(-1) if y.dim() == 4 else None
            change = jacobian * (changed - y[n]) if per_channel is None else per_channel  # (4, C)
            expected[:, k] += change.square().sum(0).detach()
    got = fast(graph, site, options, x)
    torch.testing.assert_close(got, expected / (len(x) * 4), rtol=1e-9, atol=1e-12)
    assert (got[:, -1] > 0).any()


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6])
def test_the_fast_estimate_is_exact_where_only_linear_layers_follow(activation):
    model = Chain(
        conv(3, 6), nn.ReLU(), conv(6, 6), lambda x: 9 * x, activation(), nn.AvgPool2d(2), conv(6, 4),
        nn.BatchNorm2d(4), lambda x: x.mean((2, 3)), nn.Linear(4, 5),
    )  # fmt: skip
    graph = trace(settle(model).double(), SHAPE)
    site = graph.sites[-1]
    x = torch.randn(7, *SHAPE).double()
    options = patches((8, 8))
    expected = slow(graph, site, options, x)
    torch.testing.assert_close(fast(graph, site, options, x), expected, rtol=1e-9, atol=1e-15)
    assert expected.max() > 1e-4
    assert expected[:, 0].max() < 1e-20  # 1x1 is the unchanged network


def test_the_fast_estimate_is_exact_for_small_changes():
    """Beyond linear layers it is the first order: a tenth of the change, a tenth of the relative error."""
    errors = []
    for size in (1e-2, 1e-3):
        torch.manual_seed(1)
        model = Split(conv(3, 4), nn.ReLU(), Chain(conv(4, 4), nn.SiLU(), nn.Flatten(), nn.Linear(256, 3)))
        with torch.no_grad():
            model.stem.weight.mul_(size)
            model.stem.bias.mul_(size)
        graph = trace(model.double().eval(), SHAPE)
        x = torch.randn(4, *SHAPE).double()
        truth = slow(graph, graph.sites[0], OPTIONS[1:], x)
        errors.append(float(((fast(graph, graph.sites[0], OPTIONS[1:], x) - truth) / truth).abs().max()))
    assert errors[0] < 0.1
    assert errors[1] < errors[0] / 5


class AddsBranches(nn.Module):
    """A value computed before the site is changed in place after it."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.fc = conv(3, 4), conv(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        out = self.left(x)
        out.add_(F.relu(self.right(x)))
        return self.fc(out.mean((2, 3)))


@pytest.mark.parametrize("make", [*NETWORKS.values(), AddsBranches])
def test_the_exact_loss_is_that_of_a_whole_rerun(make):
    graph = trace(settle(make()).double(), SHAPE)
    x = torch.randn(4, *SHAPE).double()
    with torch.no_grad():
        base = graph.module(x)
    method = BlockReluMethod()
    sites = graph.match("*", method.kinds)
    for k, site in enumerate(sites):
        suffix = Suffix(graph, site, x)
        assert torch.equal(suffix.output, base)
        for channel, patch in ((k % site.shape[0], OPTIONS[1 + k % 5]), (site.shape[0] - 1, (0, 0))):
            chosen = [(1, 1)] * site.shape[0]
            chosen[channel] = patch
            changed = place(graph, {site.name: {"patches": chosen}}, method.rewrite)
            with torch.no_grad():
                whole = float((changed.module(x) - base).square().mean())
            alone = exact(suffix, channel, patch, upper_of(graph, site))
            assert alone == pytest.approx(whole, rel=1e-9, abs=1e-18)
        assert torch.equal(suffix.run(suffix.value), base)


def test_a_suffix_runs_only_what_comes_after():
    graph = trace(settle(Concat()), SHAPE)
    ran: list[str] = []
    for name, m in graph.module.named_modules():
        if not list(m.children()):
            m.register_forward_hook(lambda *_, name=name: ran.append(name))
    last = graph.sites[-1]
    suffix = Suffix(graph, last, torch.randn(2, *SHAPE))
    ran.clear()
    suffix.run(suffix.value)
    assert ran == ["fc"]


def test_all_directions_or_unbiased_probes():
    a = torch.randn(3, 6, generator=torch.Generator().manual_seed(1)).double()

    def measured(most: int, seed: int) -> float:
        given = directions(a, most, torch.Generator().manual_seed(seed))
        found = [weight * float((v * a).sum(1).square().sum()) for v, weight in given]
        assert len(found) == min(most, 6)
        return sum(found)

    truth = float(a.square().sum())
    assert measured(6, 0) == pytest.approx(truth, rel=1e-12)
    assert measured(16, 0) == pytest.approx(truth, rel=1e-12)
    assert measured(4, 0) != pytest.approx(truth, rel=1e-3)
    mean = sum(measured(4, seed) for seed in range(600)) / 600
    assert mean == pytest.approx(truth, rel=0.1)  # one measurement: 40 % off, their mean: 1.7 %


def test_sites_are_measured_together_as_apart():
    graph = trace(settle(TinyResNet()).double(), SHAPE)
    x = torch.randn(3, *SHAPE).double()
    options = {s.name: patches(s.shape[1:]) for s in graph.sites}
    sums = {s.name: zeros(s, options[s.name]) for s in graph.sites}
    generator = torch.Generator().manual_seed(0)
    passes = accumulate(graph, graph.sites, options, x, sums, most_directions=16, generator=generator)
    assert passes == 1 + 5  # one forward, one backward per output
    for site in graph.sites:
        alone = fast(graph, site, options[site.name], x)
        torch.testing.assert_close(sums[site.name].squares / 15, alone, rtol=1e-9, atol=1e-15)
    assert not any(m._forward_hooks for m in graph.module.modules())


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6()])
def test_the_repaired_loss_is_the_least_over_all_rescalings(activation):
    """Against a search over the factor, with the layers after the site linear, so that J is exact."""
    model = Chain(conv(3, 4), lambda x: 6 * x, activation, conv(4, 4), nn.Flatten(), nn.Linear(256, 3))
    graph = trace(model.double().eval(), SHAPE)
    site = graph.sites[0]
    x = torch.randn(6, *SHAPE).double()
    sums, generator = {site.name: zeros(site, OPTIONS)}, torch.Generator().manual_seed(0)
    accumulate(graph, [site], {site.name: OPTIONS}, x, sums, most_directions=16, generator=generator)
    repaired = sums[site.name].repaired / (len(x) * 3)
    raw = sums[site.name].squares / (len(x) * 3)
    suffix, upper = Suffix(graph, site, x), upper_of(graph, site)
    for c in range(site.shape[0]):
        for k, patch in enumerate(OPTIONS):

            def loss(a: float, c: int = c, patch: tuple[int, int] = patch) -> float:
                changed = suffix.value.clone()
                changed[:, c : c + 1] = a * BlockReLU([patch], upper)(suffix.input[:, c : c + 1])
                return float((suffix.run(changed) - suffix.output).square().mean())

            found = minimize_scalar(loss, bracket=(0.0, 1.0), tol=1e-10)
            assert float(repaired[c, k]) == pytest.approx(found.fun, rel=1e-6, abs=1e-12)
            factor = float(sums[site.name].factor[c, k])
            assert factor == pytest.approx(found.x, rel=1e-3, abs=1e-3)
            again = exact(suffix, c, patch, upper, factor)  # linear layers: the exact loss is the fast one
            assert float(repaired[c, k]) == pytest.approx(again, rel=1e-6, abs=1e-12)
    assert (repaired <= raw).all()
    assert (repaired[:, 1:] < 0.99 * raw[:, 1:]).any()
