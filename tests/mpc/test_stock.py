"""Material on disk: used once whatever crashes, given once, within its quota, and nobody else may read it."""

from __future__ import annotations

import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from tightrope.errors import InputError, ProtocolError
from tightrope.runtimes.mpc import stock
from tightrope.runtimes.mpc.settings import StockSettings
from tightrope.runtimes.mpc.stock import About, Lot, Stock, batch_file

NAME = "ab" * 16
TERMS = {"program": "p"}


def settings(home: Path, **changed: Any) -> StockSettings:
    return StockSettings(**{"directory": home / "stock", "quota_bytes": 1 << 30, **changed})


def filled(home: Path, batches: int = 3, name: str = NAME) -> Stock:
    """A stock with one lot whose batch k holds k times its own number."""
    made = Stock(settings(home))
    with made.adding(name, About(TERMS, 1, batches, made.owner), 0) as directory:
        for number in range(1, batches + 1):
            content = bytes([number]) * number
            seal = sha256(f"{name} {number} ".encode() + content).digest()
            (directory / batch_file(number)).write_bytes(content + seal)
    return made


def lot_of(made: Stock) -> Lot:
    lot = made.get(NAME)
    assert lot is not None
    return lot


def reopened(made: Stock) -> Stock:
    made.close()
    return Stock(made.settings)


def test_a_batch_is_given_once_and_numbers_never_go_back(tmp_path: Path) -> None:
    made = filled(tmp_path)
    assert lot_of(made).take(2)[:-32] == b"\2\2"
    for number in (1, 2, 0, -1, 4):
        with pytest.raises(ProtocolError, match="used or was never there"):
            lot_of(made).take(number)
    made = reopened(made)
    assert lot_of(made).next == 3
    with pytest.raises(ProtocolError, match="used or was never there"):
        lot_of(made).take(2)
    assert lot_of(made).take(3)[:-32] == b"\3\3\3"
    assert not made.lots(TERMS, made.owner)
    assert {f.name for f in (made.path / NAME).iterdir()} == {"lot.json", "next"}  # skipped ones are gone too
    assert reopened(made).get(NAME) is None


@pytest.mark.parametrize("call", ["os.open", "os.fsync", "os.replace", "mmap.mmap", "Path.unlink", "after"])
def test_a_crash_between_commit_and_use_wastes_the_batch_and_never_repeats_it(
    tmp_path: Path, call: str
) -> None:
    """The process ends at each system call of `take` in turn. What it had in its hands, no later one gets."""
    used = []
    for crash_at in range(1, 8):
        home = tmp_path / str(crash_at)
        made = filled(home)
        made.close()
        pid = os.fork()
        if pid == 0:
            _die_at(call, crash_at, made.settings)
        survived = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        again = Stock(made.settings)
        got = (home / "used").exists()  # the child had the material in its hands
        assert survived <= got
        following = lot_of(again).next
        assert following == 2 if got else following in (1, 2)
        if following == 2:
            with pytest.raises(ProtocolError):
                lot_of(again).take(1)
        else:
            assert lot_of(again).take(1)[:-32] == b"\1"
        assert lot_of(again).take(2)[:-32] == b"\2\2"
        again.close()
        used.append(got)
        if survived:
            break
    assert used[-1] or call == "after"


def _die_at(call: str, count: int, where: StockSettings) -> None:
    """In a child process: take batch 1, and end without any clean-up at the count-th `call`."""
    lot = lot_of(Stock(where))
    left = [count]

    def dying(usual: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)
            return usual(*args, **options)

        return called

    owner: Any = {"os": os, "mmap": stock.mmap, "Path": Path}.get(call.split(".")[0])
    if owner is not None:
        name = call.split(".")[1]
        setattr(owner, name, dying(getattr(owner, name)))
    material = lot.take(1)
    (where.directory.parent / "used").write_bytes(material[:])
    os._exit(9 if call == "after" else 0)


def test_interrupted_and_damaged_lots_are_deleted_and_old_ones_too(tmp_path: Path) -> None:
    made = filled(tmp_path)
    with pytest.raises(RuntimeError), made.adding("cd" * 16, About(TERMS, 1, 1), 0) as directory:
        (directory / "x").write_bytes(b"x")
        raise RuntimeError
    assert made.get("cd" * 16) is None and not list(made.path.glob(".*"))
    for name in (".unfinished-" + "cd" * 16, ".given-" + "ef" * 16):
        (made.path / name).mkdir()
    for name, content in (("12" * 16, "not json"), ("34" * 16, "[]"), ("56" * 16, '{"schema": 1}')):
        (made.path / name).mkdir()
        (made.path / name / "lot.json").write_text(content)
        (made.path / name / "next").write_text("1")
    made = reopened(made)
    assert {p.name for p in made.path.iterdir()} == {NAME, "lock", "owner", "seen"}
    for damage in ("0", "-5", "", "one"):
        (made.path / NAME / "next").write_text(damage)
        assert stock._load(made.path / NAME) is None
    (made.path / NAME / "next").write_text("1")
    made.close()
    assert Stock(settings(tmp_path, keep_days=1e-9)).get(NAME) is None


