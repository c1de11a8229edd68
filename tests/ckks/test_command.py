"""`tightrope run --runtime ckks`: what it shows before and after, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from commands import call, refused
from tightrope.bundle import Bundle
from tightrope.data import load
from tightrope.lower import lower
from tightrope.nn import PolynomialActivation
from tightrope.program import Program
from tightrope.runtimes.plain import ranges

RUN = ("--runtime", "ckks")


def calibrated(act: nn.Module, layers: int = 1, largest: float = 1.0) -> Program:
    torch.manual_seed(0)
    deeper = [part for _ in range(layers - 1) for part in (nn.Conv2d(2, 2, 1), act)]
    net = nn.Sequential(nn.Conv2d(1, 2, 5, 4), act, *deeper, nn.Flatten(), nn.Linear(72, 10))
    x = next(iter(load("embedded").batches("train", 64)))[0]
    return ranges(lower(net.eval(), (1, 28, 28)), [largest * x])


@pytest.fixture
def polynomials(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes every bundle hold a network that CKKS can execute."""

    def give(program: Program) -> None:
        monkeypatch.setattr(Bundle, "program", lambda self, weights=True: program)

    quadratic = PolynomialActivation([[0.2, 0.5, 0.2]], gated=False)
    give(calibrated(quadratic))
    return give


@pytest.fixture
def own(searched: Path, tmp_path: Path) -> Path:
    """A copy of the bundle, for runs that keep their measurement."""
    return Path(shutil.copytree(searched, tmp_path / "own"))


