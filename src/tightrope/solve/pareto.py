"""All optima of a staged problem at once: the frontier of gain against cost, by merging frontiers.

A partial choice that costs no less and gains no more than another one can be dropped, whatever follows: so
the frontier of b + 1 blocks lies in the sums of that of b blocks and the options of one more. A stage's
frontier is the best of its depths', and the network's the sums of its stages'. Exact for one metric and
without pair terms, but for ties within rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tightrope.errors import InputError
from tightrope.solve.staged import Answer, Staged, answer, from_row
from tightrope.types import FloatArray

_ROUNDING = 2.0**-40  # relative: over that of all sums here


@dataclass(frozen=True)
class Frontier:
    """P choices of rising cost and gain. rows: (P, blocks of all stages), -1 where a block is absent."""

    problem: Staged
    cost: FloatArray  # (P,), base included, rounded
    gain: FloatArray  # (P,), base included, rounded
    rows: NDArray[np.int16]

    def best(self, limit: float) -> Answer:
        """The choice of most gain whose exact cost is at most `limit`; proved optimal.

        Raises BudgetError when there is none.
        """
        problem = replace(self.problem, limits=(limit,))
        problem.check_feasible()
        last = int(np.searchsorted(self.cost, limit + _ROUNDING * abs(limit), side="right"))
        for point in range(min(last, len(self.cost)) - 1, -1, -1):
            choice = from_row(problem, self.rows[point])
            if problem.fits(choice):
                return answer(problem, choice, problem.gain(choice))
        return answer(problem, problem.cheapest(0), math.inf)  # rounding hid the cheapest one


def frontier(problem: Staged) -> Frontier:
    """Every optimum, whatever the limit. Raises InputError for several metrics or pair terms."""
    if len(problem.metrics) != 1 or problem.pair is not None:
        raise InputError(
            "a frontier is of one metric and of a gain without pair terms",
            got=f"{', '.join(problem.metrics)}{'' if problem.pair is None else ', with pair terms'}",
            fix="milp",
        )
    whole = _Points(np.zeros(1), np.zeros(1), np.zeros((1, 0), np.int16))
    for stage in problem.stages:
        blocks = stage.depths[-1]
        prefix = _Points(np.zeros(1), np.zeros(1), np.zeros((1, 0), np.int16))
        found = []
        for b in range(blocks):
            options = _Points(
                stage.cost[0, b], stage.gain[b], np.arange(problem.options, dtype=np.int16)[:, None]
            )
            prefix = _sums(prefix, options)
            if b + 1 in stage.depths:
                rest = np.full((len(prefix.cost), blocks - b - 1), -1, np.int16)
                more = stage.depth_gain[stage.depths.index(b + 1)]
                found.append(_Points(prefix.cost, prefix.gain + more, np.hstack([prefix.rows, rest])))
        whole = _sums(whole, _best(*(np.concatenate(parts) for parts in zip(*found, strict=True))))
    return Frontier(problem, whole.cost + problem.base_cost[0], whole.gain + problem.base_gain, whole.rows)


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


def _best(cost: FloatArray, gain: FloatArray, rows: NDArray[np.int16]) -> _Points:
    kept = _undominated(cost, gain)
    return _Points(cost[kept], gain[kept], rows[kept])


def _undominated(cost: FloatArray, gain: FloatArray) -> NDArray[np.intp]:
    """Indices by rising cost; each gains more than all that cost no more."""
    order = np.lexsort((-gain, cost))
    before = np.concatenate([[-np.inf], np.maximum.accumulate(gain[order])[:-1]])
    kept: NDArray[np.intp] = order[gain[order] > before]
    return kept
