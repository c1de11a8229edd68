"""Minimax polynomials and their composites for the sign function (Lee, Lee, No and Kim 2021, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.polynomial import chebyshev
from numpy.typing import NDArray

from tightrope.errors import InputError

Array = NDArray[np.float64]
ITERATIONS = 60
GRID = 64  # points between two neighbouring extrema


def minimax_odd(degree: int, low: float, high: float) -> tuple[Array, float]:
    """The odd polynomial nearest to 1 on [low, high] in the maximum norm, by Remez's exchange.

    Returns the ascending coefficients (degree + 1,) and the largest error. Raises InputError unless the
    degree is odd and 0 < low < high.
    """
    if degree % 2 == 0 or degree < 1 or not 0 < low < high < np.inf:
        raise InputError(
            "no such minimax polynomial",
            got=f"degree {degree} on [{low:g}, {high:g}]",
            allowed="an odd degree on [low, high], 0 < low < high",
        )
    orders = np.arange(1, degree + 1, 2)
    count = len(orders) + 1  # x, x^3, ... are a Chebyshev system on a positive interval
    angle = np.pi * np.arange(count) / (count - 1)
    points = (low + high) / 2 - (high - low) / 2 * np.cos(angle)
    series, error = np.zeros(degree + 1), np.inf
    for _ in range(ITERATIONS):
        basis = np.stack([chebyshev.chebval(points / high, np.eye(degree + 1)[k]) for k in orders], 1)
        signs = (-1.0) ** np.arange(count)
        # least squares, because on an interval of the width of rounding errors the system is singular
        solved = np.linalg.lstsq(np.column_stack([basis, signs]), np.ones(count), rcond=None)[0]
        series[orders], level = solved[:-1], abs(solved[-1])
        points, error = _extrema(series, low, high, points)
        if error <= level * (1 + 1e-9) + 1e-14:
            break
    coefficients = np.zeros(degree + 1)
    converted = chebyshev.cheb2poly(series)
    coefficients[: len(converted)] = converted
    coefficients[0::2] = 0.0
    return coefficients / high ** np.arange(degree + 1), error


def _extrema(series: Array, low: float, high: float, points: Array) -> tuple[Array, float]:
    """The largest error between every two changes of its sign, one point each, and the largest of all."""
    marks = np.unique(np.concatenate([[low], points, [high]]))
    x = np.unique(np.concatenate([np.linspace(a, b, GRID) for a, b in pairwise(marks)]))
    e = chebyshev.chebval(x / high, series) - 1
    sign = np.signbit(e)
    runs = np.split(np.arange(len(x)), np.flatnonzero(sign[1:] != sign[:-1]) + 1)
    best = [int(run[np.argmax(np.abs(e[run]))]) for run in runs]
    left, right = x[np.maximum(np.array(best) - 1, 0)], x[np.minimum(np.array(best) + 1, len(x) - 1)]
    for _ in range(3):  # closer and closer around each
        fine = np.linspace(left, right, GRID)
        error = np.abs(chebyshev.chebval(fine / high, series) - 1)
        at, each = error.argmax(0), np.arange(len(best))
        left, right = fine[np.maximum(at - 1, 0), each], fine[np.minimum(at + 1, GRID - 1), each]
    found, errors = fine[at, each], error[at, each]
    while len(found) > len(points):  # more runs than points: the smaller end goes
        keep = slice(1, None) if errors[0] < errors[-1] else slice(None, -1)
        found, errors = found[keep], errors[keep]
    return found if len(found) == len(points) else points, float(error.max())


def minimax_composite(degrees: Sequence[int], epsilon: float) -> tuple[tuple[Array, ...], float]:
    """Stages of these degrees, each the minimax polynomial on the range of the one before: on [epsilon, 1].

    Returns the stages, applied first to last, and the largest error of the composite on [epsilon, 1].
    """
    if not degrees:
        raise InputError("a composite needs at least one degree", got="none")
    low, high, error, stages = epsilon, 1.0, np.inf, []
    for degree in degrees:
        stage, error = minimax_odd(degree, low, high)
        stages.append(stage)
        low, high = 1 - error, 1 + error
    return tuple(stages), error


def epsilon_for(degrees: Sequence[int], error: float) -> float:
    """The smallest epsilon (within 0.1 %) from which on the composite is within `error` of the sign."""
    low, high = 1e-9, 0.5
    if minimax_composite(degrees, high)[1] > error:
        raise InputError("no composite of these degrees is that exact", got=f"{tuple(degrees)}, {error:g}")
    while high / low > 1.001:
        middle = float(np.sqrt(low * high))
        if minimax_composite(degrees, middle)[1] > error:
            low = middle
        else:
            high = middle
    return high
