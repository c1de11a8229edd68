"""All optima of a staged problem at once: the frontier of gain against cost, by merging frontiers.

A partial choice that costs no less and gains no more than another one can be dropped, whatever follows: so
the frontier of b + 1 blocks lies in the sums of that of b blocks and the options of one more. A stage's
frontier is the best of its depths', and the network's the sums of its stages'. With pair terms there is one
frontier for every combination of depths. Exact for one metric, but for ties within rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tightrope.errors import InputError
from tightrope.solve.staged import Answer, Staged, answer, from_row
from tightrope.types import FloatArray

_COMBINATIONS = 4096
_ROUNDING = 2.0**-40  # relative: over that of all sums here


@dataclass(frozen=True)
class Frontier:
    """P choices of rising cost and gain. rows: (P, blocks of all stages), -1 where a block is absent."""

    problem: Staged
    cost: FloatArray  # (P,), base included, rounded
    gain: FloatArray  # (P,), base included, rounded
    rows: NDArray[np.int16]

    def best(self, limit: float) -> Answer:
        """The choice of most gain whose exact cost is at most `limit`; proved optimal, but where a better
        point is over it by a rounding: then that one's gain is the bound.

        Raises BudgetError when there is none.
        """
        problem = replace(self.problem, limits=(limit,))
        problem.check_feasible()
        last = int(np.searchsorted(self.cost, limit + _ROUNDING * abs(limit), side="right"))
        bound = -math.inf
        for point in range(min(last, len(self.cost)) - 1, -1, -1):
            choice = from_row(problem, self.rows[point])
            bound = max(bound, problem.gain(choice))
            if problem.fits(choice):
                return answer(problem, choice, bound)
        return answer(problem, problem.cheapest(0), math.inf)  # rounding hid the cheapest one


def frontier(problem: Staged) -> Frontier:
    """Every optimum, whatever the limit.

    Raises InputError for several metrics, and for pair terms with more than 4,096 combinations of depths.
    """
    if len(problem.metrics) != 1:
        raise InputError("a frontier is of one metric", got=", ".join(problem.metrics), fix="milp")
    whole = _separable(problem) if problem.pair is None else _paired(problem, problem.pair)
    return Frontier(problem, whole.cost + problem.base_cost[0], whole.gain + problem.base_gain, whole.rows)


def _separable(problem: Staged) -> _Points:
    whole = _nothing()
    for stage in problem.stages:
        blocks, prefix, found = stage.depths[-1], _nothing(), []
        for b in range(blocks):
            prefix = _sums(prefix, _options(stage.cost[0, b], stage.gain[b]))
            if b + 1 in stage.depths:
                rest = np.full((len(prefix.cost), blocks - b - 1), -1, np.int16)
                more = stage.depth_gain[stage.depths.index(b + 1)]
                found.append(_Points(prefix.cost, prefix.gain + more, np.hstack([prefix.rows, rest])))
        whole = _sums(whole, _best(found))
    return whole


def _paired(problem: Staged, pair: FloatArray) -> _Points:
    """Once the depths are fixed, pair terms are gains of options: one frontier for every combination."""
    combinations = math.prod(len(stage.depths) for stage in problem.stages)
    if combinations > _COMBINATIONS:
        raise InputError(
            "too many combinations of depths for a frontier with pair terms",
            got=f"{combinations:,}",
            allowed=f"up to {_COMBINATIONS:,}",
            fix="milp",
        )
    found = []
    for depths in product(*(range(len(stage.depths)) for stage in problem.stages)):
        columns = [d0 + d for d, (_, d0) in zip(depths, problem.first, strict=True)]
        more = pair[:, columns].sum(1).reshape(problem.blocks, problem.options)
        whole = _nothing()
        for stage, d, (b0, _) in zip(problem.stages, depths, problem.first, strict=True):
            for b in range(stage.depths[d]):
                whole = _sums(whole, _options(stage.cost[0, b], stage.gain[b] + more[b0 + b]))
            absent = np.full((len(whole.cost), stage.depths[-1] - stage.depths[d]), -1, np.int16)
            rows = np.hstack([whole.rows, absent])
            whole = _Points(whole.cost, whole.gain + stage.depth_gain[d], rows)
        found.append(whole)
    return _best(found)


class _Points(NamedTuple):
    cost: FloatArray  # (P,)
    gain: FloatArray  # (P,)
    rows: NDArray[np.int16]  # (P, blocks so far)


def _sums(left: _Points, right: _Points) -> _Points:
    """The frontier of all pairs."""
    cost = (left.cost[:, None] + right.cost).ravel()
    gain = (left.gain[:, None] + right.gain).ravel()
    kept = _undominated(cost, gain)
    i, j = kept // len(right.cost), kept % len(right.cost)
    return _Points(cost[kept], gain[kept], np.hstack([left.rows[i], right.rows[j]]))


def _best(found: list[_Points]) -> _Points:
    """The frontier of all of them together."""
    cost, gain, rows = (np.concatenate(parts) for parts in zip(*found, strict=True))
    kept = _undominated(cost, gain)
    return _Points(cost[kept], gain[kept], rows[kept])


def _options(cost: FloatArray, gain: FloatArray) -> _Points:
    return _Points(cost, gain, np.arange(len(cost), dtype=np.int16)[:, None])


def _nothing() -> _Points:
    return _Points(np.zeros(1), np.zeros(1), np.zeros((1, 0), np.int16))


def _undominated(cost: FloatArray, gain: FloatArray) -> NDArray[np.intp]:
    """Indices by rising cost; each gains more than all that cost no more."""
    order = np.lexsort((-gain, cost))
    before = np.concatenate([[-np.inf], np.maximum.accumulate(gain[order])[:-1]])
    kept: NDArray[np.intp] = order[gain[order] > before]
    return kept
