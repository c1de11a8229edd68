"""Polynomials trained in turns: who learns when, which result is kept, and that a run goes on."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

from stripes import CLASSES, QUICK, Stripes, same
from tightrope import turns
from tightrope.errors import BundleError, InputError
from tightrope.evaluate import accuracy
from tightrope.graph import trace
from tightrope.methods.paf.library import paf
from tightrope.nn import PolynomialActivation
from tightrope.recipe import Recipe

SHAPE = (1, 8, 8)


class Residual(nn.Module):
    """Two activations, one behind an addition, and a layer that is called before its number says."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, CLASSES)
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.a = nn.ReLU()
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.b = nn.ReLU()
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(self.norm(self.first(x)))
        x = self.b(x + self.second(x))
        return self.head(self.pool(x).flatten(1))


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def exact() -> nn.Module:
    torch.manual_seed(0)
    return Residual().eval()


def without(names: Collection[str]) -> fx.GraphModule:
    """A rough ReLU, (x + 1)^2 / 4 in units of 4, in place of the activations that are not named."""
    net = exact()
    for name in {"a", "b"} - set(names):
        setattr(net, name, PolynomialActivation([[0.5, 2.0, 2.0]], gated=False, scale=4.0))
    return trace(net, SHAPE).module


def test_every_parameter_has_one_turn_in_the_order_of_execution() -> None:
    net = without(())
    first, second = turns.divide(net, progressive=True)
    assert first.coefficients == ("a.stages.0",) and second.coefficients == ("b.stages.0",)
    assert set(first.weights) == {"first.weight", "first.bias", "norm.weight", "norm.bias"}
    assert set(second.weights) == {"second.weight", "second.bias", "head.weight", "head.bias"}
    assert (first.later, second.later) == (("b",), ())
    (both,) = turns.divide(net, progressive=False)
    named = [name for name, _ in net.named_parameters()]
    assert sorted(both.coefficients + both.weights) == sorted(named)
    assert both.coefficients == ("a.stages.0", "b.stages.0") and both.later == ()


def test_coefficients_of_minimax_composites_have_no_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    net = without(())
    net.a = PolynomialActivation.relu(paf("7,7,13").stages, scale=4.0)
    first, second = turns.divide(net, progressive=True)
    assert first.coefficients == () and second.coefficients == ("b.stages.0",)
    assert not any(name.startswith("a.") for name in first.weights + second.weights)
    net.b = net.a
    fake = Fake(monkeypatch, [0.5, 0.5, 0.6, 0.4, 0.6])
    recipe = Recipe(epochs=8)
    turns.train(net, lambda names: net, Stripes(), "alternate", teacher=exact(), recipe=recipe)
    assert [len(learning) for learning, _, _ in fake.groups] == [8, 8]  # weights alone, twice


