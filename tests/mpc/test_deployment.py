"""Client, server and dealer as services with configurations of their own, over TLS on loopback."""

from __future__ import annotations

import io
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deployment import Deployment, deployed, wait_for

from small_networks import images
from tightrope.errors import InputError, ProtocolError
from tightrope.program import Conv2d, Op, Program, Relu
from tightrope.runtimes.mpc import MPC, costs, team
from tightrope.runtimes.mpc.channel import Channel, Clock
from tightrope.runtimes.mpc.duties import House
from tightrope.runtimes.mpc.frame import ANSWER, ASK
from tightrope.runtimes.mpc.keys import Role, read_credentials
from tightrope.runtimes.mpc.party import terms
from tightrope.runtimes.mpc.remote import ask_health, dial
from tightrope.runtimes.mpc.service import Log
from tightrope.runtimes.mpc.settings import read_settings
from tightrope.runtimes.plain import evaluate

SESSION = "00" * 16


def check(deployment: Deployment, count: int = 2, seed: int = 1) -> Any:
    """Run some images; the results must be right. Returns the measurement."""
    x = images(count, seed)
    y, measured = deployment.infer(x.numpy())
    assert np.abs(y - evaluate(deployment.program, x).numpy()).max() < 2**-7
    return measured


def test_sessions_over_machines_give_the_results_and_cost_what_was_predicted(tmp_path: Path) -> None:
    """Three batches of one image in each, the dealer working ahead."""
    d = deployed(tmp_path)
    limit = int(costs(d.program, MPC()).total.offline_bytes)
    d.write("client", mpc=f"material_bytes = {limit}")
    predicted = costs(d.program, MPC(material_bytes=limit), 3)
    with d.service("server"), d.service("dealer"):
        for seed in (1, 2):
            measured = check(d, 3, seed)
            assert (measured.links, measured.offline_links) == (predicted.links, predicted.offline_links)
            assert measured.setup_links == predicted.setup_links
            assert measured.total.rounds == predicted.total.rounds
    for role in ("server", "dealer"):
        ends = d.events(role, "session_end")
        assert len(ends) == 2 and all(end["commands"]["offline"] == 3 for end in ends)
        assert d.events(role, "stopped")[0]["served"] == 2
        assert not d.events(role, "bug") and not d.events(role, "failed")


def test_a_peer_that_is_not_up_yet_is_awaited(tmp_path: Path) -> None:
    d = deployed(tmp_path)
    with ThreadPoolExecutor(1) as pool, d.service("server"):
        running = pool.submit(check, d)
        time.sleep(0.5)
        with d.service("dealer"):
            running.result(20)


def test_a_missing_peer_is_named_in_time(tmp_path: Path) -> None:
    d = deployed(tmp_path, limits="connect_s = 0.5")
    with d.service("server"), pytest.raises(ProtocolError, match=r"dealer"):
        check(d)
    with d.service("dealer"), pytest.raises(ProtocolError, match=r"cannot reach server"):
        check(d)


def test_the_dealer_tells_a_party_whose_counterpart_does_not_come(tmp_path: Path) -> None:
    d = deployed(tmp_path, limits="connect_s = 0.5")
    with d.service("dealer"):
        channel = ask(d, "client", "dealer", {"ask": "session", "session": SESSION})
        with pytest.raises(ProtocolError, match="other party of this session did not come"):
            channel.recv(0, ANSWER, 1)
        channel.close()


