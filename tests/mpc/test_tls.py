"""Channels over loopback TCP: real sockets, real certificates, peers that misbehave or die."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from tightrope.errors import InputError, ProtocolError
from tightrope.runtimes.mpc import channel as channel_module
from tightrope.runtimes.mpc import listen
from tightrope.runtimes.mpc.channel import Channel, Clock
from tightrope.runtimes.mpc.keys import Credentials, Role, make_credentials, tls_context, write_credentials
from tightrope.runtimes.mpc.listen import Listener
from tightrope.runtimes.mpc.team import beating
from tightrope.runtimes.mpc.tls import connect

HOST = "127.0.0.1"


Certs = dict[Role, Credentials]


@pytest.fixture(scope="module")
def certs() -> Certs:
    return make_credentials()


@contextmanager
def listening(certs: Certs, own: Role = "server") -> Iterator[Listener]:
    listener = Listener(HOST, 0, tls_context(certs[own], accepts=True), own)
    try:
        yield listener
    finally:
        listener.close()


def dial(
    certs: Certs,
    port: int,
    own: Role = "client",
    peer: Role = "server",
    *,
    within_s: float = 3,
    timeout_s: float = 5,
) -> Channel:
    context = tls_context(certs[own], accepts=False)
    return connect(HOST, port, context, own, peer, Clock(), within_s=within_s, timeout_s=timeout_s)


@contextmanager
def linked(certs: Certs, timeout_s: float = 5) -> Iterator[tuple[Channel, Channel]]:
    with listening(certs) as listener, ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(listener.accept, {"client"}, Clock(), within_s=5, timeout_s=timeout_s)
        client = dial(certs, listener.port, timeout_s=timeout_s)
        server = accepted.result()["client"]
    try:
        yield client, server
    finally:
        client.close()
        server.close()


def accept_in(
    pool: ThreadPoolExecutor, listener: Listener, peers: set[Role], within_s: float = 1
) -> Future[dict[Role, Channel]]:
    return pool.submit(listener.accept, peers, Clock(), within_s=within_s, timeout_s=5)


def test_frames_cross_in_both_directions_at_once(certs: Certs) -> None:
    """Both send 24 MB before they read: more than the socket buffers hold."""
    data = np.random.default_rng(0).integers(0, 2**63, 1 << 20, np.uint64)

    def talk(channel: Channel, own: int) -> None:
        for step in range(3):
            channel.send(step, own, data + np.uint64(own + step), b"x" * step)
        for step in range(3):
            payload = channel.recv(step, 1 - own, data.nbytes + step)[: data.nbytes].view(np.uint64)
            np.testing.assert_array_equal(payload, data + np.uint64(1 - own + step))
        channel.flush()

    with linked(certs) as (client, server), ThreadPoolExecutor(2) as pool:
        for done in (pool.submit(talk, client, 0), pool.submit(talk, server, 1)):
            done.result(30)
        assert client.traffic.sent == server.traffic.received
        assert server.traffic.sent_bytes == 3 * (32 + data.nbytes) + 3


def test_many_small_frames_interleave(certs: Certs) -> None:
    with linked(certs) as (client, server), ThreadPoolExecutor(1) as pool:

        def echo() -> None:
            for step in range(500):
                server.send(step, 1, server.recv(step, 0, step % 40))

        done = pool.submit(echo)
        for step in range(500):
            client.send(step, 0, bytes([step % 251]) * (step % 40))
            assert client.recv(step, 1, step % 40).tobytes() == bytes([step % 251]) * (step % 40)
        done.result(5)
        assert client.clock.round == 1000


def test_one_listener_serves_both_peers(certs: Certs) -> None:
    with listening(certs) as listener, ThreadPoolExecutor(1) as pool:
        accepted = accept_in(pool, listener, {"client", "dealer"}, within_s=5)
        dealer, client = dial(certs, listener.port, "dealer"), dial(certs, listener.port)
        channels = accepted.result()
        dealer.send(0, 0, b"d")
        client.send(0, 0, b"c")
        assert channels["dealer"].recv(0, 0, 1).tobytes() == b"d"
        assert channels["client"].recv(0, 0, 1).tobytes() == b"c"
        for channel in (dealer, client, *channels.values()):
            channel.close()


def test_connect_waits_for_a_late_listener(certs: Certs) -> None:
    with socket.create_server((HOST, 0)) as probe:
        port = probe.getsockname()[1]
    with ThreadPoolExecutor(1) as pool:
        client = pool.submit(dial, certs, port)
        time.sleep(0.3)
        listener = Listener(HOST, port, tls_context(certs["server"], accepts=True), "server")
        server = listener.accept({"client"}, Clock(), within_s=3, timeout_s=5)["client"]
        server.send(0, 0, b"late")
        assert client.result().recv(0, 0, 4).tobytes() == b"late"
        client.result().close()
        server.close()
        listener.close()


def test_addresses_that_cannot_work(certs: Certs) -> None:
    context = tls_context(certs["server"], accepts=True)
    with listening(certs) as listener:
        with pytest.raises(InputError, match=r"cannot listen[\s\S]*in use"):
            Listener(HOST, listener.port, context, "server")
        for port in (-1, 70000):
            with pytest.raises(InputError, match="no such port"):
                Listener(HOST, port, context, "server")
            with pytest.raises(InputError, match="no such port"):
                dial(certs, port)
        port = listener.port
    with pytest.raises(ProtocolError, match=r"client cannot reach server[\s\S]*refused"):
        dial(certs, port, within_s=0.2)
    with pytest.raises(InputError, match="unknown host"):
        connect("no-such-host.invalid", 1, tls_context(certs["client"], accepts=False), "client", "server",
                Clock(), within_s=1, timeout_s=1)  # fmt: skip


def test_peers_with_the_wrong_role_are_refused(certs: Certs) -> None:
    with listening(certs) as listener, ThreadPoolExecutor(1) as pool:
        accepted = accept_in(pool, listener, {"client"})
        with pytest.raises(ProtocolError):
            dial(certs, listener.port, "dealer")
        with pytest.raises(ProtocolError, match=r"in vain for client[\s\S]*the peer is dealer, not client"):
            accepted.result(5)
        accepted = accept_in(pool, listener, {"client"})
        with pytest.raises(ProtocolError, match="the peer is server, not dealer"):
            dial(certs, listener.port, "client", "dealer")
        with pytest.raises(ProtocolError, match="in vain"):
            accepted.result(5)


def first_byte(context: ssl.SSLContext, port: int) -> bytes:
    """What a peer gets that shakes hands by its own rules."""
    with context.wrap_socket(socket.create_connection((HOST, port), 3)) as secure:
        return secure.recv(1)


@pytest.mark.parametrize("fault", ["other authority", "expired", "not yet valid"])
def test_bad_certificates_are_refused_by_both_sides(certs: Certs, tmp_path: Path, fault: str) -> None:
    start = {"other authority": 0, "expired": -40, "not yet valid": 40}[fault]
    bad = make_credentials(days=30, start=datetime.now(UTC) + timedelta(days=start, minutes=-1))
    good = bad if start else certs  # out of date: both sides trust the authority and refuse nevertheless
    with listening(good) as listener, ThreadPoolExecutor(1) as pool:
        accepted = accept_in(pool, listener, {"client"})
        with pytest.raises(ProtocolError, match="certificate"):
            dial(bad, listener.port)
        with pytest.raises(ProtocolError, match="in vain"):
            accepted.result(5)
    unchecked = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    unchecked.check_hostname, unchecked.verify_mode = False, ssl.CERT_NONE
    write_credentials(tmp_path / "bad", bad)
    home = tmp_path / "bad" / "client"
    unchecked.load_cert_chain(home / "client.pem", home / "client.key")
    with listening(good) as listener, ThreadPoolExecutor(1) as pool:
        accepted = accept_in(pool, listener, {"client"})
        with pytest.raises(OSError):
            first_byte(unchecked, listener.port)
        with pytest.raises(ProtocolError, match=r"in vain[\s\S]*certificate"):
            accepted.result(5)


def test_no_certificate_and_old_tls_are_refused(certs: Certs) -> None:
    nameless = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    nameless.check_hostname, nameless.verify_mode = False, ssl.CERT_NONE
    old = tls_context(certs["client"], accepts=False)
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
    for context in (nameless, old):
        with listening(certs) as listener, ThreadPoolExecutor(1) as pool:
            accepted = accept_in(pool, listener, {"client"})
            with pytest.raises(OSError):
                first_byte(context, listener.port)
            with pytest.raises(ProtocolError, match="in vain"):
                accepted.result(5)


def test_plaintext_peers_are_refused_and_waiting_goes_on(certs: Certs) -> None:
    with listening(certs) as listener, ThreadPoolExecutor(1) as pool:
        accepted = accept_in(pool, listener, {"client"}, within_s=5)
        for greeting in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(200), b""):
            with socket.create_connection((HOST, listener.port)) as raw:
                raw.sendall(greeting)
        client = dial(certs, listener.port)
        accepted.result()["client"].close()
        client.close()
    with socket.create_server((HOST, 0)) as plain, ThreadPoolExecutor(1) as pool:

        def answer() -> None:
            with plain.accept()[0] as raw:
                raw.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                raw.recv(1000)

        pool.submit(answer)
        with pytest.raises(ProtocolError, match="no TLS"):
            dial(certs, plain.getsockname()[1])


def test_a_silent_listener_does_not_hang_the_caller(certs: Certs) -> None:
    with socket.create_server((HOST, 0)) as plain, pytest.raises(ProtocolError, match="no answer in time"):
        dial(certs, plain.getsockname()[1], within_s=0.3)


def test_frames_of_an_authenticated_liar_are_refused(certs: Certs) -> None:
    good = struct.pack("<4sHHIIQQ", b"TTMP", 1, 0, 3, 1, 0, 8)
    for stream in (os.urandom(64), good.replace(b"TTMP", b"TTMQ"), good + bytes(3), good[:-8] + b"\xff" * 8):
        with listening(certs) as listener, ThreadPoolExecutor(1) as pool:
            accepted = accept_in(pool, listener, {"client"}, within_s=5)
            context = tls_context(certs["client"], accepts=False)
            with context.wrap_socket(socket.create_connection((HOST, listener.port))) as liar:
                liar.sendall(b"tightrope mpc 1 client".ljust(32))
                liar.recv(32)
                server = accepted.result()["client"]
                liar.sendall(stream)
            with pytest.raises(ProtocolError, match="client"):
                server.recv(3, 0, 8)
            server.close()


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


def test_a_silent_or_slow_stranger_holds_nobody_up(certs: Certs) -> None:
    """Many connections that never say a word, and one that dribbles: the peer is served at once."""
    with listening(certs) as listener, ThreadPoolExecutor(1) as pool:
        silent = [socket.create_connection((HOST, listener.port)) for _ in range(20)]
        accepted = accept_in(pool, listener, {"client"}, within_s=3.5)  # less than one stranger is given
        silent[0].sendall(b"\x16\x03\x01")
        client = dial(certs, listener.port)
        accepted.result()["client"].close()
        client.close()
        for stranger in silent:
            stranger.close()


def test_two_peers_of_one_role_one_is_served_and_one_refused(certs: Certs) -> None:
    with listening(certs) as listener, ThreadPoolExecutor(3) as pool:
        accepted = accept_in(pool, listener, {"client", "dealer"}, within_s=5)
        dials = [pool.submit(dial, certs, listener.port) for _ in range(2)]
        while not any(d.done() for d in dials):
            time.sleep(0.01)
        dealer = dial(certs, listener.port, "dealer")
        channels = accepted.result()
        assert set(channels) == {"client", "dealer"}
        won = [d.result() for d in dials if d.exception() is None]
        lost = [d.exception() for d in dials if d.exception() is not None]
        assert len(won) == len(lost) == 1 and isinstance(lost[0], ProtocolError)
        won[0].send(0, 0, b"mine")
        assert channels["client"].recv(0, 0, 4).tobytes() == b"mine"
        for channel in (*won, dealer, *channels.values()):
            channel.close()


def test_an_unproven_connection_has_one_deadline_for_all_it_says(
    certs: Certs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hello byte by byte, each in time, is still cut off."""
    monkeypatch.setattr(listen, "HANDSHAKE_S", 0.6)
    with listening(certs) as listener, ThreadPoolExecutor(1) as pool:
        accepted = accept_in(pool, listener, {"client"}, within_s=2)
        context = tls_context(certs["client"], accepts=False)
        slow = context.wrap_socket(socket.create_connection((HOST, listener.port)))
        with slow, pytest.raises(OSError):
            for byte in b"tightrope mpc 1 client".ljust(32):
                slow.sendall(bytes([byte]))
                time.sleep(0.1)
        with pytest.raises(ProtocolError, match=r"in vain[\s\S]*no answer in time"):
            accepted.result()


