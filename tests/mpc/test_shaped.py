"""Shaped links: bytes in order and whole, never earlier than a network would bring them."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from small_networks import images, network
from tightrope.errors import ProtocolError
from tightrope.runtimes.mpc import MPC
from tightrope.runtimes.mpc.channel import Channel, Clock, LinkError
from tightrope.runtimes.mpc.local import local_links
from tightrope.runtimes.mpc.network import Network
from tightrope.runtimes.mpc.shaped import ShapedLink, _pieces


@given(
    st.lists(st.binary(max_size=300), max_size=8),
    st.integers(1, 100),
)
def test_pieces_are_the_same_bytes_in_order(parts: list[bytes], most: int) -> None:
    pieces = list(_pieces([memoryview(part) for part in parts], most))
    sizes = [sum(len(view) for view in piece) for piece in pieces]
    assert b"".join(bytes(view) for piece in pieces for view in piece) == b"".join(parts)
    assert all(size == most for size in sizes[:-1]) and all(0 < size <= most for size in sizes)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.binary(min_size=1, max_size=5000), min_size=1, max_size=6))
def test_what_was_sent_arrives(messages: list[bytes]) -> None:
    near, far = local_links(5.0)
    link = ShapedLink(near, Network(1e9, 0.1))
    for message in messages:
        link.send([memoryview(message[:7]), memoryview(message[7:])])
    got = bytearray(sum(map(len, messages)))
    far.recv_into(memoryview(got))
    assert got == b"".join(messages)
    link.close()


def test_nothing_arrives_before_its_time() -> None:
    """Lower bounds only, which a busy machine cannot break: 100 ms of bytes each, and 50 ms of way."""
    near, far = local_links(5.0)
    link = ShapedLink(near, Network(8e5, 100.0))
    start = time.monotonic()
    for _ in range(2):  # the second waits for the first, but not for its way
        link.send([memoryview(bytes(10_000))])
    buffer = bytearray(10_000)
    arrived = []
    for _ in range(2):
        far.recv_into(memoryview(buffer))
        arrived.append(time.monotonic() - start)
    assert arrived[0] >= 0.15 and arrived[1] >= 0.25
    link.flush()
    link.close()


def test_an_idle_line_is_not_saved_up_for_later() -> None:
    near, far = local_links(5.0)
    link = ShapedLink(near, Network(8e5, 0.0))
    time.sleep(0.05)
    start = time.monotonic()
    link.send([memoryview(bytes(10_000))])
    far.recv_into(memoryview(bytearray(10_000)))
    assert time.monotonic() - start >= 0.1
    link.close()


def test_flush_waits_and_failures_come_back() -> None:
    near, _ = local_links(5.0)
    link = ShapedLink(near, Network(1e6, 50.0))
    start = time.monotonic()
    link.send([memoryview(bytes(10))])
    link.flush()
    assert time.monotonic() - start >= 0.025

    class Broken:
        def send(self, parts: list[memoryview]) -> None:
            raise LinkError("the wire is cut")

        def flush(self) -> None:
            pass

        def close(self) -> None:
            pass

    broken = ShapedLink(Broken(), Network(1e9, 0.1))  # type: ignore[arg-type]
    broken.send([memoryview(b"x")])
    for call in (broken.flush, lambda: broken.send([memoryview(b"y")])):
        with pytest.raises(LinkError, match="the wire is cut"):
            call()
    broken.close()
    link.close()


def test_close_does_not_wait_for_a_slow_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tightrope.runtimes.mpc.shaped.LINGER_S", 0.05)
    near, _ = local_links(5.0)
    link = ShapedLink(near, Network(1e3, 0.0))  # 80 s for what follows
    link.send([memoryview(bytes(10_000))])
    closing = threading.Thread(target=link.close)
    closing.start()
    closing.join(10.0)
    assert not closing.is_alive()


def test_a_peer_that_closes_is_noticed_through_a_shaped_link() -> None:
    near, far = local_links(5.0)
    channel = Channel("client", "server", near, Clock())
    channel.through(lambda link: ShapedLink(link, Network(1e9, 1.0)))
    far.close()
    with pytest.raises(ProtocolError, match="lost server"):
        channel.recv(0, 1, 4)
    channel.close()


@pytest.mark.parametrize("mode", ["simulate", pytest.param("execute", marks=pytest.mark.slow)])
def test_a_shaped_run_has_the_same_bytes_rounds_and_result(mode: str) -> None:
    program, x = network("residual"), images(3).numpy()
    config = MPC(noise_bits=0)
    found = []
    for here in (config, replace(config, network="1e8,4")):
        with here.open(program, mode) as session:  # type: ignore[arg-type]
            y, spent = session.run(x)
        found.append((y, spent))
    (y, fast), (z, slow) = found
    assert np.abs(y - z).max() < 2**-16
    assert (fast.links, fast.offline_links, fast.setup_links) == (
        slow.links, slow.offline_links, slow.setup_links,
    )  # fmt: skip
    assert fast.total.rounds == slow.total.rounds
    assert slow.total.online_ms >= 2.0 * slow.total.rounds  # half a round trip each
