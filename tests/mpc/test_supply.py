"""Lots between three parties: given once, used once, within their quotas, and nobody else may read them."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deployment import Deployment, deployed
from test_deployment import check, wait_for

from tightrope.errors import InputError, ProtocolError
from tightrope.program import Program
from tightrope.runtimes.mpc import MPC, compile_program, costs, service, supply, team
from tightrope.runtimes.mpc.stock import Lot, Stock, batch_file


def test_the_counter_is_on_disk_and_the_file_gone_before_the_first_byte_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    d = deployed(tmp_path, stock="ready = 0")
    seen = []
    usual = supply.FileSource.recv_into

    def recv_into(self: Any, target: memoryview, silence_s: float | None = None) -> None:
        for role in ("client", "server"):
            lots = [p for p in (tmp_path / f"stock-{role}").iterdir() if p.is_dir()]
            seen.append([(p / "next").read_text() for p in lots])
            assert not (lots[0] / batch_file(1)).exists() or role != "client"
        usual(self, target, silence_s)

    with d.service("server"), d.service("dealer"):
        d.fetch(1, 2)
        monkeypatch.setattr(supply.FileSource, "recv_into", recv_into)
        check(d, 1)
    assert seen and ["1"] not in seen[::2]  # the client's, which commits first


def test_the_stock_is_private_and_held_by_one_process(tmp_path: Path) -> None:
    d = deployed(tmp_path, stock="ready = 0")
    with d.service("server"), d.service("dealer") as dealer:
        dealer.house.maker().make(1, 2)
        d.fetch(2, 1)
        for role in ("client", "server", "dealer"):
            top = tmp_path / f"stock-{role}"
            found = [top, *top.rglob("*")]
            assert len(found) > 5
            assert {stat.S_IMODE(p.stat().st_mode) for p in found if p.is_dir()} == {0o700}
            assert {stat.S_IMODE(p.stat().st_mode) for p in found if p.is_file()} == {0o600}
        with pytest.raises(InputError, match="another process uses this stock"):
            Stock(dealer.house.kept().settings)
    (tmp_path / "stock-client").chmod(0o750)
    with pytest.raises(InputError, match=r"others may read[\s\S]*chmod 700"):
        d.client()


@pytest.fixture
def stocked(tmp_path: Path) -> Iterator[Deployment]:
    """Client and server have a lot of 4 batches of 1; the dealer is off-line."""
    d = deployed(tmp_path, stock="ready = 0", limits="connect_s = 1")
    with d.service("dealer"), d.service("server"):
        d.fetch(1, 4)
    yield d


def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """(role, lot, number) of every batch used from now on."""
    uses: list[tuple[str, str, int]] = []
    usual = Lot.take

    def take(self: Lot, number: int) -> Any:
        material = usual(self, number)
        uses.append((self.path.parent.name.removeprefix("stock-"), self.name, number))
        return material

    monkeypatch.setattr(Lot, "take", take)
    return uses


def test_inference_without_the_dealer_costs_what_was_predicted(stocked: Deployment) -> None:
    predicted = costs(stocked.program, MPC(), 1)
    with stocked.service("server"):
        measured = check(stocked, 3)
        assert measured.host["mode"] == "stock"
        assert measured.links == {link: 3 * count for link, count in predicted.links.items()}
        assert measured.offline_links == {k: 3 * v for k, v in predicted.offline_links.items()}
        with pytest.raises(ProtocolError, match="dealer"):  # one batch is left, and nobody to make more
            check(stocked, 2)
        check(stocked, 1)
        with pytest.raises(ProtocolError, match="dealer"):
            check(stocked, 1)


def test_the_files_are_as_long_as_predicted(stocked: Deployment) -> None:
    schedule = compile_program(stocked.program, MPC())
    for role in ("client", "server"):
        files = [f for f in (stocked.home / f"stock-{role}").rglob("00000*") if f.is_file()]
        assert len(files) == 4
        assert {f.stat().st_size for f in files} == {supply.batch_bytes(schedule, 1, role)}  # type: ignore[arg-type]


@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.parametrize("command", ["offline", "online"])
def test_material_of_a_failed_batch_is_never_used_again(
    stocked: Deployment, monkeypatch: pytest.MonkeyPatch, role: str, command: str
) -> None:
    uses = taken(monkeypatch)
    usual = team.Worker.obey
    fail = [True]

    def obey(self: team.Worker, now: Any, size: int, x: Any) -> Any:
        if fail and self.party.role == role and now == command:
            fail.pop()
            raise ProtocolError("a crash in a test")
        return usual(self, now, size, x)

    monkeypatch.setattr(team.Worker, "obey", obey)
    with stocked.service("server"):
        with pytest.raises(ProtocolError):
            check(stocked, 1)
        check(stocked, 3)
    for who in ("client", "server"):
        numbers = [number for role_, _, number in uses if role_ == who]
        assert len(numbers) == len(set(numbers)) and set(numbers) >= {2, 3, 4}


def test_a_restored_stock_of_one_party_is_caught_by_the_other(
    stocked: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    uses = taken(monkeypatch)
    for role in ("client", "server"):
        shutil.copytree(stocked.home / f"stock-{role}", stocked.home / "backup")
        with stocked.service("server"):
            check(stocked, 1)
        shutil.rmtree(stocked.home / f"stock-{role}")
        (stocked.home / "backup").rename(stocked.home / f"stock-{role}")
        with stocked.service("server"):
            check(stocked, 1)
    assert [number for role, _, number in uses if role == "server"] == [1, 2, 3, 4]


def test_a_lot_that_only_one_has_is_not_used_and_forgotten(stocked: Deployment) -> None:
    shutil.rmtree(stocked.home / "stock-server")
    with stocked.service("server"), pytest.raises(ProtocolError, match="dealer"):
        check(stocked, 1)
    assert not [p for p in (stocked.home / "stock-client").iterdir() if p.is_dir()]


def test_a_server_that_gave_up_its_stock_is_served_by_the_dealer(stocked: Deployment) -> None:
    stocked.write("server", stock=None)  # type: ignore[arg-type]
    with stocked.service("server"), stocked.service("dealer"):
        check(stocked, 1)


def test_other_weights_never_meet_a_mask_that_has_met_weights(stocked: Deployment) -> None:
    """F = W - B and F' = W' - B would give the client W - W'."""
    other = Program(
        stocked.program.ops, stocked.program.input_shape, stocked.program.output,
        {k: v * np.float32(1.01) for k, v in stocked.program.tensors.items()}, stocked.program.ranges,
    )  # fmt: skip
    other.save(stocked.home / "server")
    assert other.sha256() == stocked.program.sha256()
    with stocked.service("server") as server:
        with pytest.raises(ProtocolError, match="dealer"):
            check(stocked, 1)
        assert server.health()["lots"] == 0


