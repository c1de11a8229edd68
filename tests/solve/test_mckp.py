"""The multiple-choice knapsack solver against enumeration, HiGHS and its own promises."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import LinearConstraint, milp

from tightrope.errors import BudgetError, InputError
from tightrope.solve import _mckp_core
from tightrope.solve.mckp import Block, Solution, solve

Floats = NDArray[np.float64]


def rows(blocks: list[Block]) -> list[tuple[Floats, Floats]]:
    """(loss, weight) of every group."""
    return [
        (block.loss[g], block.weight if block.weight.ndim == 1 else block.weight[g])
        for block in blocks
        for g in range(block.loss.shape[0])
    ]


def enumerate_best(blocks: list[Block], budget: float) -> float:
    """Least loss over all choices, by itertools; inf when none fits."""
    groups = [list(zip(loss.tolist(), weight.tolist(), strict=True)) for loss, weight in rows(blocks)]
    return min(
        (
            math.fsum(loss for loss, _ in choice)
            for choice in itertools.product(*groups)
            if math.fsum(weight for _, weight in choice) <= budget
        ),
        default=math.inf,
    )


def check_consistent(blocks: list[Block], budget: float, solution: Solution) -> None:
    """What is reported is what the choices give, and fits."""
    assert [c.shape for c in solution.choices] == [b.loss.shape[:1] for b in blocks]
    picked = list(zip(rows(blocks), np.concatenate([*solution.choices, []]).astype(int), strict=True))
    assert solution.loss == math.fsum(loss[k] for (loss, _), k in picked)
    assert solution.weight == math.fsum(weight[k] for (_, weight), k in picked)
    assert solution.weight <= budget
    assert solution.bound <= solution.loss
    assert solution.optimal == (solution.bound == solution.loss)


KINDS = {
    "integers": lambda rng, shape: rng.integers(-5, 6, shape).astype(float),
    "few values": lambda rng, shape: rng.integers(0, 3, shape).astype(float),
    "tenths": lambda rng, shape: rng.integers(-5, 6, shape) * 0.1,
    "reals": lambda rng, shape: rng.normal(size=shape),
    "cancelling": lambda rng, shape: rng.choice([-(2.0**54), -2.0, -1.0, 1.0, 2.0, 2.0**54], shape),
    "wide": lambda rng, shape: rng.normal(size=shape) * 10.0 ** rng.integers(-9, 9, shape),
}


def random_blocks(rng: np.random.Generator, loss: str, weight: str, max_groups: int = 6) -> list[Block]:
    """Up to `max_groups` groups of 1 to 5 options, some sharing weights, some with repeated options."""
    blocks: list[Block] = []
    left = int(rng.integers(1, max_groups + 1))
    while left:
        groups, options = int(rng.integers(1, left + 1)), int(rng.integers(1, 6))
        shape = (groups, options) if rng.random() < 0.5 else (options,)
        block_loss, block_weight = KINDS[loss](rng, (groups, options)), np.abs(KINDS[weight](rng, shape))
        if options > 1 and rng.random() < 0.3:
            block_loss[..., -1], block_weight[..., -1] = block_loss[..., 0], block_weight[..., 0]
        blocks.append(Block(block_loss, block_weight))
        left -= groups
    return blocks


def interesting_budget(rng: np.random.Generator, blocks: list[Block]) -> float:
    """Below, exactly at or just above the weight of a random choice, or anywhere between the extremes."""
    weights = [weight for _, weight in rows(blocks)]
    exact = math.fsum(rng.choice(w) for w in weights)
    low, high = math.fsum(w.min() for w in weights), math.fsum(w.max() for w in weights)
    return float(
        rng.choice(
            [exact, math.nextafter(exact, -1), math.nextafter(exact, math.inf), rng.uniform(low, high), high]
        )
    )


@pytest.mark.parametrize("weight", KINDS)
@pytest.mark.parametrize("loss", KINDS)
def test_equals_enumeration(loss: str, weight: str) -> None:
    rng = np.random.default_rng([list(KINDS).index(loss), list(KINDS).index(weight)])
    proved = solved = 0
    for _ in range(40):
        blocks = random_blocks(rng, loss, weight)
        budget = interesting_budget(rng, blocks)
        best = enumerate_best(blocks, budget)
        if best == math.inf:
            with pytest.raises(BudgetError, match="smallest feasible"):
                solve(blocks, budget)
            continue
        solution = solve(blocks, budget)
        check_consistent(blocks, budget, solution)
        assert solution.loss == best
        proved, solved = proved + solution.optimal, solved + 1
    assert solved >= 20
    assert proved >= 0.9 * solved


def highs(blocks: list[Block], budget: float) -> tuple[float, float]:
    """(loss, weight) of the choice found by scipy's HiGHS with a zero gap."""
    groups = rows(blocks)
    loss, weight = (np.concatenate([group[i] for group in groups]) for i in (0, 1))
    owner = np.repeat(np.arange(len(groups)), [len(group[0]) for group in groups])
    one_each = sparse.csr_array((np.ones(loss.size), (owner, np.arange(loss.size))))
    result = milp(
        loss,
        integrality=np.ones(loss.size),
        bounds=(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(weight[None], -np.inf, budget)],
        options={"mip_rel_gap": 0},
    )
    assert result.status == 0, result.message
    chosen = result.x > 0.5
    return math.fsum(loss[chosen]), math.fsum(weight[chosen])