def test_a_farewell_says_why_and_cannot_reach_the_terminal(certs: Certs) -> None:
    with linked(certs) as (client, server):
        server.farewell("the material is used up\x1b[2J\n" + "x" * 1000)
        with pytest.raises(ProtocolError, match="server ended the session") as error:
            client.recv(3, 0, 8)
        assert "the material is used up?[2J?xxx" in str(error.value)
        assert len(str(error.value)) < 700
        with pytest.raises(ProtocolError, match="used up"):
            client.recv(3, 0, 8)


def test_sending_to_a_peer_that_left_is_an_error(certs: Certs) -> None:
    with linked(certs) as (client, server):
        client.close()
        with pytest.raises(ProtocolError, match="cannot send to client"):
            for step in range(100):
                server.send(step, 0, bytes(100_000))
                server.flush()


def test_frames_sent_just_before_closing_arrive(certs: Certs) -> None:
    data = np.arange(1 << 20, dtype=np.uint64)
    with linked(certs) as (client, server):
        closing = threading.Thread(target=lambda: (client.send(0, 0, data), client.close()))
        closing.start()
        np.testing.assert_array_equal(server.recv(0, 0, data.nbytes).view(np.uint64), data)
        closing.join()
        client.close()


def test_closing_ends_a_waiting_receive_of_the_same_party(certs: Certs) -> None:
    with linked(certs) as (client, _), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.recv, 3, 0, 8)
        time.sleep(0.1)
        client.close()
        with pytest.raises(ProtocolError, match="lost server"):
            waiting.result(3)
