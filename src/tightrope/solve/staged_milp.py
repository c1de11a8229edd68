"""A staged problem as a mixed-integer linear programme, solved by HiGHS with a proved bound.

z[s, b, c] says that block b of stage s is there with option c, beta[s, d] that the stage has its d-th depth.

    sum_d beta[s, d] = 1,   sum_c z[s, b, c] = sum_{d reaching b} beta[s, d],   costs . z <= limits

so that products of z and beta within a stage disappear. Pair terms z_i beta_j become variables w_ij >= 0, by
the reformulation-linearisation of Sherali and Adams (1990), exact at whole z and beta: every row above is
also taken times every beta_j, the limits too (costs . w_j <= limits beta_j), which needs variables for
products of depths of two stages as well.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from tightrope.errors import BudgetError, TightropeError
from tightrope.solve.staged import Answer, Choice, Staged, answer, together
from tightrope.types import FloatArray

_ROUNDS = 20  # HiGHS keeps rows to 1e-6 only; as often its limits are drawn in
_SCALE = 1e3  # of a cost row, so that 1e-6 is small beside it


def solve(problem: Staged, *, seconds: float = 60.0, excluded: Collection[Choice] = ()) -> Answer:
    """The choice of most gain within all limits, and a bound on every other's; none of `excluded` counts.

    `seconds`: when to stop and return the best so far. Raises BudgetError when no choice fits (a single
    limit's smallest feasible value is named), and TightropeError when none was found in time.
    """
    problem.check_feasible()
    model = _Model(problem, excluded)
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
    fallback = _cheapest(problem, excluded)
    if fallback is None:
        raise together(problem)
    return answer(problem, fallback, bound)


def _cheapest(problem: Staged, excluded: Collection[Choice] = ()) -> Choice | None:
    """The cheapest choice of one quantity that is within all limits."""
    single = [problem.cheapest(m) for m in range(len(problem.metrics))]
    return next((choice for choice in single if problem.fits(choice) and choice not in excluded), None)


def within(problem: Staged) -> Choice:
    """Some choice within all limits: the cheapest of one quantity if that fits, else whatever HiGHS finds.
    Raises BudgetError when there is none.
    """
    problem.check_feasible()
    known = _cheapest(problem)
    if known is not None:
        return known
    worthless = [
        replace(s, gain=np.zeros_like(s.gain), depth_gain=np.zeros_like(s.depth_gain)) for s in problem.stages
    ]
    return solve(replace(problem, stages=tuple(worthless), pair=None)).choice


def best(problem: Staged, count: int, *, found: Sequence[Choice] = (), seconds: float = 60.0) -> list[Answer]:
    """Up to `count` choices of most gain within all limits, apart from those `found` already, best first.

    Where HiGHS finds none in `seconds`, there are no more; TightropeError if none at all is known then.
    """
    answers: list[Answer] = []
    while len(answers) < count:
        known = [*found, *(one.choice for one in answers)]
        try:
            answers.append(solve(problem, seconds=seconds, excluded=known))
        except BudgetError:  # there are no more
            break
        except TightropeError:
            if not known:
                raise
            break
    return answers


@contextmanager
def _silence() -> Iterator[None]:
    """HiGHS 1.12 writes a line of its own to the standard output, whatever it is told, which may be JSON."""
    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


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

    def __init__(self, problem: Staged, excluded: Collection[Choice]) -> None:
        self.problem = problem
        K, Z = problem.options, problem.blocks * problem.options
        self.depths = sum(len(stage.depths) for stage in problem.stages)
        N = Z + self.depths
        self.objective = np.concatenate(
            [stage.gain.ravel() for stage in problem.stages] + [stage.depth_gain for stage in problem.stages]
        )
        rows = _Rows()
        for stage, (b0, d0) in zip(problem.stages, problem.first, strict=True):
            rows.add({Z + d0 + d: 1.0 for d in range(len(stage.depths))}, 1, 1)
            for b in range(stage.depths[-1]):
                options = {(b0 + b) * K + k: 1.0 for k in range(K)}
                rows.add(options | {Z + d0 + d: -1.0 for d, n in enumerate(stage.depths) if n > b}, 0, 0)
        for choice in excluded:
            self._exclude(rows, choice)
        products = 0 if problem.pair is None else self._pairs(rows, Z)
        if problem.pair is not None:
            self.objective = np.concatenate([self.objective, problem.pair.ravel(), np.zeros(products)])
        self.columns = len(self.objective)
        matrix = sparse.csr_array((rows.data, rows.columns, rows.starts), shape=(len(rows.low), self.columns))
        self.rows = LinearConstraint(matrix, rows.low, rows.high)
        self.cost = np.zeros((len(problem.metrics), self.columns))
        for m in range(len(problem.metrics)):
            self.cost[m, :Z] = np.concatenate([stage.cost[m].ravel() for stage in problem.stages])
        self.whole = (np.arange(self.columns) < N).astype(np.int64)

    def _exclude(self, rows: _Rows, choice: Choice) -> None:
        """At least one depth or option is another one."""
        problem, K, Z = self.problem, self.problem.options, self.problem.blocks * self.problem.options
        taken = {}
        for stage, options, (b0, d0) in zip(problem.stages, choice, problem.first, strict=True):
            taken[Z + d0 + stage.depths.index(len(options))] = 1.0
            taken |= {(b0 + b) * K + k: 1.0 for b, k in enumerate(options)}
        rows.add(taken, -np.inf, len(taken) - 1)

    def _pairs(self, rows: _Rows, Z: int) -> int:
        """Rows of the products; how many variables of two depths there are, the last columns."""
        problem, K, D = self.problem, self.problem.options, self.depths
        start = Z + D
        both = self._two_depths(rows, Z)
        for stage, (b0, d0) in zip(problem.stages, problem.first, strict=True):
            for b in range(stage.depths[-1]):
                reaching = [d0 + d for d, n in enumerate(stage.depths) if n > b]
                for other, (_, e0) in zip(problem.stages, problem.first, strict=True):
                    depths = range(e0, e0 + len(other.depths))
                    for k in range(K):
                        i = (b0 + b) * K + k
                        rows.add({start + i * D + e: 1.0 for e in depths} | {i: -1.0}, 0, 0)
                    for e in depths:
                        sums = {start + ((b0 + b) * K + k) * D + e: 1.0 for k in range(K)}
                        if e0 == d0:
                            there = {Z + e: -1.0} if e in reaching else {}
                        else:
                            there = {both[d, e]: -1.0 for d in reaching}
                        rows.add(sums | there, 0, 0)
        return len(set(both.values()))

    def _two_depths(self, rows: _Rows, Z: int) -> dict[tuple[int, int], int]:
        """The column of the product of two depths of different stages, in either order."""
        problem = self.problem
        spans = [
            range(d0, d0 + len(s.depths)) for s, (_, d0) in zip(problem.stages, problem.first, strict=True)
        ]
        found: dict[tuple[int, int], int] = {}
        column = Z + self.depths + Z * self.depths
        for t, later in enumerate(spans):
            for earlier in spans[:t]:
                for d, e in product(earlier, later):
                    found[d, e] = found[e, d] = column
                    column += 1
                for one, other in ((earlier, later), (later, earlier)):
                    for d in one:
                        rows.add({found[d, e]: 1.0 for e in other} | {Z + d: -1.0}, 0, 0)
        return found

    def _limits(self, room: FloatArray, scale: FloatArray) -> tuple[Any, FloatArray]:
        """Costs . z - room <= 0, and the same times every depth where there are products."""
        Z, D = self.problem.blocks * self.problem.options, self.depths
        whole = sparse.csr_array(self.cost * scale[:, None])
        if self.problem.pair is None:
            return whole, room * scale
        parts, highs = [whole], [room * scale]
        for m in np.flatnonzero(np.isfinite(room) & (room > 0)):
            times = sparse.kron(sparse.csr_array(self.cost[m : m + 1, :Z] * scale[m]), sparse.eye_array(D))
            empty, rest = sparse.csr_array((D, Z)), sparse.csr_array((D, self.columns - Z - D - Z * D))
            depths = sparse.eye_array(D) * (-room[m] * scale[m])
            parts.append(sparse.hstack([empty, depths, times, rest]).tocsr())
            highs.append(np.zeros(D))
        return sparse.vstack(parts).tocsr(), np.concatenate(highs)

    def run(self, limits: list[float], seconds: float) -> Any:
        """HiGHS on the model with these limits."""
        room = np.array(limits) - np.array(self.problem.base_cost)
        with np.errstate(divide="ignore", invalid="ignore"):
            scale = np.where(np.isfinite(room) & (room > 0), _SCALE / room, 1.0)
        matrix, high = self._limits(room, scale)
        with _silence():
            return milp(
                -self.objective,
                integrality=self.whole,
                bounds=Bounds(0, 1),
                constraints=[self.rows, LinearConstraint(matrix, -np.inf, high)],
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
