"""Coefficients fitted to what an activation really sees: weighted least squares on a histogram of its inputs.

SmartPAF (section 2) runs 40 epochs of Adam on stored activations; here one pass gathers 1,000 counts a site
and Levenberg-Marquardt (scipy, with the exact Jacobian) does the rest in about a second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.polynomial import polynomial
from numpy.typing import NDArray
from scipy.optimize import least_squares

from tightrope.errors import InputError
from tightrope.methods.paf.library import Coefficients, Paf

Array = NDArray[np.floating[Any]]
BOUND, REACH = 1.1, 1.2  # |p| <= 1.1 up to 1.2 times the scale
AIM = 1.09  # what the penalty aims at, so that between its points p stays below BOUND
TAIL_POINTS, FLOOR_POINTS = 241, 500
PENALTIES = (0.0, 1e-1, 1e0, 1e1, 1e2, 1e3)
BINS = 1000
TRIES, SPREAD = 10, 0.15  # starts beside the given ones, with coefficients changed by so much


@dataclass(frozen=True)
class Histogram:
    """Counts of one site's inputs in equal bins, a multiple of 4, over [-limit, limit]."""

    limit: float
    counts: Array

    @property
    def centers(self) -> Array:
        width = 2 * self.limit / len(self.counts)
        return -self.limit + width * (np.arange(len(self.counts)) + 0.5)

    @property
    def lowest(self) -> float:
        """The lower edge of the first bin that is not empty."""
        return -self.limit + 2 * self.limit / len(self.counts) * int(np.flatnonzero(self.counts)[0])

    def and_more(self, values: Array) -> Histogram:
        """With `values` counted too; the limit doubles, and bins are joined in twos, until they fit in."""
        limit, counts = self.limit, self.counts
        quarter = len(counts) // 4
        while float(np.abs(values).max(initial=0.0)) > limit:
            inner = counts.reshape(-1, 2).sum(1)
            limit, counts = 2 * limit, np.pad(inner, quarter)
        return Histogram(limit, counts + np.histogram(values, len(counts), (-limit, limit))[0])

    @classmethod
    def of(cls, values: Array, bins: int = BINS) -> Histogram:
        limit = float(np.abs(values).max(initial=0.0)) or 1.0
        return cls(limit, np.histogram(values, bins, (-limit, limit))[0].astype(np.float64))


@dataclass(frozen=True)
class Fit:
    """A tuned polynomial on x / scale, and its root mean squared error in the units of the activation.

    `tail`: max |p| over [-1.2, 1.2], for a gated one.
    """

    paf: Paf
    scale: float
    rmse: float
    tail: float


def tune(
    starts: Sequence[Paf],
    histogram: Histogram,
    scale: float,
    target: Callable[[Array], Array] = lambda x: np.maximum(x, 0),
    *,
    tail: bool = True,
    tries: int = TRIES,
    floor: float = 0.0,
) -> Fit:
    """The best fit to `target` (ReLU) from any of `starts`, which must all be gated or all be not.

    A gated polynomial keeps its odd form and, with `tail`, |p| <= 1.1 up to 1.2 times the scale; the penalty
    is raised until that holds. The problem has local minima, so `tries` changed starts are tried too, always
    the same ones. One stage that is not gated is a linear problem, solved in closed form. `floor` is the
    share of the weight that lies evenly over the scale, so that fits do not run wild where nothing was seen.
    """
    if not 0 < scale < np.inf:
        raise InputError("the scale of a polynomial must be positive and finite", got=scale)
    used = histogram.counts > 0
    x, weight = histogram.centers[used], histogram.counts[used] / histogram.counts.sum()
    if floor:
        evenly = scale * np.linspace(-1, 1, FLOOR_POINTS)
        weight = np.concatenate([(1 - floor) * weight, np.full(FLOOR_POINTS, floor / FLOOR_POINTS)])
        x = np.concatenate([x, evenly])
    if not starts[0].gated:
        return measure(_direct(starts[0], x, weight, scale, target), histogram, scale, target)
    rng = np.random.default_rng(0)
    changed = (_changed(starts[k % len(starts)], rng) for k in range(tries))
    fits = [_gated(start, x, weight, scale, target, tail) for start in (*starts, *changed)]
    best = min(fits, key=lambda fit: (tail and fit.tail > BOUND, fit.rmse))
    return measure(best.paf, histogram, scale, target)


def measure(paf: Paf, histogram: Histogram, scale: float, target: Callable[[Array], Array]) -> Fit:
    """An untuned polynomial as it stands."""
    used = histogram.counts > 0
    x, weight = histogram.centers[used], histogram.counts[used] / histogram.counts.sum()
    u = x / scale
    with np.errstate(over="ignore", invalid="ignore"):  # beyond the scale, where a composite explodes
        y = x * (1 + paf(u)) / 2 if paf.gated else scale * paf(u)
    return Fit(paf, scale, _rms(y - target(x), weight), _tail(paf))


