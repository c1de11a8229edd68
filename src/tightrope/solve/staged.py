"""Networks in stages: a depth for every stage, an option for every block; most gain within limits.

    gain(choice) = base + sum_s [ depth_gain[s, d_s] + sum_{b < d_s} gain[s, b, c_sb] ]  (+ z' pair beta)
    cost(choice) = base + sum_s sum_{b < d_s} cost[s, b, c_sb]                     for every limited metric

These are the accuracy and latency formulas of BINAS (Nayman et al. 2021): the blocks of a stage count as
long as its depth reaches them. With `pair` the gain has a term for every (option of a present block, depth
of a stage).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tightrope.errors import BudgetError, InputError
from tightrope.types import FloatArray

Choice = tuple[tuple[int, ...], ...]  # per stage the option of every block that is there


@dataclass(frozen=True)
class Stage:
    """B blocks, K options, D depths (rising, the last is B), M limited metrics."""

    depths: tuple[int, ...]
    gain: FloatArray  # (B, K)
    depth_gain: FloatArray  # (D,)
    cost: FloatArray  # (M, B, K), 0 or more


@dataclass(frozen=True)
class Staged:
    """`limits` bound the costs, `base_cost` included; inf is no limit.

    pair: (all blocks of all stages x K, all depths) or None. Raises InputError where shapes disagree or a
    number is not finite.
    """

    stages: tuple[Stage, ...]
    metrics: tuple[str, ...]
    limits: tuple[float, ...]
    base_cost: tuple[float, ...]
    base_gain: float = 0.0
    pair: FloatArray | None = None

    def __post_init__(self) -> None:
        metrics = len(self.metrics)
        if not self.stages or not len(self.limits) == len(self.base_cost) == metrics > 0:
            raise InputError("a staged problem needs stages, and a limit and a base cost for every metric")
        for s, stage in enumerate(self.stages):
            shape = (stage.depths[-1] if stage.depths else 0, self.options)
            arrays = (stage.gain, stage.depth_gain, stage.cost)
            fits = (
                stage.gain.shape == shape
                and stage.depth_gain.shape == (len(stage.depths),)
                and stage.cost.shape == (metrics, *shape)
                and list(stage.depths) == sorted(set(stage.depths))
                and min(*shape, *stage.depths) > 0
                and all(np.isfinite(a).all() for a in arrays)
                and stage.cost.min() >= 0
            )
            if not fits:
                raise InputError(
                    "the arrays of a stage do not fit, or are not finite",
                    where=f"stage {s}",
                    got=[a.shape for a in arrays],
                    allowed=f"{shape}, {(len(stage.depths),)}, {(metrics, *shape)}; costs of 0 or more",
                )
        wide = (self.blocks * self.options, sum(len(stage.depths) for stage in self.stages))
        if self.pair is not None and (self.pair.shape != wide or not np.isfinite(self.pair).all()):
            raise InputError("the pair term does not fit", got=self.pair.shape, allowed=wide)
        if not np.isfinite([*self.base_cost, self.base_gain]).all() or not all(
            limit > -math.inf for limit in self.limits
        ):
            raise InputError("base values must be finite, limits numbers or inf", got=self.limits)

    @property
    def options(self) -> int:
        return int(self.stages[0].gain.shape[1]) if self.stages[0].gain.ndim == 2 else 0

    @property
    def blocks(self) -> int:
        return sum(stage.depths[-1] for stage in self.stages)

    @cached_property
    def first(self) -> tuple[tuple[int, int], ...]:
        """Per stage, where its blocks and its depths start among those of all stages."""
        blocks = np.cumsum([0, *(stage.depths[-1] for stage in self.stages)])
        depths = np.cumsum([0, *(len(stage.depths) for stage in self.stages)])
        return tuple((int(b), int(d)) for b, d in zip(blocks[:-1], depths[:-1], strict=True))

    def gain(self, choice: Choice) -> float:
        """The correctly rounded gain."""
        parts = [self.base_gain]
        for stage, options in zip(self.stages, choice, strict=True):
            parts.append(float(stage.depth_gain[stage.depths.index(len(options))]))
            parts += [float(stage.gain[b, k]) for b, k in enumerate(options)]
        if self.pair is not None:
            depths = [
                d + stage.depths.index(len(options))
                for stage, options, (_, d) in zip(self.stages, choice, self.first, strict=True)
            ]
            rows = [
                (b + k) * self.options + option
                for options, (b, _) in zip(choice, self.first, strict=True)
                for k, option in enumerate(options)
            ]
            parts += [float(v) for v in self.pair[np.ix_(rows, depths)].ravel()]
        return math.fsum(parts)

    def cost(self, choice: Choice) -> tuple[Fraction, ...]:
        """Exact, one per metric: floats are fractions."""
        return tuple(
            Fraction(self.base_cost[m])
            + sum(
                Fraction(float(stage.cost[m, b, k]))
                for stage, options in zip(self.stages, choice, strict=True)
                for b, k in enumerate(options)
            )
            for m in range(len(self.metrics))
        )

    def fits(self, choice: Choice) -> bool:
        """Whether no cost exceeds its limit, in exact arithmetic."""
        pairs = zip(self.cost(choice), self.limits, strict=True)
        return all(math.isinf(limit) or cost <= Fraction(limit) for cost, limit in pairs)

    def cheapest(self, metric: int) -> Choice:
        """The choice of least cost in one metric, at the least depths: no block costs less than nothing."""
        return tuple(
            tuple(int(k) for k in stage.cost[metric, : stage.depths[0]].argmin(1)) for stage in self.stages
        )

    def check_feasible(self) -> None:
        """Raise BudgetError, naming the smallest feasible limit, where a limit alone cannot be met."""
        for m, (metric, limit) in enumerate(zip(self.metrics, self.limits, strict=True)):
            least = self.cost(self.cheapest(m))[m]
            if not math.isinf(limit) and least > Fraction(limit):
                raise BudgetError(
                    "no network meets the limit",
                    got=f"{metric}<={limit:.15g}",
                    allowed=f"{metric}<={_above(least):.17g} or more",
                    fix="a larger limit, or a space with smaller networks",
                )


@dataclass(frozen=True)
class Answer:
    """`bound`: no choice within the limits gains more (inf: nothing is proved). `cost`: nearest floats."""

    choice: Choice
    gain: float
    bound: float
    cost: dict[str, float]

    @property
    def gap(self) -> float:
        """bound - gain, in the unit of the gain: 0 when proved optimal."""
        return self.bound - self.gain


def answer(problem: Staged, choice: Choice, bound: float = math.inf) -> Answer:
    """The answer, checked: raises AssertionError for a choice over a limit, which no solver may return."""
    assert problem.fits(choice), f"a solver went over its limit: {choice}"
    gain = problem.gain(choice)
    cost = {name: float(value) for name, value in zip(problem.metrics, problem.cost(choice), strict=True)}
    return Answer(choice, gain, max(bound, gain), cost)


def together(problem: Staged) -> BudgetError:
    """The error where every limit can be met, but not all at once."""
    limits = [f"{m}<={limit:.15g}" for m, limit in zip(problem.metrics, problem.limits, strict=True)]
    return BudgetError("no network meets all limits together", got=", ".join(limits), fix="larger limits")


def from_row(problem: Staged, row: NDArray[np.integer] | Sequence[int]) -> Choice:
    """The choice from an option per block of all stages, -1 where a block is absent."""
    return tuple(
        tuple(int(k) for k in row[b : b + stage.depths[-1]] if k >= 0)
        for stage, (b, _) in zip(problem.stages, problem.first, strict=True)
    )


def _above(value: Fraction) -> float:
    """The least float that is not below."""
    near = float(value)
    return near if Fraction(near) >= value else math.nextafter(near, math.inf)
