"""The library of polynomials: published tables to the printed digits, and linear programming for Remez."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.polynomial import polynomial
from scipy.optimize import linprog

from tightrope.errors import InputError
from tightrope.methods.paf.library import COMPOSITES, MINIMAX, SINGLE, names, paf
from tightrope.methods.paf.remez import epsilon_for, minimax_composite, minimax_odd

# sign error on [1/8, 1] and [1/16, 1], ReLU error on [-1, 1], p(1): in the published order, then g first
ERRORS = {
    "f1^2 g1^2": ((0.250, 0.435, 0.0484, 0.997), (0.122, 0.445, 0.0139)),
    "a7": ((0.014, 0.134, 0.0076, 0.986), (0.014, 0.134, 0.0076)),
    "f2 g3": ((0.252, 0.502, 0.1260, 0.748), (0.177, 0.508, 0.0164)),
    "f2 g2": ((0.317, 0.629, 0.0724, 0.998), (0.332, 0.631, 0.0220)),
    "f1 g2": ((0.431, 0.700, 0.0855, 0.998), (0.438, 0.701, 0.0370)),
}
# degrees, degree of the composite, depth and products of the sign alone
COSTS = {
    "f1^2 g1^2": ((3, 3, 3, 3), 81, 8, 8),
    "a7": ((7, 7), 49, 6, 10),
    "f2 g3": ((7, 5), 35, 6, 8),
    "f2 g2": ((5, 5), 25, 6, 6),
    "f1 g2": ((5, 3), 15, 5, 5),
    "7,7,13": ((7, 7, 13), 637, 10, 17),
    "15,15,27": ((15, 15, 27), 6075, 13, 26),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_of_the_published_composites_in_both_orders(name):
    published, ours = ERRORS[name]
    one, two = paf(name, published=True), paf(name)
    assert (
        round(one.sign_error(1 / 8), 3) == published[0] and round(one.sign_error(1 / 16), 3) == published[1]
    )
    assert round(one.relu_error(), 4) == published[2] and round(float(one(1.0)), 3) == published[3]
    assert (round(two.sign_error(1 / 8), 3), round(two.sign_error(1 / 16), 3)) == ours[:2]
    assert round(two.relu_error(), 4) == ours[2]


def test_a_published_composite_explodes_beyond_its_range():
    assert round(float(paf("a7")(1.1))) == 2920
    assert round(float(paf("f1^2 g1^2", published=True)(1.2)), 3) == 0.995


@pytest.mark.parametrize("name", COSTS)
def test_degrees_levels_and_products(name):
    p = paf(name)
    degrees, degree, depth, products = COSTS[name]
    assert (p.degrees, p.degree) == (degrees, degree)
    assert (p.levels, p.multiplications) == (depth + 1, products + 1)  # and the product with x


def test_the_single_polynomials_are_least_squares_fits():
    x = np.linspace(-1, 1, 20_001)
    for degree in SINGLE:
        p = paf(f"degree {degree}")
        assert p.degrees == (degree,) and not p.gated and p.levels == (1, 2, 2, 3, 3)[SINGLE.index(degree)]
        residual = p(x) - np.maximum(x, 0)
        assert np.abs(np.vander(x, degree + 1).T @ residual).max() < 1e-6 * len(x)  # normal equations
    assert paf("degree 2").multiplications == 1
    errors = [paf(f"degree {d}").relu_error() for d in (3, 5, 7)]
    assert errors == sorted(errors, reverse=True)


def test_names_are_everything_the_cheapest_first():
    assert set(names()) == {f"degree {n}" for n in SINGLE} | {"herpn"} | COMPOSITES.keys() | MINIMAX.keys()
    levels = [paf(name).levels for name in names()]
    assert levels == sorted(levels)
    with pytest.raises(InputError, match="no such polynomial"):
        paf("f9 g9")


@pytest.mark.parametrize(("degree", "low", "high"), [(1, 0.1, 1), (3, 0.2, 1), (7, 0.05, 1), (5, 0.8, 1.2)])
def test_remez_reaches_the_optimum_of_linear_programming(degree, low, high):
    stage, error = minimax_odd(degree, low, high)
    x = np.linspace(low, high, 2001)
    assert np.abs(polynomial.polyval(x, stage) - 1).max() <= error + 1e-9
    basis = x[:, None] ** np.arange(1, degree + 1, 2)
    rows = np.block([[basis, -np.ones((len(x), 1))], [-basis, -np.ones((len(x), 1))]])
    sides = np.concatenate([np.ones(len(x)), -np.ones(len(x))])
    found = linprog([0] * basis.shape[1] + [1], rows, sides, bounds=(None, None))
    assert error == pytest.approx(found.fun, rel=1e-3, abs=1e-6)


def test_minimax_composites_beat_the_published_pair_and_keep_their_promise():
    stages, error = minimax_composite((7, 7), 0.09)
    assert error < paf("a7").sign_error(0.09)
    x = np.linspace(0.09, 1, 5001)
    y = polynomial.polyval(polynomial.polyval(x, stages[0]), stages[1])
    assert np.abs(y - 1).max() <= error * (1 + 1e-6)
    for name, (degrees, bits) in MINIMAX.items():
        epsilon = epsilon_for(degrees, 2.0**-bits)
        assert paf(name).sign_error(epsilon) <= 2.0**-bits * (1 + 1e-6)
        assert minimax_composite(degrees, epsilon / 1.01)[1] > 2.0**-bits


@pytest.mark.parametrize("bad", [(2, 0.1, 1.0), (3, 0.0, 1.0), (3, 1.0, 0.5)])
def test_what_remez_cannot_do_is_refused(bad):
    with pytest.raises(InputError, match="minimax"):
        minimax_odd(*bad)
    with pytest.raises(InputError, match="exact"):
        epsilon_for((3,), 1e-3)
