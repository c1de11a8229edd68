"""The listening side: every connection is proven in a thread of its own, with a deadline of its own.

A stranger that says nothing, or speaks slowly, holds one of MAX_UNPROVEN places for at most HANDSHAKE_S and
nobody else up. When all places are taken, further connections wait in the backlog of the socket.
"""

from __future__ import annotations

import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, Queue

from tightrope.errors import InputError, ProtocolError
from tightrope.runtimes.mpc.channel import Channel, Clock
from tightrope.runtimes.mpc.keys import Role
from tightrope.runtimes.mpc.tls import Proven, check_port, handshake

HANDSHAKE_S = 4.0  # what one unproven connection is given
MAX_UNPROVEN = 64
SHOWN = 8  # refusals in an error message
LOOPBACK = "127.0.0.1"


def bound(host: str, port: int, own: Role) -> socket.socket:
    """A listening socket. Raises InputError if the address cannot be bound."""
    check_port(port)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=MAX_UNPROVEN)
    except OSError as error:
        raise InputError(
            f"{own} cannot listen",
            where=f"{host}:{port}",
            got=error.strerror,
            fix="another port, or another address to listen on",
        ) from error


class Listener:
    """A bound port on which a party waits for its peers. port 0 takes a free one; see `.port`.

    Raises InputError if the address cannot be bound.
    """

    def __init__(self, host: str, port: int, context: ssl.SSLContext, own: Role) -> None:
        self._socket = bound(host, port, own)
        self._socket.setblocking(False)
        self.port: int = self._socket.getsockname()[1]
        self._context = context
        self._own = own
        self._stop: Callable[[], None] | None = None

    def start(
        self,
        claim: Callable[[str | None], Role],
        release: Callable[[Role], None],
        deliver: Callable[[Proven], None],
        refused: Callable[[str, ProtocolError], None],
    ) -> None:
        """Accept from a thread until `stop`. All four are called from threads of their own.

        claim: the role a peer's certificate names -> that role, or raises ProtocolError; release: the peer
        failed after its claim; deliver: a proven connection; refused: its address, and why.
        """
        stopped, places = threading.Event(), threading.BoundedSemaphore(MAX_UNPROVEN)
        alarm, waker = socket.socketpair()
        poll = select.poll()
        for watched in (self._socket, alarm):
            poll.register(watched, select.POLLIN)

        def prove(raw: socket.socket, address: str) -> None:
            claimed: list[Role] = []

            def note(name: str | None) -> Role:
                claimed.append(claim(name))
                return claimed[0]

            try:
                proven = handshake(raw, self._context, self._own, note, HANDSHAKE_S)
            except ProtocolError as error:
                for role in claimed:
                    release(role)
                refused(address, error)
                return
            finally:
                places.release()
            deliver(proven)

        def accept() -> None:
            while not stopped.is_set():
                if not places.acquire(timeout=0.1):
                    continue
                with suppress(OSError, RuntimeError):  # it is gone again, or there is no room, or no thread
                    if poll.poll() != [(alarm.fileno(), select.POLLIN)]:
                        raw, (host, port, *_) = self._socket.accept()
                        try:
                            raw.setblocking(True)
                            threading.Thread(target=prove, args=(raw, f"{host}:{port}"), daemon=True).start()
                        except BaseException:
                            raw.close()
                            raise
                        continue
                places.release()
                stopped.wait(0.01)  # out of descriptors, say: not in a tight loop

        thread = threading.Thread(target=accept, name="tightrope-accept", daemon=True)

        def stop() -> None:
            stopped.set()
            waker.send(b"x")
            thread.join()
            alarm.close()
            waker.close()

        thread.start()
        self._stop = stop

    def stop(self) -> None:
        """No further connection is taken; the port stays bound. Can be called again."""
        stop, self._stop = self._stop, None
        if stop is not None:
            stop()

    def accept(
        self, peers: set[Role], clock: Clock, *, within_s: float, timeout_s: float
    ) -> dict[Role, Channel]:
        """Wait for every role in `peers` once. Other connections are refused and waiting goes on.

        within_s: for all of them together; timeout_s: of the channels. Raises ProtocolError, with the reason
        of every refusal, if a peer is still missing then.
        """
        deadline = time.monotonic() + within_s
        arrived: Queue[Proven] = Queue()
        wanted = _Wanted(self._own, peers)
        refused: list[str] = []
        channels: dict[Role, Channel] = {}
        self.start(
            wanted.claim,
            wanted.release,
            arrived.put,
            lambda address, error: refused.append(f"{address} refused: {error.what}"),
        )
        try:
            while missing := peers - channels.keys():
                try:
                    proven = arrived.get(timeout=max(0.001, deadline - time.monotonic()))
                except Empty:
                    raise ProtocolError(
                        f"{self._own} waited in vain for {', '.join(sorted(missing))}",
                        where=f"port {self.port}",
                        got="; ".join(refused[-SHOWN:]) or f"no connection within {within_s:g} s",
                        fix="start the missing party, with certificates of the same authority",
                    ) from None
                channels[proven.role] = proven.channel(self._own, clock, timeout_s)
        except BaseException:
            wanted.close()
            for channel in channels.values():
                channel.close()
            raise
        finally:
            self.stop()
        return channels

    def close(self) -> None:
        self.stop()
        self._socket.close()


class _Wanted:
    """The roles that are still awaited; each is claimed by one connection at a time."""

    def __init__(self, own: Role, roles: set[Role]) -> None:
        self._own = own
        self._roles = set(roles)
        self._lock = threading.Lock()

    def claim(self, name: str | None) -> Role:
        with self._lock:
            role = next((r for r in self._roles if r == name), None)
            if role is None:
                awaited = " or ".join(sorted(self._roles)) or "anybody that is still awaited"
                raise ProtocolError(
                    f"the peer is {name or 'of no known role'}, not {awaited}", where=self._own
                )
            self._roles.remove(role)
            return role

    def release(self, role: Role) -> None:
        with self._lock:
            self._roles.add(role)

    def close(self) -> None:
        with self._lock:
            self._roles.clear()
