"""A search by training goes on only with its own settings, says how far it was, and may be forgotten."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from commands import call, refused
from tightrope.errors import BudgetError, InputError
from tightrope.shard import Shard
from tightrope.unfinished import RUN, going_on

RUN_A = {"set": {"width": 2, "lr": 0.1}, "budget": "drelus<=5%"}
Told = list[tuple[str, int, int]]


def work(
    place: Path, run: dict[str, Any] = RUN_A, epochs: int = 3, *, restart: bool = False, ends: Any = None
) -> Told:
    """A method that keeps a file after each of its epochs, then raises `ends`; what is told of it."""
    heard: Told = []

    def progress(what: str, done: int, of: int) -> None:
        heard.append((what, done, of))

    with going_on(place, run, progress, restart=restart, shard=Shard()) as told:
        file = place / "state"
        first = int(file.read_text()) if file.exists() else 0
        for done in range(first + 1, epochs + 1):
            place.mkdir(parents=True, exist_ok=True)
            file.write_text(str(done))
            told("training", done, 4)
        told("later", 1, 1)  # of which no file is kept
        if ends is not None:
            raise ends
    return heard


def test_the_same_search_goes_on_and_says_after_what(tmp_path: Path) -> None:
    place = tmp_path / "out" / "learning"
    with pytest.raises(KeyboardInterrupt):
        work(place, ends=KeyboardInterrupt())
    assert work(place, epochs=4) == [
        ("going on after an interruption, training", 3, 4), ("training", 4, 4), ("later", 1, 1)
    ]  # fmt: skip


def test_another_search_is_refused_by_the_names_of_its_settings(tmp_path: Path) -> None:
    place = tmp_path / "learning"
    work(place)
    before = {p: p.read_bytes() for p in place.iterdir()}
    other = {"set": {"width": 4, "lr": 0.1}, "budget": "drelus<=13%"}
    says = r"budget drelus<=5%, now drelus<=13%; set.width 2, now 4\n.*--restart(.|\n)*another --out"
    with pytest.raises(InputError, match=says):
        work(place, other)
    assert {p: p.read_bytes() for p in place.iterdir()} == before
    assert work(place, other, restart=True)[0] == ("training", 1, 4)
    assert json.loads((place / RUN).read_text())["run"] == other


def test_a_budget_that_no_network_met_leaves_nothing_but_what_was_there(tmp_path: Path) -> None:
    for place, epochs in ((tmp_path / "out" / "learning", 3), (tmp_path / "early" / "learning", 0)):
        with pytest.raises(BudgetError):
            work(place, epochs=epochs, ends=BudgetError("none"))
    assert not list(tmp_path.iterdir())
    (tmp_path / "bundle.json").touch()
    with pytest.raises(BudgetError):
        work(tmp_path / "learning", ends=BudgetError("none"))
    assert [p.name for p in tmp_path.iterdir()] == ["bundle.json"]


def test_other_errors_keep_what_was_trained(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        work(tmp_path / "learning", ends=InputError("disk full"))
    assert work(tmp_path / "learning")[0][1:] == (3, 4)


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    second = replace(Shard(), rank=1, world=2)
    (tmp_path / "state").touch()
    with going_on(tmp_path, RUN_A, lambda *_: None, restart=True, shard=second) as told:
        (tmp_path / "other").touch()
        told("training", 1, 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "state"]


def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a budget that training did not meet, another one may follow in the same place."""
    out, ones = tmp_path / "out", tmp_path / "ones.json"
    ones.write_text('{"default_1": 1, "default_2": 1}')
    small = ("space=1,1", "width=2", "operators=conv_1", "epochs=1", "limit=64", "samples=32", "recovery=0")
    words = [word for setting in (*small, f"relu_map={ones}") for word in ("--set", setting)]
    search = ("search", "--method", "seesaw", "--out", out, *words)
    refused(monkeypatch, capsys, *search, "--budget", "drelus<=5%", says="no network of the space meets")
    assert not out.exists()

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tightrope.methods.seesaw.method.recover", stop)
        assert call(patch, *search, "--budget", "drelus<=40%") == 130
    capsys.readouterr()
    other = (*search, "--budget", "drelus<=50%")
    refused(monkeypatch, capsys, *other, says="budget drelus<=40%, now drelus<=50%\n  try:     --restart")
    assert call(monkeypatch, *other, "--restart") == 0
    assert [p.name for p in out.iterdir() if p.is_dir()] == []
