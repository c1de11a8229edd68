"""Three real processes: whatever goes wrong ends with a clear error, soon, and with nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from small_networks import images, network
from tightrope.errors import InputError, ProtocolError
from tightrope.runtimes.mpc import MPC, MPCSession
from tightrope.runtimes.mpc.keys import Role
from tightrope.runtimes.mpc.processes import ProcessTeam

pytestmark = pytest.mark.slow
SOON_S = 8.0


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A private place for temporary files, which must be empty in the end."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    assert not list(tmp_path.iterdir())


def team_of(session: MPCSession) -> ProcessTeam:
    assert isinstance(session._team, ProcessTeam)
    return session._team


def pids(session: MPCSession) -> dict[Role, int]:
    return {role: process.pid for role, process in team_of(session)._processes.items()}


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def after(delay_s: float, pid: int, number: int) -> None:
    threading.Timer(delay_s, os.kill, (pid, number)).start()


def test_a_dealer_that_died_between_batches() -> None:
    with MPC(noise_bits=0).open(network("patches"), "execute") as session:
        session.run(images(2).numpy())
        before = pids(session)
        os.kill(before["dealer"], signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(ProtocolError, match="the dealer failed in the offline phase"):
            session.run(images(2).numpy())
        assert time.monotonic() - start < SOON_S
        assert not any(alive(pid) for pid in before.values())
        with pytest.raises(ProtocolError, match="the dealer failed"):
            session.run(images(2).numpy())  # the session stays closed, for the same reason


def test_a_client_killed_in_the_middle_of_the_offline_phase() -> None:
    with MPC(noise_bits=0).open(network("dense"), "execute") as session:
        before = pids(session)
        after(0.3, before["client"], signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(ProtocolError, match="the client failed in the offline phase") as error:
            session.run(images(2000).numpy())
        assert time.monotonic() - start < SOON_S
        assert "status -9" in str(error.value)
        assert not any(alive(pid) for pid in before.values())


def test_a_server_that_died_before_and_hung_during_the_online_phase() -> None:
    for number, said in ((signal.SIGKILL, "status -9"), (signal.SIGSTOP, "no answer")):
        with MPC(timeout_s=2).open(network("patches"), "execute") as session:
            team, before = team_of(session), pids(session)
            team.call("offline", 2)
            os.kill(before["server"], number)
            start = time.monotonic()
            with pytest.raises(ProtocolError, match="the server failed in the online phase") as error:
                team.call("online", 2, images(2).numpy())
            assert time.monotonic() - start < SOON_S
            assert said in str(error.value)
        assert not any(alive(pid) for pid in before.values())


def test_a_port_in_use_is_an_input_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        start = time.monotonic()
        with pytest.raises(InputError, match="server cannot listen") as error:
            MPC(port=port).open(network("patches"), "execute")
        assert time.monotonic() - start < 30
        assert f"127.0.0.1:{port}" in str(error.value)


def test_a_closed_session_leaves_no_process() -> None:
    session = MPC(noise_bits=0).open(network("patches"), "execute")
    before = pids(session)
    assert all(alive(pid) for pid in before.values())
    start = time.monotonic()
    session.close()
    session.close()
    assert time.monotonic() - start < SOON_S
    assert not any(alive(pid) for pid in before.values())
    with pytest.raises(ProtocolError, match="closed"):
        session.run(np.zeros((1, 2, 7, 9)))


ORPHAN = """
import sys, time
sys.path[:0] = sys.argv[1:]
from small_networks import network
from tightrope.runtimes.mpc import MPC
session = MPC(noise_bits=0).open(network("patches"), "execute")
print(*(p.pid for p in session._team._processes.values()), flush=True)
time.sleep(60)
"""


def test_no_party_outlives_the_session_that_started_it() -> None:
    tests = str(Path(__file__).parents[1])
    parent = subprocess.Popen([sys.executable, "-c", ORPHAN, tests], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 3 and all(alive(pid) for pid in workers)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + SOON_S
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in workers)


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def test_a_launcher_killed_while_it_starts_leaves_no_file_and_no_party(tmp_path: Path) -> None:
    """At that moment keys and weights are on their way to the parties."""
    tests, env = str(Path(__file__).parents[1]), os.environ | {"TMPDIR": str(tmp_path), "HOME": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", ORPHAN, tests], env=env, stdout=subprocess.PIPE)
    while len(workers := children(parent.pid)) < 3 and parent.poll() is None:
        time.sleep(0.01)
    parent.kill()
    said, _ = parent.communicate()
    assert len(workers) == 3 and not said
    deadline = time.monotonic() + 4 * SOON_S  # they have to load before they see the end of their input
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in workers)
    assert not list(tmp_path.iterdir())
