"""Frames over an in-memory link: what is counted, and that nothing but the expected frame is accepted."""

from __future__ import annotations

import struct
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tightrope.errors import ProtocolError
from tightrope.runtimes.mpc.channel import Channel, Clock, Count, LinkError
from tightrope.runtimes.mpc.frame import HEADER_BYTES, MAX_ROUND, Header, parse
from tightrope.runtimes.mpc.local import LocalLink, local_channels, local_links


def pair(timeout_s: float = 5.0) -> tuple[Channel, Channel]:
    return local_channels(("client", Clock()), ("server", Clock()), timeout_s=timeout_s)


def receiver() -> tuple[LocalLink, Channel]:
    """A raw end to write arbitrary bytes into, and the channel that must judge them."""
    raw, end = local_links(timeout_s=0.2)
    return raw, Channel("server", "client", end, Clock())


def frame(payload: bytes, *, step: int = 4, tag: int = 2, round_: int = 1, sequence: int = 0) -> bytes:
    """Written from the documented layout, not with the package."""
    return struct.pack("<4sHHIIQQ", b"TTMP", 1, tag, step, round_, sequence, len(payload)) + payload


def test_parts_of_any_type_arrive_as_one_payload() -> None:
    client, server = pair()
    words, bits = np.arange(6, dtype=np.uint64).reshape(2, 3), np.array([7, 9], np.uint8)
    client.send(4, 2, words, bits, b"end", np.empty(0, np.uint64))
    client.send(5, 2, words)
    client.send(6, 2)
    payload = server.recv(4, 2, 53)
    assert payload.tobytes() == words.tobytes() + bits.tobytes() + b"end"
    assert payload[:48].view(np.uint64).tolist() == [0, 1, 2, 3, 4, 5]
    first, rest = np.zeros(2, np.uint64), np.zeros((2, 2), np.uint64)
    server.recv_into(5, 2, first, rest)
    assert first.tolist() == [0, 1] and rest.tolist() == [[2, 3], [4, 5]]
    assert server.recv_bounded(6, 2, 100) == b""


def test_bytes_on_the_link_are_the_documented_layout() -> None:
    raw, end = local_links(timeout_s=1.0)
    channel = Channel("client", "server", end, Clock())
    channel.send(4, 2, b"hello")
    channel.send(5, 1)
    want = frame(b"hello") + frame(b"", step=5, tag=1, sequence=1)
    got = bytearray(len(want))
    raw.recv_into(memoryview(got))
    assert bytes(got) == want and HEADER_BYTES == 32


def test_traffic_is_counted_by_step_and_tag() -> None:
    client, server = pair()
    client.send(1, 0, bytes(10))
    client.send(1, 0, bytes(20))
    client.send(1, 3, bytes(5))
    for size, tag in ((10, 0), (20, 0), (5, 3)):
        server.recv(1, tag, size)
    server.send(2, 0, bytes(1))
    assert client.traffic.sent == {(1, 0): Count(2, 94, 1), (1, 3): Count(1, 37, 1)}
    assert client.traffic.sent == server.traffic.received
    assert server.traffic.sent[2, 0].round == 2
    assert client.traffic.take().sent_bytes == 131 and client.traffic.sent_bytes == 0


def test_rounds_are_the_longest_chain_over_all_links() -> None:
    """dealer -> client -> server -> client while the server also talks at once: a chain of three."""
    client, server, dealer = Clock(), Clock(), Clock()
    cs, sc = local_channels(("client", client), ("server", server))
    cd, dc = local_channels(("client", client), ("dealer", dealer))
    sc.send(0, 0, b"a")  # independent: round 1
    dc.send(0, 0, b"b")
    dc.send(1, 0, b"c")  # back to back, still round 1
    cd.recv(0, 0, 1)
    cd.recv(1, 0, 1)
    cs.recv(0, 0, 1)
    assert client.round == 1
    cs.send(1, 0, b"d")
    sc.recv(1, 0, 1)
    sc.send(2, 0, b"e")
    cs.recv(2, 0, 1)
    assert (client.round, server.round, dealer.round) == (3, 2, 0)
    client.reset()
    assert client.round == 0


