"""Messages: only the pinned peer, only the agreed kind and size."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest

from tightrope.errors import ProtocolError
from tightrope.runtimes.ckks.link import (
    EVALUATE,
    FAILED,
    HEAD,
    KEY,
    MAGIC,
    SIZE,
    Link,
    make_identity,
    tls_context,
)


def pair(trusted: bool = True, timeout_s: float = 5, patient: bool = False) -> tuple[Any, Any]:
    """The client's link, and the server's, or why it has none; the options are the server's."""
    client, server, other = (make_identity(name) for name in ("client", "server", "other"))
    near, far = socket.socketpair(socket.AF_UNIX)
    made: list[Any] = []

    def accept() -> None:
        pinned = client if trusted else other
        try:
            context = tls_context(server, pinned.certificate, accepts=True)
            made.append(Link(_tcp(far), context, "client", timeout_s, patient=patient))
        except ProtocolError as error:
            made.append(error)

    thread = threading.Thread(target=accept)
    thread.start()
    link = Link(_tcp(near), tls_context(client, server.certificate, accepts=False), "server", 5)
    thread.join()
    return link, made[0]


def _tcp(raw: socket.socket) -> socket.socket:
    """A socket pair is not TCP, and knows no delay to switch off."""

    class Local(socket.socket):
        def setsockopt(self, *_: Any) -> None:
            return None

    return Local(raw.family, raw.type, raw.proto, raw.detach())


def test_messages_arrive_whole_and_are_counted() -> None:
    near, far = pair()
    near.send(KEY, {"a": 1}, [b"x" * 100_000, b""])
    assert far.receive(KEY, 2, 100_000) == ({"a": 1}, [b"x" * 100_000, b""])
    assert near.sent == far.received == 100_000
    near.close()
    assert far.receive(KEY, 2, 10) is None
    far.close()


def test_a_stranger_is_refused() -> None:
    near, refusal = pair(trusted=False)
    assert isinstance(refusal, ProtocolError) and "no TLS" in str(refusal)
    with pytest.raises(ProtocolError):
        near.receive(KEY, 1, 1)
    near.close()


@pytest.mark.parametrize(
    ("kind", "parts", "match"),
    [
        (EVALUATE, [b"x"], "another message"),
        (KEY, [b"x", b"y"], "another message"),
        (KEY, [b"x" * 11], "too much"),
    ],
)
def test_other_messages_are_refused(kind: int, parts: list[bytes], match: str) -> None:
    near, far = pair()
    near.send(kind, {}, parts)
    with pytest.raises(ProtocolError, match=match):
        far.receive(KEY, 1, 10)
    near.close()
    far.close()


def test_a_failure_is_told() -> None:
    near, far = pair()
    near.send(FAILED, {"text": "no such rotation"})
    with pytest.raises(ProtocolError, match="no such rotation"):
        far.receive(KEY, 1, 10)
    near.close()
    far.close()


@pytest.mark.parametrize("kind", [KEY, FAILED])
@pytest.mark.parametrize(
    ("head", "match"),
    [
        (b"[" * 100_000, "not JSON"),
        (b"[" * 65 + b"]" * 65, "not JSON"),
        (b"\xff", "not JSON"),
        (b'["text"]', "it is .*, not an object"),
        (b"null", "it is null, not an object"),
    ],
)
def test_a_head_that_is_no_object_is_refused(kind: int, head: bytes, match: str) -> None:
    near, far = pair()
    near._socket.sendall(HEAD.pack(MAGIC, kind, 1) + SIZE.pack(len(head)) + head)
    with pytest.raises(ProtocolError, match=match):
        far.receive(KEY, 1, 10)
    near.close()
    far.close()


def test_a_patient_link_waits_for_a_message_to_begin() -> None:
    near, far = pair(timeout_s=0.3, patient=True)
    late = threading.Timer(1.0, near.send, (KEY, {}, [b"x"]))
    late.start()
    assert far.receive(KEY, 1, 10) == ({}, [b"x"])
    late.join()
    ended = threading.Timer(0.6, near.close)
    ended.start()
    assert far.receive(KEY, 1, 10) is None
    ended.join()
    far.close()


@pytest.mark.parametrize(("patient", "begun"), [(True, 1), (True, HEAD.size), (False, 0)])
def test_no_link_waits_for_the_rest_of_a_message_and_only_a_patient_one_for_its_begin(
    patient: bool, begun: int
) -> None:
    near, far = pair(timeout_s=0.3, patient=patient)
    near._socket.sendall(HEAD.pack(MAGIC, KEY, 1)[:begun])
    with pytest.raises(ProtocolError, match="lost client") as error:
        far.receive(KEY, 1, 10)
    assert "no answer in time" in str(error.value)
    near.close()
    far.close()
