"""One suite for all solvers of staged problems: enumeration of every choice is the oracle."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tightrope.errors import BudgetError, InputError, TightropeError
from tightrope.solve import evolution, frank_wolfe, pareto, staged_milp
from tightrope.solve.staged import Choice, Stage, Staged

EXACT = {
    "pareto": lambda problem: pareto.frontier(problem).best(problem.limits[0]),
    "milp": staged_milp.solve,
}
HEURISTIC = {
    "bcfw": lambda problem: frank_wolfe.solve(problem, steps=40),
    "evolution": lambda problem: evolution.solve(problem, population=20, generations=15),
}


@st.composite
def problems(draw: st.DrawFn, metrics: int = 1, pairs: bool = False, whole: bool = False) -> Staged:
    """Small enough to enumerate; costs with all their bits, or `whole` numbers with many ties."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    options = draw(st.integers(1, 3))
    stages = []
    for _ in range(draw(st.integers(1, 2))):
        depths = tuple(sorted(draw(st.sets(st.integers(1, 3), min_size=1))))
        shape = (depths[-1], options)
        cost = (
            generator.integers(0, 4, (metrics, *shape))
            if whole
            else generator.lognormal(0, 1, (metrics, *shape))
        )
        gain = generator.integers(-2, 3, shape) if whole else generator.normal(0, 1, shape)
        stages.append(
            Stage(depths, gain.astype(float), generator.normal(0, 1, len(depths)), cost.astype(float))
        )
    base = tuple(float(v) for v in generator.uniform(0, 2, metrics))
    problem = Staged(tuple(stages), tuple("abc"[:metrics]), (math.inf,) * metrics, base, 1.5)
    if pairs:
        wide = (problem.blocks * options, sum(len(s.depths) for s in stages))
        problem = replace(problem, pair=generator.normal(0, 1, wide))
    limits = []
    for m in range(metrics):
        least, most = (float(f(problem.cost(c)[m] for c in everything(problem))) for f in (min, max))
        limits.append(least + draw(st.floats(0, 1)) * (most - least))
    return replace(problem, limits=tuple(limits))


def everything(problem: Staged) -> list[Choice]:
    stages = [
        [row for depth in stage.depths for row in product(range(problem.options), repeat=depth)]
        for stage in problem.stages
    ]
    return list(product(*stages))


def best(problem: Staged) -> float | None:
    gains = [problem.gain(choice) for choice in everything(problem) if problem.fits(choice)]
    return max(gains, default=None)


def on_an_edge(problem: Staged) -> bool:
    """A choice is over the limit by a rounding: nobody's bound leaves it out."""
    over = [float(problem.cost(c)[0] - Fraction(problem.limits[0])) for c in everything(problem)]
    return any(0 < more <= 1e-9 * problem.limits[0] for more in over)


def refused(problem: Staged, solver) -> bool:
    try:
        solver(problem)
    except BudgetError:
        return True
    return False


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=40)
@given(problems())
def test_exact_solvers_find_the_optimum_and_prove_it(name, problem):
    wanted = best(problem)
    if wanted is None:
        assert refused(problem, EXACT[name])
        return
    found = EXACT[name](problem)
    assert problem.fits(found.choice)
    assert found.gain == pytest.approx(wanted, abs=1e-9)
    assert found.gain == problem.gain(found.choice)
    assert found.gap >= 0 and (found.gap <= 1e-6 or on_an_edge(problem))
    assert found.cost["a"] == float(problem.cost(found.choice)[0])


@settings(max_examples=40)
@given(problems(whole=True))
def test_a_limit_may_be_met_exactly(problem):
    """Whole costs: a limit that equals a cost allows it."""
    wanted = best(problem)
    if wanted is not None:
        assert {round(solver(problem).gain, 9) for solver in EXACT.values()} == {round(wanted, 9)}


@pytest.mark.parametrize("name", HEURISTIC)
@settings(max_examples=12)
@given(problems(metrics=2, pairs=True))
def test_heuristics_keep_every_limit_and_never_beat_the_optimum(name, problem):
    wanted = best(problem)
    try:
        found = HEURISTIC[name](problem)
    except BudgetError:
        cheapest = [problem.cheapest(m) for m in range(2)]
        assert not any(problem.fits(choice) for choice in cheapest)
        return
    assert problem.fits(found.choice)
    assert wanted is not None and found.gain <= wanted + 1e-12
    assert found.bound == math.inf


@settings(max_examples=25)
@given(problems(metrics=3))
def test_several_limits_at_once(problem):
    wanted = best(problem)
    if wanted is None:
        assert refused(problem, staged_milp.solve)
        return
    found = staged_milp.solve(problem)
    assert problem.fits(found.choice) and found.gain == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=25)
@given(problems(pairs=True))
def test_pair_terms_are_exact(name, problem):
    wanted = best(problem)
    if wanted is None:
        assert refused(problem, EXACT[name])
        return
    found = EXACT[name](problem)
    assert problem.fits(found.choice) and found.gain == pytest.approx(wanted, abs=1e-9)
    assert found.gap >= 0 and (found.gap <= 1e-6 or on_an_edge(problem))


@settings(max_examples=30)
@given(problems(), st.booleans())
def test_the_frontier_is_every_optimum(problem, free):
    """Its points rise in both, and for the cost of any choice the frontier has one that gains as much."""
    line = pareto.frontier(problem)
    assert (np.diff(line.cost) > 0).all() and (np.diff(line.gain) > 0).all()
    for choice in everything(problem):
        found = line.best(math.inf if free else math.nextafter(float(problem.cost(choice)[0]), math.inf))
        assert found.gain >= problem.gain(choice) - 1e-9


