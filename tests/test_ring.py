"""Which ring a bundle runs in: found once, kept, read again, and really used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from commands import call, refused
from tightrope import ring
from tightrope.bundle import Bundle
from tightrope.errors import BundleError, InputError
from tightrope.runtimes.mpc import MPC


@pytest.fixture
def bundle(searched: Path, tmp_path: Path) -> Bundle:
    return Bundle.open(Path(shutil.copytree(searched, tmp_path / "bundle")))


def test_the_small_ring_is_run_and_its_choice_is_kept(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "run", bundle.path, "--count", "2", "--ring", "32", "--json") == 0
    body = json.loads(capsys.readouterr().out)
    kept = json.loads((bundle.path / "ring.json").read_text())
    config = body["measurement"]["config"]
    assert kept["fits"]
    assert config["ring_bits"] == 32
    assert all(config[key] == kept[key] for key in ("fraction_bits", "weight_bits"))
    assert bundle.measurements()[0]["config"]["ring_bits"] == 32
    monkeypatch.setattr(ring, "fit", None)  # a second choice would fail
    small = {key: config[key] for key in ("ring_bits", "fraction_bits", "weight_bits")}
    assert ring.settings(bundle, "32") == small
    assert ring.settings(bundle, "64") == {"ring_bits": 64}


def test_what_does_not_fit_or_is_not_precise_stays_in_the_large_ring(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unfit(*_: object) -> tuple[MPC, float]:
        raise InputError("no room")

    monkeypatch.setattr(ring, "fit", unfit)
    assert ring.settings(bundle, "auto") == {"ring_bits": 64}
    with pytest.raises(InputError, match="no room in the small ring"):
        ring.settings(bundle, "32")
    (bundle.path / "ring.json").unlink()
    rough = MPC(ring_bits=32, fraction_bits=6, weight_bits=6)
    monkeypatch.setattr(ring, "fit", lambda *_: (rough, 2 * ring.TOLERATED))
    assert ring.settings(bundle, "auto") == {"ring_bits": 64}
    assert ring.settings(bundle, "32")["fraction_bits"] == 6


def test_another_program_is_fitted_anew_and_a_damaged_file_refused(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring, "fit", lambda *_: (MPC(ring_bits=32, fraction_bits=9, weight_bits=9), 0.0))
    kept = {"program": "of another", "fits": True, "fraction_bits": 4, "weight_bits": 4, "max_abs_error": 0.0}
    (bundle.path / "ring.json").write_text(json.dumps(kept))
    assert ring.settings(bundle, "32")["fraction_bits"] == 9
    assert ring.settings(bundle, "auto")["ring_bits"] == 32
    (bundle.path / "ring.json").write_text('{"fits": 1}')
    with pytest.raises(BundleError, match="damaged"):
        ring.settings(bundle, "auto")


def test_wrong_rings_are_refused(
    searched: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(monkeypatch, capsys, "run", searched, "--ring", "48", says="64, 32, auto")
    refused(monkeypatch, capsys, "run", searched, "--runtime", "plain", "--ring", "32", says="--ring")
