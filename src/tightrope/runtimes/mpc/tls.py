"""Channels over TCP with mutually authenticated TLS 1.3.

Each link has one socket. A thread of its own sends, so that two parties that send to each other at the same
time cannot block one another; the caller receives straight into its buffers. OpenSSL's connection object must
not be entered by two threads at once, so the socket never blocks: every call into it is short and under a
lock, and the waiting happens outside, in poll.
"""

from __future__ import annotations

import select
import socket
import ssl
import threading
import time
from contextlib import suppress
from queue import SimpleQueue

from tightrope.errors import InputError, ProtocolError
from tightrope.runtimes.mpc.channel import Channel, Clock, LinkError
from tightrope.runtimes.mpc.frame import VERSION
from tightrope.runtimes.mpc.keys import Role, peer_role

RECORD_BYTES = 1 << 14  # the largest TLS record, RFC 8446 section 5.1
LINGER_S = 2.0  # what a closing party still waits for its last frames to leave
HANDSHAKE_S = 4.0  # what a listening party gives one unproven connection
RETRY_S = 0.05
HELLO_BYTES = 32
KEEPALIVE = {"TCP_KEEPIDLE": 2, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 2}  # seconds, seconds, probes


class TlsLink:
    """A link over a connected TLS socket. timeout_s: the longest wait without any progress."""

    def __init__(self, connection: ssl.SSLSocket, timeout_s: float) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._timeout_s = timeout_s
        self._inside = threading.Lock()
        self._queue: SimpleQueue[list[memoryview] | threading.Event | None] = SimpleQueue()
        self._failure: str | None = None
        self._sender = threading.Thread(target=self._send_queued, name="tightrope-send", daemon=True)
        self._sender.start()

    def send(self, parts: list[memoryview]) -> None:
        self._check_sender()
        self._queue.put(parts)

    def recv_into(self, target: memoryview) -> None:
        while target:
            try:
                with self._inside:
                    size = self._socket.recv_into(target)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as wanted:
                self._wait(wanted)
            except (OSError, ValueError) as error:
                raise LinkError(_reason(error)) from error
            else:
                if size == 0:
                    raise LinkError("closed the connection")
                target = target[size:]

    def flush(self, timeout_s: float) -> None:
        done = threading.Event()
        self._queue.put(done)
        if not done.wait(timeout_s):
            raise LinkError(f"frames still unsent after {timeout_s:g} s")
        self._check_sender()

    def close(self) -> None:
        self._queue.put(None)
        self._sender.join(LINGER_S)
        with self._inside:
            with suppress(OSError, ValueError):
                self._socket.unwrap()  # sends close_notify; the peer's own is not waited for
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()

    def _check_sender(self) -> None:
        if self._failure is not None:
            raise LinkError(self._failure)

    def _send_queued(self) -> None:
        """The sender thread. After a failure it only releases those who wait."""
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
            elif self._failure is None:
                try:
                    for view in _records(item):
                        self._send_all(view)
                except LinkError as error:
                    self._failure = str(error)

    def _send_all(self, view: memoryview) -> None:
        while view:
            try:
                with self._inside:
                    size = self._socket.send(view)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as wanted:
                self._wait(wanted)
            except (OSError, ValueError) as error:
                raise LinkError(_reason(error)) from error
            else:
                view = view[size:]

    def _wait(self, wanted: ssl.SSLError) -> None:
        """Wait until the socket can do what OpenSSL wants next."""
        reading = isinstance(wanted, ssl.SSLWantReadError)
        poll = select.poll()
        try:
            poll.register(self._socket, select.POLLIN if reading else select.POLLOUT)
        except ValueError as error:
            raise LinkError("closed on this side") from error
        if not poll.poll(self._timeout_s * 1000):
            raise LinkError(f"nothing {'came' if reading else 'was taken'} for {self._timeout_s:g} s")


class Listener:
    """A bound port on which a party waits for its peers. port 0 takes a free one; see `.port`.

    Raises InputError if the address cannot be bound.
    """

    def __init__(self, host: str, port: int, context: ssl.SSLContext, own: Role) -> None:
        _check_port(port)
        try:
            self._socket = socket.create_server((host, port), backlog=16)
        except OSError as error:
            raise InputError(
                f"{own} cannot listen",
                where=f"{host}:{port}",
                got=error.strerror,
                fix="another port, or port 0 for any free one",
            ) from error
        self.port: int = self._socket.getsockname()[1]
        self._context = context
        self._own = own

    def accept(
        self, peers: set[Role], clock: Clock, *, within_s: float, timeout_s: float
    ) -> dict[Role, Channel]:
        """Wait for every role in `peers` once. Other connections are refused and waiting goes on.

        within_s: for all of them together; timeout_s: of the channels. Raises ProtocolError, with the reason
        of every refusal, if a peer is still missing then.
        """
        deadline = time.monotonic() + within_s
        channels: dict[Role, Channel] = {}
        refused: list[str] = []
        while missing := peers - channels.keys():
            try:
                self._socket.settimeout(max(0.001, deadline - time.monotonic()))
                raw, address = self._socket.accept()
            except TimeoutError:
                for channel in channels.values():
                    channel.close()
                raise ProtocolError(
                    f"{self._own} waited in vain for {', '.join(sorted(missing))}",
                    where=f"port {self.port}",
                    got="; ".join(refused[-8:]) or f"no connection within {within_s:g} s",
                    fix="start the missing party, with certificates of the same authority",
                ) from None
            allowed_s = min(HANDSHAKE_S, max(0.1, deadline - time.monotonic()))
            try:
                secure, role = _handshake(raw, self._context, self._own, missing, allowed_s)
            except ProtocolError as error:
                refused.append(f"{address[0]}:{address[1]} refused: {error.what}")
                continue
            channels[role] = Channel(self._own, role, TlsLink(secure, timeout_s), clock)
        return channels

    def close(self) -> None:
        self._socket.close()


