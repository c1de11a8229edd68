"""Polynomial activations in training: their ranges, scales, rates and gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from stripes import CLASSES, QUICK, Stripes
from tightrope.errors import InputError
from tightrope.finetune import finetune
from tightrope.methods.paf.library import paf
from tightrope.nn import PolynomialActivation
from tightrope.reach import BOUND, GROWTH, MOMENTUM, Reach, activations, freeze, start, steerable, tame
from tightrope.recipe import Recipe
from tightrope.shard import start_fabric
from tightrope.training import Training


def act(scale: float = 2.0) -> PolynomialActivation:
    return PolynomialActivation([[0.1, 0.5, 0.4]], gated=False, scale=scale)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), act(), nn.Linear(8, CLASSES)).eval()


def test_only_what_lies_beyond_the_scale_costs():
    net = nn.Sequential(act(2.0), act(1.0)).train()
    reach = Reach(net)
    net(torch.tensor([[0.5, -1.0], [2.0, -3.0]]))
    found = reach.loss()
    inner = net[0](torch.tensor([[0.5, -1.0], [2.0, -3.0]])).detach().abs() - 1
    reach.loss()
    expected = (0.5**2 / 2 + float(inner.clamp_min(0).square().sum()) / 2) / 2
    assert isinstance(found, torch.Tensor) and found.item() == pytest.approx(expected, rel=1e-5)
    assert reach.loss() == 0.0
    net.eval()(torch.full((1, 2), 9.0))
    assert reach.loss() == 0.0  # not in training


def test_scales_stay_or_follow_or_are_frozen_at_the_end():
    net = nn.Sequential(act(2.0)).train()
    x = torch.tensor([[10.0, -4.0]])
    start(net, "static")
    net(x)
    assert float(net[0].scale) == 2
    start(net, "ema")
    net(x)
    assert float(net[0].scale) == pytest.approx(2 + MOMENTUM * 8)
    net.eval()(x)
    assert float(net[0].scale) == pytest.approx(2 + MOMENTUM * 8)
    start(net, "dynamic")
    freeze(net, [(x / 2, x), (x, x), (x / 4, x)])
    assert not net[0].dynamic and float(net[0].scale) == 10
    freeze(net, [(x * 9, x)])  # static already
    assert float(net[0].scale) == 10


@pytest.mark.parametrize("scales", ["static", "ema", "dynamic"])
def test_it_learns_under_every_kind_of_scale_and_ends_with_a_static_one(scales):
    records = []
    recipe = replace(QUICK, scales=scales, lr=0.05)
    tuned = finetune(network(), Stripes(), teacher=network(1), recipe=recipe, log=records.append)
    assert all(not m.dynamic and float(m.scale) > 0 for m in activations(tuned).values())
    assert (float(tuned[2].scale) == 2.0) == (scales == "static")
    assert records[-1]["loss"] < records[0]["loss"]


def test_in_training_alone_a_polynomial_sees_nothing_far_beyond_its_scale():
    net = nn.Sequential(PolynomialActivation.relu([[0.0, 1.5, 0.0, -0.5]] * 4, scale=2.0))
    x = torch.tensor([[-9e3, 9e3, 1.0]])
    assert not net.eval()(x).isfinite().all()
    start(net, "static")
    assert not net.eval()(x).isfinite().all()
    assert net.train()(x).isfinite().all()
    torch.testing.assert_close(net(x)[:, 2], net.eval()(x)[:, 2])


def test_a_minimax_composite_is_kept_near_its_scale_and_its_coefficients_as_they_are():
    minimax = PolynomialActivation.relu(paf("15,15,27").stages)
    assert 1 <= tame(minimax) < 1.05
    edge = torch.linspace(0, tame(minimax), 1001)
    assert float(minimax(edge[:, None]).detach().abs().max()) <= GROWTH * 1.05
    assert tame(act()) == tame(PolynomialActivation.relu([[0.0, 1.5, 0.0, -0.5]])) == BOUND
    per_channel = PolynomialActivation(
        [[[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]], gated=False
    )
    assert tame(per_channel) == pytest.approx(GROWTH**0.1, abs=BOUND / 400)  # u^10 in the second channel
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), minimax, nn.Linear(8, CLASSES))
    before = [stage.detach().clone() for stage in minimax.stages]
    recipe = replace(QUICK, lr=0.05)
    tuned = finetune(net, Stripes(), teacher=network(1), recipe=recipe)
    assert all(torch.equal(a, b) for a, b in zip(before, tuned[2].stages, strict=True))
    assert not torch.equal(tuned[1].weight, net[1].weight)


@pytest.mark.parametrize("name", ["7,7,13", "15,15,27", "a7", "f2 g2", "f1^2 g1^2"])
def test_of_the_library_only_minimax_composites_cannot_be_steered(name):
    assert steerable(PolynomialActivation.relu(paf(name).stages)) == (name[0] not in "71")


def test_a_gradient_that_overflows_is_an_error_before_the_weights_change():
    class Root(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * 0).abs().sqrt()

    net = nn.Sequential(*network()[:3], Root(), nn.Linear(8, CLASSES))
    state = Training.start(net, None, Recipe(ema=0.0), start_fabric(1, 1, "cpu", "32-true"))
    before = {name: p.detach().clone() for name, p in state.net.named_parameters()}
    with pytest.raises(InputError, match="gradient is not finite"):
        state.learn(*next(iter(Stripes().batches("train", 16))), 0.1)
    assert all(torch.equal(p, before[name]) for name, p in state.net.named_parameters())


def test_coefficients_learn_at_their_own_rate_without_decay_and_gradients_are_clipped():
    recipe = Recipe(lr=0.1, coefficients=0.0, clip=1e-3, momentum=0.0, ema=0.0, weight_decay=0.0)
    fabric = start_fabric(1, 1, "cpu", "32-true")
    state = Training.start(network(), None, recipe, fabric)
    before = {name: p.detach().clone() for name, p in state.net.named_parameters()}
    assert [group["weight_decay"] for group in state.optimizer.param_groups] == [0.0, 0.0]
    x, y = next(iter(Stripes().batches("train", 16)))
    state.learn(x, y, 0.1)
    moved = {name: p.detach() - before[name] for name, p in state.net.named_parameters()}
    assert not moved["2.stages.0"].any()
    norm = sum(float(m.square().sum()) for m in moved.values()) ** 0.5
    assert 0 < norm <= 0.1 * 1e-3 * 1.01


def test_bad_recipes_are_refused():
    for change in ({"scales": "batch"}, {"reach": -1.0}, {"clip": -1.0}, {"coefficients": float("nan")}):
        with pytest.raises(InputError, match=next(iter(change))):
            Recipe(**change)
