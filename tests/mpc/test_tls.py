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
from tightrope.runtimes.mpc.channel import Channel, Clock
from tightrope.runtimes.mpc.keys import Role, make_certificates, tls_context
from tightrope.runtimes.mpc.tls import Listener, connect

HOST = "127.0.0.1"


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("certs")
    make_certificates(home)
    return home


@contextmanager
def listening(certs: Path, own: Role = "server") -> Iterator[Listener]:
    listener = Listener(HOST, 0, tls_context(certs, own, accepts=True), own)
    try:
        yield listener
    finally:
        listener.close()


def dial(
    certs: Path,
    port: int,
    own: Role = "client",
    peer: Role = "server",
    *,
    within_s: float = 3,
    timeout_s: float = 5,
) -> Channel:
    context = tls_context(certs, own, accepts=False)
    return connect(HOST, port, context, own, peer, Clock(), within_s=within_s, timeout_s=timeout_s)


@contextmanager
def linked(certs: Path, timeout_s: float = 5) -> Iterator[tuple[Channel, Channel]]:
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


def test_frames_cross_in_both_directions_at_once(certs: Path) -> None:
    """Both send 24 MB before they read: more than the socket buffers hold."""
    data = np.random.default_rng(0).integers(0, 2**63, 1 << 20, np.uint64)

    def talk(channel: Channel, own: int) -> None:
        for step in range(3):
            channel.send(step, own, data + np.uint64(own + step), b"x" * step)
        for step in range(3):
            payload = channel.recv(step, 1 - own, data.nbytes + step)[: data.nbytes].view(np.uint64)
            np.testing.assert_array_equal(payload, data + np.uint64(1 - own + step))
        channel.flush(5)

    with linked(certs) as (client, server), ThreadPoolExecutor(2) as pool:
        for done in (pool.submit(talk, client, 0), pool.submit(talk, server, 1)):
            done.result(30)
        assert client.traffic.sent == server.traffic.received
        assert server.traffic.sent_bytes == 3 * (32 + data.nbytes) + 3


def test_many_small_frames_interleave(certs: Path) -> None:
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


def test_one_listener_serves_both_peers(certs: Path) -> None:
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


def test_connect_waits_for_a_late_listener(certs: Path) -> None:
    with socket.create_server((HOST, 0)) as probe:
        port = probe.getsockname()[1]
    with ThreadPoolExecutor(1) as pool:
        client = pool.submit(dial, certs, port)
        time.sleep(0.3)
        listener = Listener(HOST, port, tls_context(certs, "server", accepts=True), "server")
        server = listener.accept({"client"}, Clock(), within_s=3, timeout_s=5)["client"]
        server.send(0, 0, b"late")
        assert client.result().recv(0, 0, 4).tobytes() == b"late"
        client.result().close()
        server.close()
        listener.close()


def test_addresses_that_cannot_work(certs: Path) -> None:
    context = tls_context(certs, "server", accepts=True)
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
        connect("no-such-host.invalid", 1, tls_context(certs, "client", accepts=False), "client", "server",
                Clock(), within_s=1, timeout_s=1)  # fmt: skip


def test_peers_with_the_wrong_role_are_refused(certs: Path) -> None:
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
def test_bad_certificates_are_refused_by_both_sides(certs: Path, tmp_path: Path, fault: str) -> None:
    start = {"other authority": 0, "expired": -40, "not yet valid": 40}[fault]
    bad = tmp_path / "bad"
    make_certificates(bad, days=30, start=datetime.now(UTC) + timedelta(days=start, minutes=-1))
    good = bad if start else certs  # out of date: both sides trust the authority and refuse nevertheless
    with listening(good) as listener, ThreadPoolExecutor(1) as pool:
        accepted = accept_in(pool, listener, {"client"})
        with pytest.raises(ProtocolError, match="certificate"):
            dial(bad, listener.port)
        with pytest.raises(ProtocolError, match="in vain"):
            accepted.result(5)
    unchecked = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    unchecked.check_hostname, unchecked.verify_mode = False, ssl.CERT_NONE
    unchecked.load_cert_chain(bad / "client.pem", bad / "client.key")
    with listening(good) as listener, ThreadPoolExecutor(1) as pool:
        accepted = accept_in(pool, listener, {"client"})
        with pytest.raises(OSError):
            first_byte(unchecked, listener.port)
        with pytest.raises(ProtocolError, match=r"in vain[\s\S]*certificate"):
            accepted.result(5)


