"""Interrupted training goes on as if nothing had happened, or says clearly why it cannot."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from stripes import QUICK, Record, Stripes, network, same, without_time
from tightrope.errors import BundleError, InputError
from tightrope.finetune import finetune
from tightrope.nn import BlockReLU


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


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """As in a terminal: a process in the background is started with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
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
