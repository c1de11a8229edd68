"""What every method promises: one suite over the table of methods. A new one adds a line to SMALL."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save

from networks import Images, TinyResNet, plan_for, settle
from tightrope.decisions import decisions
from tightrope.errors import BudgetError, BundleError, InputError
from tightrope.lower import lower
from tightrope.methods import METHODS, Curve, Tiles, method_type
from tightrope.place import model_sha256
from tightrope.rewrite import apply
from tightrope.runtimes.plain import Plain
from tightrope.solve.select import price, select
from tightrope.types import Budget, Plan, Problem

# a configuration that measures in a second, and two budgets it can meet on the small network
SMALL: dict[str, tuple[dict[str, Any], str, str]] = {
    "block_relu": ({"samples": 16, "batch_size": 8, "verify": 0}, "drelus<=30%", "drelus<=600"),
    "paf": (
        {"samples": 16, "batch_size": 8, "polynomials": "degree *;f1 g2"},
        "ckks_levels<=17",
        "ckks_levels<=80%",
    ),
}


MEASURING = [name for name in METHODS if hasattr(method_type(name), "measure")]


@pytest.fixture(scope="module", params=MEASURING)
def found(request, trained) -> tuple[Any, TinyResNet, Images, Problem, Plan]:
    """(method, network, images, problem, plan)."""
    config, budget, _ = SMALL[request.param]
    net, data = trained
    method = method_type(request.param)(**config)
    return method, net, data, *plan_for(method, net, data, budget)


def test_every_method_is_here():
    assert SMALL.keys() == set(MEASURING)
    assert all(hasattr(method_type(name), "learn") for name in METHODS.keys() - SMALL.keys())
    with pytest.raises(InputError, match=r"unknown method(.|\n)*block_rel(.|\n)*block_relu"):
        method_type("block_rel")


def test_the_configuration_is_the_method(found):
    method, *_, plan = found
    again = method_type(plan.method)(**json.loads(json.dumps(plan.config)))
    assert again == method
    assert method.name == plan.method
    with pytest.raises(AttributeError):
        method.seed = 5  # frozen
    assert asdict(method) == dict(plan.config)


def test_the_plan_is_json_and_applies_to_an_equal_network(found, tmp_path):
    _, net, data, _, plan = found
    again = Plan.from_json(plan.to_json(), tmp_path / "plan.json")
    a, b = apply(net, plan), apply(net, again)
    x = data.x[:4]
    with torch.no_grad():
        assert torch.equal(a(x), b(x))
        assert a(x).shape == net(x).shape
        assert not torch.equal(a(x), net(x))


def test_the_callers_network_is_not_changed(found):
    method, _, data, _, plan = found
    net = settle(TinyResNet(channels=1, classes=10, width=6)).train()
    before = model_sha256(net), [(n, id(m), m.training) for n, m in net.named_modules()]
    _, own = plan_for(method, net, data, plan.budget)
    rewritten = apply(net, own)
    with torch.no_grad():
        for p in rewritten.parameters():
            p.zero_()
    assert (model_sha256(net), [(n, id(m), m.training) for n, m in net.named_modules()]) == before
    assert not any(m._forward_hooks for m in net.modules())


def test_the_budget_is_met_and_the_prediction_is_what_runs(found):
    _, net, data, problem, plan = found
    for metric, limit in Budget.parse(plan.budget).resolve(problem.baseline).items():
        assert getattr(plan.predicted, metric) <= limit
    assert plan.bound <= plan.loss
    with Plain().open(lower(apply(net, plan), plan.input_shape)) as session:
        _, measured = session.run(data.x[:3].numpy())
    assert measured.total.drelus == 3 * plan.predicted.drelus
    assert measured.total.macs == 3 * plan.predicted.macs
    assert measured.total.weights == plan.predicted.weights
    if problem.path:
        assert measured.total.ckks_levels == plan.predicted.ckks_levels


def test_the_lowered_network_equals_the_rewritten_one(found):
    _, net, data, _, plan = found
    rewritten = apply(net, plan)
    outputs, _ = Plain().open(lower(rewritten, plan.input_shape)).run(data.x[:8].numpy())
    with torch.no_grad():
        expected = rewritten.double()(data.x[:8].double()).numpy()
    np.testing.assert_allclose(outputs, expected, atol=1e-4)


def test_training_changes_weights_and_keeps_the_plan(found):
    """One step of an optimiser; then a strict reload into a network rebuilt from the plan."""
    _, net, data, _, plan = found
    model = apply(net, plan).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(data.x[:32]), data.y[:32]).backward()
    optimiser.step()
    after = model.eval().state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert {name for name, _ in model.named_parameters()} <= changed
    again = apply(net, plan)
    again.load_state_dict(load(save(dict(after))), strict=True)
    with torch.no_grad():
        assert torch.equal(again(data.x[:8]), model(data.x[:8]))
    _, measured = Plain().open(lower(again, plan.input_shape)).run(data.x[:1].numpy())
    assert measured.total.drelus == plan.predicted.drelus


def test_the_saved_problem_solves_for_another_budget_without_the_network(found, tmp_path):
    method, net, data, problem, plan = found
    problem.save(tmp_path / "problem.npz")
    loaded = Problem.load(tmp_path / "problem.npz")
    assert method.choices(loaded, select(loaded, Budget.parse(plan.budget)).picked) == plan.choices
    other = select(loaded, Budget.parse(SMALL[method.name][2]))
    choices = json.loads(json.dumps(method.choices(loaded, other.picked)))
    rewritten = apply(net, replace(plan, choices=choices))
    _, measured = Plain().open(lower(rewritten, plan.input_shape)).run(data.x[:1].numpy())
    assert measured.total.drelus == other.cost.drelus
    if problem.path:
        assert measured.total.ckks_levels == other.cost.ckks_levels


def test_controls_are_plans_too(found):
    method, net, data, problem, plan = found
    budget = Budget.parse(plan.budget)
    limits = budget.resolve(problem.baseline)
    for name, picked in method.controls(problem, budget).items():
        cost = price(problem, picked).cost
        assert all(getattr(cost, metric) <= limit for metric, limit in limits.items()), name
        control = apply(net, replace(plan, choices=method.choices(problem, picked)))
        _, measured = Plain().open(lower(control, plan.input_shape)).run(data.x[:1].numpy())
        assert measured.total.drelus == cost.drelus, name
        if problem.path:
            assert measured.total.ckks_levels == cost.ckks_levels, name


def test_an_option_has_a_label_and_a_picture(found):
    method, *_, problem, plan = found
    for table in problem.tables:
        labels = method.options(plan.choices[table.site])
        assert len(labels) == len(table.loss)
        assert set(labels) <= set(table.labels)
        for label in table.labels:
            assert isinstance(method.picture(problem, table.site, label), Tiles | Curve)
    assert method.noun


def test_decisions_are_those_of_the_plan(found):
    *_, problem, plan = found
    made = decisions(plan, problem)
    assert [d.name for d in made] == [t.site for t in problem.tables]
    site = problem.tables[0].site
    other = replace(plan, choices={**plan.choices, site: {"replace": "nothing"}})
    cheaper = replace(plan, predicted=replace(plan.predicted, drelus=plan.predicted.drelus + 1))
    without = replace(plan, choices={k: v for k, v in plan.choices.items() if k != site})
    for changed in (other, cheaper, without):
        with pytest.raises(BundleError, match="do not belong together"):
            decisions(changed, problem)


def test_measuring_twice_gives_the_same(found):
    method, net, data, problem, plan = found
    again, _ = plan_for(method, net, data, plan.budget)
    assert [t.loss.tobytes() for t in again.tables] == [t.loss.tobytes() for t in problem.tables]
    assert json.loads(json.dumps(problem.meta)) == problem.meta  # survives the file


def test_a_budget_in_what_the_method_does_not_price_is_refused(found):
    method, *_, problem, _ = found
    for choose in (select, method.controls):
        with pytest.raises(BudgetError):
            choose(problem, Budget.parse("rounds<=5"))
