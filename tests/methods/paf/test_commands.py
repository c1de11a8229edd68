"""The method from the command line: search, apply, run, curve, solve and the report."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from commands import call, refused
from tightrope.bundle import Bundle, _save_weights
from tightrope.choose import WHO
from tightrope.methods.paf import method
from tightrope.place import tensors_sha256
from tightrope.types import METRICS

FEW = ("--samples", "32", "--set", "polynomials=degree *;f1 g2", "--runtime", "plain")


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("paf") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        made = call(patch, "search", "--method", "paf", "--budget", "ckks_levels<=18", "--out", out, *FEW)
        assert made == 0
        assert call(patch, "apply", out) == 0
    return out


def test_the_plan_is_within_the_budget_and_runs(chosen, tmp_path, monkeypatch, capsys):
    bundle = Bundle.open(chosen)
    plan, program = bundle.plan(), bundle.program()
    assert plan.predicted.ckks_levels <= 18 and plan.gap == 0
    accuracies, beyond = plan.notes
    assert "static scales (SS)" in accuracies and "of each batch of 64 (DS)" in accuracies
    assert " inputs of polynomials lie" in beyond and "static scale there" in beyond
    assert {op.kind for op in program.ops} >= {"polynomial"} and "relu" not in {op.kind for op in program.ops}
    capsys.readouterr()
    assert call(monkeypatch, "run", chosen, "--runtime", "plain", "--count", "2", "--json") == 0
    spent = json.loads(capsys.readouterr().out)["measurement"]["total"]
    assert spent["ckks_levels"] == plan.predicted.ckks_levels
    assert call(monkeypatch, "solve", chosen, "--budget", "ckks_levels<=40%", "--out", tmp_path / "b") == 0
    assert "distinct polynomials" in capsys.readouterr().out
    again = Bundle.open(tmp_path / "b").plan()
    assert again.predicted.ckks_levels <= 0.4 * plan.baseline.ckks_levels


def test_coefficients_come_back_in_float64_and_those_of_an_earlier_bundle_as_they_were(chosen, tmp_path):
    shutil.copytree(chosen, tmp_path / "b")
    bundle = Bundle.open(tmp_path / "b")
    choices, model = bundle.plan().choices, bundle.model()
    stages = {f"{site}.stages.{k}": s for site, c in choices.items() for k, s in enumerate(c["stages"])}
    found = model.state_dict()
    assert stages and all(found[name].tolist() == stage for name, stage in stages.items())
    last = next(reversed(choices))
    scale = float(model.get_submodule(last).scale)
    first = [c * scale**-k for k, c in enumerate(choices[last]["stages"][0])]
    assert bundle.program().tensors[f"{last}.stage0"].tolist() == pytest.approx(first, rel=1e-14, abs=0)
    rounded = {name: t.float() if name in stages else t for name, t in found.items()}
    model.load_state_dict(rounded)
    _save_weights(bundle.path / "model.safetensors", model)
    assert tensors_sha256(bundle.model().state_dict()) == tensors_sha256(rounded) != tensors_sha256(found)


def test_the_report_draws_every_polynomial(chosen, monkeypatch, capsys):
    assert call(monkeypatch, "curve", chosen, "--points", "2", "--limit", "50", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["curve"]
    assert {"tightrope", "uniform", "random", "degree 1"} <= set().union(*(row["accuracy"] for row in rows))
    assert all(set(row["cost"]) == set(row["uniform"]) == {"ckks_levels"} for row in rows[:1])
    assert call(monkeypatch, "report", chosen) == 0
    page = (chosen / "report.html").read_text()
    bundle = Bundle.open(chosen)
    assert page.count('class="map plot"') == len(bundle.problem().tables)
    text = re.sub("<style>.*?</style>", "", page, flags=re.DOTALL)
    assert "CKKS levels used per layer" in text and "patch" not in text
    assert "--method paf" in page and "polynomials=degree" in page
    assert "CKKS levels used" in (chosen / "README.md").read_text()


def test_polynomials_learn_in_turns(chosen, tmp_path, monkeypatch, capsys):
    bundle = Bundle.open(shutil.copytree(chosen, tmp_path / "turns"))
    before = bundle.program().sha256()
    given = (
        "finetune",
        bundle.path,
        "--schedule",
        "progressive",
        "--epochs",
        "0.1",
        "--scales",
        "dynamic",
        "--json",
    )
    assert call(monkeypatch, *given) == 0
    records = [json.loads(line) for line in (bundle.path / "log.jsonl").read_text().splitlines()]
    turns = range(1, len(bundle.problem().tables) + 1)
    assert [(r["turn"], r["learns"]) for r in records] == [(turn, "both") for turn in turns]
    assert bundle.accuracy()["recipe"]["schedule"] == "progressive"
    assert bundle.accuracy()["recipe"]["scales"] == "dynamic"
    assert bundle.program().sha256() != before
    assert call(monkeypatch, "report", bundle.path) == 0
    assert "--schedule progressive" in (bundle.path / "report.html").read_text()
    refused(monkeypatch, capsys, "finetune", bundle.path, "--schedule", "backwards", says="no such schedule")
    refused(monkeypatch, capsys, "finetune", bundle.path, "--scales", "some", says="static, ema, dynamic")


def test_a_budget_below_the_cheapest_polynomials_says_what_is_possible(tmp_path, monkeypatch, capsys):
    args = ("search", "--method", "paf", "--out", tmp_path / "b", *FEW)
    refused(monkeypatch, capsys, *args, "--budget", "ckks_levels<=6", says="ckks_levels<=7 or more")
    refused(monkeypatch, capsys, *args, "--budget", "rounds<=3", says="no option is priced")
    assert not (tmp_path / "b" / "plan.json").exists()


@pytest.mark.parametrize(
    ("args", "budget", "known", "remedy"),
    [
        (("--method", "paf"), "drelus<=0", "ckks_levels", "--method block_relu"),
        (("--method", "paf"), "online_bytes<=50%", "ckks_levels", "--runtime mpc"),
        (("--method", "paf"), "macs<=50%", "ckks_levels", "--method reengineer"),
        (
            ("--method", "paf"),
            "rounds<=30",
            "ckks_levels",
            "no method limits rounds, but times have them: "
            "--budget 'online_ms<=VALUE' --runtime mpc --network wan",
        ),
        (
            ("--method", "paf", "--runtime", "mpc"),
            "ckks_levels<=9",
            "offline_bytes, offline_ms, online_bytes, online_ms",
            "--method paf --runtime ckks",
        ),
        (
            ("--method", "block_relu"),
            "ckks_levels<=9",
            "drelus, offline_bytes, offline_ms, online_bytes, online_ms",
            "--method paf --runtime ckks",
        ),
    ],
)
def test_a_budget_in_another_quantity_is_refused_at_once(
    args, budget, known, remedy, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(method, "histograms", None)  # the first work
    says = f"allowed: {known}\n  try:     {remedy}\n"
    refused(monkeypatch, capsys, "search", *args, "--budget", budget, "--out", tmp_path / "b", says=says)
    assert not (tmp_path / "b" / "plan.json").exists()


def test_every_quantity_has_a_remedy():
    assert set(WHO) == set(METRICS)


def test_levels_can_be_limited_where_only_layers_spend_them(tmp_path, monkeypatch, capsys):
    args = ("--method", "paf", "--samples", "32", "--set", "polynomials=degree 1", "--out", tmp_path / "b")
    assert call(monkeypatch, "search", *args, "--budget", "ckks_levels<=30") == 0
    assert "trial of static scales: 1000 of 1000" in capsys.readouterr().err
    plan = Bundle.open(tmp_path / "b").plan()
    assert 0 < plan.predicted.ckks_levels == plan.baseline.ckks_levels <= 30
    assert call(monkeypatch, "curve", tmp_path / "b", "--points", "1", "--limit", "20") == 0
