"""Channels over loopback TCP between honest parties: order, addresses, ends."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from links import HOST, Certs, accept_in, dial, linked, listening

from tightrope.errors import InputError, ProtocolError
from tightrope.runtimes.mpc import tls
from tightrope.runtimes.mpc.channel import Channel, Clock
from tightrope.runtimes.mpc.keys import make_credentials, tls_context
from tightrope.runtimes.mpc.listen import Listener
from tightrope.runtimes.mpc.tls import connect


@pytest.fixture(scope="module")
def certs() -> Certs:
    return make_credentials()


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


def test_a_key_encrypts_no_more_records_than_it_may(certs: Certs, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the caller or by the thread that sends; what came before arrives."""
    monkeypatch.setattr(tls, "MAX_RECORDS", 40)
    with linked(certs) as (client, server):
        for step in range(40):
            client.send(step, 0, b"x")
            server.recv(step, 0, 1)
        with pytest.raises(ProtocolError, match=r"cannot send to server[\s\S]*begin a new session"):
            client.send(40, 0, b"x")
    large = np.zeros(1 << 17, np.uint64)
    with linked(certs) as (client, server):
        server.send(0, 1, large)
        server.send(1, 1, large)
        assert len(client.recv(0, 1, large.nbytes)) == large.nbytes
        with pytest.raises(ProtocolError, match="begin a new session"):
            server.flush()


def test_small_frames_behind_one_that_does_not_leave_keep_their_order(certs: Certs) -> None:
    """The first fills the kernel's buffers, so that a thread sends the rest of it; the others must wait."""
    large = np.random.default_rng(0).integers(0, 2**63, 1 << 21, np.uint64)
    with linked(certs) as (client, server):
        client.send(0, 0, b"before")
        client.send(1, 0, large)
        for step in range(2, 200):
            client.send(step, 0, bytes([step]))
        assert server.recv(0, 0, 6).tobytes() == b"before"
        np.testing.assert_array_equal(server.recv(1, 0, large.nbytes).view(np.uint64), large)
        for step in range(2, 200):
            assert server.recv(step, 0, 1).tobytes() == bytes([step])
        client.flush()


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
