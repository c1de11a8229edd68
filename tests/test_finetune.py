"""The training loop on a tiny network and data made up here."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tightrope.errors import BundleError, InputError
from tightrope.finetune import Recipe, accuracy, finetune, recalibrate
from tightrope.nn import BlockReLU
from tightrope.recipe import learning_rate

Record = dict[str, Any]
CLASSES = 4


@dataclass(frozen=True)
class Stripes:
    """Noise with a bright row: its position is the label. Calls `at` before every training batch."""

    train: int = 96
    at: Callable[[int], None] = lambda k: None
    name: str = "stripes"
    input_shape: tuple[int, int, int] = (1, 8, 8)

    def size(self, split: str) -> int:
        return {"train": self.train, "validation": 64, "test": 64}[split]

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        augment: bool = False,
        limit: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(len(split))
        y = torch.randint(0, CLASSES, (self.size(split),), generator=generator)
        x = torch.randn(len(y), 1, 8, 8, generator=generator) * 0.5
        x[torch.arange(len(y)), 0, 2 * y] += 1.0
        draws = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(y), generator=draws) if shuffle else torch.arange(len(y))
        if augment:
            x = x + 0.1 * torch.randn(x.shape, generator=draws)
        mine = order[:limit][rank::world]
        for k, part in enumerate(mine.split(batch_size)):
            if split == "train":
                self.at(k)
            yield x[part], y[part]


def network(seed: int = 0, patch: tuple[int, int] = (2, 2)) -> nn.Sequential:
    """Batch-norm, dropout and BlockReLU: everything whose state could be lost."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            BlockReLU([(1, 1), patch, (1, 2), (0, 0)] * 2),
            nn.Dropout(0.1),
            nn.Conv2d(8, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, CLASSES),
        ).eval()


QUICK = Recipe(epochs=3, batch_size=16, lr=0.1, ema=0.9, accelerator="cpu")


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def without_time(records: list[Record]) -> list[Record]:
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


# ---------------------------------------------------------------- what comes out


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


# ---------------------------------------------------------------- interruption


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("stop", [1, 5, 7])  # training batch: early, last of the epoch, next epoch
def test_resumes_to_the_same_losses_and_weights(tmp_path: Path, stop: int, ema: float) -> None:
    file, recipe = tmp_path / "run.safetensors", replace(QUICK, ema=ema)
    teacher = network(1)
    whole, parts = list[Record](), list[Record]()
    expected = finetune(network(), Stripes(), teacher=teacher, recipe=recipe, log=whole.append)

    count = 0

    def interrupt(_: int) -> None:
        nonlocal count
        count += 1
        if count == stop + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(
            network(),
            Stripes(at=interrupt),
            teacher=teacher,
            recipe=recipe,
            checkpoint=file,
            log=parts.append,
        )
    torch.manual_seed(99)  # a resumed run must not depend on the state of the process
    tuned = finetune(network(), Stripes(), teacher=teacher, recipe=recipe, checkpoint=file, log=parts.append)
    assert without_time(parts) == without_time(whole)
    assert same(tuned, expected)
    # Finished: called again, it only reads the result.
    again = finetune(network(), Stripes(), teacher=teacher, recipe=recipe, checkpoint=file, log=parts.append)
    assert same(again, expected)
    assert len(parts) == len(whole)


def test_interrupted_between_epochs(tmp_path: Path) -> None:
    file, records = tmp_path / "run.safetensors", list[Record]()

    def log(record: Record) -> None:
        records.append(record)
        if record["epoch"] == 2 and len(records) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(network(), Stripes(), recipe=QUICK, checkpoint=file, log=log)
    tuned = finetune(network(), Stripes(), recipe=QUICK, checkpoint=file, log=log)
    assert [r["epoch"] for r in records] == [1, 2, 3]
    assert same(tuned, finetune(network(), Stripes(), recipe=QUICK))