def test_both_may_send_much_before_either_receives() -> None:
    client, server = pair()
    data = np.arange(1 << 16, dtype=np.uint64)

    def talk(channel: Channel) -> None:
        for step in range(20):
            channel.send(step, 0, data)
        for step in range(20):
            np.testing.assert_array_equal(channel.recv(step, 0, data.nbytes).view(np.uint64), data)

    other = threading.Thread(target=talk, args=(server,))
    other.start()
    talk(client)
    other.join(10)
    assert not other.is_alive() and server.traffic.received[19, 0].frames == 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (frame(bytes(8), step=5), "step 5, tag 2"),
        (frame(bytes(8), tag=3), "step 4, tag 3"),
        (frame(bytes(8), sequence=1), "frame 1"),
        (frame(bytes(9)), "9 bytes"),
        (frame(bytes(7)), "7 bytes"),
        (frame(b"")[:-8] + struct.pack("<Q", 2**64 - 1), "18446744073709551615 bytes"),
        (frame(bytes(8), round_=0), "impossible round"),
        (frame(bytes(8), round_=MAX_ROUND + 1), "impossible round"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "not a frame"),
        (b"TTMP\x02" + frame(bytes(8))[5:], "another version"),
        (frame(bytes(8))[:20], "nothing came"),
        (frame(bytes(8))[:36], "middle of a frame"),
        (b"", "nothing came"),
    ],
)
def test_any_other_frame_is_refused_and_the_channel_stays_shut(data: bytes, reason: str) -> None:
    raw, channel = receiver()
    raw.send([memoryview(data)])
    with pytest.raises(ProtocolError, match=reason):
        channel.recv(4, 2, 8)
    raw.send([memoryview(frame(bytes(8)))])
    for use in (lambda: channel.recv(4, 2, 8), lambda: channel.send(4, 2, b"")):
        with pytest.raises(ProtocolError, match=reason):
            use()
    assert channel.clock.round == 0 and not channel.traffic.received


def test_a_replayed_frame_is_refused() -> None:
    raw, channel = receiver()
    raw.send([memoryview(frame(bytes(8))) for _ in range(2)])
    channel.recv(4, 2, 8)
    with pytest.raises(ProtocolError, match="frame 0"):
        channel.recv(4, 2, 8)


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_changed_streams_are_refused_or_unchanged(data: st.DataObject) -> None:
    check_changed_stream(data)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(st.data())
def test_ten_thousand_changed_streams(data: st.DataObject) -> None:
    check_changed_stream(data)


def check_changed_stream(data: st.DataObject) -> None:
    """Cut, repeat, swap, flip or replace frames: a receiver takes exact frames in order, then refuses."""
    payloads = data.draw(st.lists(st.binary(max_size=12), min_size=1, max_size=4))
    frames = [frame(p, step=i, tag=i % 3, sequence=i) for i, p in enumerate(payloads)]
    change = data.draw(st.sampled_from(["cut", "repeat", "swap", "flip", "random", "none"]))
    stream = bytearray(b"".join(frames))
    if change == "cut":
        del stream[data.draw(st.integers(0, len(stream) - 1)) :]
    elif change in ("repeat", "swap"):
        order = data.draw(st.lists(st.integers(0, len(frames) - 1), min_size=1, max_size=6))
        stream = bytearray(b"".join(frames[i] for i in order))
    elif change == "flip":
        stream[data.draw(st.integers(0, len(stream) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    elif change == "random":
        stream = bytearray(data.draw(st.binary(max_size=200)))
    raw, end = local_links(timeout_s=0.001)
    channel = Channel("server", "client", end, Clock())
    raw.send([memoryview(stream)])
    read = 0
    try:
        for i, payload in enumerate(payloads):
            got = channel.recv(i, i % 3, len(payload)).tobytes()
            header, sent = stream[read : read + HEADER_BYTES], frames[i][:HEADER_BYTES]
            assert header[:12] + header[16:] == sent[:12] + sent[16:]  # all but the round
            assert got == bytes(stream[read + HEADER_BYTES : read + len(frames[i])])
            read += len(frames[i])
    except ProtocolError:
        assert bytes(stream) != b"".join(frames)


def test_headers_round_trip_and_refuse_what_does_not_fit() -> None:
    header = Header(tag=65535, step=2**32 - 1, round=7, sequence=2**64 - 1, payload_bytes=5)
    assert parse(header.pack(), "client") == header
    for bad in (Header(-1, 0, 1, 0, 0), Header(0, 2**32, 1, 0, 0), Header(0, 0, 1, 0, 2**40)):
        with pytest.raises(ProtocolError):
            bad.pack()


def test_the_shortest_silence_ends() -> None:
    """CPython 3.11's SimpleQueue waits for ever where the time is up while its lock is taken."""

    def wait() -> None:
        for _ in range(20_000):
            _, end = local_links(timeout_s=1e-6)
            with pytest.raises(LinkError):
                end.recv_into(memoryview(bytearray(1)))

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    waiting.join(60)
    assert not waiting.is_alive()


def test_handshake_payloads_are_bounded() -> None:
    client, server = pair()
    client.send(0, 0, bytes(101))
    with pytest.raises(ProtocolError, match="0 to 100 bytes"):
        server.recv_bounded(0, 0, 100)


def test_silence_and_closing_name_the_peer_and_the_step() -> None:
    _, server = pair(timeout_s=0.05)
    with pytest.raises(ProtocolError, match=r"lost client[\s\S]*step 12[\s\S]*nothing came for 0.05 s"):
        server.recv(12, 0, 8)
    client, server = pair()
    client.send(11, 0, b"last")
    client.close()
    server.recv(11, 0, 4)
    for _ in range(2):
        with pytest.raises(ProtocolError, match=r"lost client[\s\S]*server, step 12[\s\S]*closed"):
            server.recv(12, 0, 8)


def test_strided_arrays_cannot_be_sent() -> None:
    client, _ = pair()
    with pytest.raises(ProtocolError, match="contiguous"):
        client.send(0, 0, np.arange(10)[::2])
