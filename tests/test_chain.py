"""A found network as the model of the next search: block_relu below the blocks of seesaw."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from commands import call, refused
from tightrope import chain, pipeline
from tightrope.bundle import Bundle
from tightrope.errors import BundleError, InputError
from tightrope.finetune import Recipe
from tightrope.graph import trace
from tightrope.methods.seesaw import relu_map
from tightrope.place import model_sha256
from tightrope.program import base_cost
from tightrope.replan import solve
from tightrope.report import write
from tightrope.types import Plan

TINY = {
    "space": "1,1", "width": 4, "operators": "skip,conv_3", "epochs": 1, "limit": 128, "branches": 1,
    "keep": 1, "samples": 64, "recovery": 0,
}  # fmt: skip
FIRST, SECOND = "drelus<=3136", "drelus<=50%"
QUICK = {"samples": 16, "verify": 0}
RECIPE = Recipe(epochs=0.02)


def search(**more):
    return pipeline.search(data="embedded", warn=lambda _: None, **more)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Of seesaw, fine-tuned a little; a ReLU map says which ReLU so few images are to find worth it."""
    here = tmp_path_factory.mktemp("chain")
    relu_map.write(here / "map.json", [False, True])
    config = TINY | {"relu_map": str(here / "map.json")}
    bundle = search(model="demo", method="seesaw", config=config, budget=FIRST, out=here / "seesaw")
    pipeline.train(bundle, RECIPE)
    return bundle


@pytest.fixture(scope="module")
def both(found):
    out = found.path.parent / "both"
    bundle = search(model=str(found.path), config=QUICK, budget=SECOND, out=out)
    pipeline.train(bundle, RECIPE)
    return bundle


@pytest.mark.slow
def test_two_methods_in_one_plan(found, both):
    """What the second search started from is what the first one executes, and every number is of that."""
    first, plan = found.plan(), both.plan()
    assert (first.method, first.budget, plan.method, plan.budget) == ("seesaw", FIRST, "block_relu", SECOND)
    (link,) = plan.chain
    assert (link.bundle, link.method, link.budget) == (str(found.path), first.method, first.budget)
    assert (link.base, link.base_sha256) == ("demo", first.base_sha256)
    assert Plan.from_json(plan.to_json(), both.path) == plan
    merged = chain.finished(found, found.model())
    assert plan.base_sha256 == model_sha256(trace(merged, plan.input_shape).module)
    x, _ = pipeline.test_images(both.data(), 2)
    with torch.no_grad():
        expected = found.model()(torch.from_numpy(x))
        assert float((both.base()(torch.from_numpy(x)) - expected).abs().max()) < 1e-4
    assert plan.baseline.drelus == first.predicted.drelus == 3136
    assert 0 < plan.predicted.drelus <= 1568
    merged_ops, ops = found.program().ops, both.program().ops
    assert [(op.name, base_cost(op).macs) for op in ops] == [
        (op.name, base_cost(op).macs) for op in merged_ops
    ]


@pytest.mark.slow
def test_it_runs_and_costs_what_the_plan_says(both):
    x, _ = pipeline.test_images(both.data(), 2)
    outputs, expected, measured = pipeline.run(both, x, mode="simulate")
    assert measured.total.drelus == 2 * both.plan().predicted.drelus
    assert np.abs(outputs - expected).max() < 2**-5
    with torch.no_grad():
        model = both.model().double()(torch.from_numpy(x).double()).numpy()
    clear, _, _ = pipeline.run(both, x, runtime="plain")
    assert np.abs(clear - model).max() < 1e-4


@pytest.mark.slow
def test_both_budgets_are_shown_and_stay(found, both, tmp_path):
    write(both)
    for name in ("README.md", "report.html"):
        text = (both.path / name).read_text().replace("&lt;", "<")
        assert f"seesaw within {FIRST}, from demo, SHA-256 {found.plan().base_sha256}" in text
        assert both.plan().base_sha256 in text
    other = solve(both, "drelus<=25%", tmp_path / "other")
    assert other.plan().chain == both.plan().chain
    assert [k.budget for k in chain.links(str(other.path), (1, 28, 28))] == [FIRST, "drelus<=25%"]


@pytest.mark.slow
def test_a_source_that_changes(found, both, tmp_path):
    """Trained on, it changes nothing: a bundle has its own weights. With another network it is refused."""
    copy, above = tmp_path / "seesaw", tmp_path / "both"
    shutil.copytree(found.path, copy)
    shutil.copytree(both.path, above)
    about = json.loads((above / "bundle.json").read_text())
    (above / "bundle.json").write_text(json.dumps(about | {"model": str(copy)}))
    pipeline.train(Bundle(copy), Recipe(epochs=0.02, lr=0.2))
    assert model_sha256(Bundle(above).model()) == model_sha256(both.model())
    search(model="demo", method="seesaw", config=TINY | {"width": 8}, budget=FIRST, out=copy, overwrite=True)
    with pytest.raises(InputError, match="no network yet"):
        Bundle(above).base()
    pipeline.apply_plan(Bundle(copy))
    with pytest.raises(BundleError, match="has another network now"):
        Bundle(above).model()
    shutil.rmtree(copy)
    with pytest.raises(BundleError, match="no such bundle"):
        Bundle(above).base()


@pytest.mark.slow
def test_from_the_directory_of_the_bundle(found, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(found.path.parent)
    words = ("search", "--model", found.path.name, "--budget", SECOND, "--samples", "16", "--out", tmp_path)
    refused(monkeypatch, capsys, *words, "--weights", found.path / "base.safetensors", says="another network")
    assert not list(tmp_path.iterdir())
    assert call(monkeypatch, *words, "--verify", "0") == 0
    assert Bundle(tmp_path).about["model"] == str(found.path)


@pytest.mark.slow
def test_networks_that_cannot_be_taken(found, tmp_path):
    with pytest.raises(BundleError, match=r"bundle\.json is missing"):
        chain.resolve(str(tmp_path), num_classes=10, in_channels=1)
    with pytest.raises(InputError, match=r"num_classes=7(.|\n)*10(.|\n)*--data embedded"):
        chain.resolve(str(found.path), num_classes=7, in_channels=1)
    with pytest.raises(InputError, match=r"images of \(1, 32, 32\)"):
        chain.links(str(found.path), (1, 32, 32))
    copy = tmp_path / "seesaw"
    shutil.copytree(found.path, copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match="tightrope finetune"):
        search(model=str(copy), config=QUICK, budget=SECOND, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_words_are_no_bundles():
    for spec in ("demo", "resnet8", "timm:a/b", "arch:" + "x" * 5000, "nets/mine.py:net", "mine.py"):
        assert chain.source(spec) is None
