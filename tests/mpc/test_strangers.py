"""Who is not let in: wrong roles and certificates, plaintext, liars, the silent and the slow."""

from __future__ import annotations

import os
import socket
import ssl
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from links import HOST, Certs, accept_in, dial, listening

from tightrope.errors import ProtocolError
from tightrope.runtimes.mpc import listen
from tightrope.runtimes.mpc.keys import make_credentials, tls_context, write_credentials


@pytest.fixture(scope="module")
def certs() -> Certs:
    return make_credentials()


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


def test_a_machine_without_a_thread_to_spare_still_listens_afterwards(
    certs: Certs, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, failed = threading.Thread.start, []

    def start(self: threading.Thread) -> None:
        if "prove" in repr(getattr(self, "_target", None)) and not failed:
            failed.append(self)
            raise RuntimeError("can't start new thread")
        usual(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    with listening(certs) as listener, ThreadPoolExecutor(1) as pool:
        accepted = accept_in(pool, listener, {"client"}, within_s=5)
        with pytest.raises(ProtocolError):
            dial(certs, listener.port)
        client = dial(certs, listener.port)
        accepted.result(5)["client"].close()
        client.close()
    assert failed


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
