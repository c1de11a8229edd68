"""Server and dealer as services: session after session, several at a time, until told to stop.

Every proven connection has a thread of its own. At the server it is a session; at the dealer the connections
of client and server that name the same session are brought together first. Log: one JSON object per line.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import IO

from tightrope.errors import ProtocolError, TightropeError
from tightrope.runtimes.mpc.channel import Channel, Clock
from tightrope.runtimes.mpc.duties import Duty, House
from tightrope.runtimes.mpc.frame import ANSWER, ASK
from tightrope.runtimes.mpc.keys import ROLES, Role, tls_context
from tightrope.runtimes.mpc.listen import HANDSHAKE_S, Listener
from tightrope.runtimes.mpc.party import read_json
from tightrope.runtimes.mpc.rations import Rations
from tightrope.runtimes.mpc.remote import dial
from tightrope.runtimes.mpc.settings import Settings
from tightrope.runtimes.mpc.stock import NAME, Lot
from tightrope.runtimes.mpc.team import beat_s, beating, seat
from tightrope.runtimes.mpc.tls import Proven
from tightrope.types import Json

MAX_ORDER_BYTES = 1 << 16
MAX_WAITING = 64  # connections at the dealer whose counterpart has not come yet
TRAIL = 4  # lines of code that a bug is traced to
MAKE_AGAIN_S = 60.0  # after a lot did not fit
VISITORS: Mapping[Role, tuple[Role, ...]] = {
    "server": ("client",),
    "dealer": ("client", "server"),
}
Channels = dict[Role, Channel]


class Log:
    """Structured lines on a stream. Nothing secret goes in: names, numbers, and what errors are called."""

    def __init__(self, role: Role, stream: IO[str] | None = None) -> None:
        self._role = role
        self._stream = stream or sys.stderr
        self._lock = threading.Lock()

    def __call__(self, event: str, **facts: Json) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, "role": self._role, "event": event, **facts})
        with self._lock, suppress(ValueError, OSError):  # closed at the very end; or whoever reads it is gone
            print(line, file=self._stream, flush=True)


@dataclass
class _Session:
    """What `stop` has to know of a session under way; `lock` is held while a command is obeyed."""

    channels: Channels
    duty: Duty | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class _Waiting:
    """A connection at the dealer that waits for its counterpart."""

    channel: Channel
    taken: threading.Event = field(default_factory=threading.Event)


class Service:
    """A server or dealer on its port. Raises InputError if the port cannot be bound."""

    def __init__(self, house: House, log: Log) -> None:
        self.house = house
        self._settings: Settings = house.settings
        self._log = log
        role = self._settings.role
        own = self._settings.address(role)
        context = tls_context(house.credentials, accepts=True)
        self._listener = Listener(self._settings.listen or own.host, own.port, context, role)
        self._rations = Rations(self._settings.limits.images)
        self._places = threading.BoundedSemaphore(self._settings.limits.sessions)
        self._guard = threading.Lock()
        self._waiting: dict[str, _Waiting] = {}
        self._sessions: list[_Session] = []
        self._changed = threading.Condition(self._guard)
        self._stopping = threading.Event()
        self._served = 0
        self._began = time.monotonic()

    def run(self) -> None:
        """Serve until `stop` is called, from a signal handler or another thread; then end in good order."""
        log, stop_s = self._log, self._settings.limits.stop_s
        self._listener.start(
            self._claim, lambda role: None, self._visit, lambda a, e: log("refused", peer=a, why=e.what)
        )
        maker = threading.Thread(target=self._make_ahead, name="tightrope-make", daemon=True)
        if self._settings.role == "dealer" and self.house.stock is not None:
            maker.start()
        log("ready", port=self._listener.port, program=self.house.program.sha256())
        self._stopping.wait()
        log("stopping", sessions=len(self._sessions))
        self._listener.close()
        self._end_idle()
        with self._guard:
            if not self._changed.wait_for(lambda: not self._sessions, stop_s):
                log("cut_off", sessions=len(self._sessions))
        if maker.is_alive():
            maker.join(stop_s)
        log("stopped", served=self._served)

    def stop(self) -> None:
        self._stopping.set()

    def _claim(self, name: str | None) -> Role:
        """Peers for sessions; its own role too, to be asked for its health on its own machine."""
        role = next((r for r in ROLES if r == name), None)
        if role is None:
            raise ProtocolError(f"the peer is {name or 'of no known role'}", where=self._settings.role)
        return role

    def _visit(self, proven: Proven) -> None:
        """One connection, from its first word to its end."""
        channel = proven.channel(self._settings.role, Clock(), self._settings.mpc.timeout_s)
        try:
            with self._reporting({channel.peer: channel}, peer=channel.peer):
                ask = read_json(
                    channel.recv_bounded(0, ASK, MAX_ORDER_BYTES, within_s=HANDSHAKE_S),
                    "a question",
                    channel.peer,
                )
                if ask.get("ask") == "health":
                    channel.send(0, ANSWER, json.dumps(self.health()).encode())
                elif ask.get("ask") == "session" and channel.peer in VISITORS[self._settings.role]:
                    self._welcome(channel, _session_id(ask), ask.get("dealer") is not False)
                else:
                    raise ProtocolError(f"a {channel.peer} may not ask for this")
        finally:
            channel.close()

    def _welcome(self, channel: Channel, session: str, dealer: bool) -> None:
        if self._settings.role == "server":
            with self._place():
                self._serve(session, {"client": channel}, dealer=dealer)
            return
        partner = self._partner(channel, session)
        if partner is None:
            return  # the thread of the counterpart served both, or told this one why not
        try:
            with self._place():
                self._serve(
                    session, {channel.peer: channel, partner.channel.peer: partner.channel}, dealer=False
                )
        finally:
            partner.taken.set()

    def _partner(self, channel: Channel, session: str) -> _Waiting | None:
        """The connection that waited for this one. Without one, wait until the next one's thread has served
        both, and return None."""
        with self._guard:
            found = self._waiting.pop(session, None)
            if found is not None and found.channel.peer == channel.peer:
                self._waiting[session] = found
                raise ProtocolError("this session has such a party already")
            if found is None:
                if len(self._waiting) >= MAX_WAITING:
                    raise ProtocolError("too many connections wait for their counterpart")
                own = self._waiting[session] = _Waiting(channel)
        if found is not None:
            found.channel.clock = channel.clock
            return found
        every_s = beat_s(self._settings.mpc)
        with beating(every_s, lambda: channel.beat(every_s)):
            taken = own.taken.wait(self._settings.limits.connect_s)
        if taken:
            return None
        with self._guard:
            alone = self._waiting.pop(session, None) is own
        if alone:
            raise ProtocolError("the other party of this session did not come")
        own.taken.wait()
        return None

    def _serve(self, session: str, channels: Channels, *, dealer: bool) -> None:
        """A whole session: meet, then obey the client until it says goodbye."""
        house, settings, client = self.house, self._settings, channels["client"]
        every_s = beat_s(settings.mpc)
        entry = _Session(channels)
        with self._guard:
            if self._stopping.is_set():
                raise ProtocolError("the service is stopping")
            self._sessions.append(entry)
        began = time.monotonic()
        self._log("session", session=session[:8], dealer=dealer or settings.role == "dealer")
        commands: dict[str, int] = {}
        try:
            with self._reporting(channels, session=session[:8]):
                if dealer:
                    ask = {"ask": "session", "session": session}
                    with beating(every_s, lambda: client.beat(every_s)):
                        channels["dealer"] = dial(
                            settings, house.credentials, "dealer", client.clock, ask, self._stopping.is_set
                        )
                worker = seat(
                    settings.role, house.program, house.schedule, settings.mpc, bytes.fromhex(session),
                    dict(channels), client.clock, house.credentials.fingerprint,
                )  # fmt: skip
                entry.duty = Duty(house, worker, channels, self._rations)
                self._obey(entry, entry.duty, commands)
        finally:
            for channel in channels.values():
                channel.close()
            with self._guard:
                self._sessions.remove(entry)
                self._served += 1
                self._changed.notify_all()
            facts = {"seconds": round(time.monotonic() - began, 3), "commands": commands}
            images = 0 if entry.duty is None else entry.duty.images
            self._log("session_end", session=session[:8], images=images, **facts)

    def _obey(self, entry: _Session, duty: Duty, commands: dict[str, int]) -> None:
        client = entry.channels["client"]
        while not (self._stopping.is_set() and duty.idle):
            data = client.recv_bounded(0, ASK, MAX_ORDER_BYTES, within_s=self._settings.limits.idle_s)
            order = read_json(data, "a command", "client")
            if order.get("command") == "close":
                return
            with entry.lock:
                answer = duty.obey(order)
                client.send(0, ANSWER, json.dumps(answer).encode())
                client.flush()
            commands[order["command"]] = commands.get(order["command"], 0) + 1
        raise ProtocolError("the service is stopping")

    def _end_idle(self) -> None:
        """Sessions that only wait for a command end now; the others after theirs, see `_obey`."""
        with self._guard:
            sessions = list(self._sessions)
        for entry in sessions:
            if entry.lock.acquire(blocking=False):
                try:
                    if entry.duty is not None and entry.duty.idle:
                        for channel in entry.channels.values():
                            channel.farewell("the service is stopping")
                            channel.close()
                finally:
                    entry.lock.release()

    @contextmanager
    def _place(self) -> Iterator[None]:
        if not self._places.acquire(blocking=False):
            raise ProtocolError(f"the {self._settings.role} is busy; try again later")
        try:
            yield
        finally:
            self._places.release()

    @contextmanager
    def _reporting(self, channels: Channels, **facts: Json) -> Iterator[None]:
        """Whatever goes wrong in the block ends there: the peers are told what, the log a little more."""
        try:
            yield
        except TightropeError as error:
            event = "stopped_session" if self._stopping.is_set() else "failed"
            self._log(event, why=str(error).splitlines(), **facts)
            said = error.what
        except Exception as error:
            self._bug(error, **facts)
            said = "an internal error"
        else:
            return
        for channel in channels.values():
            channel.farewell(said)

    def _bug(self, error: Exception, **facts: Json) -> None:
        """Where it happened and its kind; what it says may hold a value, and is not logged."""
        trail = [f"{at.filename}:{at.lineno}" for at in traceback.extract_tb(error.__traceback__)]
        self._log("bug", why=type(error).__name__, at=trail[-TRAIL:], **facts)

    def _make_ahead(self) -> None:
        """The dealer keeps as many lots ready as it is told to."""
        lots, wanted = self.house.maker(), self._settings.stock
        assert wanted is not None

        def fits(lot: Lot) -> bool:
            return lots.fits(lot, wanted.batch, wanted.batches)

        lots.stock.forget(lambda lot: lot.about.terms != self.house.terms)
        while not self._stopping.is_set():
            pause_s = 1.0
            try:
                if lots.stock.count(fits) < wanted.ready:
                    began = time.monotonic()
                    lots.make(wanted.batch, wanted.batches, self._stopping.is_set)
                    self._log(
                        "made_lot",
                        seconds=round(time.monotonic() - began, 3),
                        ready=lots.stock.count(fits),
                    )
                    continue
            except TightropeError as error:
                self._log("no_lot", why=str(error).splitlines())
                pause_s = MAKE_AGAIN_S
            except Exception as error:
                self._bug(error)
                pause_s = MAKE_AGAIN_S
            self._stopping.wait(pause_s)

    def health(self) -> dict[str, Json]:
        """What anybody with a certificate may know."""
        stock, settings = self.house.stock, self._settings
        return {
            "role": settings.role,
            "status": "stopping" if self._stopping.is_set() else "ready",
            "terms": self.house.terms,
            "sessions": len(self._sessions),
            "places": settings.limits.sessions,
            "served": self._served,
            "uptime_s": round(time.monotonic() - self._began, 1),
            "lots": None if stock is None else stock.count(lambda lot: lot.left > 0),
        }


def _session_id(ask: Mapping[str, Json]) -> str:
    session = ask.get("session")
    if not isinstance(session, str) or not NAME.fullmatch(session):
        raise ProtocolError("no session id")
    return session