@pytest.mark.parametrize("solver", [*EXACT.values(), *HEURISTIC.values()])
def test_an_infeasible_limit_names_the_smallest_feasible_one(solver):
    stage = Stage((1, 2), np.zeros((2, 2)), np.zeros(2), np.array([[[0.1, 0.3], [1.0, 1.0]]]))
    problem = Staged((stage, stage), ("latency_ms",), (0.3,), (0.2,))
    least = Fraction(0.1) + Fraction(0.1) + Fraction(0.2)
    with pytest.raises(BudgetError, match=r"latency_ms<=0\.4") as caught:
        solver(problem)
    named = float(str(caught.value).split("allowed: latency_ms<=")[1].split()[0])
    assert named >= least > math.nextafter(named, 0)
    assert solver(replace(problem, limits=(named,))).choice == ((0,), (0,))


def test_limits_that_exclude_each_other_are_told_apart():
    stage = Stage((1,), np.zeros((1, 2)), np.zeros(1), np.array([[[0.0, 1.0]], [[1.0, 0.0]]]))
    problem = Staged((stage,), ("a", "b"), (0.5, 0.5), (0.0, 0.0))
    for solver in (staged_milp.solve, frank_wolfe.solve, evolution.solve):
        with pytest.raises(BudgetError, match="together"):
            solver(problem)


@pytest.mark.parametrize(
    "change",
    [
        {"limits": (1.0, 2.0)},
        {"base_cost": (math.nan,)},
        {"limits": (math.nan,)},
        {"limits": (-math.inf,)},
        {"pair": np.zeros((1, 1))},
        {"stages": ()},
        {"stages": (Stage((2, 1), np.zeros((2, 2)), np.zeros(2), np.zeros((1, 2, 2))),)},
        {"stages": (Stage((1,), np.zeros((1, 2)), np.zeros(1), -np.ones((1, 1, 2))),)},
        {"stages": (Stage((1,), np.full((1, 2), np.nan), np.zeros(1), np.ones((1, 1, 2))),)},
    ],
)
def test_a_malformed_problem_is_refused(change):
    good = Stage((1, 2), np.zeros((2, 2)), np.zeros(2), np.zeros((1, 2, 2)))
    whole = Staged((good,), ("a",), (1.0,), (0.0,))
    with pytest.raises(InputError):
        replace(whole, **change)


def test_a_frontier_with_pairs_has_its_limits():
    stage = Stage((1, 2, 3), np.zeros((3, 1)), np.zeros(3), np.zeros((1, 3, 1)))
    many = Staged((stage,) * 8, ("a",), (1.0,), (0.0,), pair=np.zeros((24, 24)))
    with pytest.raises(InputError, match="6,561"):
        pareto.frontier(many)
    assert staged_milp.solve(many).gap == 0


def test_a_frontier_is_of_one_metric():
    good = Stage((1,), np.zeros((1, 2)), np.zeros(1), np.zeros((2, 1, 2)))
    with pytest.raises(InputError, match="milp"):
        pareto.frontier(Staged((good,), ("a", "b"), (1.0, 1.0), (0.0, 0.0)))


@settings(max_examples=20)
@given(problems(metrics=2, pairs=True))
def test_the_best_few_are_the_best_few(problem):
    gains = sorted(
        (problem.gain(choice) for choice in everything(problem) if problem.fits(choice)), reverse=True
    )
    found = staged_milp.best(problem, 3) if gains else []
    assert len({answer.choice for answer in found}) == len(found) == min(3, len(gains))
    assert [answer.gain for answer in found] == pytest.approx(gains[:3], abs=1e-6)
    assert all(problem.fits(answer.choice) for answer in found)


def test_a_frontier_claims_nothing_that_a_rounding_hides():
    """1 + 2^-53 rounds to 1, exactly the limit: the point there is over it, and hides the best one."""
    dear = Stage((1,), np.array([[0.0, -1.0]]), np.zeros(1), np.array([[[1.0, 0.5]]]))
    tiny = Stage((1,), np.array([[1.0, 0.5]]), np.zeros(1), np.array([[[2.0**-53, 0.0]]]))
    problem = Staged((dear, tiny), ("ms",), (1.0,), (0.0,))
    best = ((0,), (1,))
    assert problem.fits(best) and problem.gain(best) == 0.5
    found = pareto.frontier(problem).best(1.0)
    assert problem.fits(found.choice) and found.bound >= 0.5


@pytest.mark.parametrize("solver", [frank_wolfe.solve, evolution.solve])
def test_heuristics_start_where_no_cheapest_choice_meets_all_limits(solver):
    costs = np.array([[[1.0, 10.0, 5.0]], [[10.0, 1.0, 5.0]]])
    stage = Stage((1,), np.array([[1.0, 1.0, 0.0]]), np.zeros(1), costs)
    assert solver(Staged((stage,), ("a", "b"), (6.0, 6.0), (0.0, 0.0))).choice == ((2,),)
    with pytest.raises(BudgetError, match="together"):
        solver(Staged((stage,), ("a", "b"), (4.0, 4.0), (0.0, 0.0)))


def test_the_best_few_end_where_there_is_no_more_time(monkeypatch):
    problem = Staged(
        (Stage((1,), np.array([[1.0, 2.0, 3.0]]), np.zeros(1), np.ones((1, 1, 3))),), ("a",), (6.0,), (0.0,)
    )
    first = staged_milp.best(problem, 1)
    late = SimpleNamespace(status=1, x=None, mip_dual_bound=None, message="time limit")
    monkeypatch.setattr(staged_milp, "milp", lambda *_, **__: late)
    assert staged_milp.best(problem, 2, found=[first[0].choice]) == []
    with pytest.raises(TightropeError, match="in time"):
        staged_milp.best(problem, 2)