def connect(
    host: str,
    port: int,
    context: ssl.SSLContext,
    own: Role,
    peer: Role,
    clock: Clock,
    *,
    within_s: float,
    timeout_s: float,
) -> Channel:
    """A channel to `peer`, trying again for within_s seconds while nobody listens; timeout_s: of the channel.

    Raises InputError for an unknown host, ProtocolError if nobody listens or the one who does is not `peer`.
    """
    _check_port(port)
    deadline = time.monotonic() + within_s
    while True:
        left_s = max(0.1, deadline - time.monotonic())
        try:
            raw = socket.create_connection((host, port), timeout=left_s)
            break
        except socket.gaierror as error:
            raise InputError("unknown host", where=f"{host}:{port}", got=error.strerror) from error
        except OSError as error:
            if time.monotonic() + RETRY_S >= deadline:
                raise ProtocolError(
                    f"{own} cannot reach {peer}",
                    where=f"{host}:{port}",
                    got=f"{_reason(error)}, for {within_s:g} s",
                    fix=f"start {peer} first, or check its address",
                ) from error
            time.sleep(RETRY_S)
    secure, role = _handshake(raw, context, own, {peer}, max(0.1, deadline - time.monotonic()))
    return Channel(own, role, TlsLink(secure, timeout_s), clock)


def _handshake(
    raw: socket.socket, context: ssl.SSLContext, own: Role, allowed: set[Role], within_s: float
) -> tuple[ssl.SSLSocket, Role]:
    """TLS, the peer's role from its certificate, and one hello each way.

    The hellos make both sides sure that the other accepted: a TLS 1.3 client is done before the server has
    looked at its certificate. Closes the socket and raises ProtocolError if anything is not as it must be.
    """
    accepts = context.protocol == ssl.PROTOCOL_TLS_SERVER
    try:
        raw.settimeout(within_s)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            if hasattr(socket, option):
                raw.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        secure = context.wrap_socket(raw, server_side=accepts)
    except (OSError, ValueError) as error:
        raw.close()
        raise ProtocolError(f"no TLS 1.3 with a valid certificate ({_reason(error)})", where=own) from error
    try:
        name = peer_role(secure.getpeercert())
        role = next((r for r in allowed if r == name), None)
        if role is None:
            raise ProtocolError(
                f"the peer is {name or 'of no known role'}, not {' or '.join(sorted(allowed))}", where=own
            )
        secure.sendall(_hello(own))
        greeting = b""
        while len(greeting) < HELLO_BYTES and (more := secure.recv(HELLO_BYTES - len(greeting))):
            greeting += more
        if greeting != _hello(role):
            raise ProtocolError(f"{role} refused or speaks another version ({greeting!r})", where=own)
    except (OSError, ProtocolError) as error:
        secure.close()
        if isinstance(error, ProtocolError):
            raise
        raise ProtocolError(f"the peer did not accept ({_reason(error)})", where=own) from error
    return secure, role


def _check_port(port: int) -> None:
    if not 0 <= port <= 65535:
        raise InputError("no such port", got=port, allowed="0 to 65535")


def _hello(role: Role) -> bytes:
    return f"tightrope mpc {VERSION} {role}".encode().ljust(HELLO_BYTES)


def _records(parts: list[memoryview]) -> list[memoryview]:
    """The parts, the front of them joined to fill one record, so that a header costs no record of its own."""
    head, rest = bytearray(), list(parts)
    while rest and len(head) < RECORD_BYTES:
        room = RECORD_BYTES - len(head)
        head += rest[0][:room]
        rest[0] = rest[0][room:]
        if not rest[0]:
            rest.pop(0)
    return [memoryview(head), *rest]


def _reason(error: Exception) -> str:
    """Short words for a failed socket call."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError, ConnectionResetError, BrokenPipeError)):
        return "closed the connection"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate refused: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason or error}"
    return getattr(error, "strerror", None) or str(error)
