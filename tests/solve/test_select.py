"""select: the cheapest losses within the budget, the fixed cost counted, the bound proved."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tightrope.errors import BudgetError
from tightrope.solve.select import price, quantities, select
from tightrope.types import Budget, Cost, Limit, Problem, Step, Table


def problem_of(generator: np.random.Generator, tables: int, groups: int, options: int) -> Problem:
    """Random whole DReLUs, so that a test can count exactly; bytes unrelated to them."""
    made = []
    for k in range(tables):
        drelus = np.sort(generator.integers(0, 20, options))[::-1].astype(float)
        cost = {"drelus": drelus, "online_bytes": generator.random(options) * 100}
        labels = tuple(f"{i}x{i}" for i in range(options))
        made.append(Table(f"site{k}", labels, generator.random((groups, options)), cost))
    fixed = Cost(drelus=7, macs=3)
    baseline = fixed + Cost(drelus=sum(float(t.cost["drelus"].max()) * groups for t in made))
    return Problem(tuple(made), fixed, baseline)


def assignments(problem: Problem):
    """Every assignment, as the mapping that `price` takes."""
    sizes = [t.loss.shape for t in problem.tables]
    spaces = [itertools.product(range(options), repeat=groups) for groups, options in sizes]
    for choice in itertools.product(*map(list, spaces)):
        yield {t.site: np.array(picked) for t, picked in zip(problem.tables, choice, strict=True)}


@settings(max_examples=80)
@given(st.integers(0, 2**32 - 1), st.integers(1, 2), st.integers(1, 3), st.integers(2, 3), st.data())
def test_the_choice_is_the_best_of_all(seed, tables, groups, options, data):
    """Whole budgets from just below the least possible, so that the fixed cost often decides."""
    problem = problem_of(np.random.default_rng(seed), tables, groups, options)
    least = 7 + sum(float(t.cost["drelus"].min()) * groups for t in problem.tables)
    limit = float(data.draw(st.integers(int(least) - 2, int(problem.baseline.drelus) + 2)))
    budget = Budget((Limit("drelus", limit),))
    losses = [p.loss for p in (price(problem, a) for a in assignments(problem)) if p.cost.drelus <= limit]
    if not losses:
        with pytest.raises(BudgetError, match="no choice meets"):
            select(problem, budget)
        return
    found = select(problem, budget)
    assert found.loss == pytest.approx(min(losses), rel=1e-12)
    assert found.bound <= min(losses) * (1 + 1e-12)
    assert found.cost.drelus <= limit
    assert price(problem, found.picked).loss == pytest.approx(found.loss, rel=1e-12)


def test_cost_adds_the_fixed_part_in_every_quantity():
    problem = problem_of(np.random.default_rng(0), 2, 4, 3)
    found = select(problem, Budget.parse("drelus<=60"))
    by_hand = Cost(drelus=7, macs=3)
    for t in problem.tables:
        for group, k in enumerate(found.picked[t.site]):
            by_hand += t.option(group, k).cost
    assert found.cost.as_dict() == pytest.approx(by_hand.as_dict())
    assert found.cost.macs == 3


def test_the_same_problem_is_solved_in_bytes():
    problem = problem_of(np.random.default_rng(1), 2, 3, 3)
    found = select(problem, Budget.parse("online_bytes<=250"))
    losses = [p.loss for p in (price(problem, a) for a in assignments(problem)) if p.cost.online_bytes <= 250]
    assert found.cost.online_bytes <= 250
    assert found.loss == pytest.approx(min(losses), rel=1e-12)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_a_larger_budget_never_loses_more(seed):
    problem = problem_of(np.random.default_rng(seed), 3, 5, 4)
    least = 7 + sum(float(t.cost["drelus"].min()) * 5 for t in problem.tables)
    limits = np.linspace(least, problem.baseline.drelus, 12)
    losses = [select(problem, Budget((Limit("drelus", float(x)),))).loss for x in limits]
    assert all(a >= b for a, b in itertools.pairwise(losses))
    assert losses[-1] == pytest.approx(sum(float(t.loss.min(1).sum()) for t in problem.tables))


def test_an_impossible_budget_says_what_is_possible():
    table = Table("relu", ("1x1", "2x2"), np.zeros((3, 2)), {"drelus": np.array([8.0, 2.0])})
    problem = Problem((table,), Cost(drelus=4), Cost(drelus=28))
    message = r"no choice meets(.|\n)*drelus<=9(.|\n)*drelus<=10 or more, of which 4"
    with pytest.raises(BudgetError, match=message):
        select(problem, Budget.parse("drelus<=9"))
    with pytest.raises(BudgetError, match=r"drelus<=25%, that is drelus<=7"):
        select(problem, Budget.parse("drelus<=25%"))
    assert select(problem, Budget.parse("drelus<=10")).cost.drelus == 10


def test_the_possible_budget_is_not_rounded():
    table = Table("relu", ("1x1",), np.zeros((3, 1)), {"drelus": np.array([1234567.0])})
    problem = Problem((table,), Cost(), Cost(drelus=3 * 1234567))
    with pytest.raises(BudgetError, match="drelus<=3703701 or more"):
        select(problem, Budget.parse("drelus<=5"))
    assert select(problem, Budget.parse("drelus<=3703701")).cost.drelus == 3703701


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("drelus<=5,online_bytes<=5", "exactly one limit"),
        ("macs<=5", r"no option is priced(.|\n)*macs(.|\n)*drelus"),
        ("online_ms<=5%", "does not have"),
    ],
)
def test_budgets_this_cannot_use(text, message):
    problem = problem_of(np.random.default_rng(0), 1, 1, 2)
    with pytest.raises(BudgetError, match=message):
        select(problem, Budget.parse(text))


def test_a_problem_without_options_has_nothing_to_choose():
    with pytest.raises(BudgetError, match=r"no option is priced(.|\n)*nothing"):
        select(Problem((), Cost(drelus=1), Cost(drelus=1)), Budget.parse("drelus<=1"))


def test_levels_may_be_limited_where_only_what_no_choice_changes_spends_them():
    """Polynomials of degree 1 take none, the layers beside them do."""
    free = {"drelus": np.zeros(2), "ckks_levels": np.zeros(2)}
    table = Table("act", ("degree 1", "another"), np.array([[0.5, 0.25]]), free)
    path = (Step("first", ("",), 1), Step("act", ("first",), 0), Step("last", ("act",), 1))
    problem = Problem((table,), Cost(), Cost(ckks_levels=2), {}, path)
    assert quantities(problem) == ("ckks_levels",)
    chosen = select(problem, Budget.parse("ckks_levels<=2"))
    assert chosen.cost.ckks_levels == 2 and chosen.loss == 0.25
    with pytest.raises(BudgetError, match="ckks_levels<=2 or more"):
        select(problem, Budget.parse("ckks_levels<=1"))
    assert quantities(Problem((table,), Cost(), Cost())) == ()
