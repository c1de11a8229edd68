"""Fitted estimators: the closed form against refitting, and what each can and cannot represent."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tightrope.errors import InputError
from tightrope.methods.binas import estimators
from tightrope.methods.binas.estimators import FITTED, RIDGES, agreement
from tightrope.methods.binas.objective import Formula, encode, problem
from tightrope.methods.binas.space import PRESETS

SPACE = PRESETS["fashion"]


def networks(count: int, seed: int):
    generator = np.random.default_rng(seed)
    return [SPACE.random(generator) for _ in range(count)]


def truth(seed: int = 0, pair: float = 0.0) -> Formula:
    generator = np.random.default_rng(seed)
    wide = (sum(s.depths[-1] for s in SPACE.stages) * 12, sum(len(s.depths) for s in SPACE.stages))
    return Formula(
        80.0,
        tuple(generator.normal(0, 1, 3) for _ in SPACE.stages),
        tuple(generator.normal(0, 0.3, (3, 12)) for _ in SPACE.stages),
        generator.normal(0, pair, wide) if pair else None,
    )


@pytest.mark.parametrize("pair", [0.0, 0.1])
def test_a_formula_predicts_what_the_solver_maximises(pair):
    gain, choices = truth(pair=pair), networks(20, 1)
    staged = problem(SPACE, gain, {"macs": math.inf})
    assert gain.predict(SPACE, choices) == pytest.approx([staged.gain(c) for c in choices], abs=1e-9)


def test_the_leave_one_out_error_is_that_of_leaving_one_out():
    """By the primal normal equations, a row left out each time."""
    choices = networks(12, 2)
    y = truth().predict(SPACE, choices) + np.random.default_rng(3).normal(0, 0.5, 12)
    x = np.hstack(encode(SPACE, choices))

    def refitted(ridge: float) -> float:
        errors = []
        for i in range(len(y)):
            rest = np.arange(len(y)) != i
            mean, of = x[rest].mean(0), y[rest].mean()
            a = x[rest] - mean
            w = np.linalg.solve(a.T @ a + ridge * np.eye(x.shape[1]), a.T @ (y[rest] - of))
            errors.append(y[i] - of - (x[i] - mean) @ w)
        return float(np.mean(np.square(errors)))

    ridge = min(RIDGES, key=refitted)
    a = x - x.mean(0)
    wanted = y.mean() + a @ np.linalg.solve(a.T @ a + ridge * np.eye(x.shape[1]), a.T @ (y - y.mean()))
    assert estimators.linear(SPACE, choices, y).predict(choices) == pytest.approx(wanted, abs=1e-8)


@pytest.mark.parametrize("fit", FITTED, ids=lambda f: f.__name__)
def test_each_ranks_networks_that_it_has_not_seen(fit):
    gain = truth()
    seen, unseen = networks(250, 4), networks(80, 5)
    found = fit(SPACE, seen, gain.predict(SPACE, seen))
    assert found.name == fit.__name__
    assert agreement(found.predict(unseen), gain.predict(SPACE, unseen)).spearman > 0.85


def test_products_help_where_there_are_any():
    gain = truth(pair=0.3)
    seen, unseen = networks(400, 6), networks(120, 7)
    y, wanted = gain.predict(SPACE, seen), gain.predict(SPACE, unseen)
    errors = {
        fit.__name__: agreement(fit(SPACE, seen, y).predict(unseen), wanted).mse
        for fit in (estimators.linear, estimators.bilinear, estimators.quadratic)
    }
    assert errors["bilinear"] < 0.9 * errors["linear"]
    assert errors["quadratic"] < 0.9 * errors["linear"]


def test_agreement_of_known_numbers():
    found = agreement(np.array([1.0, 2, 3, 4]), np.array([1.0, 2, 4, 3]))
    assert (found.kendall, found.spearman, found.pearson) == pytest.approx((2 / 3, 0.8, 0.8))
    assert found.mse == 0.5
    with pytest.raises(InputError, match="no order"):
        agreement(np.ones(4), np.arange(4.0))


@pytest.mark.parametrize("fit", FITTED, ids=lambda f: f.__name__)
def test_too_few_networks_are_refused(fit):
    with pytest.raises(InputError, match="too few"):
        fit(SPACE, networks(3, 0), np.arange(3.0))
