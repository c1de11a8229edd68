"""`tightrope binas`: the whole way on a small space, and everything that is refused before it starts."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from commands import call, refused
from tightrope import device as devices
from tightrope import nas
from tightrope.bundle import Bundle
from tightrope.errors import BundleError
from tightrope.methods.binas import latency, resolve
from tightrope.methods.binas.counts import counts
from tightrope.methods.binas.latency import LatencyTable, Timing
from tightrope.methods.binas.method import FORMULAS, BinasMethod
from tightrope.models.arch import Architecture

SMALL = """
input_shape = [1, 28, 28]
classes = 10
stem = 8
stride = 2
first = 8
last = 16
head = 16
expansions = [1, 2]
kernels = [3]
ses = [0, 0.25]
stages = [
  {channels = 8, stride = 2, depths = [1, 2], act = "re"},
  {channels = 16, stride = 2, depths = [1, 2]},
]
"""
QUICK = (
    "--data", "embedded", "--device", "cpu", "--clock", "cpu", "--heaviest-epochs", "0.15",
    "--elastic-epochs", "0.15", "--passes", "2", "--held-out", "12", "--epochs", "0.1",
)  # fmt: skip


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with the space, and a table of this machine whose times are the MACs in millions."""
    folder = tmp_path_factory.mktemp("nas")
    (folder / "small.toml").write_text(SMALL)
    space = resolve(str(folder / "small.toml"))
    table = of_macs(space)
    table.save(folder / "lut.json")
    return folder


def of_macs(space) -> LatencyTable:
    device = devices.open_device("cpu", 1)
    now = devices.conditions("cpu", device, threads=1, batch=1, clock="cpu")
    table = latency.empty(space, now, visits=1, fitted=8, held_out=4, seed=0)
    for k, key in enumerate(table.parts_ms):
        table = table.add(key, Timing(0.01 + 0.001 * k, 0.0, 5))
    for text, choice in zip(table.networks_ms, table.choices(space), strict=True):
        table = table.add(text, Timing(table.raw(space, choice), 0.0, 5))
    return table


def words(here, *more: str) -> tuple[str, ...]:
    return ("binas", "--space", here / "small.toml", "--work", here / "work", *QUICK, *more)