def test_ctrl_c_within_a_step_waits_for_its_end(tmp_path: Path) -> None:
    file = tmp_path / "run.safetensors"

    class Signals(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                Signals.calls += 1
                if Signals.calls == 4:
                    os.kill(os.getpid(), signal.SIGINT)
            return x

    def model() -> nn.Sequential:
        return nn.Sequential(*network(), Signals())

    with pytest.raises(KeyboardInterrupt):
        finetune(model(), Stripes(), recipe=QUICK, checkpoint=file)
    assert Signals.calls == 4
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    tuned = finetune(model(), Stripes(), recipe=QUICK, checkpoint=file)
    assert Signals.calls == 18
    assert same(tuned, finetune(model(), Stripes(), recipe=QUICK))


def test_broken_off_within_a_step_nothing_is_saved(tmp_path: Path) -> None:
    file = tmp_path / "run.safetensors"
    saved = list[bytes]()

    class Breaks(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                Breaks.calls += 1
                if Breaks.calls == 9:
                    raise KeyboardInterrupt
            return x

    with pytest.raises(KeyboardInterrupt):
        finetune(
            nn.Sequential(*network(), Breaks()), Stripes(), recipe=QUICK, checkpoint=file,
            log=lambda record: saved.append(file.read_bytes()),
        )  # fmt: skip
    assert saved == [file.read_bytes()]  # of the first epoch's end


def test_the_checkpoint_is_readable_without_pickle(tmp_path: Path) -> None:
    file = tmp_path / "new" / "run.safetensors"
    finetune(network(), Stripes(), recipe=replace(QUICK, epochs=1), checkpoint=file)
    tensors = load_file(file)
    assert {name.split("/")[0] for name in tensors} == {"net", "average", "momentum"}
    assert os.listdir(file.parent) == [file.name]  # nothing half-written beside it


# ---------------------------------------------------------------- refusals


def refused(file: Path, message: str, **changes: Any) -> None:
    """The call fails with this message and does not touch the checkpoint."""
    before = file.read_bytes()
    arguments = {"model": network(), "data": Stripes(), "recipe": QUICK} | changes
    with pytest.raises(BundleError, match=message):
        finetune(arguments.pop("model"), arguments.pop("data"), checkpoint=file, **arguments)
    assert file.read_bytes() == before


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("run") / "run.safetensors"
    finetune(network(), Stripes(), recipe=QUICK, checkpoint=file)
    return file.read_bytes()


def test_refuses_the_checkpoint_of_another_run(tmp_path: Path, finished: bytes) -> None:
    file = tmp_path / "run.safetensors"
    file.write_bytes(finished)
    refused(file, r"another run[\s\S]*recipe.lr 0.1, now 0.2", recipe=replace(QUICK, lr=0.2))
    refused(file, r"another run[\s\S]*model", model=network(1))
    swapped = network()
    *rest, last, final = swapped[2].patches
    swapped[2] = BlockReLU([*rest, final, last])  # the same patches on other channels
    refused(file, r"another run[\s\S]*model", model=swapped)
    refused(file, r"another run[\s\S]*teacher None, now", teacher=network())
    refused(file, r"another run[\s\S]*data.train 96, now 80", data=Stripes(train=80))


def test_refuses_a_damaged_checkpoint(tmp_path: Path, finished: bytes) -> None:
    file = tmp_path / "run.safetensors"
    flipped = bytearray(finished)
    flipped[-5] ^= 1
    for content in (b"", b"not a checkpoint", finished[: len(finished) // 2], finished[:-1], bytes(flipped)):
        file.write_bytes(content)
        refused(file, "the checkpoint is damaged")
    edited = finished.replace(rb"\"step\": 18", rb"\"step\": 12")
    assert edited != finished
    file.write_bytes(edited)
    refused(file, "the checkpoint is damaged")


def test_refuses_weights_that_are_no_checkpoint(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "run.safetensors"
    save_file({"net/0.weight": torch.zeros(3)}, file)
    refused(file, "damaged, or no checkpoint")


def test_a_place_that_cannot_be_written_shows_at_once(tmp_path: Path) -> None:
    def never(_: int) -> None:
        raise AssertionError("trained before finding out")

    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write the checkpoint"):
        finetune(network(), Stripes(at=never), recipe=QUICK, checkpoint=tmp_path / "file" / "run.safetensors")


def test_divergence_is_an_error_and_the_checkpoint_stays(tmp_path: Path) -> None:
    file = tmp_path / "run.safetensors"
    contents = list[bytes]()

    class Poison(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                Poison.calls += 1
                if Poison.calls == 9:
                    return x * torch.nan
            return x

    with pytest.raises(InputError, match=r"diverged[\s\S]*step 8[\s\S]*nan[\s\S]*learning rate below 0.1"):
        finetune(
            nn.Sequential(*network(), Poison()), Stripes(), recipe=QUICK, checkpoint=file,
            log=lambda record: contents.append(file.read_bytes()),
        )  # fmt: skip
    assert contents == [file.read_bytes()]  # of the first epoch's end


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
    with pytest.raises(InputError, match="this machine"):
        finetune(network(), Stripes(), recipe=replace(one_step, accelerator="abacus"))

    class Short(Stripes):
        def batches(self, *args: Any, **kwargs: Any) -> Iterator[tuple[Tensor, Tensor]]:
            yield from list(super().batches(*args, **kwargs))[:2]

    with pytest.raises(InputError, match="fewer batches"):
        finetune(network(), Short(), recipe=QUICK)


# ---------------------------------------------------------------- evaluation


def test_accuracy_is_exact() -> None:
    class Says(nn.Module):
        """Always class 1; notes that it is evaluated, and on which images."""

        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            assert not torch.is_grad_enabled()
            return torch.tensor([0.0, 1.0, 0.0, 0.0]).repeat(len(x), 1)

    model = Says().train()
    labels = torch.cat([y for _, y in Stripes().batches("test", 64)])
    assert accuracy(model, Stripes(), "test", batch_size=7) == int((labels == 1).sum()) / 64
    assert accuracy(model, Stripes(), "test", limit=10) == int((labels[:10] == 1).sum()) / 10
    assert model.training


def test_recalibrate_changes_the_batch_norm_buffers_only() -> None:
    model = network().train()
    model[3].eval()
    before = copy.deepcopy(model)
    batches = list(Stripes().batches("train", 32))
    recalibrate(model, batches)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before.state_dict()[k])}
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert model[1].momentum == before[1].momentum
    with torch.no_grad():
        outputs = [before[0](x) for x, _ in batches]
    means = torch.stack([o.mean(dim=(0, 2, 3)) for o in outputs]).mean(0)
    variances = torch.stack([o.var(dim=(0, 2, 3)) for o in outputs]).mean(0)
    assert torch.allclose(model[1].running_mean, means, atol=1e-6)
    assert torch.allclose(model[1].running_var, variances, atol=1e-6)


def test_recalibrate_without_batches_changes_nothing() -> None:
    model = network()
    before = copy.deepcopy(model)
    with pytest.raises(InputError, match="no batches"):
        recalibrate(model, [])
    assert same(model, before)
    recalibrate(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), [])  # nothing to estimate


# ---------------------------------------------------------------- several processes

SCRIPT = """
import sys, json, os, torch
sys.path.insert(0, sys.argv[1])
from test_finetune import *
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
