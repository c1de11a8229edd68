"""Block-coordinate Frank-Wolfe for staged problems (Nayman et al. 2021), rounded within the limits.

The one-hot choices become points of simplices: alpha of the options, beta of the depths. Gain and costs are
linear in either while the other is frozen, so each step solves a linear programme over one of the two,
picked at random, and moves towards its vertex. Full steps in turns then lead to a corner, where as many
blocks and stages at most are fractional as there are limits; of these few the best whole choice within the
limits is taken.
"""

from __future__ import annotations

import math
from itertools import islice, product

import numpy as np
from scipy import sparse
from scipy.optimize import linprog

from tightrope.errors import TightropeError
from tightrope.solve.staged import Answer, Choice, Staged, answer, from_row
from tightrope.solve.staged_milp import within
from tightrope.types import FloatArray

_FINAL = 100  # full steps at most
_CORNERS = 4096  # whole choices looked at, at most
_ZERO = 1e-7


def solve(problem: Staged, *, steps: int = 1000, seed: int = 0) -> Answer:
    """A choice within the limits; nothing is proved. Raises BudgetError when no choice fits."""
    start = within(problem)
    relaxed = _Relaxed(problem)
    alpha, beta = relaxed.point(start)
    generator = np.random.default_rng(seed)
    turns = [0, 0]
    for step in range(steps):
        side = 0 if step < 2 else int(generator.integers(2))  # no depth pays before its blocks have options
        rate = 2 / (turns[side] + 2)
        turns[side] += 1
        if side == 0:
            alpha = alpha + rate * (relaxed.best_alpha(alpha, beta) - alpha)
        else:
            beta = beta + rate * (relaxed.best_beta(alpha, beta) - beta)
    before = -math.inf
    for _ in range(_FINAL):
        beta = relaxed.best_beta(alpha, beta)
        alpha = relaxed.best_alpha(alpha, beta)
        gain = relaxed.gain(alpha, beta)
        if gain <= before:
            break
        before = gain
    return answer(problem, max([start, *relaxed.corners(alpha, beta)], key=problem.gain))


class _Relaxed:
    """alpha: (blocks of all stages, K), beta: (depths of all stages,), rows of both summing to 1."""

    def __init__(self, problem: Staged) -> None:
        self.problem = problem
        depths = [(s, n) for s, stage in enumerate(problem.stages) for n in stage.depths]
        blocks = [(s, b) for s, stage in enumerate(problem.stages) for b in range(stage.depths[-1])]
        # reach[b, d]: depth d has block b
        self.reach = np.array([[float(s == t and b < n) for t, n in depths] for s, b in blocks])
        self.owner = np.array([[float(s == t) for t, _ in depths] for s in range(len(problem.stages))])
        self.gains = np.concatenate([stage.gain for stage in problem.stages])
        self.depth_gain = np.concatenate([stage.depth_gain for stage in problem.stages])
        self.costs = np.concatenate([stage.cost for stage in problem.stages], axis=1)
        self.room = np.array(problem.limits) - np.array(problem.base_cost)
        one = np.ones((1, problem.options))
        self.simplices = sparse.kron(sparse.eye_array(len(blocks)), one).tocsr()

    def point(self, choice: Choice) -> tuple[FloatArray, FloatArray]:
        """A whole choice; absent blocks have option 0."""
        alpha, beta = np.zeros_like(self.gains), np.zeros(len(self.depth_gain))
        for stage, options, (b, d) in zip(self.problem.stages, choice, self.problem.first, strict=True):
            beta[d + stage.depths.index(len(options))] = 1
            for k in range(stage.depths[-1]):
                alpha[b + k, options[k] if k < len(options) else 0] = 1
        return alpha, beta

    def _per_option(self, beta: FloatArray) -> FloatArray:
        """What each option of a block that is there adds to the gain."""
        if self.problem.pair is None:
            return self.gains
        return self.gains + (self.problem.pair @ beta).reshape(self.gains.shape)

    def gain(self, alpha: FloatArray, beta: FloatArray) -> float:
        inner = (self._per_option(beta) * alpha).sum(1)
        return float((self.reach @ beta) @ inner + self.depth_gain @ beta)

    def best_alpha(self, alpha: FloatArray, beta: FloatArray) -> FloatArray:
        there = (self.reach @ beta)[:, None]
        found = self._corner(there * self._per_option(beta), there * self.costs, self.simplices)
        return alpha if found is None else found.reshape(alpha.shape)

    def best_beta(self, alpha: FloatArray, beta: FloatArray) -> FloatArray:
        slope = self.depth_gain + (self._per_option(beta) * alpha).sum(1) @ self.reach
        if self.problem.pair is not None:
            slope = slope + ((self.reach @ beta)[:, None] * alpha).ravel() @ self.problem.pair
        costs = (self.costs * alpha).sum(2) @ self.reach
        found = self._corner(slope, costs, sparse.csr_array(self.owner))
        return beta if found is None else found

    def _corner(self, slope: FloatArray, costs: FloatArray, simplices: sparse.csr_array) -> FloatArray | None:
        """The vertex of most gain within the limits; None where rounding has left no room for one."""
        scale = np.where(np.isfinite(self.room) & (self.room > 0), self.room, 1.0)
        finite = np.isfinite(self.room)
        rows = (costs.reshape(len(self.room), -1) / scale[:, None])[finite]
        result = linprog(
            -slope.ravel(),
            A_ub=rows if len(rows) else None,
            b_ub=(self.room / scale)[finite] if len(rows) else None,
            A_eq=simplices,
            b_eq=np.ones(simplices.shape[0]),
            bounds=(0, 1),
            method="highs",
        )
        if result.status == 2:
            return None
        if result.x is None:
            raise TightropeError("HiGHS could not solve a linear programme", got=result.message)
        x: FloatArray = result.x
        return x

    def corners(self, alpha: FloatArray, beta: FloatArray) -> list[Choice]:
        """Whole choices within the limits, out of the depths and options that are partly chosen."""
        problem, found = self.problem, []
        supports = [
            [d for d in range(d0, d0 + len(stage.depths)) if beta[d] > _ZERO]
            for stage, (_, d0) in zip(problem.stages, problem.first, strict=True)
        ]
        for chosen in islice(product(*supports), _CORNERS):
            whole = np.zeros_like(beta)
            whole[list(chosen)] = 1
            points = self.best_alpha(alpha, whole)
            options = [np.flatnonzero(row > _ZERO) for row in points]
            present = self.reach @ whole > 0
            kept: list[list[int]] = [
                list(o) if here else [-1] for o, here in zip(options, present, strict=True)
            ]
            for row in islice(product(*kept), _CORNERS):
                choice = from_row(problem, row)
                if problem.fits(choice):
                    found.append(choice)
        return found