def test_no_certificate_and_old_tls_are_refused(certs: Path) -> None:
    nameless = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    nameless.check_hostname, nameless.verify_mode = False, ssl.CERT_NONE
    old = tls_context(certs, "client", accepts=False)
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
    for context in (nameless, old):
        with listening(certs) as listener, ThreadPoolExecutor(1) as pool:
            accepted = accept_in(pool, listener, {"client"})
            with pytest.raises(OSError):
                first_byte(context, listener.port)
            with pytest.raises(ProtocolError, match="in vain"):
                accepted.result(5)


def test_plaintext_peers_are_refused_and_waiting_goes_on(certs: Path) -> None:
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


def test_a_silent_listener_does_not_hang_the_caller(certs: Path) -> None:
    with socket.create_server((HOST, 0)) as plain, pytest.raises(ProtocolError, match="no answer in time"):
        dial(certs, plain.getsockname()[1], within_s=0.3)


def test_frames_of_an_authenticated_liar_are_refused(certs: Path) -> None:
    good = struct.pack("<4sHHIIQQ", b"TTMP", 1, 0, 3, 1, 0, 8)
    for stream in (os.urandom(64), good.replace(b"TTMP", b"TTMQ"), good + bytes(3), good[:-8] + b"\xff" * 8):
        with listening(certs) as listener, ThreadPoolExecutor(1) as pool:
            accepted = accept_in(pool, listener, {"client"}, within_s=5)
            context = tls_context(certs, "client", accepts=False)
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
from tightrope.runtimes.mpc.keys import tls_context
from tightrope.runtimes.mpc.tls import connect
context = tls_context(Path(sys.argv[1]), "client", accepts=False)
port = int(sys.argv[2])
channel = connect("127.0.0.1", port, context, "client", "server", Clock(), within_s=20, timeout_s=60)
channel.send(0, 0, b"ready")
channel.flush(5)
time.sleep(60)
"""


@contextmanager
def other_process(certs: Path, timeout_s: float) -> Iterator[tuple[subprocess.Popen[bytes], Channel]]:
    with listening(certs) as listener:
        peer = subprocess.Popen([sys.executable, "-c", PEER, str(certs), str(listener.port)])
        try:
            server = listener.accept({"client"}, Clock(), within_s=20, timeout_s=timeout_s)["client"]
            server.recv(0, 0, 5)
            yield peer, server
            server.close()
        finally:
            peer.kill()
            peer.wait()


@pytest.mark.parametrize("sends", [False, True])
def test_a_killed_peer_is_noticed_at_once(certs: Path, sends: bool) -> None:
    with other_process(certs, timeout_s=60) as (peer, server):
        if sends:  # a frame that the peer never reads: the sender thread is stuck when the peer dies
            server.send(1, 0, np.zeros(1 << 22, np.uint64))
        threading.Timer(0.3, peer.kill).start()
        began = time.monotonic()
        with pytest.raises(ProtocolError, match=r"lost client[\s\S]*server, step 7[\s\S]*closed"):
            server.recv(7, 0, 8)
        assert time.monotonic() - began < 5


def test_a_frozen_peer_is_given_up_after_the_timeout(certs: Path) -> None:
    with other_process(certs, timeout_s=0.5) as (peer, server):
        peer.send_signal(signal.SIGSTOP)
        server.send(1, 0, np.zeros(1 << 22, np.uint64))
        began = time.monotonic()
        with pytest.raises(ProtocolError, match=r"lost client[\s\S]*step 7[\s\S]*nothing came for 0.5 s"):
            server.recv(7, 0, 8)
        assert time.monotonic() - began < 3


def test_sending_to_a_peer_that_left_is_an_error(certs: Path) -> None:
    with linked(certs) as (client, server):
        client.close()
        with pytest.raises(ProtocolError, match="cannot send to client"):
            for step in range(100):
                server.send(step, 0, bytes(100_000))
                server.flush(5)


def test_frames_sent_just_before_closing_arrive(certs: Path) -> None:
    data = np.arange(1 << 20, dtype=np.uint64)
    with linked(certs) as (client, server):
        closing = threading.Thread(target=lambda: (client.send(0, 0, data), client.close()))
        closing.start()
        np.testing.assert_array_equal(server.recv(0, 0, data.nbytes).view(np.uint64), data)
        closing.join()
        client.close()


def test_closing_ends_a_waiting_receive_of_the_same_party(certs: Path) -> None:
    with linked(certs) as (client, _), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.recv, 3, 0, 8)
        time.sleep(0.1)
        client.close()
        with pytest.raises(ProtocolError, match="lost server"):
            waiting.result(3)
