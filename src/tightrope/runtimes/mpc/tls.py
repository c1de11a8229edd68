"""Channels over TCP with mutually authenticated TLS 1.3.

Each link has one socket. Who sends hands to the kernel what it takes at once, a thread of the link's own the
rest, so that two parties that send to each other at the same time cannot block one another; the caller
receives straight into its buffers. OpenSSL's connection object must not be entered by two threads at once, so
the socket never blocks: every call into it is short and under a lock, and the waiting happens outside, in
poll.
"""

from __future__ import annotations

import fcntl
import select
import socket
import ssl
import sys
import termios
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue

from tightrope.errors import InputError, ProtocolError
from tightrope.runtimes.mpc.channel import STEP_S, Channel, Clock, LinkError
from tightrope.runtimes.mpc.frame import VERSION
from tightrope.runtimes.mpc.keys import Role, fingerprint, peer_role

RECORD_BYTES = 1 << 14  # the largest TLS record, RFC 8446 section 5.1
MAX_RECORDS = 1 << 24  # under one AES-GCM key, RFC 8446 section 5.5; the ssl module cannot ask for another
DIRECT_BYTES = 1 << 17  # what the caller encrypts: waking a thread takes as long as encrypting this
LINGER_S = 2.0  # what a closing party still waits for its last frames to leave
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
        self._records = 0  # encrypted so far
        self._turn = threading.Lock()  # of those who send; frames keep their order
        self._pending = 0  # frames that the thread has not sent completely
        self._queue: SimpleQueue[list[memoryview] | threading.Event | None] = SimpleQueue()
        self._failure: str | None = None
        self._sender = threading.Thread(target=self._send_queued, name="tightrope-send", daemon=True)
        self._sender.start()

    def send(self, parts: list[memoryview]) -> None:
        self._check_sender()
        rest = _records(parts)
        with self._turn:
            if not self._pending and sum(view.nbytes for view in rest) <= DIRECT_BYTES:
                rest = self._send_now(rest)
            if rest:
                self._pending += 1
                self._queue.put(rest)

    def recv_into(self, target: memoryview, silence_s: float | None = None) -> None:
        while target:
            try:
                with self._inside:
                    size = self._socket.recv_into(target)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as wanted:
                self._wait(wanted, self._timeout_s if silence_s is None else silence_s)
            except (OSError, ValueError) as error:
                raise LinkError(_reason(error)) from error
            else:
                if size == 0:
                    raise LinkError("closed the connection")
                target = target[size:]

    def flush(self) -> None:
        with self._turn:
            if not self._pending:
                return self._check_sender()
        done = threading.Event()
        self._queue.put(done)
        if not done.wait(STEP_S):  # the sender itself notices a peer that is gone
            raise LinkError(f"frames still unsent after {STEP_S:g} s")
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
                    for view in item:
                        self._send_all(view)
                except LinkError as error:
                    self._failure = str(error)
                with self._turn:
                    self._pending -= 1

    def _send_now(self, views: list[memoryview]) -> list[memoryview]:
        """What the kernel does not take at once; the first of it must be the next to be sent."""
        rest = [view for view in views if view]
        while rest:
            try:
                size = self._push(rest[0])
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                break
            except (OSError, ValueError) as error:
                self._failure = _reason(error)
                raise LinkError(self._failure) from error
            rest[0] = rest[0][size:]
            if not rest[0]:
                rest.pop(0)
        return rest

    def _push(self, view: memoryview) -> int:
        """Encrypt the front of it for the kernel, which takes so many bytes."""
        with self._inside:
            if self._records >= MAX_RECORDS:
                raise LinkError("this connection's key has encrypted all that it may; begin a new session")
            size = self._socket.send(view)
            self._records += -(-size // RECORD_BYTES)
        return size

    def _send_all(self, view: memoryview) -> None:
        while view:
            try:
                size = self._push(view)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as wanted:
                self._wait(wanted, self._timeout_s)
            except (OSError, ValueError) as error:
                raise LinkError(_reason(error)) from error
            else:
                view = view[size:]

    def _unread(self) -> int:
        """Bytes that wait to be received. While a peer works on something else it takes nothing, but its
        beats come in and change this number."""
        try:
            count = fcntl.ioctl(self._socket, termios.FIONREAD, bytes(4))
        except (OSError, ValueError) as error:
            raise LinkError("closed on this side") from error
        return int.from_bytes(count, sys.byteorder)

    def _wait(self, wanted: ssl.SSLError, silence_s: float) -> None:
        """Wait until the socket can do what OpenSSL wants next."""
        reading = isinstance(wanted, ssl.SSLWantReadError)
        poll = select.poll()
        try:
            poll.register(self._socket, select.POLLIN if reading else select.POLLOUT)
        except ValueError as error:
            raise LinkError("closed on this side") from error
        unread = self._unread()
        while not poll.poll(silence_s * 1000):
            before, unread = unread, self._unread()
            if reading or unread == before:
                raise LinkError(f"nothing {'came' if reading else 'was taken'} for {silence_s:g} s")


@dataclass(frozen=True)
class Proven:
    """A connection whose peer has shown the certificate of a role; `certificate` is its fingerprint."""

    connection: ssl.SSLSocket
    role: Role
    certificate: str

    def channel(self, own: Role, clock: Clock, timeout_s: float) -> Channel:
        return Channel(own, self.role, TlsLink(self.connection, timeout_s), clock, self.certificate)


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
    stopped: Callable[[], bool] = lambda: False,
) -> Channel:
    """A channel to `peer`, trying again for within_s seconds while nobody listens, unless `stopped` says that
    this party ends; timeout_s: of the channel.

    Raises InputError for an unknown host, ProtocolError if nobody listens or the one who does is not `peer`.
    """
    check_port(port)
    deadline = time.monotonic() + within_s
    while True:
        left_s = max(0.1, deadline - time.monotonic())
        try:
            raw = socket.create_connection((host, port), timeout=left_s)
            break
        except OSError as error:
            if isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN:
                raise InputError("unknown host", where=f"{host}:{port}", got=error.strerror) from error
            if time.monotonic() + RETRY_S >= deadline or stopped():
                raise ProtocolError(
                    f"{own} cannot reach {peer}",
                    where=f"{host}:{port}",
                    got=f"{_reason(error)}, for {within_s:g} s at most",
                    fix=f"start {peer} first, or check its address",
                ) from error
            time.sleep(RETRY_S)

    def is_peer(name: str | None) -> Role:
        if name != peer:
            raise ProtocolError(f"the peer is {name or 'of no known role'}, not {peer}", where=own)
        return peer

    try:
        proven = handshake(raw, context, own, is_peer, max(0.1, deadline - time.monotonic()))
    except ProtocolError as error:
        raise ProtocolError(
            error.what,
            where=f"{own} to {peer}, {host}:{port}",
            fix=f"see that {peer} listens there and is well, and that all certificates are of one authority",
        ) from error
    return proven.channel(own, clock, timeout_s)


