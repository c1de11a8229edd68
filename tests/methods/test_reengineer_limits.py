"""Budgets that no masks meet are refused before anything is trained; those just above are met."""

from __future__ import annotations

import re

import pytest
import torch

from tightrope import models
from tightrope.data import load, parse_task, view
from tightrope.errors import BudgetError
from tightrope.graph import trace
from tightrope.methods.reengineer import ReengineerMethod
from tightrope.methods.reengineer.heads import attach
from tightrope.methods.reengineer.projection import fits, found, project, smallest
from tightrope.methods.reengineer.search import Search
from tightrope.nn.masked import Masked
from tightrope.program import base_cost
from tightrope.runtimes.onnx import Onnx
from tightrope.runtimes.plain import Plain
from tightrope.types import Budget

DATA = load("embedded")
GRAPH = trace(models.resolve("demo"), DATA.input_shape)
TASK = parse_task(DATA.classes, chosen="3")
PART = view(DATA, TASK)


class Steady(Onnx):
    """An engine as fast as its multiplications, on any machine."""

    def times_ms(self, program, batch=1, repeats=1):
        return [0.01 + 1e-6 * batch * sum(base_cost(op).macs for op in program.ops)]


def learn(budget, *, cost=None, progress=lambda *_: None, **config):
    method = ReengineerMethod(**{"granularity": "channel", "epochs": 1, "controls": False} | config)
    return method.learn(
        GRAPH, PART, task=TASK, budget=Budget.parse(budget), cost=cost or Plain(), progress=progress
    )


def untrained(what, done, of):
    raise AssertionError(f"{what} has begun")


def masked() -> Masked:
    method = ReengineerMethod(granularity="channel")
    return method._masked(attach(GRAPH, "linear", 2, TASK.groups, 0), GRAPH.input_shape)


@pytest.mark.parametrize(
    ("metric", "multiple", "more"),
    [
        ("macs", 8, {}),
        ("macs", 8, {"granularity": "hybrid"}),
        ("weights", 8, {}),
        ("latency_ms", 8, {"cost": Steady()}),
        ("macs", 4, {}),  # fewer channels than are spared where there is room
    ],
)
def test_a_budget_below_the_smallest_network_is_refused_at_once_and_the_one_it_names_is_met(
    metric, multiple, more
):
    start = {"macs": 129, "weights": 131, "latency_ms": 0.011}[metric]  # the head is below
    with pytest.raises(BudgetError, match="smallest network that masks can make") as refusal:
        learn(f"{metric}<={start}", multiple=multiple, progress=untrained, **more)
    text = str(refusal.value)
    assert f"{multiple} channel(s) in every tensor" in text and "a smaller multiple" in text
    least = float(re.search(r"allowed: ([\d,.]+) ", text)[1].replace(",", ""))
    with pytest.raises(BudgetError, match="smallest network that masks can make"):
        learn(f"{metric}<={0.99 * least}", multiple=multiple, progress=untrained, **more)
    if metric == "latency_ms":  # time is aimed at with some slack
        least *= 1.2
    learned = learn(f"{metric}<={least}", multiple=multiple, epochs=3, **more)
    spent = "online_ms" if metric == "latency_ms" else metric
    assert 0.5 * least < getattr(learned.predicted, spent) <= least


def test_without_multiples_one_channel_a_tensor_is_the_smallest():
    with pytest.raises(BudgetError, match=r"smallest network(.|\n)*1 channel\(s\)") as refusal:
        learn("macs<=140", mode="reference", progress=untrained)
    assert "multiple" not in str(refusal.value)
    least = int(re.search(r"allowed: ([\d,]+) macs", str(refusal.value))[1].replace(",", ""))
    off = {"mode": "reference", "epochs": 2, "lr_mask": 5.0, "alpha": 1e3}  # masks everything
    assert learn(f"macs<={least}", **off).predicted.macs == least


@pytest.mark.parametrize("multiple", [2, 4, 8])
def test_the_projection_reaches_the_smallest_network(multiple):
    net = masked()
    scores = net.scores["channels"].detach()  # shares its memory
    scores.copy_(torch.rand(scores.shape, generator=torch.Generator().manual_seed(0)))
    before, limits = scores.clone(), {"macs": found(net, smallest(net, multiple))["macs"]}
    project(net, limits, multiple)
    assert fits(net, net.snapshot(), limits)
    for chain in net.channels.separate:
        best = sorted(chain, key=lambda k: -float(before[k]))[:multiple]
        assert {k for k in chain if scores[k] > 0} == set(best)


def test_a_network_that_masks_make_smaller_than_it_can_be_is_refused_at_the_end(monkeypatch):
    """A tensor without channels is counted as nothing by masks, and keeps one."""

    def without_inner(net):
        bits = net.snapshot()
        bits["channels"][net.channels.out["stages.1.0.conv1"]] = False
        return bits

    def ended(search, alpha, floor, patience, limits):
        return search._state(0, without_inner(search.masked), 1.0), True

    monkeypatch.setattr(Search, "reference", ended)
    head = 128
    limit = found(masked(), without_inner(masked()))["macs"] + head
    with pytest.raises(BudgetError, match="with a channel in every tensor"):
        learn(f"macs<={limit}", mode="reference")
    assert learn("macs<=1x", mode="reference").predicted.macs > limit