@pytest.mark.parametrize("seed", range(200))
def test_equals_highs(seed: int) -> None:
    """Up to 40 groups of 15 options: too many to enumerate."""
    rng = np.random.default_rng(seed)
    blocks = []
    for _ in range(int(rng.integers(1, 5))):
        groups, options = int(rng.integers(2, 11)), int(rng.integers(2, 16))
        weight = rng.integers(0, 60, (groups, options) if seed % 2 else options).astype(float)
        loss = rng.lognormal(size=(groups, 1)) * np.exp(-weight / 30) + 0.1 * rng.normal(
            size=(groups, options)
        )
        blocks.append(Block(loss, weight))
    low, high = (math.fsum(f(w) for _, w in rows(blocks)) for f in (np.min, np.max))
    budget = float(np.floor(rng.uniform(low, high)))
    solution = solve(blocks, budget)
    check_consistent(blocks, budget, solution)
    loss, weight = highs(blocks, budget)
    assert weight <= budget
    assert solution.optimal
    assert solution.loss == pytest.approx(loss, abs=1e-6)  # HiGHS's own tolerance


FAMILIES = {
    "convex": lambda rng, weight: np.round(1e4 * np.exp(-weight / 15) * rng.lognormal(0, 0.1, weight.shape)),
    "correlated": lambda rng, weight: 600 - 10 * weight + rng.integers(0, 15, weight.shape),
    "concave": lambda rng, weight: (
        np.round(100 * np.sqrt(3601 - weight**2)) + rng.integers(0, 9, weight.shape)
    ),
    "unrelated": lambda rng, weight: rng.integers(0, 1000, weight.shape).astype(float),
}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_dynamic_programme_over_all_budgets(family: str, seed: int) -> None:
    """Integer weights: the textbook table of the best loss at each weight, for every fourth budget."""
    rng = np.random.default_rng(seed)
    weight = rng.integers(0, 60, (30, 8))
    loss = FAMILIES[family](rng, weight)
    table = np.zeros(1200)  # best loss with weight <= index
    for group_loss, group_weight in zip(loss, weight, strict=True):
        lifted = [
            np.concatenate([np.full(w, np.inf), table[: table.size - w]]) + v
            for v, w in zip(group_loss, group_weight, strict=True)
        ]
        table = np.min(lifted, axis=0)
    blocks = [Block(loss, weight.astype(float))]
    for budget in np.flatnonzero(np.isfinite(table))[::4]:
        solution = solve(blocks, float(budget))
        assert solution.loss == table[budget]
        assert solution.optimal


reals = st.one_of(
    st.integers(-4, 4).map(float),
    st.integers(-40, 40).map(lambda i: i * 0.1),
    st.floats(-1e6, 1e6, allow_nan=False, width=64),
)
amounts = st.one_of(
    st.integers(0, 6).map(float),
    st.integers(0, 40).map(lambda i: i * 0.1),
    st.floats(1e-9, 1e6, allow_nan=False, width=64),
)
instances = st.lists(st.lists(st.tuples(reals, amounts), min_size=1, max_size=6), min_size=1, max_size=7).map(
    lambda groups: [
        Block(np.array([[loss for loss, _ in group]]), np.array([weight for _, weight in group]))
        for group in groups
    ]
)
caps = st.sampled_from([1, 2, 3, 5, 9, 20, 1 << 17])


