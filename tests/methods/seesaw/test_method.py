"""The whole method on small images: budgets, resuming, both modes, bad input, and the way through."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from commands import call, refused
from methods.seesaw.small import DATA, GRAPH, QUICK, SHAPE, learn
from networks import gap
from tightrope.errors import BudgetError, BundleError, InputError
from tightrope.lower import lower
from tightrope.methods import configure, parse_settings
from tightrope.methods.seesaw import SeesawMethod, relu_map
from tightrope.methods.seesaw.space import Architecture
from tightrope.program import base_cost
from tightrope.runtimes.mpc import MPC
from tightrope.runtimes.plain import Plain, ranges
from tightrope.types import Cost, total

COST = MPC().pricing()
METHOD = SeesawMethod(**QUICK)


def untrained(what, done, of):
    raise AssertionError(f"{what} before the budget was refused")


@pytest.fixture(scope="module")
def found():
    return learn("drelus<=700", epochs=4, recovery=3)


def test_the_budget_holds_and_the_prediction_is_what_runs(found):
    model = METHOD.rebuild(GRAPH, json.loads(json.dumps(found.choices)), found.tensors)
    merged = METHOD.finish(model, SHAPE, COST)
    program = lower(merged, SHAPE)
    x, _ = next(DATA.batches("validation", 16))
    assert gap(model, program, x) < 1e-4
    counted = total(base_cost(op) for op in program.ops)
    assert (counted.drelus, counted.macs) == (found.predicted.drelus, found.predicted.macs)
    assert counted.drelus <= 700
    assert found.predicted.online_ms > 0 == found.predicted.rounds
    with MPC(noise_bits=0).open(ranges(program, [x]), "simulate") as session:
        outputs, measured = session.run(x[:2].numpy())
    assert measured.total.drelus == 2 * found.predicted.drelus
    with torch.no_grad():
        assert float((torch.from_numpy(outputs) - model.double()(x[:2].double())).abs().max()) < 2**-6


def test_what_is_found_works(found):
    """Three patterns, a third each by guessing."""
    assert found.accuracy > 0.6
    assert found.loss == 1 - found.accuracy
    assert found.baseline.drelus == 1024


def test_an_interrupted_search_goes_on_and_finds_the_same(tmp_path):
    whole = learn(operators="skip,conv_3")

    def stop(what, done, of):
        if done == of - 1:  # in the last epoch
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(operators="skip,conv_3", workdir=tmp_path, progress=stop)
    again = learn(operators="skip,conv_3", workdir=tmp_path)
    assert again.choices == whole.choices
    assert all(torch.equal(again.tensors[k], v) for k, v in whole.tensors.items())
    with pytest.raises(BundleError, match="another run"):
        learn(operators="skip,conv_3", workdir=tmp_path, lr=0.01)


@pytest.mark.parametrize(
    ("metric", "share"),
    [("offline_bytes", 0.5), ("online_bytes", 1.0), ("online_ms", 1.2), ("offline_ms", 0.9)],
)
def test_budgets_in_bytes_and_milliseconds(metric, share):
    """Here prices do not add up: the whole program counts."""
    found = learn(f"{metric}<={share}x,macs<=2x", operators="skip,conv_3", epochs=1, recovery=0)
    assert 0 < getattr(found.predicted, metric) <= share * getattr(found.baseline, metric)
    assert found.predicted.macs <= 2 * found.baseline.macs


def test_reference_mode_with_the_published_aggregates(tmp_path):
    reference = {"mode": "reference", "aggregates": "published", "borders": "published", "epochs": 1}
    found = learn("drelus<=100000", **reference)
    assert found.choices["aggregate1"] == {"pool": "max", "relu": True}
    relu_map.write(tmp_path / "map.json", [True, True])
    with pytest.raises(BudgetError, match="drelus<=1,280 or more: what the ReLU map"):
        learn("drelus<=600", relu_map=str(tmp_path / "map.json"), **reference)
    reference["aggregates"], seen = "searched", []
    with pytest.raises(BudgetError, match=r"drelus<=100\n(.|\n)*[0-9]{3} drelus, which were reached"):
        learn(
            "drelus<=100",
            progress=lambda what, *_: seen.append(what),
            **reference | {"aggregates": "searched"},
        )
    assert set(seen) == {"steps of the supernet"}  # and no recovery of what is refused


def test_a_relu_map_fixes_the_blocks(tmp_path):
    path = tmp_path / "map.json"
    relu_map.write(path, [False, True])
    found = learn("drelus<=100%", relu_map=str(path), epochs=1)
    assert [found.choices[f"block{k}"]["relu"] for k in (1, 2)] == [False, True]
    with pytest.raises(BudgetError, match="drelus<=256 or more: what the ReLU map"):
        learn("drelus<=200", relu_map=str(path), progress=untrained)
    assert learn("drelus<=256", relu_map=str(path), epochs=1, recovery=0).predicted.drelus == 256
    relu_map.write(path, [True])
    with pytest.raises(InputError, match="another network"):
        learn(relu_map=str(path))


def test_options_of_training():
    """Mixed precision, a teacher, the variance phase, the release's rates: they run and give a network."""
    found = learn(
        precision="bf16-mixed",
        distill=0.9,
        variance=1e-4,
        rates="published",
        balance=0.529,
        epochs=1,
        branches=0,
    )
    assert found.predicted.drelus <= 700


