"""A staged problem as a mixed-integer linear programme, solved by HiGHS with a proved bound.

z[s, b, c] says that block b of stage s is there with option c, beta[s, d] that the stage has its d-th depth.

    sum_d beta[s, d] = 1,   sum_c z[s, b, c] = sum_{d reaching b} beta[s, d],   costs . z <= limits

so that products of z and beta within a stage disappear. Pair terms z_i beta_j become variables w_ij >= 0
with sum over the depths of a stage = z_i and sum over the options of a block <= beta_j (= within its own
stage, and for blocks that are always there): a reformulation-linearisation, exact at whole z and beta.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from tightrope.errors import TightropeError
from tightrope.solve.staged import Answer, Choice, Staged, answer, together
from tightrope.types import FloatArray

_ROUNDS = 20  # HiGHS keeps rows to 1e-6 only; as often its limits are drawn in
_SCALE = 1e3  # of a cost row, so that 1e-6 is small beside it


def solve(problem: Staged, *, seconds: float = 60.0) -> Answer:
    """The choice of most gain within all limits, and a bound on every other one's.

    `seconds`: when to stop and return the best so far. Raises BudgetError when no choice fits (a single
    limit's smallest feasible value is named), and TightropeError when none was found in time.
    """
    problem.check_feasible()
    model = _Model(problem)
    limits, bound = list(problem.limits), math.inf
    for _ in range(_ROUNDS):
        result = model.run(limits, seconds)
        if result.status == 2:
            break
        if bound == math.inf and result.mip_dual_bound is not None:  # of the limits as they were given
            bound = problem.base_gain - float(result.mip_dual_bound)
        if result.x is None:
            raise TightropeError("HiGHS found no network in time", got=result.message, fix="more seconds")
        choice = model.choice(result.x)
        if problem.fits(choice):
            return answer(problem, choice, bound)
        for m, (cost, limit) in enumerate(zip(problem.cost(choice), problem.limits, strict=True)):
            if not math.isinf(limit) and cost > Fraction(limit):
                # a choice over its limit by a rounding: draw the row in until it is cut off
                limits[m] = min(limits[m], limit) - 2 * max(float(cost - Fraction(limit)), 1e-9 * abs(limit))
    single = [problem.cheapest(m) for m in range(len(problem.metrics))]
    fallback = next((choice for choice in single if problem.fits(choice)), None)
    if fallback is None:
        raise together(problem)
    return answer(problem, fallback, bound)


@dataclass
class _Rows:
    """Rows of a sparse matrix, written one after another."""

    data: list[float] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=lambda: [0])
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)

    def add(self, entries: dict[int, float], low: float, high: float) -> None:
        self.columns += entries.keys()
        self.data += entries.values()
        self.starts.append(len(self.columns))
        self.low.append(low)
        self.high.append(high)


class _Model:
    """Columns: all z, all beta, then all w (z by beta) where there are pair terms."""

    def __init__(self, problem: Staged) -> None:
        self.problem = problem
        K, Z = problem.options, problem.blocks * problem.options
        self.depths = sum(len(stage.depths) for stage in problem.stages)
        N = Z + self.depths
        self.objective = np.concatenate(
            [stage.gain.ravel() for stage in problem.stages] + [stage.depth_gain for stage in problem.stages]
        )
        if problem.pair is not None:
            self.objective = np.concatenate([self.objective, problem.pair.ravel()])
        rows = _Rows()
        for stage, (b0, d0) in zip(problem.stages, problem.first, strict=True):
            rows.add({Z + d0 + d: 1.0 for d in range(len(stage.depths))}, 1, 1)
            for b in range(stage.depths[-1]):
                options = {(b0 + b) * K + k: 1.0 for k in range(K)}
                rows.add(options | {Z + d0 + d: -1.0 for d, n in enumerate(stage.depths) if n > b}, 0, 0)
        if problem.pair is not None:
            self._pairs(rows, Z)
        self.columns = len(self.objective)
        matrix = sparse.csr_array((rows.data, rows.columns, rows.starts), shape=(len(rows.low), self.columns))
        self.rows = LinearConstraint(matrix, rows.low, rows.high)
        self.cost = np.zeros((len(problem.metrics), self.columns))
        for m in range(len(problem.metrics)):
            self.cost[m, :Z] = np.concatenate([stage.cost[m].ravel() for stage in problem.stages])
        self.whole = (np.arange(self.columns) < N).astype(np.int64)

    def _pairs(self, rows: _Rows, Z: int) -> None:
        problem, K, D = self.problem, self.problem.options, self.depths
        start = Z + D
        for stage, (b0, d0) in zip(problem.stages, problem.first, strict=True):
            for b in range(stage.depths[-1]):
                for other, (_, e0) in zip(problem.stages, problem.first, strict=True):
                    depths = range(e0, e0 + len(other.depths))
                    for k in range(K):
                        i = (b0 + b) * K + k
                        rows.add({start + i * D + d: 1.0 for d in depths} | {i: -1.0}, 0, 0)
                    for d in depths:
                        here = d0 <= d < d0 + len(stage.depths)
                        reached = not here or stage.depths[d - d0] > b
                        always = b < stage.depths[0] or here
                        column = {Z + d: -1.0} if reached else {}
                        sums = {start + ((b0 + b) * K + k) * D + d: 1.0 for k in range(K)}
                        rows.add(sums | column, 0 if always else -np.inf, 0)

    def run(self, limits: list[float], seconds: float) -> Any:
        """HiGHS on the model with these limits."""
        room = np.array(limits) - np.array(self.problem.base_cost)
        with np.errstate(divide="ignore", invalid="ignore"):
            scale = np.where(np.isfinite(room) & (room > 0), _SCALE / room, 1.0)
        budget = LinearConstraint(sparse.csr_array(self.cost * scale[:, None]), -np.inf, room * scale)
        return milp(
            -self.objective,
            integrality=self.whole,
            bounds=Bounds(0, 1),
            constraints=[self.rows, budget],
            options={"time_limit": seconds, "mip_rel_gap": 0},
        )

    def choice(self, x: FloatArray) -> Choice:
        problem, K, Z = self.problem, self.problem.options, self.problem.blocks * self.problem.options
        found = []
        for stage, (b0, d0) in zip(problem.stages, problem.first, strict=True):
            depth = stage.depths[int(x[Z + d0 : Z + d0 + len(stage.depths)].argmax())]
            options = x[b0 * K : (b0 + depth) * K].reshape(depth, K)
            found.append(tuple(int(k) for k in options.argmax(1)))
        return tuple(found)
