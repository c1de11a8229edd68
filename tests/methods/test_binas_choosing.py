"""Estimators compared, one of them optimised, candidates within the limit; and what is drawn of it."""

from __future__ import annotations

import numpy as np
import pytest

from tightrope.errors import BudgetError
from tightrope.methods.binas.accuracies import Accuracies
from tightrope.methods.binas.choosing import candidates, check, compare, pick
from tightrope.methods.binas.contributions import drawn
from tightrope.methods.binas.counts import counts
from tightrope.methods.binas.estimators import agreement
from tightrope.methods.binas.method import FORMULAS, SOLVERS, BinasMethod
from tightrope.methods.binas.objective import Contributions, Formula, problem
from tightrope.methods.binas.paths import same_path
from tightrope.methods.binas.regression import encode, pooled, regression
from tightrope.methods.binas.space import PRESETS
from tightrope.report import explain

SPACE = PRESETS["fashion"]
LIMIT = sum(counts(SPACE, c)["macs"] for c in (SPACE.smallest(), SPACE.largest())) / 2


def truth() -> Formula:
    """In points. Depth helps more in later stages, width only in the first block of each."""
    depths = tuple(np.array([-1.0, 0, 1]) * (s + 1) for s in range(3))
    wide = np.array([o.expansion == 6 for o in SPACE.options], dtype=float)
    blocks = tuple(np.stack([2 * wide, 0 * wide, 0 * wide]) for _ in range(3))
    return Formula(75.0, depths, blocks)


def measured(count: int, images: int, seed: int) -> Accuracies:
    generator = np.random.default_rng(seed)
    choices = tuple(SPACE.random(generator) for _ in range(count))
    share = truth().predict(SPACE, choices) / 100
    return Accuracies(choices, generator.random((count, images)) < share[:, None])


def contributions(error: float = 0.1) -> tuple[Contributions, Contributions]:
    """What the truth makes of every decision, the others random."""
    gain = truth()
    average = 75 + sum(float(b[0].mean()) for b in gain.block)
    depth = tuple(average + d for d in gain.depth)
    block = []
    for s, b in enumerate(gain.block):
        # a block is measured at the least depth that has it
        at = np.array([0.0, *gain.depth[s][1:]])[:, None]
        block.append(average + at + b - np.array([b[0].mean(), 0, 0])[:, None])
    means = Contributions(average, depth, tuple(block))
    errors = [tuple(np.full_like(a, error) for a in part) for part in (depth, block)]
    return means, Contributions(error, errors[0], errors[1])


def test_each_estimator_is_compared_on_the_same_networks():
    found = compare(
        SPACE, contributions()[0], truth(), truth(), 1000, measured(60, 400, 1), measured(40, 2000, 2)
    )
    assert [c.estimator.name for c in found] == [*FORMULAS, "quadratic", "mlp"]
    assert [c.images for c in found] == [1000] * 3 + [25_000] + [24_000] * 4
    by_name = {c.estimator.name: c.agreement for c in found}
    assert by_name["conditional"].spearman > 0.85
    assert by_name["conditional"].mse < by_name["released"].mse  # which counts depth twice
    formulas = {c.estimator.name: c.estimator.formula for c in found}
    best = next(name for name in FORMULAS if formulas[name] is pick(BinasMethod(), found))
    assert by_name[best].spearman == max(by_name[name].spearman for name in FORMULAS)
    assert pick(BinasMethod(solver="iqcp"), found) is formulas["bilinear"]
    assert pick(BinasMethod(estimator="released"), found) is formulas["released"]


def test_a_regression_on_single_evaluations_finds_what_they_were_drawn_from():
    gain, passes, images = truth(), 20, 3000
    generator = np.random.default_rng(0)
    easy = generator.uniform(-5, 5, images)  # of an image, whatever the network
    paths = [drawn(SPACE, images, 0, k) for k in range(passes)]
    weights = np.concatenate([*(b.ravel() for b in gain.block), *gain.depth])
    share = [(75 + easy + encode(SPACE, path) @ weights) / 100 for path in paths]
    table = generator.random((passes, images)) < np.stack(share)
    found = regression(SPACE, table, paths)
    choices = [SPACE.random(generator) for _ in range(200)]
    same = agreement(found.predict(SPACE, choices), gain.predict(SPACE, choices))
    assert same.spearman > 0.9 and same.mse < 1.5
    # with networks on a tenth of the images, of as many evaluations again, it is nearer
    networks = tuple(SPACE.random(generator) for _ in range(10 * passes))
    shares = (gain.predict(SPACE, networks)[:, None] + easy[: images // 10]) / 100
    both = pooled(SPACE, table, paths, Accuracies(networks, generator.random(shares.shape) < shares))
    nearer = agreement(both.predict(SPACE, choices), gain.predict(SPACE, choices))
    assert nearer.spearman > same.spearman and nearer.mse < 0.8 * same.mse
    assert encode(SPACE, same_path(SPACE, choices[0], 2))[1] @ weights + 75 == pytest.approx(
        gain.predict(SPACE, choices[:1])[0]
    )


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_gives_candidates_within_the_limit(solver):
    staged = problem(SPACE, truth(), {"macs": LIMIT})
    found = candidates(BinasMethod(solver=solver, candidates=3), staged)
    assert len({a.choice for a in found}) == 3
    assert all(staged.fits(a.choice) for a in found)
    best = candidates(BinasMethod(candidates=1), staged)[0]
    assert found[0].gain <= best.gain + 1e-9
    if solver not in ("bcfw", "evo"):
        assert found[0].gain == pytest.approx(best.gain)
        assert [a.gain for a in found] == sorted((a.gain for a in found), reverse=True)


def test_limits_are_checked_before_there_is_an_estimator():
    check(SPACE, BinasMethod(), {"macs": LIMIT}, {})
    with pytest.raises(BudgetError, match="or more"):
        check(SPACE, BinasMethod(), {"macs": 1.0}, {})
    with pytest.raises(BudgetError, match="--solver milp"):
        check(SPACE, BinasMethod(), {"macs": LIMIT, "weights": 1e6}, {})
    check(SPACE, BinasMethod(solver="milp"), {"macs": LIMIT, "weights": 1e6}, {})


def test_the_page_says_where_depth_and_width_help():
    means, errors = contributions()
    gains = {(what, stage): value for what, stage, value in explain.claims(SPACE, means, errors)}
    for stage in (1, 2, 3):
        assert gains["depth", str(stage)][0] == pytest.approx(2 * stage)
        assert gains["width of the first block", str(stage)] == pytest.approx((2.0, 0.1 * (2 / 4) ** 0.5))
        assert gains["width of the others, mean", str(stage)][0] == pytest.approx(0)
    page = explain.render(SPACE, means, errors, [])
    assert page.count('<svg class="chart"') == 2 + 3
    assert "stage 3, 3 blocks: +3.000 ± 0.196 points" in page
    assert "Stage 3, block by block" in page and "<script" not in page
