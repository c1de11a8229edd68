"""From what was measured to candidates: estimators fitted and compared, one of them optimised."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tightrope.errors import BudgetError
from tightrope.methods.binas.accuracies import Accuracies
from tightrope.methods.binas.contributions import PERCENT
from tightrope.methods.binas.estimators import FITTED, Agreement, Estimator, agreement, of_formula
from tightrope.methods.binas.method import AUTO, BinasMethod
from tightrope.methods.binas.objective import Contributions, Formula, Priced, formula, problem
from tightrope.methods.binas.space import Space
from tightrope.solve import evolution, frank_wolfe, pareto, staged_milp
from tightrope.solve.staged import Answer, Staged


@dataclass(frozen=True)
class Compared:
    """`images`: how many evaluations of an image the estimator learned from."""

    estimator: Estimator
    agreement: Agreement
    images: int


def compare(
    space: Space,
    measured: Contributions,
    regressed: Formula,
    pooled: Formula,
    images: int,
    fitted: Accuracies,
    held_out: Accuracies,
) -> list[Compared]:
    """Every estimator on the held-out networks, in points of %. `images`: evaluations behind `measured` and
    `regressed`; behind `pooled` are these and `fitted`.

    The images of `fitted` may be a part of the others, easier or harder than they are: its accuracies are
    shifted to the mean of random networks that the contributions have.
    """
    built = [
        (of_formula("released", space, formula(space, measured)), images),
        (of_formula("conditional", space, formula(space, measured, conditional=True)), images),
        (of_formula("regression", space, regressed), images),
        (of_formula("pooled", space, pooled), images + fitted.hits.size),
    ]
    accuracy = PERCENT * (fitted.mean - fitted.mean.mean()) + measured.mean
    built += [(fit(space, fitted.choices, accuracy), fitted.hits.size) for fit in FITTED]
    wanted = PERCENT * held_out.mean
    return [Compared(e, agreement(e.predict(held_out.choices), wanted), n) for e, n in built]


def pick(method: BinasMethod, compared: Sequence[Compared]) -> Formula:
    """The formula that is optimised."""
    usable = {c.estimator.name: c for c in compared if c.estimator.formula is not None}
    if method.solver == "iqcp":
        best = usable["bilinear"]
    elif method.estimator != AUTO:
        best = usable[method.estimator]
    else:
        best = max(usable.values(), key=lambda c: c.agreement.spearman)
    assert best.estimator.formula is not None
    return best.estimator.formula


def check(space: Space, method: BinasMethod, limits: Mapping[str, float], priced: Priced) -> None:
    """Raise BudgetError for limits that no network meets, before anything is trained."""
    blocks = tuple(np.zeros((s.depths[-1], len(space.options))) for s in space.stages)
    nothing = Formula(0.0, tuple(np.zeros(len(s.depths)) for s in space.stages), blocks)
    staged = problem(space, nothing, limits, priced=priced)
    staged.check_feasible()
    if len(limits) > 1:
        if method.solver == "pareto":
            raise BudgetError("pareto is for one limit", got=", ".join(limits), fix="--solver milp")
        staged_milp.solve(staged)


def _pareto(staged: Staged, seed: int) -> Answer:
    return pareto.frontier(staged).best(staged.limits[0])


def _milp(staged: Staged, seed: int) -> Answer:
    return staged_milp.solve(staged)


def _bcfw(staged: Staged, seed: int) -> Answer:
    return frank_wolfe.solve(staged, seed=seed)


def _evo(staged: Staged, seed: int) -> Answer:
    return evolution.solve(staged, seed=seed)


SOLVE: dict[str, Callable[[Staged, int], Answer]] = {
    "pareto": _pareto,
    "milp": _milp,
    "iqcp": _milp,
    "bcfw": _bcfw,
    "evo": _evo,
}


def candidates(method: BinasMethod, staged: Staged) -> list[Answer]:
    """What the solver finds, then the next best networks within the limits, by HiGHS."""
    first = SOLVE[method.solver](staged, method.seed)
    return [first, *staged_milp.best(staged, method.candidates - 1, found=[first.choice])]
