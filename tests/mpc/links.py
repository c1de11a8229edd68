"""Two parties on loopback TCP, each end in the test's process."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from tightrope.runtimes.mpc.channel import Channel, Clock
from tightrope.runtimes.mpc.keys import Credentials, Role, tls_context
from tightrope.runtimes.mpc.listen import Listener
from tightrope.runtimes.mpc.tls import connect

HOST = "127.0.0.1"


Certs = dict[Role, Credentials]


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