def finest_patches(op: Op) -> dict[str, Any]:
    return {"patches": ((1, 1),) * len(op.patches)} if isinstance(op, Relu) else {}


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("fraction_bits", {"mpc": "fraction_bits = 20"}),
        ("program, plan", {}),
        ("noise_bits", {"mpc": "noise_bits = 9"}),
    ],
)
def test_parties_that_disagree_refuse_with_both_values(
    tmp_path: Path, what: str, change: dict[str, str]
) -> None:
    d = deployed(tmp_path)
    d.write("client", **change)
    other = d.program
    if what == "program, plan":
        finest = [replace(op, **finest_patches(op)) for op in other.ops]
        other = replace(other, ops=tuple(finest))
        other.public().save(tmp_path / "public")
    ours, theirs = terms(other, MPC()), terms(d.program, MPC())
    shown = {
        "fraction_bits": ("20", "22"),
        "noise_bits": ("9", "8"),
        "program, plan": (ours["program"], ours["plan"], theirs["program"], theirs["plan"]),
    }[what]
    with d.service("server"):
        d.write("dealer", **change)
        with d.service("dealer"), pytest.raises(ProtocolError) as error:
            d.infer(images(1).numpy())
    text = str(error.value) + json.dumps(d.events("server", "failed"))
    assert f"disagree about the {what}" in text and all(value in text for value in shown)
    assert not d.events("server", "bug")


def ask(d: Deployment, own: Role, peer: Role, body: dict[str, Any]) -> Channel:
    mine = replace(read_settings(d.home / f"{own}.toml"), role=own)
    return dial(mine, read_credentials(d.home / "certs" / own, own), peer, Clock(), body)


@pytest.mark.parametrize(
    ("own", "peer", "body"),
    [
        ("dealer", "server", {"ask": "session", "session": SESSION}),
        ("server", "server", {"ask": "session", "session": SESSION}),
        ("dealer", "dealer", {"ask": "session", "session": SESSION}),
        ("client", "server", {"ask": "weights"}),
        ("client", "server", {"ask": "session"}),
        ("client", "server", {"ask": "session", "session": "00 " * 16}),
        ("client", "dealer", {"ask": "session", "session": 7}),
    ],
)
def test_questions_that_are_not_for_this_peer_are_refused(
    tmp_path: Path, own: Role, peer: Role, body: dict[str, Any]
) -> None:
    d = deployed(tmp_path)
    with d.service(peer):
        channel = ask(d, own, peer, body)
        with pytest.raises(ProtocolError, match=r"ended the session[\s\S]*(may not ask|no session id)"):
            channel.recv(0, ANSWER, 1)
        channel.close()
    assert d.events(peer, "failed") and not d.events(peer, "session")


def test_two_clients_of_one_session_id_are_not_mixed(tmp_path: Path) -> None:
    d = deployed(tmp_path, limits="connect_s = 1")
    with d.service("dealer"):
        first = ask(d, "client", "dealer", {"ask": "session", "session": SESSION})
        time.sleep(0.2)
        second = ask(d, "client", "dealer", {"ask": "session", "session": SESSION})
        with pytest.raises(ProtocolError, match="has such a party already"):
            second.recv(0, ANSWER, 1)
        with pytest.raises(ProtocolError, match="did not come"):
            first.recv(0, ANSWER, 1)
        for channel in (first, second):
            channel.close()


@pytest.mark.parametrize(
    "order",
    [
        {"command": "offline", "size": 1},  # before the weights
        {"command": "online", "size": 1},
        {"command": "setup", "size": 0, "then": {"command": "setup", "size": 0}},
        {"command": "setup", "then": {"command": "offline", "size": 0}},
        {"command": "setup", "then": {"command": "offline", "size": 10**9}},
        {"command": "setup", "then": {"command": "offline", "size": True}},
        {"command": "setup", "then": {"command": "offline"}},
        {"command": "setup", "then": {"command": "online", "size": 1}},
        {"command": "fetch", "size": 1, "batches": 1, "owner": "../../etc"},
        {"command": "lots", "owner": SESSION, "lots": ["../x"]},
        {"command": "open", "lot": SESSION},
        {"command": "eval"},
        {"command": ["setup"]},
        {},
    ],
)
def test_commands_out_of_order_or_shape_end_the_session_and_nothing_else(
    served: Deployment, order: dict[str, Any]
) -> None:
    client = served.client()
    remote = client.connect(dealer=True)
    then = order.pop("then", None)
    remote._order("server", order)
    if then is not None:
        for step in remote._worker.party.schedule.steps:  # let the server share its weights
            for message in step.setup:
                remote._worker.party.receive(step, message, 0)
        remote._answer("server")
        remote._order("server", then)
    with pytest.raises(ProtocolError, match="server ended the session") as error:
        remote._answer("server")
    assert "internal" not in str(error.value)
    remote.close()
    check(served, 1)
    assert not served.events("server", "bug")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Any:
    d = deployed(tmp_path_factory.mktemp("served"))
    with d.service("server"), d.service("dealer"):
        yield d


