"""Masks: gradients, copies, the donor untouched; the way through from the command line; bad input."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from commands import call, refused
from tightrope import donor, models, pipeline
from tightrope.bundle import Bundle
from tightrope.data import load, parse_task, view
from tightrope.errors import BudgetError, InputError
from tightrope.graph import trace
from tightrope.learning import Wanted
from tightrope.methods import configure
from tightrope.methods.reengineer import ReengineerMethod
from tightrope.methods.reengineer.heads import attach
from tightrope.methods.reengineer.projection import fits, project
from tightrope.methods.reengineer.projection import found as spent
from tightrope.nn.group_max import GroupMax
from tightrope.nn.masked import Channels, Masked, binarise
from tightrope.place import model_sha256
from tightrope.program import base_cost
from tightrope.runtimes.onnx import Onnx
from tightrope.runtimes.plain import Plain
from tightrope.types import Budget

DATA = load("embedded")
GRAPH = trace(models.resolve("demo"), DATA.input_shape)
TASK = parse_task(DATA.classes, chosen="3")
PLAIN = Plain()
QUICK = ("--set", "epochs=1", "--set", "controls=false")


def masked(granularity: str = "weight") -> Masked:
    method = ReengineerMethod(granularity=granularity)
    return method._masked(attach(GRAPH, "linear", 2, TASK.groups, 0), GRAPH.input_shape)


def learn(budget: str, *, task=TASK, cost=PLAIN, **config):
    method = ReengineerMethod(**{"epochs": 1, "controls": False} | config)
    return method.learn(GRAPH, view(DATA, task), task=task, budget=Budget.parse(budget), cost=cost)


def test_single_weights_that_are_masked_may_not_grow_again_but_channels_are_gone(tmp_path):
    assert ReengineerMethod(granularity="channel").tunable
    assert not ReengineerMethod(granularity="hybrid").tunable
    bundle = pipeline.search(
        model="demo", data="embedded", method="reengineer", budget="weights<=0.9x",
        config={"epochs": 1, "controls": False}, wanted=Wanted(classes="3"), out=tmp_path / "b",
    )  # fmt: skip
    with pytest.raises(InputError, match="trained this network already"):
        pipeline.train(bundle, pipeline.Recipe(epochs=0.1))


@pytest.mark.parametrize(("multiple", "share"), [(4, 0.6), (8, 0.5), (3, 0.35)])
def test_tensors_keep_multiples_of_their_best_channels_within_the_limit(multiple, share):
    found = masked("channel")
    scores = found.scores["channels"].detach()  # shares its memory
    torch.manual_seed(0)
    scores.copy_(torch.rand_like(scores) - 0.3)  # a third is dead
    before, limits = scores.clone(), {"macs": share * spent(masked(), masked().snapshot())["macs"]}
    project(found, limits, multiple)
    living = found.snapshot()["channels"]
    for chain in found.channels.separate:
        kept = [k for k in chain if living[k]]
        assert len(kept) % multiple == 0 or len(kept) == len(chain)
        best = sorted(chain, key=lambda k: -float(before[k]))[: len(kept)]
        assert set(kept) == set(best)
    assert fits(found, found.snapshot(), limits)
    assert spent(found, found.snapshot())["macs"] > 0.5 * limits["macs"]  # and makes use of it
    project(found, limits, multiple)
    assert torch.equal(living, found.snapshot()["channels"])


def test_a_limit_that_no_masks_meet_leaves_scores_in_their_order():
    found = masked("channel")
    scores = found.scores["channels"].detach()
    torch.manual_seed(0)
    scores.copy_(torch.rand_like(scores))
    before = scores.clone()
    project(found, {"macs": 1.0}, 8)
    assert scores.abs().max() <= 1
    for chain in found.channels.separate:
        kept = {k for k in chain if scores[k] > 0}
        assert kept == set(sorted(chain, key=lambda k: -float(before[k]))[: min(8, len(chain))])


def test_multiples_are_of_channels():
    with pytest.raises(InputError, match="multiples are of channels"):
        ReengineerMethod(multiple=8)
    with pytest.raises(InputError, match="multiple must be positive"):
        ReengineerMethod(granularity="channel", multiple=0)


def test_a_score_of_0_is_off_and_gradients_are_clipped_straight_through():
    score = torch.tensor([-1.0, 0.0, 1e-9, 5.0], requires_grad=True)
    bits = binarise(score)
    assert bits.tolist() == [0, 0, 1, 1]
    bits.backward(torch.tensor([3.0, -0.5, -7.0, 0.25]))
    assert score.grad.tolist() == [1.0, -0.5, -1.0, 0.25]


def test_the_ratio_gives_every_score_alpha_over_n():
    found = masked()
    alpha = 2.0
    (alpha * found.kept(found.bits())[0] / found.total).backward()
    for score in found.scores.values():
        torch.testing.assert_close(score.grad, torch.full_like(score, alpha / found.total))


def test_counts_are_exact_where_single_precision_is_not():
    model = nn.Sequential(nn.Linear(4097, 4097), nn.Linear(4097, 2))
    found = Masked.start(model, ("0.weight", "0.bias"), Channels(), "weight", {"0": 3})
    weights, macs = found.kept(found.snapshot())
    assert (int(weights), int(macs)) == (4097 * 4098, 3 * 4097**2)  # 2^24 + 12,290 weights


def test_a_snapshot_does_not_alias_the_scores():
    found = masked()
    before = found.snapshot()
    with torch.no_grad():
        for score in found.scores.values():
            score.fill_(-1)
    assert all(bits.all() for bits in before.values())
    assert not any(bits.any() for bits in found.snapshot().values())


@pytest.mark.parametrize("granularity", ["weight", "channel", "hybrid"])
def test_all_ones_reproduce_the_donor_and_all_is_counted(granularity):
    found = masked(granularity)
    x = next(DATA.batches("validation", 8))[0]
    ones = found.snapshot()
    with torch.no_grad():
        assert torch.equal(found(x, found.effective(ones)), found.model(x))
    weights, macs = found.kept(ones)
    assert int(weights) == found.total == sum(of for _, of in found.by_layer(ones).values())
    assert int(macs) == 9_345_920 - 640  # all but the donor's last layer


@pytest.mark.parametrize("granularity", ["channel", "hybrid"])
def test_counts_of_masks_are_those_of_the_masked_parameters(granularity):
    found = masked(granularity)
    with torch.no_grad():
        for score in found.scores.values():
            score.uniform_(-1, 1)
    bits = found.snapshot()
    whole = {n: torch.ones_like(p) for n, p in found.model.named_parameters()}
    found.model.load_state_dict(whole, strict=False)  # a weight of 1 is counted by its sum
    into = 0
    effective = found.effective(bits)
    for name in found.names:
        module = name.rpartition(".")[0]
        value = effective[name]
        if module in found.channels.into and value.dim() > 1:
            gates = torch.cat([bits["channels"].float(), torch.ones(1)])
            gate = gates[found.channels.into_matrix(module, found.model.get_submodule(module))]
            value = value * gate[..., None, None] if value.dim() == 4 else value * gate
        into += int(value.sum())
    assert int(found.kept(bits)[0]) == into


def test_the_donor_is_not_changed_and_the_result_is_rebuilt_from_its_bits():
    before = model_sha256(GRAPH.module)
    learned = learn("weights<=0.5x,macs<=0.6x", granularity="hybrid")
    assert model_sha256(GRAPH.module) == before
    method = ReengineerMethod(epochs=1, controls=False, granularity="hybrid")
    a, b = (method.rebuild(GRAPH, learned.choices, learned.tensors) for _ in range(2))
    x = next(DATA.batches("validation", 8))[0]
    with torch.no_grad():
        assert torch.equal(a(x), b(x)) and a(x).shape == (8, 2)
    assert learned.predicted.weights <= 0.5 * learned.baseline.weights
    assert learned.predicted.macs <= 0.6 * learned.baseline.macs


@pytest.mark.parametrize(
    ("budget", "config", "says"),
    [
        ("weights<=20", {}, "below the head alone"),
        ("macs<=0.5x", {}, "neither multiplications nor time"),
        ("drelus<=0.5x", {}, "does not limit"),
        ("weights<=0.5x", {"mode": "reference", "head": "relu_linear", "lr_head": 0.1}, "no network within"),
    ],
)
def test_budgets_that_cannot_be_met_are_refused(budget, config, says):
    with pytest.raises(BudgetError, match=says):
        learn(budget, **config)


def test_a_slice_needs_single_classes():
    with pytest.raises(InputError, match="one class of the donor"):
        learn("weights<=0.5x", head="slice")


@pytest.mark.parametrize(
    "given", [{"epoch": 3}, {"epochs": "x"}, {"epochs": True}, {"head": 3}, {"mode": "z"}]
)
def test_settings_are_checked(given):
    with pytest.raises(InputError):
        configure("reengineer", given)


def test_the_whole_way_and_what_it_refuses(tmp_path, monkeypatch, capsys):
    out = tmp_path / "b"
    base = ("search", "--method", "reengineer", "--budget", "macs<=0.6x", "--set", "granularity=channel")
    refused(monkeypatch, capsys, *base, "--classes", "", "--out", out, says="no class is named")
    refused(monkeypatch, capsys, *base, "--classes", "10", "--out", out, says="no such class")
    refused(
        monkeypatch, capsys, "search", "--budget", "drelus<=12%", "--classes", "3", "--out", out,
        says="--method reengineer",
    )  # fmt: skip
    assert not out.exists()
    with monkeypatch.context() as patched:
        told = [(0.9, 0.2), (0.5, 0.6)]
        patched.setattr(donor, "chance", lambda net, images: told.pop(0))
        assert call(patched, *base, "--classes", "3,5", *QUICK, "--out", out) == 0
    errors = capsys.readouterr().err
    assert (
        f"what was learned ({out}) classifies no better than chance: 50.0%" in errors
        and "--weights" not in errors
    )
    assert call(monkeypatch, "apply", out, "--test") == 0
    capsys.readouterr()
    assert call(monkeypatch, "run", out, "--runtime", "onnx", "--count", "4", "--json") == 0
    assert json.loads(capsys.readouterr().out)["max_abs_error"] < 1e-4
    assert call(monkeypatch, "report", out) == 0
    page, card = (out / "report.html").read_text(), (out / "README.md").read_text()
    for word in ("What is kept of every layer", "restricted", "onnx", "dress / sandal"):
        assert word in page and word in card
    assert "e+0" not in page  # counts in full
    assert call(monkeypatch, "run", out, "--runtime", "onnx", "--estimate") == 0
    assert "only the whole has a time" in capsys.readouterr().out
    untuned, planned = model_sha256(Bundle(out).model()), Bundle(out).plan().predicted
    capsys.readouterr()
    assert call(monkeypatch, "finetune", out, "--epochs", "0.5", "--json") == 0
    tuned = json.loads(capsys.readouterr().out)
    restricted = Bundle(out).record()["controls"]["restricted"]
    assert tuned["validation_base"] == pytest.approx(restricted)  # the teacher answers within the task
    assert tuned["validation"] > tuned["validation_untuned"] - 0.02
    assert model_sha256(Bundle(out).model()) != untuned
    macs = sum(base_cost(op).macs for op in Bundle(out).program().ops)
    assert macs == planned.macs  # no channel has come back
    for verb in (("curve", out), ("solve", out, "--budget", "macs<=0.9x", "--out", tmp_path / "c")):
        refused(monkeypatch, capsys, *verb, says="this plan was learned")
    path = out / "plan.safetensors"
    tensors = load_file(path)
    whole = path.read_bytes()
    save_file(tensors, path, metadata={"sha256": "0", "base_sha256": "0"})
    refused(monkeypatch, capsys, "apply", out, says="fine-tuned network")
    (out / "accuracy.json").unlink()
    refused(monkeypatch, capsys, "apply", out, says="masks are damaged")
    path.write_bytes(
        whole.replace(json.loads((out / "plan.json").read_text())["base_sha256"].encode(), b"0" * 64)
    )
    refused(monkeypatch, capsys, "apply", out, says="another network")


@pytest.mark.slow
def test_the_masks_meet_the_budget_and_are_trained_after_the_last_cut():
    """The whole network, and a tenth of it: at that share cuts without training had left 44 %."""
    learned = learn("weights<=0.1x", epochs=10)
    assert learned.predicted.weights <= 0.1 * learned.baseline.weights
    assert learned.accuracy >= learned.controls["restricted"] - 0.03
    assert all(point["weights"] > 0 for point in learned.front)


@pytest.mark.parametrize(
    ("granularity", "metric", "least"), [("weight", "weights", 0.999), ("hybrid", "macs", 0.93)]
)
def test_limits_are_met_by_the_smallest_multiplier(granularity, metric, least):
    """Nearly the whole budget is used: a channel is some per cent of it, a weight next to nothing."""
    found = masked(granularity)
    with torch.no_grad():
        for score in found.scores.values():
            score.uniform_(0, 1, generator=torch.Generator().manual_seed(1))
    limits = {metric: 0.4 * spent(found, found.snapshot())[metric]}
    project(found, limits)
    before = found.snapshot()
    assert fits(found, before, limits) and spent(found, before)[metric] >= least * limits[metric]
    project(found, limits)
    assert all(torch.equal(before[name], bits) for name, bits in found.snapshot().items())


def test_a_floor_that_is_missed_is_an_error_that_says_what_was_found():
    with pytest.raises(BudgetError, match=r"no network within(.|\n)*the donor's(.|\n)*found:"):
        learn("weights<=0.01x", floor=0.0)
    assert learn("weights<=0.9x", floor=0.5).accuracy > 0.4


@pytest.mark.slow
def test_distillation_pulls_the_outputs_towards_the_donors():
    """KL of the restricted donor from the result, on validation images."""

    def distance(**config):
        learned = learn("weights<=0.2x", epochs=2, task=parse_task(DATA.classes, chosen="0,2,4,6"), **config)
        net = ReengineerMethod().rebuild(GRAPH, learned.choices, learned.tensors)
        teacher = nn.Sequential(GRAPH.module, GroupMax(((0,), (2,), (4,), (6,))))
        x, _ = next(DATA.batches("validation", 200))
        with torch.no_grad():
            soft, got = teacher(x).log_softmax(1), net(x).log_softmax(1)
        return float(nn.functional.kl_div(got, soft, log_target=True, reduction="batchmean"))

    assert distance(distill=20.0) < 0.8 * distance()


class Steady(Onnx):
    """An engine as fast as its multiplications, on any machine."""

    def times_ms(self, program, batch=1, repeats=1):
        return [0.01 + 1e-6 * batch * sum(base_cost(op).macs for op in program.ops)]


def test_time_is_limited_only_where_it_is_measured():
    with pytest.raises(BudgetError, match=r"no times(.|\n)*--runtime onnx"):
        learn("latency_ms<=0.5x", granularity="channel")
    with pytest.raises(BudgetError, match="neither multiplications nor time"):
        learn("latency_ms<=0.5x", cost=Onnx())
    learned = learn("latency_ms<=0.7x", granularity="channel", cost=Steady(), epochs=4)
    assert 0 < learned.predicted.online_ms <= 0.7 * learned.baseline.online_ms
    assert learned.predicted.macs < 0.9 * learned.baseline.macs


@pytest.mark.slow
def test_a_reengineered_network_runs_under_mpc_unchanged(tmp_path, monkeypatch, capsys):
    out = tmp_path / "b"
    base = ("search", "--method", "reengineer", "--classes", "3", "--budget", "macs<=0.4x", "--out", out)
    assert call(monkeypatch, *base, *QUICK, "--set", "granularity=hybrid") == 0
    assert call(monkeypatch, "apply", out) == 0
    capsys.readouterr()
    assert call(monkeypatch, "run", out, "--count", "8", "--json") == 0
    body = json.loads(capsys.readouterr().out)
    assert body["measurement"]["runtime"] == "mpc"
    assert body["max_abs_error"] < 1e-2
    assert body["measurement"]["total"]["macs"] < 0.4 * 8 * 9_345_920
    bundle = Bundle.open(out)
    x = next(bundle.data().batches("test", 8))[0].double().numpy()
    got, plain, _ = pipeline.run(bundle, x, runtime="mpc")
    first, second = np.sort(plain, 1)[:, :-3:-1].T
    clear = first - second > 2 * np.abs(got - plain).max()
    assert clear.any() and (got.argmax(1) == plain.argmax(1))[clear].all()


@pytest.mark.slow
def test_every_class_in_one_command_and_again_only_what_is_missing(tmp_path, monkeypatch, capsys):
    small = tmp_path / "images"  # three classes of pictures, so that there are three tasks
    generator = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 6), ("test", 6)):
        for k, name in enumerate(("Dark", "grey/dim", "light")):
            folder = small / split / name.replace("/", "_")
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = (generator.random((16, 16, 3)) * 60 + 90 * k).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    file = tmp_path / "net.py"
    file.write_text(
        "import torch\nfrom tightrope.models.resnet import ResNet\n"
        "def net():\n    torch.manual_seed(0)\n    return ResNet(4, ((8, 1, 2),), 3, 3)\n"
    )
    out = tmp_path / "all"
    base = (
        "search", "--method", "reengineer", "--model", f"{file}:net", "--data", small, "--image-size", "16",
        "--classes", "each", "--budget", "weights<=0.6x", *QUICK, "--out", out, "--json",
    )  # fmt: skip
    assert call(monkeypatch, *base) == 0
    tasks = json.loads(capsys.readouterr().out)["tasks"]
    assert [task["bundle"].rpartition("/")[2] for task in tasks] == ["0-dark", "1-grey-dim", "2-light"]
    assert all(t["predicted"]["weights"] <= 0.6 * t["baseline"]["weights"] for t in tasks)
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/plan.json")}
    shutil.rmtree(out / "1-grey-dim")
    assert call(monkeypatch, *base) == 0
    assert json.loads(capsys.readouterr().out)["tasks"] == tasks  # the same task gives the same network
    after = {p: p.stat().st_mtime_ns for p in out.glob("*/plan.json")}
    assert [p.parent.name for p in before if before[p] != after[p]] == ["1-grey-dim"]
    refused(monkeypatch, capsys, *base, "--runtime", "onnx", says="would be lost")  # another search
    other = ("search", "--budget", "drelus<=12%", "--classes", "each", "--out", tmp_path / "x")
    refused(monkeypatch, capsys, *other, says="--method reengineer")
