"""Bundles: what was written is what is read, strictly, and damage is named."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from networks import TinyResNet, images, settle
from tightrope import models
from tightrope.bundle import DERIVED, RESULTS, Bundle, _save_weights
from tightrope.errors import BundleError, InputError
from tightrope.graph import trace
from tightrope.lock import locked
from tightrope.lower import lower
from tightrope.methods.block_relu import BlockReluMethod
from tightrope.nn import BlockReLU
from tightrope.place import model_sha256
from tightrope.rewrite import apply
from tightrope.runtimes.plain import Plain
from tightrope.solve.select import select
from tightrope.types import Budget, Cost, Measurement, Plan

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
    method, graph = BlockReluMethod(samples=4, verify=0), trace(net, SHAPE)
    problem = method.measure(graph, images(SHAPE), cost=Plain(), workdir=None, progress=lambda *_: None)
    best = select(problem, Budget.parse("drelus<=50%"))
    plan = Plan(
        method="block_relu", config=problem.meta["config"], budget="drelus<=50%",
        choices=method.choices(problem, best.picked), predicted=best.cost, baseline=problem.baseline,
        loss=best.loss, bound=best.bound, base="tiny", base_sha256=model_sha256(graph.module),
        input_shape=SHAPE,
    )  # fmt: skip
    problem.save(bundle.path / "problem.npz")
    bundle.save_plan(plan)
    model = settle(apply(net, plan), seed=5)
    program = lower(model, SHAPE)
    bundle.save_model(model, program)
    _, measured = Plain().open(program).run(np.ones((1, *SHAPE)))
    bundle.add_measurement(measured, {"max_abs_error": 0.5})
    return bundle


def test_a_bundle_gives_back_what_was_put_in(bundle, net):
    opened = Bundle.open(bundle.path)
    assert model_sha256(opened.base()) == model_sha256(net)
    assert opened.plan() == bundle.plan()
    assert len(opened.problem().tables) == 5
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
    ends = [(body[:1], body[-1:]) for body in (p.read_bytes() for p in bundle.path.iterdir())]
    assert (b"\x80", b".") not in ends
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
    Bundle.create(bundle.path, about, net, overwrite=True)
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
    "name",
    ["base.safetensors", "model.safetensors", "start.safetensors", "plan.safetensors", "program.json",
     "program.safetensors"],
)  # fmt: skip
def test_a_cut_file_is_found_whether_or_not_it_is_used(bundle, name):
    bundle.save_start(bundle.model())
    bundle.save_learned({"masks": torch.ones(100)}, bundle.plan().base_sha256, {})
    bundle.check()
    whole = (bundle.path / name).read_bytes()
    for damaged in (whole[:200], whole[:-3] + b"xyz"):
        (bundle.path / name).write_bytes(damaged)
        with pytest.raises(BundleError, match="damaged"):
            bundle.check()
    (bundle.path / name).unlink()
    bundle.check()  # what was never made is not damaged


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
    with pytest.raises(BundleError, match="not those that were saved"):
        bundle.base()
    net = TinyResNet()
    net.load_state_dict(weights)
    _save_weights(path, net)
    with pytest.raises(InputError, match="another network"):
        bundle.model()


@pytest.mark.parametrize("name", ["base.safetensors", "model.safetensors", "program.safetensors"])
@pytest.mark.parametrize("place", [1, 400])
def test_a_flipped_bit_of_any_weights_is_noticed(bundle, name, place):
    path = bundle.path / name
    body = bytearray(path.read_bytes())
    body[-place] ^= 1
    path.write_bytes(body)
    reads = {"base": bundle.base, "model": bundle.model, "program": bundle.program}
    with pytest.raises(BundleError, match="damaged"):
        reads[path.stem]()


def edit(path, change):
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan["choices"].pop("layer1.relu"),
        lambda plan: plan["choices"]["layer1.relu"].update(patches=[[1, 1]] * 4),
        lambda plan: plan["choices"]["layer1.relu"]["patches"].pop(),
        lambda plan: plan["choices"]["layer1.relu"]["patches"].append([0, 0]),
        lambda plan: plan["choices"]["layer1.relu"].update(patches=[["x", 1]] * 4),
        lambda plan: plan["choices"]["layer1.relu"].update(patches=7),
        lambda plan: plan["choices"]["layer1.relu"].update(replace="relu"),
        lambda plan: plan["choices"].update(other={"patches": [[1, 1]]}),
        lambda plan: plan["choices"].update({"layer9": {"replace": "avg_pool"}}),
        lambda plan: plan["predicted"].update(drelus=plan["predicted"]["drelus"] - 1),
    ],
)
def test_a_plan_that_is_not_the_problems_is_refused(bundle, change):
    edit(bundle.path / "plan.json", change)
    for read in (bundle.plan, bundle.model, bundle.program):
        with pytest.raises(BundleError, match="do not belong together"):
            read()


def test_a_program_that_is_not_the_plans_is_refused(bundle, net):
    lower(net, SHAPE).save(bundle.path)
    for weights in (True, False):
        with pytest.raises(BundleError, match=r"plan and the program do not belong(.|\n)*DReLUs"):
            bundle.program(weights=weights)


@pytest.mark.parametrize("name", RESULTS)
def test_results_are_not_overwritten_unasked(tmp_path, about, net, name):
    bundle = Bundle.create(tmp_path / "out", about, net)
    Bundle.create(tmp_path / "out", about, net)  # no results yet
    (bundle.path / name).write_text("[]")
    with pytest.raises(InputError, match=rf"would be lost(.|\n)*{name}(.|\n)*--overwrite"):
        Bundle.create(bundle.path, about, net)
    assert (bundle.path / name).read_text() == "[]"
    Bundle.create(bundle.path, about, net, overwrite=True)
    assert not (bundle.path / name).exists()


def test_a_bundle_that_is_being_written_is_left_alone(bundle, about, net):
    with locked(bundle.path):
        for target in (
            Bundle.check_target,
            lambda p, overwrite: Bundle.create(p, about, net, overwrite=True),
        ):
            with pytest.raises(BundleError, match="another command is writing"):
                target(bundle.path, overwrite=True)
    assert Bundle.open(bundle.path).plan().budget == "drelus<=50%"


@pytest.mark.parametrize(
    ("file", "change", "read", "says"),
    [
        ("bundle.json", lambda b: b.update(num_classes="x"), lambda b: b.base(), "num_classes is"),
        ("bundle.json", lambda b: b.update(model=3), lambda b: b.base(), "model is 3"),
        ("bundle.json", lambda b: b.update(root=[]), lambda b: b.data(), "root is"),
        ("bundle.json", lambda b: b.update(schema=1), lambda b: Bundle.open(b.path), "another version"),
        ("measurements.json", lambda b: b[0].update(batch="x"), lambda b: b.measurements(), r"\[0\].batch"),
        ("measurements.json", lambda b: b[0].update(batch=0), lambda b: b.measurements(), "empty batch"),
        (
            "measurements.json",
            lambda b: b[0].update(total={"rounds": "x"}),
            lambda b: b.measurements(),
            "rounds",
        ),
        ("measurements.json", lambda b: b[0].update(ops=[{"op": 1}]), lambda b: b.measurements(), "ops"),
    ],
)
def test_wrong_types_are_named(bundle, file, change, read, says):
    edit(bundle.path / file, change)
    with pytest.raises(BundleError, match=says):
        read(bundle)


@pytest.mark.parametrize(
    ("name", "body"),
    [("accuracy", {"validation": "x"}), ("accuracy", {"recipe": 3}), ("accuracy", []), ("curve", {}),
     ("curve", [{"share": 0.1}]),
     ("curve", [{"share": "x", "cost": {}, "loss": 0, "bound": 0, "accuracy": {}}])],
)  # fmt: skip
def test_wrong_types_of_results_are_named(bundle, name, body):
    path = bundle.path / f"{name}.json"
    assert not getattr(bundle, name)()
    path.write_text(json.dumps(body))
    with pytest.raises(BundleError, match=rf"damaged(.|\n)*{name}"):
        getattr(bundle, name)()


@pytest.mark.parametrize("file", ["bundle.json", "plan.json", "program.json", "measurements.json"])
def test_json_that_nests_deeply_is_damaged(bundle, file):
    reads = {
        "bundle.json": lambda: bundle.about, "plan.json": bundle.plan, "program.json": bundle.program,
        "measurements.json": bundle.measurements,
    }  # fmt: skip
    for depth in (300, 100_000):
        (bundle.path / file).write_text("[" * depth + "]" * depth)
        with pytest.raises(BundleError, match="damaged"):
            reads[file]()


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
