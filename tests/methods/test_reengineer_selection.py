"""Which epoch is taken, on scripted histories; the front of a run."""

from __future__ import annotations

import math

import pytest
import torch

from tightrope.data import load, parse_task, view
from tightrope.errors import BudgetError, InputError
from tightrope.graph import trace
from tightrope.methods.reengineer import ReengineerMethod
from tightrope.methods.reengineer.search import Search
from tightrope.methods.reengineer.selection import Best, Fewest, Floor, front
from tightrope.models.resnet import ResNet
from tightrope.runtimes.plain import Plain
from tightrope.types import Budget


def run(history, floor=0.9, patience=None, wanted=0.0):
    rule = Fewest(floor, patience, wanted=wanted)
    seen = 0
    for accuracy, share in history:
        seen += 1
        if not rule.offer(accuracy, share, lambda k=seen: k):
            break
    return rule.result, seen


@pytest.mark.parametrize(
    ("history", "epoch"),
    [
        ([(0.95, 0.9), (0.91, 0.5), (0.89, 0.1)], 2),  # fewest that hold the floor
        ([(0.92, 0.5), (0.95, 0.5), (0.94, 0.5)], 2),  # ties go to the accuracy
        ([(0.95, 0.5004), (0.92, 0.5001)], 1),  # the same thousandth: fewer, but less accurate
        ([(0.92, 0.5001), (0.95, 0.5004)], 1),  # more accurate, but not fewer
        ([(0.92, 0.5004), (0.95, 0.5001)], 2),
        ([(0.90, 0.4)], 1),  # the floor itself holds
        ([(0.90, 1.0), (0.95, 1.0)], 2),  # nothing pruned yet: the accuracy decides
        ([(0.8, 0.5), (0.85, 0.3), (0.7, 0.2)], 2),  # no epoch holds: largest accuracy minus share
        ([(0.85, 0.1), (0.95, 0.9)], 2),  # the fallback is only for that case
    ],
)
def test_the_published_rule(history, epoch):
    assert run(history)[0] == epoch


def test_patience_counts_epochs_below_the_floor_once_it_was_reached():
    low = (0.5, 0.01)
    assert run([low] * 5 + [(0.95, 0.5), low, low, (0.95, 0.4)], patience=2) == (6, 8)
    assert run([(0.95, 0.5), low, (0.95, 0.4), low, (0.95, 0.3)], patience=2) == (5, 5)
    assert run([(0.95, 0.5), low, low, (0.95, 0.4)]) == (4, 4)


@pytest.mark.parametrize(
    ("history", "epoch"),
    [
        ([(0.91, 0.2), (0.95, 0.5), (0.92, 0.1)], 2),  # what is wanted goes before fewer weights
        ([(0.95, 0.5), (0.96, 0.4), (0.93, 0.3), (0.99, 0.35)], 4),  # of those that reach it, the fewest
        ([(0.94, 0.5), (0.90, 0.3), (0.89, 0.1)], 2),  # nothing does: the floor, as published
        ([(0.80, 0.5), (0.85, 0.3), (0.7, 0.2)], 2),  # nor that
        ([(0.95, 1.0), (0.94, 0.2)], 1),
    ],
)
def test_epochs_that_reach_what_is_wanted_above_the_floor_go_first(history, epoch):
    assert run(history, wanted=0.95)[0] == epoch


def test_patience_then_counts_epochs_below_what_is_wanted():
    assert run([(0.95, 0.5), (0.92, 0.4), (0.92, 0.3), (0.99, 0.2)], patience=2, wanted=0.95) == (1, 3)


def test_what_is_wanted_is_so_many_standard_errors_above_the_donor():
    assert Floor(0.9, 900, 2.0).wanted == pytest.approx(0.92)
    assert Floor(0.9, 900, 0.0).wanted == 0.9
    assert Floor(0.9, 9, 2.0).wanted == 1.0
    for wrong in ({"margin": 1.0}, {"mode": "reference", "margin": -1.0}):
        with pytest.raises(InputError, match="margin"):
            ReengineerMethod(**wrong)


@pytest.fixture
def scripted(monkeypatch):
    """A reference search of which epoch k keeps a script's share of the weights at a script's accuracy."""
    data = load("embedded")
    task = parse_task(data.classes, chosen="3")
    graph = trace(ResNet(8, ((8, 1, 2),), 10, 1).eval(), data.input_shape)

    def learn(history, budget, **config):
        left, rates = list(history), []

        def run(search, epoch, optimizers, fixed, penalty, after):
            for _ in range(search.per_epoch):
                after()
            rates.append(optimizers[0].param_groups[0]["lr"])
            with torch.no_grad():
                for score in search.masked.scores.values():
                    kept = torch.arange(score.numel()) < left[0][1] * score.numel()
                    score.copy_(kept.float().view(score.shape) - 0.5)

        monkeypatch.setattr(Search, "run", run)
        monkeypatch.setattr(Search, "accuracy", lambda search, bits: left.pop(0)[0])
        monkeypatch.setattr(
            "tightrope.methods.reengineer.method.donor_accuracy", lambda *_: {"restricted": 0.9}
        )
        method = ReengineerMethod(mode="reference", lr_head=0.1, epochs=len(left), controls=False, **config)
        learned = method.learn(graph, view(data, task), task=task, budget=Budget.parse(budget), cost=Plain())
        return learned, rates

    return learn


def test_epochs_beyond_the_budget_are_not_taken(scripted):
    history = [(0.99, 1.0), (0.97, 0.5), (0.91, 0.3), (0.89, 0.2)]
    assert scripted(history, "weights<=1x")[0].accuracy == 0.91
    assert scripted(history, "weights<=1x", margin=2.0)[0].accuracy == 0.97  # 0.9 + 2 * 0.0095
    assert scripted(history, "weights<=0.4x", margin=2.0)[0].accuracy == 0.91
    below = scripted(history, "weights<=0.25x")[0]
    assert below.accuracy == 0.89 and any("as accurate as the donor" in note for note in below.notes)
    reached = scripted(history, "weights<=0.4x")[0]
    assert not any("as accurate as the donor" in note for note in reached.notes)
    with pytest.raises(BudgetError, match="no network within"):
        scripted(history, "weights<=0.1x")


def test_learning_rates_fall_like_a_cosine_where_that_is_asked_for(scripted):
    history = [(0.95, 0.5)] * 4
    assert scripted(history, "weights<=1x")[1] == [0.1] * 4
    assert scripted(history, "weights<=1x", decay=True)[1] == pytest.approx(
        [0.05 * (1 + math.cos(math.pi * k / 4)) for k in (1, 2, 3, 4)]
    )


def test_best_takes_the_most_accurate_feasible_epoch():
    rule = Best()
    for k, (accuracy, feasible) in enumerate([(0.9, False), (0.7, True), (0.8, True), (0.75, True)]):
        rule.offer(accuracy, feasible, lambda k=k: k)
    assert rule.best == 2


def test_the_front_drops_what_another_point_beats():
    def point(w, m, a):
        return {"weights": w, "macs": m, "accuracy": a}

    a, b, c, d = point(1, 5, 0.5), point(2, 2, 0.6), point(2, 3, 0.6), point(9, 9, 0.9)
    assert front([d, c, b, a]) == [a, b, d]
