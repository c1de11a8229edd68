"""The command line from the outside: what it writes; bad input ends with status 2 and nothing written."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image

from commands import QUICK, call, refused
from tightrope.bundle import Bundle
from tightrope.cli import app
from tightrope.data import ASSETS


def test_search_writes_a_bundle_that_meets_the_budget(searched: Path) -> None:
    plan = Bundle.open(searched).plan()
    assert 0 < plan.predicted.drelus <= 0.12 * plan.baseline.drelus
    assert plan.bound <= plan.loss
    planned = Bundle.open(searched).program(weights=False)
    assert sum(getattr(op, "drelus", 0) for op in planned.ops) == plan.predicted.drelus


def test_json_output_is_one_object(
    searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        call(monkeypatch, "solve", searched, "--budget", "drelus<=6%", "--out", tmp_path / "six", "--json")
        == 0
    )
    body = json.loads(capsys.readouterr().out)
    assert body["predicted"]["drelus"] <= 0.06 * body["baseline"]["drelus"]


def test_run_plain_on_an_image(
    searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(searched, tmp_path / "copy")
    image = sorted(ASSETS.glob("sample_*.png"))[0]
    assert call(monkeypatch, "run", copy, "--runtime", "plain", "--image", image, "--json") == 0
    body = json.loads(capsys.readouterr().out)
    assert body["predictions"] == body["plain"]
    assert body["measurement"]["total"]["drelus"] == Bundle.open(searched).plan().predicted.drelus


@pytest.mark.slow
def test_a_run_that_reveals_the_label_shows_no_logits(
    searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(searched, tmp_path / "copy")
    assert call(monkeypatch, "run", copy, "--count", "3", "--reveal", "label", "--json") == 0
    body = json.loads(capsys.readouterr().out)
    assert body["predictions"] == body["plain"] and body["max_abs_error"] is None
    assert body["measurement"]["config"]["reveal"] == "label"
    assert call(monkeypatch, "report", copy) == 0
    assert "the client saw the label only" in (copy / "report.html").read_text()


def test_the_same_search_resumes(searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second search with the same measurement finds the saved distortions and runs no pass."""
    again = tmp_path / "again"
    shutil.copytree(searched, again)
    assert call(monkeypatch, "search", "--budget", "drelus<=20%", "--out", again, *QUICK) == 0
    assert Bundle.open(again).problem().meta["passes"] == 0


