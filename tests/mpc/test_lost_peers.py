"""Peers that die, freeze, work for long or give signs of life only."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from links import Certs, linked, listening

from tightrope.errors import ProtocolError
from tightrope.runtimes.mpc import channel as channel_module
from tightrope.runtimes.mpc.channel import Channel, Clock
from tightrope.runtimes.mpc.keys import make_credentials, write_credentials
from tightrope.runtimes.mpc.team import beating


@pytest.fixture(scope="module")
def certs() -> Certs:
    return make_credentials()


PEER = """
import sys, time
from pathlib import Path
from tightrope.runtimes.mpc.channel import Clock
from tightrope.runtimes.mpc.keys import read_credentials, tls_context
from tightrope.runtimes.mpc.tls import connect
context = tls_context(read_credentials(Path(sys.argv[1]), "client"), accepts=False)
port = int(sys.argv[2])
channel = connect("127.0.0.1", port, context, "client", "server", Clock(), within_s=20, timeout_s=60)
channel.send(0, 0, b"ready")
channel.flush()
time.sleep(60)
"""


@contextmanager
def other_process(
    certs: Certs, home: Path, timeout_s: float
) -> Iterator[tuple[subprocess.Popen[bytes], Channel]]:
    write_credentials(home / "certs", certs)
    with listening(certs) as listener:
        arguments = [str(home / "certs" / "client"), str(listener.port)]
        peer = subprocess.Popen([sys.executable, "-c", PEER, *arguments])
        try:
            server = listener.accept({"client"}, Clock(), within_s=20, timeout_s=timeout_s)["client"]
            server.recv(0, 0, 5)
            yield peer, server
            server.close()
        finally:
            peer.kill()
            peer.wait()


@pytest.mark.parametrize("sends", [False, True])
def test_a_killed_peer_is_noticed_at_once(certs: Certs, tmp_path: Path, sends: bool) -> None:
    with other_process(certs, tmp_path, timeout_s=60) as (peer, server):
        if sends:  # a frame that the peer never reads: the sender thread is stuck when the peer dies
            server.send(1, 0, np.zeros(1 << 22, np.uint64))
        threading.Timer(0.3, peer.kill).start()
        began = time.monotonic()
        with pytest.raises(ProtocolError, match=r"lost client[\s\S]*server, step 7[\s\S]*closed"):
            server.recv(7, 0, 8)
        assert time.monotonic() - began < 5


def test_a_frozen_peer_is_given_up_after_the_timeout(certs: Certs, tmp_path: Path) -> None:
    with other_process(certs, tmp_path, timeout_s=0.5) as (peer, server):
        peer.send_signal(signal.SIGSTOP)
        server.send(1, 0, np.zeros(1 << 22, np.uint64))
        began = time.monotonic()
        with pytest.raises(ProtocolError, match=r"lost client[\s\S]*step 7[\s\S]*nothing came for 0.5 s"):
            server.recv(7, 0, 8)
        assert time.monotonic() - began < 3


def test_a_peer_that_works_longer_than_the_timeout_is_waited_for(certs: Certs) -> None:
    """In silence it would be given up, see above: with beats neither who receives nor who sends does so."""
    with linked(certs, timeout_s=0.4) as (client, server), ThreadPoolExecutor(1) as pool:
        data = np.arange(1 << 22, dtype=np.uint64)  # more than the socket buffers hold
        client.send(0, 0, data)
        sent = pool.submit(client.flush)
        with beating(0.1, lambda: server.beat(0.1)):
            time.sleep(1.5)
            np.testing.assert_array_equal(server.recv(0, 0, data.nbytes).view(np.uint64), data)
        sent.result(5)
        with beating(0.1, lambda: server.beat(0.1)):
            waiting = pool.submit(client.recv, 7, 0, 8)
            time.sleep(1.5)
            server.send(7, 0, bytes(8))
        assert waiting.result(5).tobytes() == bytes(8)
        assert client.traffic.received == server.traffic.sent  # beats are in neither
        assert client.clock.round == 1 + server.clock.round


def test_beats_alone_are_not_waited_for_without_end(certs: Certs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "STEP_S", 0.5)
    gone = pytest.raises(ProtocolError, match=r"lost server[\s\S]*no frame in time")
    with linked(certs, timeout_s=0.4) as (client, server), beating(0.1, lambda: server.beat(0.1)), gone:
        client.recv(3, 0, 8)
