"""An interrupted search goes on exactly where its last whole epoch ended, and only its own."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from tightrope.data import load, parse_task, view
from tightrope.errors import BundleError
from tightrope.graph import trace
from tightrope.methods.reengineer import ReengineerMethod
from tightrope.models.resnet import ResNet
from tightrope.runtimes.onnx import Onnx
from tightrope.runtimes.openvino import OpenVino
from tightrope.runtimes.plain import Plain
from tightrope.types import Budget

DATA = load("embedded")
TASK = parse_task(DATA.classes, chosen="3")
PART = view(DATA, TASK)
PART = replace(PART, splits={**PART.splits, "train": tuple(part[:200] for part in PART.splits["train"])})


@pytest.fixture(autouse=True)
def _one_thread():
    """Sums over several threads are not in the same order twice."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


FILE = "search.safetensors"
WAYS = {
    "reference": (
        {"mode": "reference", "head": "relu_linear", "lr_mask": 0.3, "alpha": 20.0, "epochs": 7},
        "weights<=1x",
    ),
    "decay": (
        {"mode": "reference", "lr_mask": 0.3, "alpha": 5.0, "epochs": 6, "decay": True, "margin": 1.0},
        "weights<=0.99x",
    ),
    "dual": ({"granularity": "hybrid", "epochs": 5}, "macs<=0.5x"),
}


class WithDropout(nn.Module):
    """Dropout stays active, so that its draws must come back too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = ResNet(8, ((8, 1, 2), (16, 1, 2)), 10, 1)
        self.net.fc = nn.Sequential(nn.Dropout(0.3), self.net.fc)

    def forward(self, x):
        return self.net(x)


GRAPH = trace(WithDropout().eval(), DATA.input_shape)


def learn(way, workdir, stop=None, **more):
    config, budget = WAYS[way]

    def progress(what, done, of):
        if done == stop:
            raise KeyboardInterrupt

    method = ReengineerMethod(**{**config, "controls": False, "batch_size": 40, **more})
    return method.learn(
        GRAPH, PART, task=TASK, budget=Budget.parse(budget), cost=Plain(), workdir=workdir, progress=progress
    )


@pytest.mark.parametrize("way", WAYS)
def test_an_interrupted_search_ends_as_the_whole_one_does(way, tmp_path):
    whole = learn(way, None)
    for stop in (2, 4):
        with pytest.raises(KeyboardInterrupt):
            learn(way, tmp_path, stop)
    torch.rand(7)  # nothing may depend on what else draws numbers
    again = learn(way, tmp_path)
    assert again.accuracy == whole.accuracy and again.front == whole.front
    assert again.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(again.tensors[k], v) for k, v in whole.tensors.items())


def test_only_its_own_search_goes_on_and_damage_is_an_error(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        learn("dual", tmp_path, 3)
    other = learn("dual", None, seed=1)
    assert all(torch.equal(learn("dual", tmp_path, seed=1).tensors[k], v) for k, v in other.tensors.items())
    (tmp_path / FILE).write_bytes(b"damaged")
    with pytest.raises(BundleError, match="cannot be read"):
        learn("dual", tmp_path)


def test_a_search_within_a_time_belongs_to_the_runtime_that_measures_it():
    method = ReengineerMethod(granularity="channel")

    def key(budget, cost):
        return method._key(GRAPH, PART, TASK, Budget.parse(budget), cost)

    for one, other in itertools.combinations([Onnx(), Onnx(batch=16), OpenVino()], 2):
        assert key("latency_ms<=0.5x", one) != key("latency_ms<=0.5x", other)
        assert key("macs<=0.5x", one) == key("macs<=0.5x", other)