@pytest.mark.parametrize(
    ("budget", "config", "says"),
    [
        ("drelus<=10", {"aggregates": "published"}, r"512(.|\n)*aggregates=searched"),
        ("rounds<=10", {}, "takes one limit"),
        ("drelus<=10,online_ms<=5", {}, "takes one limit"),
        ("macs<=1e6", {}, "takes one limit"),
        ("drelus<=500,macs<=1000", {}, r"macs<=1,000\n(.|\n)*macs<=4,144 or more(.|\n)*larger limit on macs"),
        ("drelus<=500,macs<=4143", {}, "macs<=4,144 or more"),
        ("online_ms<=0.001", {}, "no network of the space"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(budget, config, says):
    with pytest.raises(BudgetError, match=says):
        learn(budget, progress=untrained, **config)


def test_a_cost_that_the_runtime_does_not_state_is_refused():
    with pytest.raises(BudgetError, match=r"a ReLU costs no online_ms(.|\n)*allowed: drelus\n"):
        learn("online_ms<=5", cost=Plain(), progress=untrained)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"operators": "conv_9"}, "unknown operator"),
        ({"space": "cifarsupermodel51"}, "unknown search space"),
        ({"space": "1,1,1,1,1,1"}, "divisible by"),
        ({"mode": "fast"}, "unknown choice for mode"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": 1e9}, "diverged"),
        ({"operators": "group_8_conv_3", "width": 3}, "multiple of 8"),
        ({"relu_map": "nothing.json"}, "cannot read the ReLU map"),
    ],
)
def test_settings_that_cannot_be_are_refused(config, says):
    with pytest.raises(InputError, match=says):
        learn(**config)


def test_a_plan_that_was_changed_is_refused(found):
    other = {**found.choices, "block1": {"operators": ["conv_1"], "relu": True}}
    with pytest.raises(BundleError, match="do not belong together"):
        METHOD.rebuild(GRAPH, other, found.tensors)
    with pytest.raises(BundleError, match="no network of its space"):
        METHOD.rebuild(GRAPH, {}, found.tensors)


def test_the_configuration_comes_back_from_json(found):
    method = configure("seesaw", json.loads(json.dumps(dict(QUICK))))
    assert method == METHOD
    space = method.space_for(SHAPE, 3)
    assert Architecture.from_json(found.choices, space).to_json() == found.choices
    assert isinstance(replace(found.predicted), Cost)


def test_a_width_needs_to_suit_the_chosen_operators_only():
    narrow = configure("seesaw", {"width": 2, "operators": "skip,conv_3"})
    assert narrow.space_for(SHAPE, 3).shape(0)[0] == 4
    with pytest.raises(InputError, match="multiple of 8 channels"):
        configure("seesaw", {"width": 2, "operators": "all"}).space_for(SHAPE, 3)


@pytest.mark.slow
def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    """Search, fine-tune, run in the clear and under mpc, report."""
    out = tmp_path / "bundle"
    small = ("space=1,1", "width=4", "operators=skip,conv_3", "epochs=4", "limit=512", "branches=1",
             "keep=1", "samples=64")  # fmt: skip
    words = [word for setting in small for word in ("--set", setting)]
    search = ("search", "--method", "seesaw", "--budget", "drelus<=10%", "--out", out, *words)
    refused(monkeypatch, capsys, *search, "--set", "width=0", says="width must be positive")
    assert not out.exists()
    assert call(monkeypatch, *search, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert 0 < plan["predicted"]["drelus"] <= 3763
    assert call(monkeypatch, "finetune", out, "--epochs", "0.02", "--json") == 0
    assert call(monkeypatch, "run", out, "--count", "2", "--json") == 0
    capsys.readouterr()
    measured = json.loads((out / "measurements.json").read_text())[-1]
    assert measured["runtime"] == "mpc"
    assert measured["total"].get("drelus", 0) == 2 * plan["predicted"].get("drelus", 0)
    assert measured["max_abs_error"] < 2**-6
    assert call(monkeypatch, "report", out) == 0
    page, card = (out / "report.html").read_text(), (out / "README.md").read_text()
    assert "aggregate1" in page
    for text in (page, card):
        assert "Every count equals its prediction: DReLUs, online bytes, offline bytes, rounds." in text
        assert f"tightrope run {out} --runtime mpc" in text
    assert "- `plan.safetensors`" in card


def test_the_balance_may_be_left_out():
    given = parse_settings(["balance=null"], SeesawMethod)
    assert configure("seesaw", given).balance is None
    with pytest.raises(InputError, match="keep of seesaw is of another kind"):
        configure("seesaw", parse_settings(["keep=null"], SeesawMethod))


def test_a_space_of_one_stage_may_be_a_plain_number():
    given = parse_settings(["space=2", "limit=64", "mode=dual"], SeesawMethod)
    assert given == {"space": "2", "limit": 64, "mode": "dual"}
    found = learn("drelus<=600", **given, operators="skip,conv_1", epochs=1)
    assert set(found.choices) == {"block1", "block2"} and found.predicted.drelus <= 600
