"""Bundles: what was written is what is read, strictly, and damage is named."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from networks import TinyResNet, settle
from tightrope import models
from tightrope.bundle import DERIVED, Bundle
from tightrope.errors import BundleError, InputError
from tightrope.lower import lower
from tightrope.nn import BlockReLU
from tightrope.place import model_sha256
from tightrope.rewrite import apply
from tightrope.runtimes.plain import Plain
from tightrope.types import Cost, Measurement, Plan, Problem

SHAPE = (3, 8, 8)
SOURCE = """
from networks import TinyResNet

def tiny(num_classes, in_channels):
    return TinyResNet(in_channels, num_classes)
"""


@pytest.fixture
def about(tmp_path):
    (tmp_path / "net.py").write_text(SOURCE)
    return {
        "model": f"{tmp_path / 'net.py'}:tiny", "num_classes": 5, "in_channels": 3,
        "data": "embedded", "root": None, "image_size": None,
    }  # fmt: skip


@pytest.fixture
def net(about):
    return settle(models.resolve(about["model"], num_classes=5, in_channels=3))


@pytest.fixture
def bundle(tmp_path, about, net) -> Bundle:
    """A complete one: base, problem, plan, trained weights, program, a measurement."""
    bundle = Bundle.create(tmp_path / "bundle", about, net)
    patches = [[2, 2], [0, 0], [1, 1], [3, 5]]
    plan = Plan(
        method="block_relu", config={}, budget="drelus<=50%", choices={"layer1.relu": {"patches": patches}},
        predicted=Cost(), baseline=Cost(), loss=0.0, bound=0.0, base="tiny", base_sha256=model_sha256(net),
        input_shape=SHAPE,
    )  # fmt: skip
    bundle.save_plan(plan)
    Problem((), Cost(), Cost()).save(bundle.path / "problem.npz")
    model = settle(apply(net, plan), seed=5)
    program = lower(model, SHAPE)
    bundle.save_model(model, program)
    _, measured = Plain().open(program).run(np.ones((1, *SHAPE)))
    bundle.add_measurement(measured, {"commit": "abc"})
    return bundle


def test_a_bundle_gives_back_what_was_put_in(bundle, net):
    opened = Bundle.open(bundle.path)
    assert model_sha256(opened.base()) == model_sha256(net)
    assert opened.plan() == bundle.plan()
    assert opened.problem().tables == ()
    model, x = opened.model(), torch.randn(2, *SHAPE)
    assert isinstance(model.get_submodule("layer1.relu"), BlockReLU)
    assert not model.training
    weights = load_file(bundle.path / "model.safetensors")
    state = model.state_dict()
    assert state.keys() == weights.keys() and all(torch.equal(v, weights[k]) for k, v in state.items())
    got, _ = Plain().open(opened.program()).run(x.numpy())
    np.testing.assert_allclose(got, model(x).detach().numpy(), atol=1e-5)
    assert opened.program(weights=False).sha256() == opened.program().sha256()
    assert opened.data().name == "embedded"
    assert set(opened.about["versions"]) == {"tightrope", "python", "torch", "numpy"}


def test_nothing_in_a_bundle_is_a_pickle(bundle):
    kinds = {p.suffix for p in bundle.path.iterdir()}
    assert kinds == {".json", ".safetensors", ".npz"}
    assert not any(p.read_bytes()[:1] == b"\x80" for p in bundle.path.iterdir())
    with np.load(bundle.path / "problem.npz", allow_pickle=False) as data:
        assert all(data[k].dtype != object for k in data.files)


def test_the_newest_measurement_of_each_runtime_is_kept(bundle):
    for runtime, batch in (("plain", 4), ("mpc", 1), ("mpc", 2)):
        measured = Measurement(runtime=runtime, batch=batch, ops=(), total=Cost(drelus=1))
        bundle.add_measurement(measured, {"k": 1})
    found = bundle.measurements()
    assert [(m["runtime"], m["batch"], m["total"], m["k"]) for m in found] == [
        ("plain", 4, {"drelus": 1}, 1),
        ("mpc", 2, {"drelus": 1}, 1),
    ]


def test_the_log_grows_by_lines(bundle):
    bundle.log({"epoch": 1})
    bundle.log({"epoch": 2})
    lines = (bundle.path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]


def test_a_new_bundle_replaces_an_old_one_and_all_that_came_from_it(bundle, about, net):
    bundle.log({"epoch": 1})
    assert (bundle.path / "plan.json").exists()
    (bundle.path / "notes.txt").write_text("mine")
    Bundle.create(bundle.path, about, net)
    left = {p.name for p in bundle.path.iterdir()}
    assert left == {"bundle.json", "base.safetensors", "notes.txt"}
    assert not left & set(DERIVED)


def test_a_bundle_may_start_where_its_measurement_started(tmp_path, about, net):
    (tmp_path / "out" / "distortion").mkdir(parents=True)
    (tmp_path / "out" / "distortion" / "site.npz").write_bytes(b"kept")
    Bundle.create(tmp_path / "out", about, net)
    assert (tmp_path / "out" / "distortion" / "site.npz").read_bytes() == b"kept"
    assert Bundle.open(tmp_path / "out").about["model"] == about["model"]


def test_a_foreign_directory_is_not_touched(tmp_path, about, net):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "plan.json").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for path, message in (("mine", "not empty and not a bundle"), ("file", "must be a directory")):
        with pytest.raises(InputError, match=message + r"(.|\n)*another --out"):
            Bundle.create(tmp_path / path, about, net)
        with pytest.raises(InputError, match=message):
            Bundle.check_target(tmp_path / path)
    assert (tmp_path / "mine" / "plan.json").read_text() == "mine"
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["plan.json"]


def test_what_is_no_bundle_is_said(tmp_path):
    with pytest.raises(BundleError, match=r"no such bundle(.|\n)*nowhere(.|\n)*tightrope search"):
        Bundle.open(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"bundle\.json is missing"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize(
    ("file", "read"),
    [
        ("bundle.json", lambda b: Bundle.open(b.path)),
        ("base.safetensors", lambda b: b.base()),
        ("plan.json", lambda b: b.plan()),
        ("problem.npz", lambda b: b.problem()),
        ("model.safetensors", lambda b: b.model()),
        ("program.json", lambda b: b.program()),
        ("program.safetensors", lambda b: b.program()),
        ("measurements.json", lambda b: b.measurements()),
    ],
)
@pytest.mark.parametrize("damage", ["empty", "half", "noise", "other json"])
def test_a_damaged_file_is_named(bundle, file, read, damage):
    path = bundle.path / file
    whole = path.read_bytes()
    damaged = {"empty": b"", "half": whole[: len(whole) // 2], "noise": b"\xff\x00" * 50, "other json": b"3"}
    path.write_bytes(damaged[damage])
    with pytest.raises(BundleError, match=r"damaged|another version") as caught:
        read(bundle)
    assert "bundle" in str(caught.value)


@pytest.mark.parametrize(
    ("file", "read", "message"),
    [
        ("bundle.json", lambda b: b.base(), "lacks a file"),
        ("base.safetensors", lambda b: b.base(), "lacks its weights"),
        ("plan.json", lambda b: b.model(), r"no plan yet(.|\n)*tightrope search"),
        ("problem.npz", lambda b: b.problem(), "no saved problem"),
        ("model.safetensors", lambda b: b.model(), "lacks its weights"),
        ("program.json", lambda b: b.program(), r"no program(.|\n)*tightrope finetune"),
    ],
)
def test_a_missing_file_is_named(bundle, file, read, message):
    (bundle.path / file).unlink()
    with pytest.raises(BundleError, match=message):
        read(bundle)


def test_weights_are_loaded_strictly(bundle):
    path = bundle.path / "model.safetensors"
    weights = load_file(path)
    for change in (
        {k: v for k, v in weights.items() if k != "fc.bias"},
        weights | {"extra": torch.zeros(1)},
        weights | {"fc.bias": torch.zeros(9)},
    ):
        save_file(change, path)
        with pytest.raises(BundleError, match="do not fit"):
            bundle.model()


def test_a_base_that_is_not_the_plans_is_refused(bundle):
    path = bundle.path / "base.safetensors"
    weights = load_file(path)
    weights["fc.bias"] += 1
    save_file(weights, path)
    with pytest.raises(InputError, match="another network"):
        bundle.model()


@pytest.mark.parametrize(
    ("change", "read"),
    [
        (lambda a: a.pop("model"), lambda b: b.base()),
        (lambda a: a.pop("data"), lambda b: b.data()),
        (lambda a: a.pop("schema"), lambda b: Bundle.open(b.path)),
    ],
)
def test_a_head_that_lacks_something_is_refused(bundle, change, read):
    path = bundle.path / "bundle.json"
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))
    with pytest.raises(BundleError, match=r"damaged|another version"):
        read(bundle)


def test_a_write_that_fails_keeps_the_old_weights(bundle, monkeypatch):
    before = {p.name: p.read_bytes() for p in bundle.path.iterdir()}

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full)
    model = bundle.model()
    with pytest.raises(OSError, match="no space"):
        bundle.save_model(settle(TinyResNet()), lower(model, SHAPE))
    with pytest.raises(OSError, match="no space"):
        bundle.save_plan(bundle.plan())
    assert {p.name: p.read_bytes() for p in bundle.path.iterdir()} == before
