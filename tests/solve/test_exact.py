"""fit: the exact cost meets the budget, whatever the prices believe; the room is used; or it is refused."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tightrope.errors import BudgetError
from tightrope.solve.exact import SLACK, TRIES, anchored, check, fit
from tightrope.solve.select import cheapest, price, select
from tightrope.types import Budget, Cost, Limit, Problem, Table

METRIC = "offline_bytes"


def problem_of(seed: int, groups: int = 40, options: int = 6) -> Problem:
    generator = np.random.default_rng(seed)
    tables = []
    for k in range(3):
        cost = np.sort(generator.random(options) * 100)[::-1]
        loss = np.cumsum(generator.random((groups, options)), 1) - 1e-3
        tables.append(Table(f"site{k}", tuple(map(str, range(options))), loss, {METRIC: cost}))
    fixed = Cost(offline_bytes=500.0)
    baseline = fixed + Cost(offline_bytes=sum(t.cost[METRIC].max() * groups for t in tables))
    return Problem(tuple(tables), fixed, baseline, {})


def exactly(problem: Problem, factors: dict[str, float], constant: float = 0.0, asked: list | None = None):
    """Prices are off by a factor per site, and by a constant where anything is chosen."""

    def exact(picked):
        if asked is not None:
            asked.append(picked)
        spent = problem.fixed.offline_bytes + constant
        for t in problem.tables:
            spent += factors[t.site] * float(t.cost[METRIC][picked[t.site]].sum())
        return Cost(offline_bytes=spent)

    return exact


@example(241, [1.0, 1.0, 1.875], 0.0, 1.044921875)  # always a hair above: ended at the cheapest choice
@example(69, [0.5, 1.5, 1.0], 0.0, 0.375)  # went up and down between two choices
@example(309, [1.1, 2.0, 1.0063364021102164], -263.0, 1.1066486645633746)
@settings(max_examples=60)
@given(
    st.integers(0, 1000),
    st.lists(st.floats(0.5, 2.0), min_size=3, max_size=3),
    st.floats(-300, 300),
    st.floats(0.15, 1.3),
)
def test_the_exact_cost_meets_the_budget_and_uses_its_room(seed, factors, constant, share):
    problem = problem_of(seed)
    asked: list = []
    exact = exactly(problem, {f"site{k}": f for k, f in enumerate(factors)}, constant, asked)
    target = share * problem.baseline.offline_bytes
    budget = Budget((Limit(METRIC, target),))
    try:
        found = fit(problem, budget, exact)
    except BudgetError as error:
        least = {t.site: np.full(len(t.loss), t.cost[METRIC].argmin()) for t in problem.tables}
        assert exact(least).offline_bytes > target and "no choice meets" in str(error)
        with pytest.raises(BudgetError, match="no choice meets"):
            check(problem, budget, exact)
        return
    assert len(asked) <= TRIES
    spent = exact(found.selection.picked).offline_bytes
    assert spent == found.selection.cost.offline_bytes <= target
    summed = price(problem, found.selection.picked)
    assert summed.cost.offline_bytes <= found.limit * (1 + 1e-12)
    assert (
        found.selection.loss == pytest.approx(summed.loss) and found.selection.bound <= found.selection.loss
    )
    dearest = sum(t.cost[METRIC].max() * len(t.loss) for t in problem.tables) + problem.fixed.offline_bytes
    room = target - problem.fixed.offline_bytes
    full = target - spent <= 2 * SLACK * room + 100  # one more step of one group may not fit
    assert full or found.limit >= dearest - 1e-6 or len(asked) == TRIES


def test_exact_prices_are_asked_once_and_chosen_as_by_select():
    problem = problem_of(3)
    asked: list = []
    exact = exactly(problem, dict.fromkeys(("site0", "site1", "site2"), 1.0), asked=asked)
    budget = Budget.parse(f"{METRIC}<=40%")
    found, plain = fit(problem, budget, exact), select(problem, budget)
    assert len(asked) <= 2
    assert found.selection.loss == plain.loss and found.limit == 0.4 * problem.baseline.offline_bytes


def test_a_budget_that_prices_call_impossible_is_met_if_it_can_be():
    """Prices twice too high: the cheapest choice is affordable, though its price is not."""
    problem = problem_of(1)
    exact = exactly(problem, dict.fromkeys(("site0", "site1", "site2"), 0.5))
    target = cheapest(problem, METRIC) - 1
    budget = Budget((Limit(METRIC, target),))
    with pytest.raises(BudgetError):
        select(problem, budget)
    check(problem, budget, exact)
    found = fit(problem, budget, exact)
    assert exact(found.selection.picked).offline_bytes <= target


def test_an_impossible_budget_says_what_is_possible_exactly():
    problem = problem_of(1)
    exact = exactly(problem, dict.fromkeys(("site0", "site1", "site2"), 1.5))
    least = {t.site: np.full(len(t.loss), t.cost[METRIC].argmin()) for t in problem.tables}
    possible = exact(least).offline_bytes
    for refuse in (check, fit):
        with pytest.raises(BudgetError, match=rf"no choice meets(.|\n)*{METRIC}<={possible:.15g} or more"):
            refuse(problem, Budget((Limit(METRIC, possible * (1 - 1e-9)),)), exact)
        refuse(problem, Budget((Limit(METRIC, possible),)), exact)


def test_anchored_moves_the_baseline_and_keeps_differences():
    problem = problem_of(2)
    moved = anchored(
        problem, Cost(offline_bytes=9e4, online_ms=7.0, drelus=5), frozenset({METRIC, "online_ms"})
    )
    assert (moved.baseline.offline_bytes, moved.baseline.online_ms, moved.baseline.drelus) == (9e4, 7.0, 0)
    for share in (0.0, 0.5, 1.0):
        picked = {t.site: np.full(len(t.loss), int(share * 5)) for t in problem.tables}
        before, after = (price(p, picked).cost for p in (problem, moved))
        shift = 9e4 - problem.baseline.offline_bytes
        assert after.offline_bytes - before.offline_bytes == pytest.approx(shift)


@pytest.mark.parametrize("text", ["offline_bytes<=5,drelus<=5", "macs<=5", "drelus<=5%"])
def test_budgets_this_cannot_use(text):
    problem = problem_of(0)
    for refuse in (check, fit):
        with pytest.raises(BudgetError):
            refuse(problem, Budget.parse(text), lambda picked: Cost())


def tiny(seed: int) -> Problem:
    """Two sites of 2 groups and 3 options: 81 choices in all."""
    generator = np.random.default_rng(seed)
    tables = []
    for k in range(2):
        cost = np.sort(generator.integers(0, 60, 3).astype(float))[::-1]
        loss = np.cumsum(generator.random((2, 3)), 1)
        tables.append(Table(f"site{k}", ("a", "b", "c"), loss, {METRIC: cost}))
    fixed = Cost(offline_bytes=100.0)
    baseline = fixed + Cost(offline_bytes=sum(2 * t.cost[METRIC].max() for t in tables))
    return Problem(tuple(tables), fixed, baseline, {})


def all_choices(problem: Problem):
    shapes = [len(t.loss) for t in problem.tables]
    for flat in product(range(3), repeat=sum(shapes)):
        parts = np.split(np.array(flat), np.cumsum(shapes)[:-1])
        yield {t.site: part for t, part in zip(problem.tables, parts, strict=True)}


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 10_000),
    st.floats(0.6, 1.8),
    st.floats(-40, 40),
    st.integers(1, 9),
    st.floats(0.3, 1.5),
)
def test_against_brute_force_where_exact_costs_grow_with_prices(seed, factor, constant, step, share):
    """Exact costs are a staircase over the sum of prices, as packed bits and frame headers make them.

    Then every choice that is cheaper in prices is no dearer exactly: the best choice for some limit is the
    best of all, and the cheapest one decides what is feasible.
    """
    problem = tiny(seed)

    def exact(picked):
        summed = price(problem, picked).cost.offline_bytes
        return Cost(offline_bytes=max(0.0, constant + np.ceil(factor * summed / step) * step))

    target = share * problem.baseline.offline_bytes
    budget = Budget((Limit(METRIC, target),))
    found = [(exact(p).offline_bytes, price(problem, p)) for p in all_choices(problem)]
    allowed = [s for spent, s in found if spent <= target]
    least = min(spent for spent, _ in found)
    if not allowed:
        for refuse in (check, fit):
            with pytest.raises(BudgetError, match=rf"{METRIC}<={least:.15g} or more"):
                refuse(problem, budget, exact)
        return
    check(problem, budget, exact)
    got = fit(problem, budget, exact)
    assert exact(got.selection.picked).offline_bytes == got.selection.cost.offline_bytes <= target
    best = min(s.loss for s in allowed)
    assert got.selection.loss >= best - 1e-9
    # the bound: no choice whose prices add up to no more than the limit has less loss
    within = [s.loss for _, s in found if s.cost.offline_bytes <= got.limit + 1e-9]
    assert got.selection.bound <= min(within) + 1e-9
    # and the room is used: what beats it spends more of the budget than it, by prices
    better = [s for s in allowed if s.loss < got.selection.loss - 1e-9]
    assert all(s.cost.offline_bytes > got.limit for s in better)