def test_a_directory_that_was_meant_for_something_else_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A home directory, say: it is as private as a stock, and full of names with dots."""
    home = tmp_path / "stock"
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh" / "id").write_text("x")
    (home / ".profile").write_text("x")
    home.chmod(0o700)
    Stock(settings(tmp_path)).close()
    assert (home / ".ssh" / "id").exists() and (home / ".profile").exists()
    another = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: another)
    with pytest.raises(InputError, match="belongs to another user"):
        Stock(settings(tmp_path))


def test_a_stock_whose_name_is_damaged_is_refused(tmp_path: Path) -> None:
    Stock(settings(tmp_path)).close()
    for damage in (b"", b"\xff" * 16, b"../" * 10):
        (tmp_path / "stock" / "owner").write_bytes(damage)
        with pytest.raises(InputError, match="the stock is damaged"):
            Stock(settings(tmp_path))


def test_lots_become_too_old_while_a_service_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = filled(tmp_path)
    assert made.lots(TERMS, made.owner)
    monkeypatch.setattr(stock.time, "time", lambda now=stock.time.time: now() + 31 * stock.DAY_S)
    assert not made.lots(TERMS, made.owner) and not (made.path / NAME).exists()
    made = filled(tmp_path / "dealer")
    monkeypatch.setattr(stock.time, "time", lambda now=stock.time.time: now() + 31 * stock.DAY_S)
    assert made.claim(lambda lot: True) is None


def test_a_lot_never_comes_twice_not_even_when_the_first_is_gone(tmp_path: Path) -> None:
    """As a dealer would send it that was restored from a backup."""
    made = filled(tmp_path)
    made.forget(lambda lot: True)
    made = reopened(made)
    about = About(TERMS, 1, 1)
    with pytest.raises(ProtocolError, match="no name for a new lot"), made.adding(NAME, about, 0):
        pass


def test_a_damaged_or_missing_batch_is_an_error_and_stays_used(tmp_path: Path) -> None:
    made = filled(tmp_path, batches=7)
    files = [made.path / NAME / batch_file(number) for number in range(1, 7)]
    whole = [file.read_bytes() for file in files]
    files[0].write_bytes(b"")
    files[1].unlink()
    files[2].write_bytes(whole[2][:-1])  # truncated
    files[3].write_bytes(whole[3] + b"x")
    files[4].write_bytes(bytes([whole[4][0] ^ 1]) + whole[4][1:])  # one bit fell over
    files[5].write_bytes(whole[4])  # another batch's
    for number in range(1, 7):
        with pytest.raises(ProtocolError, match="cannot be read"):
            lot_of(made).take(number)
    assert lot_of(made).take(7)[:-32] == b"\7" * 7


def test_lots_that_come_at_the_same_time_share_the_quota(tmp_path: Path) -> None:
    made = Stock(settings(tmp_path, quota_bytes=1000))
    about = About(TERMS, 1, 1)
    with made.adding("ab" * 16, about, 600) as directory:
        (directory / batch_file(1)).write_bytes(bytes(500))
        with pytest.raises(InputError, match=r"quota[\s\S]*got: +6\d\d bytes there"):
            made.check_room(400)
        made.check_room(300)
        with pytest.raises(InputError, match="quota"), made.adding("cd" * 16, about, 400):
            pass
    made.check_room(100)  # 500 and the lot's own two files
    with pytest.raises(InputError, match="quota"):
        made.check_room(499)


def test_names_are_checked_and_a_lot_is_claimed_once(tmp_path: Path) -> None:
    made = filled(tmp_path)
    for name in ("../" + "ab" * 15, NAME, "AB" * 16, ""):
        with pytest.raises(ProtocolError, match="no name"), made.adding(name, About(TERMS, 1, 1), 0):
            pass
    lot = made.claim(lambda lot: True)
    assert lot is not None and lot.name == NAME and made.claim(lambda lot: True) is None
    made = reopened(made)  # a crash before it was discarded
    assert made.get(NAME) is None and not list(made.path.glob(".*"))
