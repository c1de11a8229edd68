"""The training loop: what it learns, reads, refuses, and how several processes share it."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stripes import CLASSES, QUICK, Record, Stripes, network, same
from tightrope.errors import InputError
from tightrope.finetune import Recipe, accuracy, finetune
from tightrope.recipe import learning_rate
from tightrope.training import objective


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_it_learns_and_leaves_its_inputs_alone(ema: float, capfd: pytest.CaptureFixture[str]) -> None:
    model, records = network(), list[Record]()
    model[1].train()  # a mode of its own, which must survive
    before, random_state = copy.deepcopy(model), torch.get_rng_state()
    tuned = finetune(model, Stripes(), recipe=replace(QUICK, epochs=6, ema=ema), log=records.append)
    assert same(model, before)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(m.training for m in tuned.modules())
    assert all(p.requires_grad and p.grad is None for p in tuned.parameters())
    assert tuned[2].patches == model[2].patches
    assert records[-1]["loss"] < 0.5 * records[0]["loss"]
    assert accuracy(model, Stripes(), "test") < 0.5
    assert accuracy(tuned, Stripes(), "test") > 0.9
    assert [r["epoch"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records] == [6, 12, 18, 24, 30, 36]
    assert set(records[0]) == {"epoch", "step", "loss", "validation_accuracy", "lr", "seconds"}
    assert records[-1]["validation_accuracy"] > 0.9
    assert capfd.readouterr() == ("", "")


def test_the_teacher_alone_can_teach() -> None:
    teacher = finetune(network(1), Stripes(), recipe=replace(QUICK, epochs=6))
    student = network(2, patch=(4, 4))
    recipe = replace(QUICK, epochs=12, lr=0.02, label=0.0, distill=1.0, hints=0.0)
    before = copy.deepcopy(teacher)
    tuned = finetune(student, Stripes(), teacher=teacher, recipe=recipe)
    assert same(teacher, before)
    assert accuracy(tuned, Stripes(), "test") > 0.9
    x = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = teacher(x).softmax(1)
        gaps = [float((m(x).softmax(1) - expected).abs().mean()) for m in (student, tuned)]
    assert gaps[1] < 0.5 * gaps[0]


def test_smoothed_labels_divide_a_share_among_all_classes() -> None:
    outputs, labels = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    recipe = replace(QUICK, label=1.0, smoothing=0.2)
    target = 0.8 * torch.nn.functional.one_hot(labels, 5) + 0.2 / 5
    expected = -(target * outputs.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(objective(outputs, labels, None, recipe), expected)


def test_same_seed_same_result() -> None:
    runs = [finetune(network(), Stripes(), recipe=replace(QUICK, epochs=1, seed=s)) for s in (0, 0, 1)]
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_what_is_read() -> None:
    """Every epoch has its own order; validation images come as they are; the test split never comes."""
    read = list[tuple[str, Record]]()

    class Watched(Stripes):
        def batches(self, split: str, batch_size: int, **kwargs: Any) -> Iterator[tuple[Tensor, Tensor]]:
            read.append((split, kwargs))
            return super().batches(split, batch_size, **kwargs)

    finetune(network(), Watched(), recipe=QUICK)
    finetune(network(), Watched(), recipe=replace(QUICK, seed=1))
    epochs = [kwargs for split, kwargs in read if split == "train" and kwargs.get("shuffle")]
    assert len({kwargs["seed"] for kwargs in epochs}) == 6
    held_out = [kwargs for split, kwargs in read if split == "validation"]
    assert len(held_out) == 6
    assert not any(kwargs.get("shuffle") or kwargs.get("augment") for kwargs in held_out)
    assert {split for split, _ in read} == {"train", "validation"}


def test_the_statistics_fit_the_final_weights() -> None:
    tuned = finetune(network(), Stripes(), recipe=replace(QUICK, epochs=1, augment=False))
    convolved = torch.cat([tuned[0](x) for x, _ in Stripes().batches("train", 96)])
    assert torch.allclose(tuned[1].running_mean, convolved.mean(dim=(0, 2, 3)), atol=1e-5)


def test_frozen_weights_stay() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    tuned = finetune(model, Stripes(), recipe=replace(QUICK, epochs=1))
    assert torch.equal(tuned[0].weight, model[0].weight)
    assert not torch.equal(tuned[4].weight, model[4].weight)


def test_part_of_an_epoch_and_a_limit() -> None:
    records = list[Record]()
    finetune(network(), Stripes(), recipe=replace(QUICK, epochs=1.5, limit=64), log=records.append)
    assert [r["step"] for r in records] == [4, 6]


def test_learning_rate() -> None:
    recipe = Recipe(lr=0.2, warmup=0.25)
    rates = [learning_rate(recipe, step, 16) for step in range(16)]
    assert rates[:5] == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2])
    assert rates[10] == pytest.approx(0.1)  # the middle of the cosine
    assert rates == sorted(rates[:4]) + sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.01
    assert learning_rate(Recipe(lr=1.0, warmup=0.0), 0, 5) == 1.0


def test_divergence_in_the_last_step_is_noticed() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))
    with pytest.raises(InputError, match="diverged"):
        finetune(model, Stripes(), recipe=replace(QUICK, epochs=1 / 6, lr=1e38, weight_decay=1e38))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs"),
        ({"epochs": math.nan}, "epochs"),
        ({"lr": -1.0}, "lr"),
        ({"batch_size": 0}, "batch_size"),
        ({"momentum": 1.0}, "momentum"),
        ({"ema": 1.0}, "ema"),
        ({"warmup": 1.0}, "warmup"),
        ({"temperature": 0.0}, "temperature"),
        ({"limit": 0}, "limit"),
        ({"seed": -1}, "seed"),
        ({"precision": "8-bit"}, "precision"),
        ({"label": 0.0, "distill": 0.0}, "learns from nothing"),
        ({"batch_size": 15, "devices": 2}, "divided"),
    ],
)
def test_refuses_bad_recipes(change: Record, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe(**change)


def test_refuses_what_does_not_fit() -> None:
    one_step = replace(QUICK, epochs=0.1)
    with pytest.raises(InputError, match="does not fit the data"):
        finetune(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), Stripes(), recipe=one_step)
    with pytest.raises(InputError, match="the teacher has other outputs"):
        teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 9))
        finetune(network(), Stripes(), teacher=teacher, recipe=one_step)
    with pytest.raises(InputError, match="nothing to train"):
        finetune(network().requires_grad_(False), Stripes(), recipe=one_step)
    with pytest.raises(InputError, match="this machine does not have"):
        finetune(network(), Stripes(), recipe=replace(one_step, accelerator="abacus"))

    class Short(Stripes):
        def batches(self, *args: Any, **kwargs: Any) -> Iterator[tuple[Tensor, Tensor]]:
            yield from list(super().batches(*args, **kwargs))[:2]

    with pytest.raises(InputError, match="fewer batches"):
        finetune(network(), Short(), recipe=QUICK)


SCRIPT = """
import atexit, sys, json, os, torch
atexit.register(lambda: print("still joined") if torch.distributed.is_initialized() else None)  # runs last
from dataclasses import replace
from torch import nn
sys.path.insert(0, sys.argv[1])
from stripes import *
from tightrope.finetune import finetune
seen = []
class Watched(Stripes):
    def batches(self, split, batch_size, **kwargs):
        seen.append((split, batch_size, kwargs.get("rank"), kwargs.get("world")))
        return super().batches(split, batch_size, **kwargs)