def test_simulation_shows_parameters_first_and_keeps_no_measurement(
    polynomials: Any, searched: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = len(Bundle.open(searched).measurements())
    options = ("--mode", "simulate", "--scale-bits", "38", "--log-n", "15", "--count", "2", "--json")
    assert call(monkeypatch, "run", searched, *RUN, *options) == 0
    captured = capsys.readouterr()
    assert "ring degree 2^15, scale 2^38" in captured.err and "881 allowed" in captured.err
    assert "memory" in captured.err
    body = json.loads(captured.out)
    assert body["predictions"] == body["plain"] and body["max_abs_error"] < 1e-9
    config = body["measurement"]["config"]
    assert config["levels_planned"] == body["measurement"]["total"]["ckks_levels"]
    assert call(monkeypatch, "run", searched, *RUN, *options[:-1]) == 0
    assert "simulated steps: 6 of 6" in capsys.readouterr().err  # two sums and the square between them, twice
    assert 0 < config["predicted_error"] < 1e-3
    assert len(Bundle.open(searched).measurements()) == before


def test_an_estimate_tells_memory_and_levels(
    polynomials: Any, searched: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "run", searched, *RUN, "--estimate") == 0
    shown = capsys.readouterr().out
    assert "ring degree 2^14, scale 2^40" in shown and "memory" in shown and "levels" in shown
    assert "no bootstraps" in shown
    assert call(monkeypatch, "run", searched, *RUN, "--estimate", "--memory-gb", "0.5") == 0
    assert "would be refused here: 0.5 GB allowed" in capsys.readouterr().out
    assert call(monkeypatch, "run", searched, *RUN, "--estimate", "--memory-gb", "500") == 0
    assert "refused" not in capsys.readouterr().out


def test_bootstraps_are_shown_before_and_after_a_run(
    polynomials: Any, own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    polynomials(calibrated(PolynomialActivation([[0.2, 0.5, 0.2]], gated=False), layers=3))
    always = (*RUN, "--bootstrap", "always", "--refresh-levels", "3")
    assert call(monkeypatch, "run", own, *always, "--estimate", "--json") == 0
    about = json.loads(capsys.readouterr().out)["about"]
    found = re.search(r"(\d+) bootstraps \(after ([\w, ]+)\) with keys", about)
    assert found is not None and int(found[1]) == len(found[2].split(", ")) > 0
    assert call(monkeypatch, "run", own, *always, "--mode", "simulate") == 0
    said = f"bootstraps of ciphertexts, per image: {found[1]} planned, {found[1]} executed"
    shown = capsys.readouterr().out
    assert said in shown and "of the polynomials alone" not in shown
    assert call(monkeypatch, "run", own, "--runtime", "plain") == 0
    shown = capsys.readouterr().out
    assert "levels: of the polynomials alone" in shown and "bootstraps" not in shown


def test_values_beyond_the_calibrated_range_are_counted_and_warned_of(
    polynomials: Any, own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    polynomials(calibrated(PolynomialActivation([[0.2, 0.5, 0.2]], gated=False), largest=0.3))
    assert call(monkeypatch, "run", own, *RUN, "--mode", "simulate", "--json") == 0
    captured = capsys.readouterr()
    assert captured.err.count("warning: values outside the calibrated range") == 1
    simulated = json.loads(captured.out)["measurement"]["config"]["beyond_range"]
    assert sum(simulated.values()) > 0
    assert call(monkeypatch, "run", own, "--runtime", "plain", "--json") == 0
    captured = capsys.readouterr()
    assert captured.err.count("warning: values outside the calibrated range") == 1
    assert json.loads(captured.out)["measurement"]["config"]["beyond_range"] == simulated


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--log-n", "13"), "no such ring"),
        (("--scale-bits", "60"), "scale_bits is out of range"),
        (("--memory-gb", "0.5"), "needs more memory than allowed"),
        (("--memory-gb", "-1"), "--memory-gb is out of range"),
        (("--memory-gb", "0"), "--memory-gb is out of range"),
        (("--memory-gb", "nan"), "--memory-gb is out of range"),
        (("--memory-gb", "inf"), "--memory-gb is out of range"),
        (("--mode", "dream"), "unknown mode"),
        (("--bootstrap", "sometimes"), "auto, always, never"),
        (("--refresh-levels", "40"), "refresh_levels is out of range"),
        (("--refresh-levels", "5"), "where none is needed"),
        (("--refresh-levels", "5", "--bootstrap", "never"), "levels after a bootstrap, where there is none"),
        (("--ring", "32"), "--ring is an option of the mpc runtime"),
    ],
)
def test_bad_options_are_refused(
    options: tuple[str, ...],
    says: str,
    polynomials: Any,
    searched: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refused(monkeypatch, capsys, "run", searched, *RUN, *options, says=says)


def test_options_of_ckks_are_refused_elsewhere(
    searched: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for option in (("--mode", "simulate"), ("--log-n", "14"), ("--memory-gb", "1")):
        refused(monkeypatch, capsys, "run", searched, *option, says=f"{option[0]} is an option of the ckks")


def test_a_quadratic_without_a_square_is_refused_and_evaluated_with_a_level_more(
    polynomials: Any, searched: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    polynomials(calibrated(PolynomialActivation([[0.2, 0.5, 0.0]], gated=False)))
    options = ("--mode", "simulate", "--json")
    refused(monkeypatch, capsys, "run", searched, *RUN, *options, says="--no-squares")
    refused(monkeypatch, capsys, "run", searched, *RUN, "--estimate", says="a quadratic has hardly a square")
    assert call(monkeypatch, "run", searched, *RUN, "--estimate", "--no-squares") == 0
    capsys.readouterr()
    assert call(monkeypatch, "run", searched, *RUN, *options, "--no-squares") == 0
    body = json.loads(capsys.readouterr().out)
    assert body["measurement"]["total"]["ckks_levels"] == 1 + 2 + 1 and body["max_abs_error"] < 1e-9


def test_too_few_levels_in_an_insecure_ring_are_refused_with_both_values(
    polynomials: Any, searched: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    polynomials(calibrated(PolynomialActivation([[0.2, 0.5, 0.2]], gated=False), layers=5))
    refused(monkeypatch, capsys, "run", searched, *RUN, "--log-n", "14", says="8 levels for N = 2^14")


@pytest.mark.slow
def test_crosscheck_computes_with_the_other_library_and_keeps_no_measurement(
    polynomials: Any, searched: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tenseal")
    before = len(Bundle.open(searched).measurements())
    assert call(monkeypatch, "run", searched, *RUN, "--mode", "crosscheck", "--json") == 0
    captured = capsys.readouterr()
    assert "ckks, crosscheck" in captured.err
    body = json.loads(captured.out)
    assert body["predictions"] == body["plain"] and 0 < body["max_abs_error"] < 1e-3
    assert body["measurement"]["config"]["mode"] == "crosscheck"
    assert len(Bundle.open(searched).measurements()) == before