BAD: dict[str, tuple[tuple[Any, ...], str]] = {
    "budget that is no budget": (("--budget", "drelu=12"), "cannot read the budget"),
    "budget in an unknown quantity": (("--budget", "relus<=12%"), "drelus"),
    "impossible budget": (("--budget", "online_bytes<=1"), "online_bytes<="),
    "unknown model": (("--budget", "drelus<=12%", "--model", "resnt18"), "resnet18"),
    "missing model file": (("--budget", "drelus<=12%", "--model", "nowhere.py:net"), "nowhere.py"),
    "missing weights": (("--budget", "drelus<=12%", "--model", "resnet8", "--weights", "no.st"), "no.st"),
    "unknown data": (("--budget", "drelus<=12%", "--data", "fashon-mnist"), "fashion-mnist"),
    "unknown site pattern": (("--budget", "drelus<=12%", "--sites", "layer9.*"), "matches no site"),
    "unknown method": (("--budget", "drelus<=12%", "--method", "blockrelu"), "block_relu"),
    "unknown runtime": (("--budget", "drelus<=12%", "--runtime", "mpcc"), "mpc"),
    "nonsense samples": (("--budget", "drelus<=12%", "--samples", "0"), "samples"),
    "negative seed": (("--budget", "drelus<=12%", "--seed", "-1"), "seed"),
    "no devices": (("--budget", "drelus<=12%", "--devices", "0"), "devices must be positive"),
    "negative devices": (("--budget", "drelus<=12%", "--devices", "-1"), "devices must be positive"),
    "no machines": (("--budget", "drelus<=12%", "--nodes", "0"), "nodes must be positive"),
    "no such accelerator": (("--budget", "drelus<=12%", "--accelerator", "abacus"), "does not have these"),
    "an accelerator elsewhere": (
        ("--budget", "drelus<=12%", "--accelerator", "tpu"),
        "try:     --accelerator cpu",
    ),
    "nonsense choice": (("--budget", "drelus<=12%", "--max-pool", "zz"), "allowed: keep, avg"),
    "an option twice": (
        ("--budget", "drelus<=12%", "--seed", "2", "--set", "seed=1"),
        "a setting has two values\n  got:     --seed 2 and --set seed=1",
    ),
    "an option of others": (
        ("--budget", "drelus<=12%", "--method", "paf", "--no-repair"),
        "--no-repair is no option of the method paf\n  got:     --no-repair with --method paf\n"
        "  allowed: --method block_relu",
    ),
    "patterns of others": (
        ("--budget", "drelus<=12%", "--method", "reengineer", "--sites", "foo*"),
        "got:     --sites foo* with --method reengineer\n  allowed: --method block_relu or paf",
    ),
    "unpriced quantity": (("--budget", "power<=12%"), "offline_bytes, offline_ms, online_bytes"),
    "no budget at all": ((), "--budget"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_search(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args, says = BAD[name]
    quick = () if {"--samples", "--method"} & set(args) else QUICK
    refused(monkeypatch, capsys, "search", "--out", tmp_path / "out", *args, *quick, says=says)
    assert not (tmp_path / "out").exists()


def test_untraceable_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.f = nn.Linear(784, 10)\n"
        "    def forward(self, x):\n"
        "        x = x.flatten(1)\n"
        "        return self.f(x) if x.sum() > 0 else self.f(-x)\n"
        "def make():\n"
        "    return Net()\n"
    )
    model = f"{tmp_path / 'net.py'}:make"
    refused(
        monkeypatch, capsys, "search", "--budget", "drelus<=12%", "--model", model, "--out", tmp_path / "out",
        *QUICK, says="cannot trace",
    )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_python_runs_the_package_as_the_command_line(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "tightrope", "report", tmp_path / "none"], capture_output=True, text=True
    )
    assert ran.returncode == 2 and ran.stderr.startswith("error: no such bundle")


def test_output_that_is_not_a_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    refused(
        monkeypatch,
        capsys,
        "search",
        "--budget",
        "drelus<=12%",
        "--out",
        tmp_path,
        *QUICK,
        says="not a bundle",
    )
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "command",
    [
        *(
            ("search", "--budget", "drelus<=12%", "--method", m)
            for m in ("block_relu", "paf", "reengineer", "seesaw")
        ),
        ("binas", "--budget", "macs<=50%"),
        ("binas", "--budget", "macs<=50%", "--out", "fine", "--work"),
        ("measure",),
        ("calibrate",),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: tuple[str, ...],
) -> None:
    def never(*args: object, **options: object) -> None:
        raise AssertionError("read data")

    monkeypatch.setattr("tightrope.data.load", never)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    option = () if command[-1] == "--work" else ("--out",)
    refused(monkeypatch, capsys, *command, *option, "file/a/b", says="nothing can be written there")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("command", ["apply", "finetune", "run", "report", "curve"])
def test_no_bundle(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(monkeypatch, capsys, command, tmp_path / "none", says="no such bundle")


@pytest.mark.parametrize(
    "part", ["plan.json", "program.json", "program.safetensors", "base.safetensors", "bundle.json"]
)
def test_damaged_bundle(
    part: str,
    searched: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(searched, broken)
    data = (broken / part).read_bytes()
    (broken / part).write_bytes(data[: len(data) // 2])
    command = ("run", broken, "--runtime", "plain") if part.startswith("program") else ("apply", broken)
    refused(monkeypatch, capsys, *command, says="damaged")


def test_apply_keeps_a_fine_tuned_network_and_a_new_one_drops_old_measurements(
    searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(searched, copy)
    (copy / "measurements.json").write_text("[]")
    assert call(monkeypatch, "apply", copy) == 0
    assert f"next: tightrope run {copy} --runtime mpc\n" in capsys.readouterr().out
    assert not (copy / "measurements.json").exists()
    (copy / "accuracy.json").write_text("{}")
    before = (copy / "model.safetensors").read_bytes()
    refused(monkeypatch, capsys, "apply", copy, says="fine-tuned")
    assert (copy / "model.safetensors").read_bytes() == before


def test_bad_images(
    searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.png").write_text("not an image")
    Image.fromarray(np.zeros((40, 30), np.uint8)).save(tmp_path / "large.png")
    for name, says in (("none.png", "none.png"), ("text.png", "text.png"), ("large.png", "28")):
        refused(monkeypatch, capsys, "run", searched, "--image", tmp_path / name, says=says)
    refused(monkeypatch, capsys, "run", searched, "--count", "0", says="test images")
    refused(monkeypatch, capsys, "run", searched, "--runtime", "plain", "--port", "5000", says="--port")
    refused(monkeypatch, capsys, "run", searched, "--runtime", "plain", "--reveal", "label", says="--reveal")
    refused(monkeypatch, capsys, "run", searched, "--reveal", "lable", says="logits, label")


@pytest.mark.slow
def test_port_in_use(
    searched: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused(monkeypatch, capsys, "run", searched, "--port", port, says=str(port))


def test_nonsense_numbers_and_pairs(
    searched: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = sorted(ASSETS.glob("sample_*.png"))[0]
    for flag, value in (("--points", 0), ("--points", -3), ("--limit", 0), ("--limit", -1)):
        refused(monkeypatch, capsys, "curve", searched, flag, value, says="must be positive")
    refused(monkeypatch, capsys, "run", searched, "--image", image, "--count", "2", says="--count 2")
    refused(monkeypatch, capsys, "run", searched, "--resize", says="--resize without --image")
    refused(monkeypatch, capsys, "finetune", searched, "--devices", "0", says="devices")


def test_an_image_of_another_size_is_resized_when_asked(
    searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(searched, tmp_path / "copy")
    large = tmp_path / "large.png"
    Image.fromarray(np.zeros((40, 30), np.uint8)).save(large)
    command = ("run", copy, "--runtime", "plain", "--image", large)
    refused(monkeypatch, capsys, *command, says="--resize")
    assert call(monkeypatch, *command, "--resize") == 0


WRONG: dict[str, tuple[str, str]] = {
    "bundle.json": ('{"schema": 2, "num_classes": "x"}', "num_classes"),
    "accuracy.json": ('{"validation": "x"}', "validation"),
    "measurements.json": ('[{"runtime": "mpc", "batch": "x", "ops": [], "total": {}}]', "batch"),
    "curve.json": ('{"a": ' * 2000 + "1" + "}" * 2000, "nested"),
    "plan.json": ("[" * 100_000, "damaged"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_types_in_a_bundle(
    name: str,
    searched: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(searched, copy)
    text, says = WRONG[name]
    (copy / name).write_text(text)
    refused(monkeypatch, capsys, "report", copy, says=says)


def test_help_shows_every_word_of_it() -> None:
    from rich.text import Text

    commands = typer.main.get_command(app).commands.values()  # type: ignore[attr-defined]
    texts = [getattr(one, "help", None) or "" for command in commands for one in command.params]
    # brackets are markup unless escaped
    assert [text for text in texts if Text.from_markup(text).plain != text.replace("\\", "")] == []


def test_help_says_which_methods_have_an_option() -> None:
    from dataclasses import fields

    from tightrope.methods import METHODS, method_type

    search = typer.main.get_command(app).commands["search"]  # type: ignore[attr-defined]
    helps = {one.name: one.help for one in search.params}
    have = {name: {field.name for field in fields(method_type(name))} for name in METHODS}
    for option in ("sites", "samples", "repair", "verify", "max_pool", "relu6"):
        named = {name for name in METHODS if name in helps[option]}
        assert named == {name for name in METHODS if option in have[name]}
    assert all("seed" in known for known in have.values())