def test_frames_that_are_no_commands_are_refused(served: Deployment) -> None:
    for data in (b"[" * 60000, b"\xff\xfe", b"[]", b'"close"', b" " * 70000):
        client = served.client()
        remote = client.connect(dealer=True)
        with pytest.raises(ProtocolError, match="server ended the session"):
            remote._channels["server"].send(0, ASK, data)
            remote._answer("server")
        remote.close()
    assert not served.events("server", "bug")


def test_what_goes_wrong_inside_stays_inside(served: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer is told that there was an error, the log its kind and place; its text might hold secrets."""
    usual = team.Worker.obey

    def obey(self: team.Worker, command: Any, size: int, x: Any) -> Any:
        if self.party.role == "server" and command == "online":
            raise RuntimeError("weight 0 is 3.14159")
        return usual(self, command, size, x)

    with monkeypatch.context() as patch:
        patch.setattr(team.Worker, "obey", obey)
        with pytest.raises(ProtocolError, match=r"server ended the session[\s\S]*an internal error") as error:
            served.infer(images(1).numpy())
    assert "3.14" not in str(error.value)
    bug = served.events("server", "bug")[-1]
    assert bug["why"] == "RuntimeError" and "test_deployment.py:" in bug["at"][-1]
    assert "3.14159" not in served.logs["server"].getvalue()
    served.logs["server"].truncate(0)
    check(served, 1)


def test_a_log_that_nobody_reads_any_more_ends_no_session() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    Log("server", Gone())("session", session="0")


def test_a_service_takes_as_many_sessions_as_it_has_places(tmp_path: Path) -> None:
    d = deployed(tmp_path, limits="connect_s = 10\nsessions = 1")
    with d.service("server"), d.service("dealer"):
        first = d.client()
        with first.session(1) as session:
            with pytest.raises(ProtocolError, match="is busy"):
                check(d)
            session.run(images(1).numpy())
        wait_for(lambda: d.events("server", "session_end"))
        check(d)


def test_a_service_whose_weights_do_not_fit_says_so_before_it_opens_and_not_how_large_they_are(
    tmp_path: Path,
) -> None:
    d = deployed(tmp_path)
    name = next(op.name for op in d.program.ops if isinstance(op, Conv2d))
    bias = d.program.tensors[f"{name}.bias"]
    tensors = {**d.program.tensors, f"{name}.bias": np.full_like(bias, 31415.9265)}
    replace(d.program, tensors=tensors).save(d.home / "server")
    d.write("server", mpc="ring_bits = 32\nfraction_bits = 12\nweight_bits = 13")
    with pytest.raises(InputError, match="does not fit the ring") as error:
        House.load(read_settings(d.home / "server.toml"))
    assert name in str(error.value) and "3.14" not in str(error.value) and "31415" not in str(error.value)


def test_two_clients_at_the_same_time(served: Deployment) -> None:
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(check, served, 2, seed) for seed in (5, 6)]:
            done.result(30)


def test_a_service_that_stops_ends_idle_sessions_and_lets_others_finish(tmp_path: Path) -> None:
    d = deployed(tmp_path)
    with d.service("dealer"), d.service("server") as server:
        idle, busy = d.client(), d.client()
        with idle.session(1) as waiting, busy.session(2) as working:
            working._team.call("offline", 2)  # material that would be lost
            server.stop()
            wait_for(lambda: len(d.events("server", "session_end")) == 1)  # the idle one
            with pytest.raises(ProtocolError, match=r"server ended|lost server|cannot send to server"):
                waiting.run(images(1).numpy())
            y = working._team.call("online", 2, images(2).numpy())["client"][1]
            want = evaluate(d.program, images(2)).numpy()
            assert y is not None and np.abs(y - want).max() < 2**-7
            with pytest.raises(ProtocolError, match=r"server ended|lost server|cannot send"):
                working.run(images(1).numpy())
    assert d.events("server", "stopped") and not d.events("server", "cut_off")


def test_a_service_that_waits_for_the_dealer_stops_at_once(tmp_path: Path) -> None:
    d = deployed(tmp_path, limits="connect_s = 60\nstop_s = 60")
    d.write("client", limits="connect_s = 0.2")
    began = time.monotonic()
    with d.service("server"), pytest.raises(ProtocolError, match="cannot reach dealer"):
        d.infer(images(1).numpy())
    assert time.monotonic() - began < 20


def test_a_client_that_says_nothing_loses_its_place(tmp_path: Path) -> None:
    d = deployed(tmp_path, limits="idle_s = 0.3\nconnect_s = 10")
    with d.service("dealer"), d.service("server"):
        with d.client().session(1) as session:
            time.sleep(1.0)
            with pytest.raises(ProtocolError, match=r"ended the session"):
                session.run(images(1).numpy())
        check(d, 1)


def test_health_says_ready_busy_or_gone_and_needs_a_certificate(tmp_path: Path) -> None:
    d = deployed(tmp_path, limits="connect_s = 1")
    client = read_settings(d.home / "client.toml")
    with d.service("server"):
        said = ask_health(client, "server")
        assert (said["status"], said["sessions"], said["lots"]) == ("ready", 0, None)
        assert said["terms"]["program"] == d.program.sha256()
        assert ask_health(read_settings(d.home / "server.toml"), "server")["role"] == "server"
        other = tmp_path / "other"
        other.mkdir()
        stranger = deployed(other)
        outside = replace(client, certificates=stranger.home / "certs" / "client")
        with pytest.raises(ProtocolError, match="certificate"):
            ask_health(outside, "server")
    with pytest.raises(ProtocolError, match="cannot reach server"):
        ask_health(client, "server")


def test_a_client_does_not_serve_and_a_server_is_no_client(tmp_path: Path) -> None:
    d = deployed(tmp_path)
    with pytest.raises(InputError, match="does not serve"), d.service("client"):
        pass
    from tightrope.runtimes.mpc.remote import Client

    with pytest.raises(InputError, match="not a client's"):
        Client.load(read_settings(d.home / "server.toml"))


def test_the_certificate_of_another_role_is_refused_before_anything_starts(tmp_path: Path) -> None:
    d = deployed(tmp_path)
    for end in ("pem", "key"):
        source = d.home / "certs" / "client" / f"client.{end}"
        (d.home / "certs" / "server" / f"server.{end}").write_bytes(source.read_bytes())
    with pytest.raises(InputError, match="not one of a server"), d.service("server"):
        pass


def test_the_client_and_the_dealer_never_open_the_weights(tmp_path: Path) -> None:
    d = deployed(tmp_path)
    assert not (tmp_path / "public" / "program.safetensors").exists()
    assert Program.load(tmp_path / "public", weights=False).sha256() == d.program.sha256()
    with d.service("server") as server, d.service("dealer") as dealer:
        assert server.house.program.tensors and not dealer.house.program.tensors


def test_no_thread_is_left(tmp_path: Path) -> None:
    before = threading.active_count()
    d = deployed(tmp_path)
    with d.service("server"), d.service("dealer"):
        check(d)
    wait_for(lambda: threading.active_count() <= before)
