"""Images of another task: searched, fine-tuned without a teacher, and read back; devices that are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from commands import call, refused
from tightrope.bundle import Bundle
from tightrope.data import load, parse_task, view
from tightrope.errors import InputError
from tightrope.graph import trace
from tightrope.methods.reengineer import ReengineerMethod
from tightrope.models import resolve
from tightrope.place import model_sha256
from tightrope.program import base_cost
from tightrope.runtimes.plain import Plain
from tightrope.shard import Shard
from tightrope.types import Budget


def draw(folder, turned):
    """Pictures of 16x16 that are bright on one side, on the other, or nowhere."""
    generator = np.random.default_rng(turned)
    names = ("top", "nowhere", "bottom") if turned else ("left", "nowhere", "right")
    for split, count in (("train", 40), ("val", 10), ("test", 10)):
        for name, columns in zip(names, (slice(0, 8), slice(0, 0), slice(8, 16)), strict=True):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 90, (16, 16, 3))
                pixels[:, columns] += 150
                pixels = pixels.swapaxes(0, 1) if turned else pixels
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{i}.png")
    return folder


def test_a_network_for_new_images_is_fine_tuned_on_them_without_a_teacher(tmp_path, monkeypatch, capsys):
    known, new = (draw(tmp_path / name, turned) for name, turned in (("known", True), ("new", False)))
    net = tmp_path / "net.py"
    net.write_text(
        "import torch\nfrom tightrope.models.resnet import ResNet\n"
        "def net():\n    torch.manual_seed(0)\n    return ResNet(8, ((8, 1, 1), (16, 1, 2)), 3, 3)\n"
    )
    out = tmp_path / "b"
    search = (
        "search", "--method", "reengineer", "--model", f"{net}:net", "--data", known, "--image-size", "16",
        "--new-data", new, "--budget", "macs<=0.5x", "--set", "granularity=channel", "--set", "epochs=2",
        "--set", "controls=false", "--set", "batch_size=20", "--out", out,
    )  # fmt: skip
    assert call(monkeypatch, *search) == 0
    bundle = Bundle.open(out)
    assert bundle.task().new == str(new) and bundle.donor() is None
    assert tuple(bundle.data().classes) == ("left", "nowhere", "right")
    planned = bundle.plan().predicted
    untuned = model_sha256(bundle.rewritten())
    capsys.readouterr()
    tune = ("finetune", out, "--epochs", "4", "--batch-size", "20", "--accelerator", "cpu", "--json")
    assert call(monkeypatch, *tune) == 0
    tuned = json.loads(capsys.readouterr().out)
    assert "validation_base" not in tuned  # the donor's classes say nothing of these images
    assert tuned["validation"] >= 0.9 and tuned["validation"] >= tuned["validation_untuned"]
    assert model_sha256(bundle.model()) != untuned
    assert sum(base_cost(op).macs for op in bundle.program().ops) == planned.macs
    assert call(monkeypatch, "run", out, "--runtime", "onnx", "--count", "4", "--json") == 0
    assert json.loads(capsys.readouterr().out)["max_abs_error"] < 1e-4
    refused(monkeypatch, capsys, *search, says="fine-tuned network")


def test_a_device_without_float64_is_refused_by_name():
    data = load("embedded")
    task = parse_task(data.classes, chosen="3")
    with pytest.raises(InputError, match=r"float64(.|\n)*mps(.|\n)*--accelerator cpu"):
        ReengineerMethod().learn(
            trace(resolve("demo"), data.input_shape), view(data, task), task=task,
            budget=Budget.parse("weights<=0.5x"), cost=Plain(), shard=Shard(device=torch.device("mps")),
        )  # fmt: skip