@pytest.mark.parametrize("role", ["client", "server", "dealer"])
def test_a_lot_beyond_the_quota_is_refused_and_leaves_nothing(tmp_path: Path, role: Any) -> None:
    d = deployed(tmp_path, stock="ready = 0")
    path = d.write(role)
    path.write_text(path.read_text().replace(f"quota_bytes = {1 << 30}", "quota_bytes = 1_000_000"))
    with d.service("server"), d.service("dealer"):
        d.fetch(1, 1)
        with pytest.raises((InputError, ProtocolError), match="exceed its quota") as error:
            d.fetch(1, 10)
        if role == "client":
            assert "quota_bytes = 1000000" in str(error.value)
        for who in ("client", "server"):
            wait_for(
                lambda who=who: len([p for p in (tmp_path / f"stock-{who}").iterdir() if p.is_dir()]) == 1
            )
        check(d, 1)


def test_a_transfer_that_breaks_off_burns_the_lot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of it is known outside; nobody gets it again."""
    d = deployed(tmp_path, stock="ready = 0")
    usual = supply._new_file

    def failing(path: Path) -> Any:
        if "stock-client" in str(path) and path.name == batch_file(2):
            raise OSError(28, "No space left on device")
        return usual(path)

    with d.service("server") as server, d.service("dealer") as dealer:
        dealer.house.maker().make(1, 3)
        monkeypatch.setattr(supply, "_new_file", failing)
        with pytest.raises(InputError, match=r"cannot be used[\s\S]*No space left"):
            d.fetch(1, 3)
        wait_for(lambda: d.events("dealer", "session_end") and d.events("server", "session_end"))
        assert dealer.health()["lots"] == 0
        for role in ("client", "dealer"):
            left = {p.name for p in (tmp_path / f"stock-{role}").iterdir()}
            assert left - {"seen"} == {"lock", "owner"}
        monkeypatch.setattr(supply, "_new_file", usual)
        d.fetch(1, 3)
        assert server.health()["lots"] == 1  # what the server alone had got is gone
        check(d, 3)


def test_the_dealer_makes_lots_ahead_and_forgets_those_for_another_network(tmp_path: Path) -> None:
    d = deployed(tmp_path, stock="ready = 2\nbatches = 3")
    with d.service("dealer") as dealer:
        wait_for(lambda: dealer.health()["lots"] == 2)
        with d.service("server"):
            made = {p.name for p in (tmp_path / "stock-dealer").iterdir() if p.is_dir()}
            assert d.fetch(1, 3) in made
            wait_for(lambda: dealer.health()["lots"] == 2)
    d.write("dealer", mpc="fraction_bits = 20", stock="ready = 0")
    with d.service("dealer") as dealer:
        wait_for(lambda: dealer.health()["lots"] == 0)


def test_a_dealer_goes_on_making_lots_after_whatever_went_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "MAKE_AGAIN_S", 0.1)
    usual, calls = supply.LotMaker.make, []

    def make(self: Any, *args: Any) -> None:
        calls.append(args)
        if len(calls) == 1:
            raise MemoryError("a value")
        usual(self, *args)

    monkeypatch.setattr(supply.LotMaker, "make", make)
    d = deployed(tmp_path, stock="ready = 1\nbatches = 1")
    with d.service("dealer") as dealer:
        wait_for(lambda: dealer.health()["lots"] == 1)
    (bug,) = d.events("dealer", "bug")
    assert bug["why"] == "MemoryError" and "a value" not in d.logs["dealer"].getvalue()


def test_a_party_without_a_stock_says_so(tmp_path: Path) -> None:
    d = deployed(tmp_path, stock="ready = 0")
    d.write("dealer", stock=None)  # type: ignore[arg-type]
    with (
        d.service("server"),
        d.service("dealer"),
        pytest.raises(ProtocolError, match="the dealer keeps no stock"),
    ):
        d.fetch(1, 1)
    d.write("client", stock=None)  # type: ignore[arg-type]
    with d.service("server"), d.service("dealer"), pytest.raises(InputError, match=r"no \[stock\]"):
        d.fetch(1, 1)


def test_no_two_batches_share_a_seed_and_the_client_gets_none_of_the_weights(tmp_path: Path) -> None:
    d = deployed(tmp_path, stock="ready = 0")
    with d.service("server"), d.service("dealer"):
        d.fetch(1, 3)
        d.fetch(1, 2)
    seeds = [
        f.read_bytes()[:32]
        for role in ("client", "server")
        for f in (tmp_path / f"stock-{role}").rglob("00*")
        if f.is_file()  # a batch's random name may begin so too
    ]
    assert len(seeds) == len(set(seeds)) == 10
    texts = {
        r: [f.read_text() for f in (tmp_path / f"stock-{r}").rglob("lot.json")] for r in ("client", "server")
    }
    assert all('"weights_seed": ""' in text for text in texts["client"])
    assert not any('"weights_seed": ""' in text for text in texts["server"])
