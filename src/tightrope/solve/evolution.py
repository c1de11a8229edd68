"""Evolution of a population, as once-for-all networks are searched: the control beside exact solvers.

Each generation keeps the best quarter as parents; half of the next population are mutants of parents, the
rest children that take each gene from one of two parents. What is over a limit is drawn again (Cai et al.
2020).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tightrope.solve.staged import Answer, Choice, Staged, answer, from_row
from tightrope.solve.staged_milp import within
from tightrope.types import FloatArray

Genes = NDArray[np.int64]  # (P, depths of all stages, then options of all blocks)
_TRIES = 200  # draws of a whole population before infeasible places are filled with parents


def solve(
    problem: Staged,
    *,
    population: int = 100,
    generations: int = 500,
    parents: float = 0.25,
    mutants: float = 0.5,
    mutation: float = 0.1,
    seed: int = 0,
) -> Answer:
    """The best choice ever seen; nothing is proved. Raises BudgetError when no choice fits."""
    start = within(problem)
    evaluation = _Evaluation(problem)
    generator = np.random.default_rng(seed)
    people = np.repeat(evaluation.genes(start)[None], population, 0)
    people = _fill(people, lambda: evaluation.random(population, generator), evaluation)
    elite = max(2, round(parents * population))
    for _ in range(generations):
        gain = evaluation.gain(people)
        best = people[np.argsort(-gain, kind="stable")[:elite]]
        wanted = population - elite
        changed = round(mutants * population)

        def children(best: Genes = best, wanted: int = wanted, changed: int = changed) -> Genes:
            mothers, fathers = (best[generator.integers(len(best), size=wanted)] for _ in range(2))
            new = evaluation.random(wanted, generator)
            mutated = np.where(generator.random(new.shape) < mutation, new, mothers)
            crossed = np.where(generator.random(new.shape) < 0.5, mothers, fathers)
            return np.where(np.arange(wanted)[:, None] < changed, mutated, crossed)

        rest = _fill(best[generator.integers(len(best), size=wanted)], children, evaluation)
        people = np.concatenate([best, rest])
    for k in np.argsort(-evaluation.gain(people), kind="stable"):
        choice = evaluation.choice(people[k])
        if problem.fits(choice):
            return answer(problem, choice)
    return answer(problem, start)


def _fill(default: Genes, draw: Callable[[], Genes], evaluation: _Evaluation) -> Genes:
    """Places drawn until each has something feasible; `default` where that does not happen."""
    result, missing = default.copy(), np.arange(len(default))
    for _ in range(_TRIES):
        drawn = draw()
        drawn = drawn[missing] if len(drawn) > len(missing) else drawn
        ok = evaluation.fits(drawn)
        result[missing[ok]] = drawn[ok]
        missing = missing[~ok]
        if not len(missing):
            break
    return result


class _Evaluation:
    """Gains and costs of whole populations, in floats."""

    def __init__(self, problem: Staged) -> None:
        self.problem = problem
        self.stages = len(problem.stages)
        self.gains = np.concatenate([stage.gain for stage in problem.stages])
        self.costs = np.concatenate([stage.cost for stage in problem.stages], axis=1)
        self.position = np.concatenate([np.arange(stage.depths[-1]) for stage in problem.stages])
        self.owner = np.repeat(np.arange(self.stages), [stage.depths[-1] for stage in problem.stages])
        self.choices = [len(stage.depths) for stage in problem.stages]

    def random(self, count: int, generator: np.random.Generator) -> Genes:
        highs = [*self.choices, *[self.problem.options] * len(self.position)]
        return generator.integers(0, highs, size=(count, len(highs)))

    def present(self, genes: Genes) -> NDArray[np.bool_]:
        depths = [np.array(s.depths)[genes[:, i]] for i, s in enumerate(self.problem.stages)]
        reach: NDArray[np.int64] = np.stack(depths, 1)
        return self.position < reach[:, self.owner]

    def gain(self, genes: Genes) -> FloatArray:
        here, options = self.present(genes), genes[:, self.stages :]
        blocks = np.arange(len(self.position))
        total: FloatArray = (self.gains[blocks, options] * here).sum(1) + self.problem.base_gain
        for i, stage in enumerate(self.problem.stages):
            total += stage.depth_gain[genes[:, i]]
        if self.problem.pair is not None:
            rows = blocks * self.problem.options + options
            columns = genes[:, : self.stages] + np.array([d for _, d in self.problem.first])
            terms = self.problem.pair[rows[:, :, None], columns[:, None, :]].sum(2)
            total += (terms * here).sum(1)
        return total

    def fits(self, genes: Genes) -> NDArray[np.bool_]:
        here, options = self.present(genes), genes[:, self.stages :]
        costs = (self.costs[:, np.arange(len(self.position)), options] * here).sum(2)
        room = np.array(self.problem.limits) - np.array(self.problem.base_cost)
        return (costs <= room[:, None]).all(0)  # type: ignore[no-any-return]

    def genes(self, choice: Choice) -> Genes:
        depths = [s.depths.index(len(o)) for s, o in zip(self.problem.stages, choice, strict=True)]
        options: list[int] = []
        for stage, chosen in zip(self.problem.stages, choice, strict=True):
            options += [*chosen, *[0] * (stage.depths[-1] - len(chosen))]
        return np.array([*depths, *options], dtype=np.int64)

    def choice(self, genes: Genes) -> Choice:
        row = np.where(self.present(genes[None])[0], genes[self.stages :], -1)
        return from_row(self.problem, row)