@settings(max_examples=250, deadline=None)
@given(instances, caps, st.data())
def test_monotone_in_the_budget(blocks: list[Block], cap: int, data: st.DataObject) -> None:
    """Also where the cap on states cuts the search short; the bound stays below every solution found."""
    groups = [weight.tolist() for _, weight in rows(blocks)]
    exact = [math.fsum(data.draw(st.sampled_from(w)) for w in groups) for _ in range(8)]
    edges = [math.nextafter(w, math.inf) for w in exact] + [math.nextafter(w, 0) for w in exact] + [math.inf]
    budgets = sorted(b for b in exact + edges if b >= math.fsum(min(w) for w in groups))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_mckp_core, "MAX_STATES", cap)
        solutions = [solve(blocks, budget) for budget in budgets]
    for budget, solution in zip(budgets, solutions, strict=True):
        check_consistent(blocks, budget, solution)
        assert solution.bound <= solve(blocks, budget).loss
    losses = [solution.loss for solution in solutions]
    assert losses == sorted(losses, reverse=True)


def noisy_convex(seed: int, groups: int, options: int, *, integer: bool) -> list[Block]:
    rng = np.random.default_rng(seed)
    weight = rng.integers(0, 300, (groups, options)).astype(float)
    if not integer:
        weight *= rng.lognormal(0, 0.1, weight.shape)
    loss = rng.lognormal(size=(groups, 1)) * np.exp(-weight / 60) * rng.lognormal(0, 0.3, weight.shape)
    return [Block(loss, weight)]


@pytest.mark.parametrize("integer", [True, False])
@pytest.mark.parametrize("cap", [4, 64, 1 << 17])
def test_monotone_within_one_break_interval(integer: bool, cap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """400 neighbouring budgets, several per break edge, with and without truncation."""
    monkeypatch.setattr(_mckp_core, "MAX_STATES", cap)
    blocks = noisy_convex(3, 40, 12, integer=integer)
    solutions = [solve(blocks, budget) for budget in np.linspace(1500, 1900, 400)]
    losses = [solution.loss for solution in solutions]
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) > (100 if cap > 4 else 5)
    if cap == 1 << 17:
        assert all(solution.optimal for solution in solutions)
    else:
        assert not all(solution.optimal for solution in solutions)