@pytest.mark.slow
def test_the_whole_way_and_a_second_budget(here, monkeypatch, capsys):
    space = resolve(str(here / "small.toml"))
    table = latency.load(here / "lut.json", space)
    most = table.predict(space, space.largest())
    limit = 0.7 * most
    lut = ("--lut", here / "lut.json")
    out = here / "first"
    assert (
        call(monkeypatch, *words(here, *lut, "-b", f"online_ms<={limit}", "--out", out, "--test", "--json"))
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    choice = space.choice(Architecture.parse(found["architecture"]))
    assert table.predict(space, choice) == pytest.approx(found["predicted"]["online_ms"])
    assert found["predicted"]["online_ms"] <= limit and found["gap"] <= 1e-6
    assert found["predicted"]["macs"] == counts(space, choice)["macs"]
    assert len(found["validation_inherited"]) == 10
    assert found["validation_inherited"][found["taken"]] == max(found["validation_inherited"])
    assert found["estimators"].keys() == {*FORMULAS, "quadratic", "mlp"}
    assert found["measured_ms"] > 0 and 0 <= found["test"] <= 1
    page = (here / "work" / "explain.html").read_text()
    assert "Stage 2, block by block" in page and "Spearman" in page

    bundle = Bundle.open(out)
    net = bundle.model()
    x = torch.randn(2, 1, 28, 28)
    assert net(x).shape == (2, 10)
    assert sum(p.numel() for p in net.parameters()) == counts(space, choice)["weights"]
    kept = bundle.rewritten().state_dict()
    for name, tensor in bundle.learned(bundle.plan()).items():
        assert torch.equal(kept[name], tensor)
    assert call(monkeypatch, "run", out, "--runtime", "plain", "--count", "2", "--json") == 0
    capsys.readouterr()
    assert call(monkeypatch, "report", out) == 0
    assert "Estimators of accuracy" in (out / "report.html").read_text()
    capsys.readouterr()

    # a second budget, of two quantities: nothing is trained again but the network that is found
    second = ("-b", "macs<=80%,weights<=90%", "--solver", "milp", "--epochs", "0", "--candidates", "2")
    assert call(monkeypatch, *words(here, *second, "--out", here / "second")) == 0
    said = capsys.readouterr().out
    assert "elastic" not in said and "gap" in said
    plan = Bundle.open(here / "second").plan()
    assert plan.predicted.macs <= 0.8 * plan.baseline.macs
    assert plan.predicted.weights <= 0.9 * plan.baseline.weights
    assert Bundle.open(here / "second").program().ops  # to be run, though nothing was fine-tuned

    # interrupted after an epoch of fine-tuning, the same command goes on; other ones would lose that
    third = words(here, *lut, "-b", "online_ms<=80%", "--epochs", "2", "--out", here / "third")
    with monkeypatch.context() as patch:
        patch.setattr(Bundle, "log", interrupted)
        assert call(monkeypatch, *third) == 130
    plan = (here / "third" / "plan.json").stat().st_mtime_ns
    capsys.readouterr()
    refused(monkeypatch, capsys, *third, "--seed", "1", says="would be lost")
    assert call(monkeypatch, *third) == 0
    assert (here / "third" / "plan.json").stat().st_mtime_ns == plan
    logged = (here / "third" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in logged] == [2]
    bundle = Bundle.open(here / "third")
    (name,) = (n for n in bundle.record()["controls"] if "random" in n)
    assert name.startswith("random networks within the limits, ") and not name.endswith(" 12")  # of all
    capsys.readouterr()
    refused(monkeypatch, capsys, *third, says="would be lost")


def interrupted(*_, **__):
    raise KeyboardInterrupt


def test_a_time_above_the_limit_is_said():
    table = SimpleNamespace(conditions="here")
    best = SimpleNamespace(gap=0.0)
    assert "above the limit of 1," in nas._notes(BinasMethod(), best, table, 1.5, 1.0)[-1]
    assert "above" not in nas._notes(BinasMethod(), best, table, 0.9, 1.0)[-1]


def test_limits_are_refused_before_any_training(here, monkeypatch, capsys):
    space = resolve(str(here / "small.toml"))
    least = counts(space, space.smallest())["macs"]
    tried = words(here, "--out", here / "none", "--work", here / "nowhere")
    refused(monkeypatch, capsys, *tried, "-b", "macs<=10", says=f"macs<={least:.0f} or more")
    both = (*tried, "-b", f"macs<={least},weights<=10%", "--solver", "milp")
    refused(monkeypatch, capsys, *both, says="weights<=")
    refused(monkeypatch, capsys, *tried, "-b", "macs<=90%,weights<=90%", says="pareto is for one limit")
    refused(monkeypatch, capsys, *tried, "-b", "drelus<=90%", says="binas limits other quantities")
    assert not (here / "nowhere" / "oneshot").exists() and not (here / "none").exists()


def test_tables_of_elsewhere_are_refused_with_both_named(here, monkeypatch, capsys, tmp_path):
    tried = words(here, "--out", here / "none", "-b", "online_ms<=90%", "--lut")
    space = resolve(str(here / "small.toml"))
    table = latency.load(here / "lut.json", space)
    moved = replace(table, conditions=replace(table.conditions, host={"processor": "abacus", "cores": 1}))
    moved.save(tmp_path / "moved.json")
    refused(monkeypatch, capsys, *tried, tmp_path / "moved.json", says="another device")
    other = replace(table, space="other", space_sha256="0" * 64)
    other.save(tmp_path / "other.json")
    refused(monkeypatch, capsys, *tried, tmp_path / "other.json", says="other 000000000000")
    refused(monkeypatch, capsys, *words(here, "-b", "macs<=90%", "--elsewhere"), says="--lut")
    path = tmp_path / "moved.json"
    found = nas.latency_table(space, nas.Target(table=path, elsewhere=True), tmp_path, lambda *_: None)
    assert found.conditions.host["processor"] == "abacus"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--solver", "cplex"), "unknown solver"),
        (("--estimator", "oracle"), "unknown estimator"),
        (("--solver", "iqcp", "--estimator", "released"), "bilinear predictor"),
        (("--passes", "1"), "passes is too small"),
        (("--norms", "none"), "unknown norms"),
        (("--clock", "sun"), "unknown clock"),
        (("--held-out", "100000"), "a smaller --held-out"),
        (("--space", "fashion", "--data", "nowhere"), "unknown data set"),
    ],
)
def test_wrong_settings_are_refused(here, monkeypatch, capsys, options, says):
    tried = words(here, "--out", here / "none", "-b", "macs<=90%", *options)
    refused(monkeypatch, capsys, *tried, says=says)


def test_search_says_where_to_find_it(here, monkeypatch, capsys):
    tried = ("search", "--method", "binas", "--budget", "macs<=50%", "--out", here / "none")
    refused(monkeypatch, capsys, *tried, says="tightrope binas --space")


def test_networks_are_not_drawn_twice(here):
    space = resolve(str(here / "small.toml"))
    generator = np.random.default_rng(0)
    first = nas._distinct(space, generator, 100, set())
    more = nas._distinct(space, generator, 100, set(first))
    assert len({*first, *more}) == 200
    with pytest.raises(nas.InputError, match="fewer networks"):
        nas._distinct(space, generator, space.count, set(first))


def test_a_network_that_does_not_fit_its_weights_is_refused(here):
    from tightrope.graph import trace
    from tightrope.methods.binas.method import chosen
    from tightrope.models.mobilenet import mobilenet

    space = resolve(str(here / "small.toml"))
    arch = space.architecture(space.largest())
    net = mobilenet(arch, 10, 1).eval()
    graph = trace(net, space.input_shape)
    small = mobilenet(space.architecture(space.smallest()), 10, 1).eval()
    again = BinasMethod().rebuild(graph, chosen(arch, 10), net.state_dict())
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(again(x), net(x))
    for choices in (chosen(arch, 10), {}, {"network": {"architecture": "[", "classes": 10}}, {"a": {}}):
        with pytest.raises(BundleError, match="no network"):
            BinasMethod().rebuild(graph, choices, small.state_dict())