records = []
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
with torch.no_grad():
    model[1].weight.zero_(); model[1].bias.zero_()
recipe = replace(QUICK, devices=int(sys.argv[3]), ema=0.0)
tuned = finetune(model, Watched(), recipe=recipe, log=records.append)
again = finetune(model, Watched(), recipe=recipe)
rank = os.environ.get("LOCAL_RANK", "0")
result = {"weight": tuned[1].weight.tolist(), "again": same(tuned, again), "records": records, "seen": seen}
open(f"{sys.argv[2]}/{sys.argv[3]}-{rank}.json", "w").write(json.dumps(result))
"""


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Every gradient is the mean over both halves of the batch, so the weights are those of one process."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-W", "error::UserWarning", str(script), str(Path(__file__).parent)]
    for devices in ("1", "2"):
        done = subprocess.run([*command, str(tmp_path), devices], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert (done.stdout, done.stderr) == ("", "")
    one, first, second = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("1-0", "2-0", "2-1"))
    assert first["weight"] == second["weight"]
    assert torch.allclose(torch.tensor(first["weight"]), torch.tensor(one["weight"]), atol=1e-5)
    assert all(result["again"] for result in (one, first, second))
    assert [r["loss"] for r in first["records"]] == pytest.approx(
        [r["loss"] for r in one["records"]], rel=1e-4
    )
    assert second["records"] == []
    for rank, result in ((0, first), (1, second)):
        assert ["train", 8, rank, 2] in result["seen"]
        assert ["validation", 500, rank, 2] in result["seen"]
        assert not any(split == "test" for split, *_ in result["seen"])