class Fake:
    """In place of `finetune` and `accuracy`: notes what may learn, and makes results as good as told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, reached: list[float]) -> None:
        self.groups: list[tuple[list[str], list[str], Recipe]] = []
        self.reached: Iterator[float] = iter(reached)
        monkeypatch.setattr(turns, "finetune", self.finetune)
        monkeypatch.setattr(turns, "accuracy", lambda net, data, split: next(self.reached))

    def finetune(self, net: nn.Module, data: Any, *, recipe: Recipe, log: Any, **_: Any) -> nn.Module:
        learning = [name for name, p in net.named_parameters() if p.requires_grad]
        there = [name for name, m in net.named_modules() if isinstance(m, PolynomialActivation)]
        self.groups.append((learning, there, recipe))
        if log is not None:
            log({"epoch": 1})
        tuned = copy.deepcopy(net)
        with torch.no_grad():
            for name, p in tuned.named_parameters():
                if name in learning:
                    p.add_(1.0)
        return tuned


def run(schedule: str, **more: Any) -> nn.Module:
    recipe = Recipe(epochs=8, seed=3)
    return turns.train(without(()), without, Stripes(), schedule, teacher=exact(), recipe=recipe, **more)


def test_progressive_replaces_one_activation_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, records = Fake(monkeypatch, []), list[dict[str, Any]]()
    tuned = run("progressive", log=records.append)
    assert [there for _, there, _ in fake.groups] == [["a"], ["a", "b"]]
    assert set(fake.groups[0][0]) == {"first.weight", "first.bias", "norm.weight", "norm.bias", "a.stages.0"}
    assert [r.epochs for _, _, r in fake.groups] == [4, 4]
    assert fake.groups[0][2].seed != fake.groups[1][2].seed
    assert [(r["turn"], r["learns"], r["epoch"]) for r in records] == [(1, "both", 1), (2, "both", 2)]
    before, after = without(()).state_dict(), tuned.state_dict()
    for name, _ in without(()).named_parameters():  # each once
        torch.testing.assert_close(after[name], before[name] + 1)
    assert all(p.requires_grad for p in tuned.parameters()) and not tuned.training


def learned(fake: Fake) -> str:
    return "".join("c" if "a.stages.0" in names else "w" for names, _, _ in fake.groups)


@pytest.mark.parametrize(
    ("reached", "phases", "kept"),
    [
        ([0.5, 0.6, 0.7, 0.8, 0.9], "cccc", "cccc"),  # as long as it gets better
        ([0.5, 0.4, 0.6, 0.3, 0.2], "cwwc", "w"),  # fails, switches, succeeds, fails, switches, fails
        ([0.5, 0.5, 0.5], "cw", ""),  # neither helps: the turn ends, with what it began with
        ([0.5, 0.6, 0.6, 0.7, 0.7], "ccww", "cw"),
    ],
)
def test_alternate_keeps_what_is_better_and_switches_else(
    monkeypatch: pytest.MonkeyPatch, reached: list[float], phases: str, kept: str
) -> None:
    fake = Fake(monkeypatch, reached)
    tuned = run("alternate")
    assert learned(fake) == phases
    assert all(r.epochs == 2 for _, _, r in fake.groups)
    assert not any({"a.stages.0", "first.weight"} <= set(names) for names, _, _ in fake.groups)
    before, after = without(()).state_dict(), tuned.state_dict()
    for name, key in (("a.stages.0", "c"), ("b.stages.0", "c"), ("first.weight", "w"), ("head.bias", "w")):
        torch.testing.assert_close(after[name], before[name] + kept.count(key))


@pytest.mark.parametrize("stop", range(8))
def test_an_interrupted_run_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stop: int) -> None:
    """Stopped within any group: the same groups follow, and the result is that of a run in one go."""
    begins = 0.5  # validation accuracy before each turn, which is asked again where a turn is begun again
    reached = [begins, 0.6, 0.7, 0.6, 0.6, begins, 0.4, 0.9, 0.8, 0.7]
    whole = Fake(monkeypatch, reached)
    expected = run("progressive+alternate")
    assert learned(whole)[:4] == "cccw" and len(whole.groups) == 8

    begun, path = Fake(monkeypatch, reached), tmp_path / "checkpoint.safetensors"
    left = iter(range(stop))

    def finetune(*args: Any, **kwargs: Any) -> nn.Module:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return begun.finetune(*args, **kwargs)

    monkeypatch.setattr(turns, "finetune", finetune)
    with pytest.raises(KeyboardInterrupt):
        run("progressive+alternate", checkpoint=path)
    monkeypatch.setattr(turns, "finetune", begun.finetune)
    if stop in (0, 4):
        begun.reached = chain([begins], begun.reached)
    tuned = run("progressive+alternate", checkpoint=path)
    assert same(tuned, expected)
    assert [(names, recipe) for names, _, recipe in begun.groups] == [
        (names, recipe) for names, _, recipe in whole.groups
    ]
    with pytest.raises(BundleError, match="another run"):
        run("progressive", checkpoint=path)


@pytest.mark.parametrize("schedule", turns.SCHEDULES[1:])
def test_it_learns(schedule: str) -> None:
    """For real: better than the rough polynomials that it began with."""
    recipe = replace(QUICK, epochs=32, lr=0.05, ema=0.9, label=1.0, distill=0.0, hints=0.0)
    model = without(())
    before = copy.deepcopy(model)
    tuned = turns.train(model, without, Stripes(), schedule, teacher=exact(), recipe=recipe)
    assert same(model, before)
    assert accuracy(tuned, Stripes(), "test") > accuracy(model, Stripes(), "test") + 0.2
    assert all(p.requires_grad for p in tuned.parameters())


def test_refusals() -> None:
    with pytest.raises(InputError, match="no such schedule"):
        run("joint")
    with pytest.raises(InputError, match="has none"):
        turns.train(trace(exact(), SHAPE).module, without, Stripes(), "progressive", teacher=exact())
    with pytest.raises(InputError, match="one process"):
        several = Recipe(devices=2)
        turns.train(without(()), without, Stripes(), "progressive", teacher=exact(), recipe=several)
