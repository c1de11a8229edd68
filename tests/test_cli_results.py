"""What commands keep, refuse to overwrite, say when interrupted, and print for people and programs."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tightrope
from commands import QUICK, call, refused
from tightrope import cli
from tightrope.bundle import Bundle
from tightrope.lock import NAME as LOCK
from tightrope.lock import locked
from tightrope.recipe import Recipe
from tightrope.types import ADDITIVE, Cost
from tightrope.view import View, times

BRIEF = ("--epochs", "0.03", "--accelerator", "cpu")  # two steps


@pytest.fixture(scope="module")
def tuned(searched: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the bundle after a few steps of fine-tuning; shared by the tests that only read it."""
    copy = tmp_path_factory.mktemp("cli") / "tuned"
    shutil.copytree(searched, copy)
    (copy / "log.jsonl").write_text('{"epoch": 1, "of": "an older run"}\n')
    with pytest.MonkeyPatch.context() as patch:
        assert call(patch, "finetune", copy, *BRIEF) == 0
    return copy


def test_finetune_leaves_one_log_and_no_lock(tuned: Path) -> None:
    lines = [json.loads(line) for line in (tuned / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1] and "loss" in lines[0]
    assert not (tuned / "checkpoint.safetensors").exists() and not (tuned / LOCK).exists()
    assert set(Bundle.open(tuned).accuracy()) == {
        "validation_base", "validation_untuned", "validation", "recipe",
    }  # fmt: skip


def test_refine_solves_anew_and_starts_from_the_tuned_weights(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "refined"
    assert call(monkeypatch, "refine", tuned, "--out", out) == 0
    before, after = Bundle.open(tuned), Bundle.open(out)
    assert after.plan().budget == before.plan().budget
    assert after.plan().choices != before.plan().choices
    assert after.problem().meta["remeasured"] == 1
    start, weights = after.rewritten().state_dict(), before.model().state_dict()
    assert all(torch.equal(start[name], weights[name]) for name in weights)
    assert call(monkeypatch, "apply", out) == 0
    applied = after.model().state_dict()
    assert all(torch.equal(applied[name], weights[name]) for name in weights)
    assert call(monkeypatch, "solve", out, "--budget", "drelus<=6%", "--out", tmp_path / "other") == 0
    assert not (tmp_path / "other" / "start.safetensors").exists()


def test_refine_wants_a_fine_tuned_bundle_and_a_place_of_its_own(
    searched: Path,
    tuned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "refined"
    refused(monkeypatch, capsys, "refine", searched, "--out", out, says="tightrope finetune")
    assert not out.exists()
    refused(monkeypatch, capsys, "refine", tuned, "--out", tuned, says="a directory of its own")


def test_refine_names_what_a_learned_bundle_can_do_instead(
    searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(searched, tmp_path / "copy")
    plan = json.loads((copy / "plan.json").read_text())
    (copy / "problem.npz").unlink()
    for method, says in (
        ("seesaw", f"tightrope finetune {copy}"),
        ("reengineer", "the command that searched"),
    ):
        (copy / "plan.json").write_text(json.dumps(plan | {"method": method, "config": {}}))
        refused(monkeypatch, capsys, "refine", copy, "--out", tmp_path / "out", says=f"try:     {says}")


@pytest.mark.parametrize(
    ("expected", "spent", "told"),
    [
        (Cost(online_ms=4.6), Cost(online_ms=26.4), True),
        (Cost(online_ms=10, offline_ms=2), Cost(online_ms=10, offline_ms=3.1), True),
        (Cost(online_ms=10), Cost(online_ms=14.9), False),
        (Cost(), Cost(online_ms=5), False),  # nothing was predicted
    ],
)
def test_a_time_far_above_its_prediction_is_explained(
    expected: Cost, spent: Cost, told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    times(View(as_json=False), expected, spent)
    out = capsys.readouterr().out
    assert "predicted" in out and ("tightrope calibrate" in out) == told


@pytest.mark.parametrize("verb", ["search", "solve"])
def test_a_fine_tuned_network_is_not_overwritten_unasked(
    verb: str,
    searched: Path,
    tuned: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from tightrope import pipeline, replan

    def never(*args: object, **options: object) -> None:
        raise AssertionError("worked before finding out")

    monkeypatch.setattr(pipeline, "open_donor", never)
    monkeypatch.setattr(replan, "Chooser", never)
    before = {p.name: p.read_bytes() for p in tuned.iterdir() if p.is_file()}
    source = () if verb == "search" else (searched,)
    command = (verb, *source, "--budget", "drelus<=6%", "--out", tuned)
    refused(monkeypatch, capsys, *command, says="another --out, or --overwrite")
    assert {p.name: p.read_bytes() for p in tuned.iterdir() if p.is_file()} == before


def test_overwrite_replaces_a_fine_tuned_network(
    searched: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tuned, copy)
    command = ("solve", searched, "--budget", "drelus<=6%", "--out", copy, "--overwrite")
    assert call(monkeypatch, *command) == 0
    assert Bundle.open(copy).plan().budget == "drelus<=6%"
    assert not (copy / "accuracy.json").exists() and not (copy / "model.safetensors").exists()


def test_interrupted_while_the_accuracies_are_read_it_goes_on_from_the_trained_network(
    searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tightrope import pipeline, training

    copy = tmp_path / "copy"
    shutil.copytree(searched, copy)

    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "accuracy", interrupt)
        assert call(patch, "finetune", copy, *BRIEF) == 130
    assert "without --restart, goes on where it stopped" in capsys.readouterr().err
    monkeypatch.setattr(training.Training, "learn", interrupt)
    assert call(monkeypatch, "finetune", copy, *BRIEF) == 0
    assert len((copy / "log.jsonl").read_text().splitlines()) == 1
    assert not (copy / "checkpoint.safetensors").exists()


def test_two_writers(
    searched: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(searched):
        for command in (("finetune", searched), ("apply", searched)):
            refused(monkeypatch, capsys, *command, says="another command is writing this bundle")


@pytest.mark.slow
def test_of_several_processes_the_first_alone_writes_and_speaks(searched: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(searched, copy)
    command = [sys.executable, "-m", "tightrope.cli", "finetune", str(copy), *BRIEF, "--json"]
    done = subprocess.run(
        [*command, "--devices", "2", "--restart"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout).keys() == {"validation_base", "validation_untuned", "validation"}
    assert "error" not in done.stderr and "Traceback" not in done.stderr
    assert len((copy / "log.jsonl").read_text().splitlines()) == 1
    Bundle.open(copy).model()
    Bundle.open(copy).program()


@pytest.mark.parametrize(("verb", "keeps"), [("search", True), ("finetune", True), ("curve", False)])
def test_ctrl_c_says_what_is_kept(
    verb: str,
    keeps: bool,
    searched: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from tightrope import budgets, pipeline

    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    home, name = {"finetune": (pipeline, "train"), "curve": (budgets, "curve")}.get(verb, (pipeline, verb))
    monkeypatch.setattr(home, name, interrupt)
    command = (
        ("search", "--budget", "drelus<=9%", "--out", tmp_path) if verb == "search" else (verb, searched)
    )
    assert call(monkeypatch, *command) == 130
    captured = capsys.readouterr()
    assert "interrupted" in captured.err and captured.out == ""
    assert ("goes on where it stopped" in captured.err) == keeps


def test_an_interrupted_search_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tightrope.view import View

    @contextmanager
    def stopping(view: View) -> Iterator[Callable[[str, int, int], None]]:
        def update(what: str, done: int, of: int) -> None:
            raise KeyboardInterrupt

        yield update

    command = ("search", "--budget", "drelus<=12%", "--out", tmp_path / "out", *QUICK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(View, "progress", stopping)
        assert call(patch, *command) == 130
    kept = {p: p.read_bytes() for p in (tmp_path / "out" / "distortion").iterdir()}
    assert kept
    assert call(monkeypatch, *command) == 0
    assert {p: p.read_bytes() for p in kept} == kept
    assert "Traceback" not in capsys.readouterr().err


def test_search_speaks_where_there_is_no_terminal_but_not_with_json(
    searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(searched / "distortion", out / "distortion")
    for more, speaks in (((), True), (("--json",), False)):
        assert call(monkeypatch, "search", "--budget", "drelus<=12%", "--out", out, *QUICK, *more) == 0
        lines = capsys.readouterr().err.splitlines()
        if speaks:
            assert lines[0].startswith("reading") and re.match(r"exact check: (\d+) of \1 ", lines[-1])
        else:
            assert lines == []


def test_the_plan_predicts_only_what_adds_up(searched: Path) -> None:
    body = json.loads((searched / "plan.json").read_text())
    assert set(body["predicted"]) == set(body["baseline"]) == set(ADDITIVE)


NET = """
from torch import nn

def make(num_classes, in_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, num_classes),
    )
"""


def test_a_bundle_of_relative_paths_works_from_another_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also: an untrained network is warned of, and a path with a space is quoted."""
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for k in range(20):
            pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{k}.png")
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    command = (
        "search", "--model", "net.py:make", "--data", "images", "--image-size", "16",
        "--budget", "drelus<=0.5x", "--out", "my bundle", *QUICK,
    )  # fmt: skip
    assert call(monkeypatch, *command) == 0
    captured = capsys.readouterr()
    assert "no better than chance" in captured.err and "--weights" in captured.err
    assert "next: tightrope finetune 'my bundle'" in captured.out
    monkeypatch.chdir(tmp_path / "elsewhere")
    about = Bundle.open(tmp_path / "my bundle").about
    assert (about["model"], about["data"]) == (f"{tmp_path}/net.py:make", f"{tmp_path}/images")
    assert call(monkeypatch, "apply", tmp_path / "my bundle") == 0


def test_names_are_not_made_paths(searched: Path) -> None:
    about = Bundle.open(searched).about
    assert (about["model"], about["data"], about["root"]) == ("demo", "embedded", None)


def test_no_warning_of_a_trained_network(
    searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(searched / "distortion", out / "distortion")
    assert call(monkeypatch, "search", "--budget", "drelus<=12%", "--out", out, *QUICK) == 0
    assert "chance" not in capsys.readouterr().err


def test_the_version_and_the_defaults_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"tightrope {tightrope.__version__}\n"
    assert call(monkeypatch, "finetune", "--help") == 0
    shown = capsys.readouterr().out
    recipe = Recipe()
    for name in ("epochs", "lr", "batch_size", "hints", "precision", "accelerator"):
        line = next(line for line in shown.splitlines() if f"--{name.replace('_', '-')}" in line)
        assert f"[default: {getattr(recipe, name)}]" in line


def test_an_error_of_the_disk_names_the_file(
    searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object, **options: object) -> bytes:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tightrope.types.np.savez_compressed", full)
    out = tmp_path / "out"
    command = ("solve", searched, "--budget", "drelus<=6%", "--out", out)
    refused(monkeypatch, capsys, *command, says=f"No space left on device: {out / 'problem.npz'}")


def test_demo_prints_one_object_and_replaces_only_a_demo(
    searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[bool] = []

    def stub(name: str) -> Callable[..., dict[str, Any]]:
        def stage(*args: object, overwrite: bool = False, **options: object) -> dict[str, Any]:
            assert options["as_json"] is True
            seen.extend([overwrite] if name == "search" else [])
            return {"stage": name}

        return stage

    stages = ("search", "finetune", "run", "curve", "report")
    for name in stages:
        monkeypatch.setattr(cli, name, stub(name))
    own, other = tmp_path / "own", tmp_path / "other"
    for out, model in ((own, "demo"), (other, "resnet8")):
        out.mkdir()
        (out / "bundle.json").write_text(json.dumps({"model": model, "data": "embedded"}))
    for out in (own, other, tmp_path / "new"):
        assert call(monkeypatch, "demo", "--out", out, "--json") == 0
        body = json.loads(capsys.readouterr().out)
        assert body == {name: {"stage": name} for name in stages}
    assert seen == [True, False, False]