def _rms(residual: Array, weight: Array) -> float:
    return float(np.sqrt(weight @ residual**2))


def _tail(paf: Paf) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.abs(paf(np.linspace(0, REACH, 4001))).max())


def _direct(start: Paf, x: Array, weight: Array, scale: float, target: Callable[[Array], Array]) -> Paf:
    """target(x) = scale * p(x / scale) in the least-squares sense; Chebyshev's basis for its conditioning."""
    (stage,) = start.stages
    series = np.polynomial.Chebyshev.fit(
        x / scale, target(x) / scale, len(stage) - 1, domain=[-1, 1], w=np.sqrt(weight)
    )
    coefficients = np.zeros(len(stage))
    found = np.polynomial.chebyshev.cheb2poly(series.coef)
    coefficients[: len(found)] = found
    return replace(start, stages=(tuple(map(float, coefficients)),))


def _gated(
    start: Paf, x: Array, weight: Array, scale: float, target: Callable[[Array], Array], tail: bool
) -> Fit:
    u, root = x / scale, np.sqrt(weight)
    edge = np.linspace(0.5, REACH, TAIL_POINTS)
    best: Fit | None = None
    vector = np.concatenate([stage[1::2] for stage in start.stages])
    for penalty in PENALTIES if tail else (0.0,):

        def residuals(c: Array, penalty: float = penalty) -> Array:
            p = _values(_split(c, start), np.concatenate([u, edge]))[-1]
            over = np.maximum(np.abs(p[len(u) :]) - AIM, 0)
            error = root * (x * (1 + p[: len(u)]) / 2 - target(x))
            return np.concatenate([error, np.sqrt(penalty / TAIL_POINTS) * over])

        def jacobian(c: Array, penalty: float = penalty) -> Array:
            stages = _split(c, start)
            both = np.concatenate([u, edge])
            p = _values(stages, both)[-1]
            over = np.abs(p[len(u) :]) > AIM
            outer = np.concatenate(
                [root * x / 2, np.sqrt(penalty / TAIL_POINTS) * over * np.sign(p[len(u) :])]
            )
            return outer[:, None] * _gradient(stages, both)

        with np.errstate(over="ignore", invalid="ignore"):  # a step too far is taken back
            vector = least_squares(residuals, vector, jacobian, method="lm", max_nfev=400).x
        paf = _normalised(replace(start, stages=_split(vector, start)))
        error = x * (1 + paf(u)) / 2 - target(x)
        fit = Fit(paf, scale, _rms(error, weight), _tail(paf))
        best = fit
        if fit.tail <= BOUND:
            break
    assert best is not None  # there is at least one penalty
    return best


def _normalised(paf: Paf) -> Paf:
    """The same composite with inner stages of magnitude 1 on [-1, 1].

    p_2(p_1(u)) does not change when p_1 is divided by k and the coefficients of p_2 are multiplied by k^j; a
    fit may drift along that. Values of 20 and their seventh powers would make training and CKKS imprecise.
    """
    stages = [np.array(stage) for stage in paf.stages]
    values = _values(paf.stages, np.linspace(0, 1, TAIL_POINTS))
    for k, value in enumerate(values[1:-1]):
        size = float(np.abs(value).max()) or 1.0
        stages[k] = stages[k] / size
        stages[k + 1] = stages[k + 1] * size ** np.arange(len(stages[k + 1]))
    return replace(paf, stages=tuple(tuple(map(float, stage)) for stage in stages))


def _changed(paf: Paf, rng: np.random.Generator) -> Paf:
    stages = tuple(tuple(c * (1 + SPREAD * rng.standard_normal()) for c in stage) for stage in paf.stages)
    return replace(paf, stages=stages)


def _split(vector: Array, like: Paf) -> tuple[Coefficients, ...]:
    """The odd coefficients, one stage after the other, as stages."""
    stages, start = [], 0
    for degree in like.degrees:
        count = (degree + 1) // 2
        odd = vector[start : start + count]
        stages.append(tuple(float(c) for value in odd for c in (0.0, value)))
        start += count
    return tuple(stages)


def _values(stages: Sequence[Coefficients], x: Array) -> list[Array]:
    """x and what each stage makes of it."""
    values = [x]
    for stage in stages:
        values.append(polynomial.polyval(values[-1], stage))
    return values


def _gradient(stages: Sequence[Coefficients], x: Array) -> Array:
    """(len(x), coefficients): how the composite changes with each odd coefficient, by the chain rule."""
    values = _values(stages, x)
    outer, columns = np.ones_like(x), list[Array]()
    for stage, value in zip(reversed(stages), reversed(values[:-1]), strict=True):
        powers = value[:, None] ** np.arange(1, len(stage), 2)
        columns.insert(0, outer[:, None] * powers)
        outer = outer * polynomial.polyval(value, polynomial.polyder(stage))
    return np.concatenate(columns, 1)
