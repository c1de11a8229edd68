"""Coefficient tuning: the published optima on N(0, 1), the bound beyond the scale, and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tightrope.errors import InputError
from tightrope.methods.paf import tuning
from tightrope.methods.paf.library import paf
from tightrope.methods.paf.published import published
from tightrope.methods.paf.tuning import BOUND, REACH, Histogram, measure, tune

SCALE = 4.73
BARS = {"f1^2 g1^2": 0.0118, "a7": 0.0141, "f2 g3": 0.0201, "f2 g2": 0.0296, "f1 g2": 0.0484}


def relu(x):
    return np.maximum(x, 0)


def gaussian(bins: int = 1000) -> Histogram:
    edges = np.linspace(-SCALE, SCALE, bins + 1)
    return Histogram(SCALE, np.exp(-(((edges[1:] + edges[:-1]) / 2) ** 2) / 2))


def rmse(fitted, points: int = 20_001) -> float:
    x = np.linspace(-SCALE, SCALE, points)
    weight = np.exp(-(x**2) / 2)
    return np.sqrt((weight * (x * (1 + fitted(x / SCALE)) / 2 - relu(x)) ** 2).sum() / weight.sum())


@pytest.mark.parametrize("name", BARS)
def test_the_error_on_a_normal_distribution_is_at_most_the_published_one(name):
    starts = [paf(name), paf(name, published=True)]
    fit = tune(starts, gaussian(), SCALE, tail=False)
    assert rmse(fit.paf) == pytest.approx(fit.rmse, rel=1e-3)
    assert fit.rmse <= BARS[name]
    assert fit.rmse < min(measure(start, gaussian(), SCALE, relu).rmse for start in starts)


@pytest.mark.parametrize("name", ["f2 g2", "f1 g2"])
def test_the_error_is_at_most_that_of_the_published_tuning(name):
    start, seen = paf(name, published=True), Histogram.of(np.random.default_rng(0).laplace(0.3, 1.0, 20_000))
    few = {"images": 900, "batch": 40}
    adam = published(start, seen, seen.limit, **few)
    assert adam.rmse < 0.75 * measure(start, seen, seen.limit, relu).rmse
    assert tune([start], seen, seen.limit, tail=False).rmse <= adam.rmse
    assert published(start, seen, seen.limit, **few).paf == adam.paf
    assert published(start, seen, seen.limit, **few, seed=1).paf != adam.paf


@pytest.mark.parametrize(("name", "most"), [("f1^2 g1^2", 0.0118), ("f2 g2", 0.035), ("f1 g2", 0.049)])
def test_a_bounded_polynomial_stays_bounded_beyond_its_scale(name, most):
    fit = tune([paf(name), paf(name, published=True)], gaussian(), SCALE)
    assert np.abs(fit.paf(np.linspace(-REACH, REACH, 100_001))).max() <= BOUND
    assert fit.tail <= BOUND and fit.rmse <= most


@pytest.mark.parametrize("name", ["a7", "f1^2 g1^2"])
def test_inner_stages_have_magnitude_one_and_the_composite_is_the_same(name):
    histogram = Histogram.of(np.random.default_rng(0).standard_normal(20_000))
    fit = tune([paf(name)], histogram, 1.5 * histogram.limit, relu, tries=3)
    x = np.linspace(-1, 1, 20_001)
    for stage in fit.paf.stages[:-1]:
        x = np.polynomial.polynomial.polyval(x, stage)
        assert np.abs(x).max() == pytest.approx(1, abs=1e-3)
    assert measure(fit.paf, histogram, fit.scale, relu).rmse == pytest.approx(fit.rmse, rel=1e-9)


def test_a_fit_does_not_run_wild_between_what_was_seen_and_its_scale():
    histogram = Histogram.of(np.random.default_rng(0).standard_normal(20_000))
    scale = 1.5 * histogram.limit
    unseen = np.linspace(histogram.limit, scale, 100)
    x = np.concatenate([unseen, -unseen])

    def apart(floor):
        fit = tune([paf("degree 7")], histogram, scale, relu, floor=floor)
        return np.abs(scale * fit.paf(x / scale) - relu(x)).max()

    assert apart(0.01) < 0.2 * scale < 0.2 * apart(0.0)


@settings(max_examples=15, deadline=None)
@given(degree=st.sampled_from([2, 3, 5, 7]), scale=st.floats(0.1, 30), seed=st.integers(0, 99))
def test_one_stage_is_the_weighted_least_squares_solution(degree, scale, seed):
    x = np.random.default_rng(seed).uniform(-scale, scale, 5000)
    histogram = Histogram.of(x)
    fit = tune([paf(f"degree {degree}")], histogram, scale, np.tanh)
    powers = np.vander(histogram.centers / scale, degree + 1, increasing=True)
    root = np.sqrt(histogram.counts)[:, None]
    want = np.linalg.lstsq(root * powers, root[:, 0] * np.tanh(histogram.centers), rcond=None)[0]
    assert np.allclose(scale * fit.paf(histogram.centers / scale), powers @ want, atol=1e-6 * scale)


def test_the_jacobian_is_the_derivative():
    p = paf("a7")
    vector = np.concatenate([stage[1::2] for stage in p.stages])
    x = np.linspace(-1, 1, 31)
    got = tuning._gradient(tuning._split(vector, p), x)
    for k in range(len(vector)):
        step = np.zeros_like(vector)
        step[k] = 1e-6
        high, low = (tuning._values(tuning._split(vector + s, p), x)[-1] for s in (step, -step))
        assert np.allclose(got[:, k], (high - low) / 2e-6, rtol=1e-4, atol=1e-5)


def test_a_histogram_knows_its_range():
    histogram = Histogram.of(np.array([-4.0, -1.0, 0.5, 3.0]), bins=80)
    assert histogram.limit == 4.0 and histogram.counts.sum() == 4
    assert histogram.lowest == -4.0
    assert Histogram.of(np.zeros(3)).limit == 1.0
    with pytest.raises(InputError, match="scale"):
        tune([paf("f1 g2")], histogram, 0.0)