def handshake(
    raw: socket.socket,
    context: ssl.SSLContext,
    own: Role,
    claim: Callable[[str | None], Role],
    within_s: float,
) -> Proven:
    """TLS, the peer's role from its certificate, and one hello each way, all within_s seconds.

    The hellos make both sides sure that the other accepted: a TLS 1.3 client is done before the server has
    looked at its certificate. `claim` gets the role that the certificate names and returns it, or raises
    ProtocolError. Closes the socket and raises ProtocolError if anything is not as it must be.
    """
    deadline = time.monotonic() + within_s
    accepts = context.protocol == ssl.PROTOCOL_TLS_SERVER
    try:
        raw.settimeout(within_s)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            if hasattr(socket, option):
                raw.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        secure = context.wrap_socket(raw, server_side=accepts)
    except TimeoutError as error:
        raw.close()
        raise ProtocolError("the peer gives no answer in time", where=own) from error
    except (OSError, ValueError) as error:
        raw.close()
        raise ProtocolError(f"no TLS 1.3 with a valid certificate ({_reason(error)})", where=own) from error
    try:
        role = claim(peer_role(secure.getpeercert()))
        secure.sendall(_hello(own))
        greeting = b""
        while len(greeting) < HELLO_BYTES:
            secure.settimeout(max(0.01, deadline - time.monotonic()))
            if not (more := secure.recv(HELLO_BYTES - len(greeting))):
                break
            greeting += more
        if greeting != _hello(role):
            raise ProtocolError(f"{role} refused or speaks another version ({greeting!r})", where=own)
    except (OSError, ProtocolError) as error:
        secure.close()
        if isinstance(error, ProtocolError):
            raise
        raise ProtocolError(f"the peer did not accept ({_reason(error)})", where=own) from error
    return Proven(secure, role, fingerprint(secure.getpeercert(binary_form=True) or b""))


def check_port(port: int) -> None:
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
