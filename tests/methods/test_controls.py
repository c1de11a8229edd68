"""Controls: within the budget, of the form their name says, and never better than the solver."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tightrope.errors import BudgetError
from tightrope.methods.block_relu.controls import controls
from tightrope.methods.block_relu.patches import label, parse, patches
from tightrope.nn.block_relu import tiles
from tightrope.solve.select import price, select
from tightrope.types import Budget, Cost, Limit, Problem, Table, total

METRICS = ("drelus", "online_bytes")


@st.composite
def problems(draw) -> Problem:
    """Sites of random size; DReLUs are tiles, bytes grow with them; random losses, 0 for the plain ReLU."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tables = []
    for k in range(draw(st.integers(1, 4))):
        size = (draw(st.integers(1, 12)), draw(st.integers(1, 12)))
        options = patches(size)
        loss = generator.random((draw(st.integers(1, 6)), len(options))) * 10.0 ** draw(st.integers(-3, 3))
        loss[:, 0] = 0
        counted = np.array([float(tiles(p, size)) for p in options])
        bytes_ = counted * draw(st.floats(1, 500)) + (counted > 0) * 8.0 * size[0] * size[1]
        cost = {"drelus": counted, "online_bytes": bytes_}
        tables.append(Table(f"relu_{k}", tuple(map(label, options)), loss, cost))
    fixed = Cost(drelus=draw(st.integers(0, 50)), online_bytes=draw(st.floats(0, 1e4)))
    dearest = [t.cost_of(np.zeros(len(t.loss), dtype=np.intp)) for t in tables]
    return Problem(tuple(tables), fixed, fixed + total(dearest))


def budget_at(problem: Problem, metric: str, share: float) -> Budget:
    low, high = getattr(problem.fixed, metric), getattr(problem.baseline, metric)
    return Budget((Limit(metric, low + share * (high - low)),))


@settings(max_examples=60)
@given(problems(), st.sampled_from(METRICS), st.floats(0, 1.2), st.integers(0, 5))
def test_controls_meet_the_budget_and_never_beat_the_solver(problem, metric, share, seed):
    budget = budget_at(problem, metric, share)
    limit = budget.limits[0].value
    best = select(problem, budget)
    found = controls(problem, budget, seed)
    assert list(found) == ["uniform", "random", "per_layer", "layers"]
    for name, picked in found.items():
        result = price(problem, picked)
        assert getattr(result.cost, metric) <= limit * (1 + 1e-12), name
        assert result.loss >= best.loss - 1e-9 * max(1.0, abs(best.loss)), name
        for t in problem.tables:
            assert picked[t.site].shape == (len(t.loss),)
            assert (picked[t.site] >= 0).all() and (picked[t.site] < len(t.labels)).all()
    for t in problem.tables:
        assert len(set(found["uniform"][t.site])) == 1
        assert len(set(found["layers"][t.site])) == 1
        assert t.labels[found["layers"][t.site][0]] in ("1x1", "identity")
    again = controls(problem, budget, seed)["random"]
    assert all((again[site] == picked).all() for site, picked in found["random"].items())


@settings(max_examples=60)
@given(problems(), st.sampled_from(METRICS), st.floats(0, 1.2))
def test_layers_is_the_best_of_all_subsets(problem, metric, share):
    """Every subset of the sites is tried."""
    budget = budget_at(problem, metric, share)
    limit = budget.limits[0].value
    losses = []
    for removed in itertools.product((False, True), repeat=len(problem.tables)):
        picked = {
            t.site: np.full(len(t.loss), len(t.labels) - 1 if gone else 0)
            for t, gone in zip(problem.tables, removed, strict=True)
        }
        result = price(problem, picked)
        cost = getattr(result.cost, metric)
        assume(cost == limit == round(cost) or abs(cost - limit) > 1e-9 * limit)  # no tie by rounding
        if cost <= limit:
            losses.append(result.loss)
    assert price(problem, controls(problem, budget)["layers"]).loss == pytest.approx(min(losses), rel=1e-9)


@settings(max_examples=40)
@given(problems(), st.floats(0, 1.2))
def test_per_layer_is_the_best_of_all_uniform_sites(problem, share):
    budget = budget_at(problem, "drelus", share)
    losses = []
    for choice in itertools.product(*(range(len(t.labels)) for t in problem.tables)):
        result = price(
            problem, {t.site: np.full(len(t.loss), k) for t, k in zip(problem.tables, choice, strict=True)}
        )
        if result.cost.drelus <= budget.limits[0].value:
            losses.append(result.loss)
    found = controls(problem, budget)["per_layer"]
    assert all(len(set(found[t.site])) == 1 for t in problem.tables)
    assert price(problem, found).loss == pytest.approx(min(losses), rel=1e-9)


@settings(max_examples=60)
@given(problems(), st.sampled_from(METRICS), st.floats(0, 1.2))
def test_uniform_is_the_dearest_patch_that_fits(problem, metric, share):
    """A site too small for the patch takes the largest of its own inside it; no patch fits: identities."""
    budget = budget_at(problem, metric, share)
    costs = []
    for wanted in {text for t in problem.tables for text in t.labels[:-1]}:
        p, q = parse(wanted)
        picked = {}
        for t in problem.tables:
            sides = [(k, parse(text)) for k, text in enumerate(t.labels[:-1])]
            inside = [k for k, side in sides if side[0] <= p and side[1] <= q]
            areas = [np.prod(parse(t.labels[k])) for k in inside]
            largest = [k for k, area in zip(inside, areas, strict=True) if area == max(areas)]
            picked[t.site] = largest
        combinations = [
            sum(t.cost[metric][k] * len(t.loss) for t, k in zip(problem.tables, choice, strict=True))
            for choice in itertools.product(*picked.values())
        ]
        costs.append((min(combinations), max(combinations)))
    room = budget.limits[0].value - getattr(problem.fixed, metric)
    found = price(problem, controls(problem, budget)["uniform"]).cost
    got = getattr(found, metric) - getattr(problem.fixed, metric)
    surely = max((high for _, high in costs if high <= room * (1 - 1e-12)), default=0.0)
    assert got >= surely * (1 - 1e-12)
    if not any(low <= room for low, _ in costs):
        assert got == pytest.approx(0, abs=1e-9)


@settings(max_examples=40)
@given(problems(), st.floats(0.01, 0.99))
def test_random_leaves_no_room_for_a_larger_step(problem, share):
    budget = budget_at(problem, "drelus", share)
    picked = controls(problem, budget)["random"]
    room = budget.limits[0].value - price(problem, picked).cost.drelus
    for t in problem.tables:
        for k in picked[t.site]:
            steps = t.cost["drelus"] - t.cost["drelus"][k]
            assert not (steps[steps > 0] <= room - 1e-9).any()


@pytest.mark.parametrize("text", ["drelus<=0", "macs<=5", "online_ms<=10%", "drelus<=5,online_bytes<=5"])
def test_budgets_that_cannot_be_are_refused(text):
    table = Table("relu", ("1x1", "identity"), np.zeros((2, 2)), {"drelus": np.array([4.0, 0])})
    problem = Problem((table,), Cost(drelus=3, macs=9), Cost(drelus=11, macs=9))
    with pytest.raises(BudgetError):
        controls(problem, Budget.parse(text))