def test_truncated_bound_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound of a truncated search is below the true optimum, the loss above, and both are near it."""
    for seed in range(20):
        blocks = noisy_convex(seed, 60, 15, integer=bool(seed % 2))
        best = solve(blocks, 2500.0)
        assert best.optimal
        with monkeypatch.context() as patch:
            patch.setattr(_mckp_core, "MAX_STATES", 50)
            rough = solve(blocks, 2500.0)
        assert rough.bound <= best.loss <= rough.loss
        assert rough.gap < 0.02


def test_layers_of_a_large_network() -> None:
    """6,000 groups, 300,000 options, four layer sizes: proved optimal at DReLU-like weights."""
    rng = np.random.default_rng(0)
    blocks = []
    for channels, side in ((200, 56), (800, 28), (2000, 14), (3000, 7)):
        sides = [s for s in range(1, side + 1) if s <= 7 or s % 7 == 0]
        weight = np.array([-(-side // p) * -(-side // q) for p in sides for q in sides] + [0], float)
        shape = 1 - np.sqrt(weight / side**2)
        blocks.append(
            Block(
                rng.lognormal(0, 1.5, (channels, 1)) * shape * rng.lognormal(0, 0.2, (channels, weight.size)),
                weight,
            )
        )
    total = sum(block.loss.shape[0] * block.weight.max() for block in blocks)
    solutions = [solve(blocks, total * fraction) for fraction in (0.03, 0.06, 0.12, 0.3)]
    for fraction, solution in zip((0.03, 0.06, 0.12, 0.3), solutions, strict=True):
        check_consistent(blocks, total * fraction, solution)
        assert solution.gap < 1e-4
    assert sum(solution.optimal for solution in solutions) >= 3


def test_ties_are_settled_the_same_way_each_time() -> None:
    blocks = [Block(np.tile([3.0, 1.0, 1.0, 0.0], (50, 1)), np.array([0.0, 2.0, 2.0, 5.0]))]
    first, second = solve(blocks, 131), solve(blocks, 131)
    assert first.optimal
    np.testing.assert_array_equal(first.choices[0], second.choices[0])
    assert 2 not in first.choices[0]  # an equal option never beats an earlier one


def test_knife_edge_budget() -> None:
    """0.1 + 0.2 rounds to more than 0.3: the pair does not fit a budget of 0.3, the single 0.3 does."""
    blocks = [
        Block(np.array([[1.0, 0.0]]), np.array([0.0, 0.1])),
        Block(np.array([[1.0, 0.5, 0.0]]), np.array([0.0, 0.3, 0.2])),
    ]
    solution = solve(blocks, 0.3)
    assert solution.loss == enumerate_best(blocks, 0.3) == 1.0
    assert solve(blocks, math.nextafter(0.3, 1)).loss == 0.0


def test_nothing_to_choose() -> None:
    empty = solve([], 0.0)
    assert (empty.choices, empty.loss, empty.weight, empty.bound, empty.optimal) == ((), 0.0, 0.0, 0.0, True)
    hollow = solve([Block(np.empty((0, 3)), np.arange(3.0)), Block(np.array([[2.0]]), np.array([4.0]))], 4)
    assert [c.tolist() for c in hollow.choices] == [[], [0]]
    assert (hollow.loss, hollow.gap) == (2.0, 0.0)


@pytest.mark.parametrize(
    ("loss", "bound", "gap"),
    [
        (2.0, 2.0, 0.0),
        (0.0, 0.0, 0.0),
        (2.0, 1.0, 0.5),
        (-1.0, -2.0, 0.5),
        (0.0, -1e-300, 1.0),
        (1.0, -1.0, 2.0),
    ],
)
def test_gap(loss: float, bound: float, gap: float) -> None:
    assert Solution((), loss, 0.0, bound, loss == bound).gap == gap


def test_infeasible_budget_names_the_smallest_feasible_one() -> None:
    blocks = [Block(np.zeros((3, 2)), np.array([0.1, 7.0])), Block(np.zeros((1, 1)), np.array([2.0]))]
    smallest = math.fsum([0.1, 0.1, 0.1, 2.0])
    with pytest.raises(BudgetError) as caught:
        solve(blocks, math.nextafter(smallest, 0))
    assert f"smallest feasible budget is {smallest!r}" in str(caught.value)
    assert solve(blocks, smallest).weight == smallest


GOOD = Block(np.zeros((2, 3)), np.arange(3.0))
BAD_BLOCKS = {
    "loss nan": (Block(np.array([[0.0, math.nan]]), np.ones(2)), "a loss is out of range"),
    "loss infinite": (Block(np.array([[0.0, -math.inf]]), np.ones(2)), "a loss is out of range"),
    "loss 1-d": (Block(np.zeros(3), np.zeros(3)), "loss has the wrong shape"),
    "no options": (Block(np.zeros((2, 0)), np.zeros(0)), "loss has the wrong shape"),
    "weight nan": (Block(np.zeros((1, 2)), np.array([0.0, math.nan])), "a weight is out of range"),
    "weight negative": (Block(np.zeros((1, 2)), np.array([0.0, -1.0])), "a weight is out of range"),
    "weight subnormal": (Block(np.zeros((1, 2)), np.array([0.0, 1e-310])), "a weight is out of range"),
    "weight shape": (Block(np.zeros((2, 3)), np.zeros((3, 2))), "weight does not match loss"),
    "weight inexact": (Block(np.zeros((1, 1)), np.array([2**53 + 1])), "too large to be exact"),
    "text": (Block(np.array([["a"]]), np.zeros(1)), "loss is not numeric"),
}


@pytest.mark.parametrize("case", BAD_BLOCKS)
def test_bad_block_is_named(case: str) -> None:
    block, message = BAD_BLOCKS[case]
    with pytest.raises(InputError, match=message) as caught:
        solve([GOOD, block], 100.0)
    assert "block 1" in str(caught.value)


def test_budget_must_be_a_number() -> None:
    with pytest.raises(InputError, match="budget is not a number"):
        solve([GOOD], math.nan)
