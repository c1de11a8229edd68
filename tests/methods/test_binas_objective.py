"""The bilinear accuracy formula and counted budgets, from the space to a checked optimum."""

from __future__ import annotations

import numpy as np
import pytest

from tightrope.errors import BudgetError, InputError
from tightrope.methods.binas.counts import counts
from tightrope.methods.binas.objective import Contributions, staged
from tightrope.methods.binas.space import PRESETS
from tightrope.solve import pareto, staged_milp

SPACE = PRESETS["fashion"]


def contributions(seed: int = 0) -> Contributions:
    generator = np.random.default_rng(seed)
    return Contributions(
        80.0,
        tuple(80 + np.sort(generator.normal(0, 1, 3)) for _ in SPACE.stages),
        tuple(80 + generator.normal(0, 0.3, (3, 12)) for _ in SPACE.stages),
    )


def test_the_released_formula_term_by_term():
    c = contributions()
    choice = ((3,), (0, 11), (5, 6, 7))
    wanted = 80.0
    for s, options in enumerate(choice):
        wanted += (
            c.depth[s][len(options) - 1] - 80 + sum(c.block[s][b, k] - 80 for b, k in enumerate(options))
        )
    assert staged(SPACE, c, {"macs": 1e9}).gain(choice) == pytest.approx(wanted)


def test_the_conditional_variant_leaves_depth_to_its_own_term():
    """Blocks after the first then add nothing on average over their options."""
    problem = staged(SPACE, contributions(), {"macs": 1e9}, conditional=True)
    for stage in problem.stages:
        assert stage.gain[1:].mean(1) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_costs_are_the_counts_and_both_solvers_agree(seed):
    small, large = counts(SPACE, SPACE.smallest()), counts(SPACE, SPACE.largest())
    limit = (small["macs"] + large["macs"]) / 3
    problem = staged(SPACE, contributions(seed), {"macs": limit})
    best, other = pareto.frontier(problem).best(limit), staged_milp.solve(problem)
    assert best.gain == pytest.approx(other.gain, abs=1e-9)
    assert counts(SPACE, best.choice)["macs"] == best.cost["macs"] <= limit
    assert SPACE.choice(SPACE.architecture(best.choice)) == best.choice


def test_several_budgets_and_a_measured_price():
    prices = {(s, b): np.linspace(0.1, 0.4, 12) for s, b, _, _ in SPACE.places()}
    most = counts(SPACE, SPACE.largest())
    limits = {"macs": most["macs"] / 2, "weights": most["weights"] / 2, "latency_ms": 2.0}
    found = staged_milp.solve(staged(SPACE, contributions(), limits, priced={"latency_ms": (0.5, prices)}))
    counted = counts(SPACE, found.choice)
    assert all(found.cost[m] <= limit for m, limit in limits.items())
    assert {m: found.cost[m] for m in counted} == counted


def test_wrong_metrics_and_foreign_contributions_are_refused():
    with pytest.raises(BudgetError, match="macs"):
        staged(SPACE, contributions(), {"mcs": 1})
    with pytest.raises(InputError, match="another space"):
        staged(PRESETS["cifar"], contributions(), {"macs": 1})
    with pytest.raises(BudgetError, match="or more"):
        staged_milp.solve(staged(SPACE, contributions(), {"macs": 10}))
