"""Hermite expansions per channel: those of numpy, the best quadratics on Gaussians, every runtime."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.polynomial import hermite_e
from scipy.integrate import quad
from torch import nn

from networks import Chain, conv, images, plan_for, settle
from tightrope.graph import trace
from tightrope.lower import lower
from tightrope.methods.paf import PafMethod
from tightrope.methods.paf.hermite import NARROWEST, STEEPEST, quadratics, residual, widened
from tightrope.methods.paf.library import paf
from tightrope.methods.paf.options import fit, offered
from tightrope.methods.paf.sites import Seen
from tightrope.rewrite import apply
from tightrope.runtimes.ckks import CKKS
from tightrope.runtimes.mpc import MPC
from tightrope.runtimes.plain import evaluate, ranges


@given(st.floats(-3, 3), st.floats(0.1, 5))
def test_a_channel_has_the_coefficients_of_numpys_expansion(m, deviation):
    """E[relu(mean + deviation z) he_i(z)] / i! from the kink on, where ReLU is smooth."""

    def moment(i: int) -> float:
        def integrand(z: float) -> float:
            return (z + m) * hermite_e.hermeval(z, np.eye(3)[i]) * np.exp(-z * z / 2) / np.sqrt(2 * np.pi)

        return deviation * quad(integrand, -m, max(12.0, 12.0 - m))[0]

    series = np.array([moment(0), moment(1), moment(2) / 2])
    (ascending,) = quadratics(np.array([m * deviation]), np.array([deviation]))
    z = np.linspace(-3, 3, 7)
    got = np.polynomial.polynomial.polyval(deviation * (z + m), ascending)
    assert np.allclose(got, hermite_e.hermeval(z, series), atol=1e-7 * deviation)


def test_a_normalised_channel_has_the_published_constants():
    (got,) = quadratics(np.zeros(1), np.ones(1))
    f = np.array([1 / np.sqrt(2 * np.pi), 1 / 2, 1 / np.sqrt(4 * np.pi)])
    want = hermite_e.herme2poly(f * [1, 1, 1 / np.sqrt(2)])
    assert np.allclose(got, want) and np.allclose(paf("herpn").stages[0], want)


@pytest.mark.parametrize("mean", [-1.0, 0.0, 2.0])
def test_no_quadratic_is_better_on_a_gaussian_and_the_error_is_known(mean):
    x = mean + 1.5 * np.random.default_rng(0).standard_normal(400_000)
    (ours,) = quadratics(np.array([mean]), np.array([1.5]))
    error = np.maximum(x, 0) - np.polynomial.polynomial.polyval(x, ours)
    best = np.polynomial.Polynomial.fit(x, np.maximum(x, 0), 2)
    least = np.sqrt(np.mean((np.maximum(x, 0) - best(x)) ** 2))
    assert np.sqrt(np.mean(error**2)) == pytest.approx(least, rel=1e-3)
    assert residual(np.array([mean]), np.array([1.5])) == pytest.approx(least, rel=0.01)


def test_channels_that_are_constant_or_far_from_the_kink_stay_curved_and_tame():
    mean, scale = np.array([0.0, -4.0, 4.0, 0.1]), 6.0
    deviation = widened(mean, np.array([0.0, 0.0, 0.1, 1.0]), scale)
    assert np.allclose(deviation, [NARROWEST * scale, 4 / STEEPEST, 4 / STEEPEST, 1.0])
    assert (quadratics(mean, deviation)[:, 2] > 1e-3).all()


def test_channels_of_their_own_are_fitted_better_than_all_alike():
    """Two channels, one nearly always positive, one nearly always negative."""
    x = np.random.default_rng(0).standard_normal((20_000, 2)) + np.array([2.0, -2.0])
    seen, scale = Seen.of(x), 1.5 * float(np.abs(x).max())

    def error(name: str) -> float:
        found = fit("relu", name, seen, scale)
        stage = np.broadcast_to(found.stages[0], (2, 3))
        got = np.stack([np.polynomial.polynomial.polyval(x[:, c] / scale, stage[c]) for c in range(2)], 1)
        assert np.sqrt(np.mean((got - np.maximum(x, 0)) ** 2)) == pytest.approx(found.rmse, rel=0.1)
        return found.rmse

    assert error("herpn") < 0.5 * error("degree 2")
    assert offered("relu", ("herpn", "degree 2"), True) == ("herpn", "degree 2")
    assert offered("silu", ("herpn", "degree 2"), False) == ("degree 2",)


def test_a_search_with_them_runs_under_every_runtime():
    """A dead channel and one that is always positive among them; in CKKS a level like other quadratics."""
    torch.manual_seed(0)
    first = conv(3, 4)
    steps = (first, nn.ReLU(), conv(4, 4), nn.SiLU(), conv(4, 4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    net, data = settle(Chain(*steps, nn.Linear(64, 5))), images((3, 8, 8))
    with torch.no_grad():
        first.weight[0], first.bias[0], first.bias[1] = 0.0, -2.0, 9.0
    method = PafMethod(samples=16, polynomials="herpn;degree 2")
    _, plan = plan_for(method, net, data, "ckks_levels<=12")
    graph, pricing = trace(net, (3, 8, 8)), CKKS().pricing()
    problem = method.measure(graph, data, cost=pricing, workdir=None, progress=lambda *_: None)
    both = ("herpn", "degree 2")
    assert [t.labels for t in problem.tables] == [both, ("degree 2",), both, both, both]
    choices = method.choices(problem, {t.site: np.array([0]) for t in problem.tables})
    site = problem.tables[0].site
    curve, stages = method.picture(problem, site, "herpn"), np.array(choices[site]["stages"][0])
    assert stages.shape == (4, 3) and np.allclose(curve.y[-1], stages.sum(1).mean())
    network = apply(net, replace(plan, choices=choices))
    program = ranges(lower(network, (3, 8, 8)), [data.x])
    expected = evaluate(program, data.x[:2]).numpy()
    with torch.no_grad():
        assert np.allclose(network(data.x[:2]).numpy(), expected, atol=1e-4)
    assert CKKS().exact(program).ckks_levels == 11  # four layers, five squares, two rounds
    for runtime, most in ((CKKS(), 1e-6), (MPC(), 2**-6)):
        with runtime.open(program, "simulate") as session:
            got, _ = session.run(data.x[:2].numpy())
        assert np.abs(got - expected).max() < most * np.abs(expected).max()
