"""The client on a machine of its own: it commands server and dealer over the links that carry the frames.

A connection begins with what it is for, {"ask": "session", ...} or {"ask": "health"}. In a session the
client's commands follow, one JSON object a frame, and every one is answered: {"command": "setup", "offline"
or "online", "size"} as in `team`, "fetch" (a lot from the dealer), "lots" and "open" (use one), "close".
These frames are not counted.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from tightrope.errors import InputError, ProtocolError
from tightrope.program import Program
from tightrope.runtimes.mpc import control
from tightrope.runtimes.mpc.channel import Channel, Clock
from tightrope.runtimes.mpc.frame import ANSWER, ASK
from tightrope.runtimes.mpc.keys import Credentials, Role, read_credentials, tls_context
from tightrope.runtimes.mpc.party import PhaseReport, read_json, terms
from tightrope.runtimes.mpc.prg import SESSION_BYTES
from tightrope.runtimes.mpc.schedule import Schedule, compile_program
from tightrope.runtimes.mpc.session import MPCSession, begin
from tightrope.runtimes.mpc.settings import Settings
from tightrope.runtimes.mpc.stock import About, Lot, Stock
from tightrope.runtimes.mpc.supply import as_dealer, batch_bytes, receiving, supplied
from tightrope.runtimes.mpc.team import (
    TAKES_PART,
    Command,
    Reply,
    beat_s,
    beating,
    peak_memory_bytes,
    seat,
)
from tightrope.runtimes.mpc.tls import connect
from tightrope.runtimes.mpc.warm import load_kernels
from tightrope.types import Json

MAX_ANSWER_BYTES = 1 << 22  # a report of a network of some 10,000 ops
HEALTH_S = 5.0


def dial(
    settings: Settings,
    own: Credentials,
    peer: Role,
    clock: Clock,
    ask: Mapping[str, Json],
    stopped: Callable[[], bool] = lambda: False,
) -> Channel:
    """A channel to `peer`, which has been told what it is for. Waits for it, see `tls.connect`."""
    address, limits = settings.address(peer), settings.limits
    context = tls_context(own, accepts=False)
    within_s = min(HEALTH_S, limits.connect_s) if ask["ask"] == "health" else limits.connect_s
    channel = connect(
        address.host, address.port, context, settings.role, peer, clock,
        within_s=within_s, timeout_s=settings.mpc.timeout_s, stopped=stopped,
    )  # fmt: skip
    channel.send(0, ASK, json.dumps(ask).encode())
    return channel


def ask_health(settings: Settings, peer: Role) -> dict[str, Json]:
    """What a service says of itself. Raises ProtocolError if it does not answer."""
    own = read_credentials(settings.certificates, settings.role)
    channel = dial(settings, own, peer, Clock(), {"ask": "health"})
    try:
        return read_json(channel.recv_bounded(0, ANSWER, MAX_ANSWER_BYTES, within_s=HEALTH_S), "health", peer)
    finally:
        channel.close()


@dataclass(frozen=True)
class Client:
    """A client's settings and what was read from its files. `stock`: None without one."""

    settings: Settings
    program: Program
    schedule: Schedule
    credentials: Credentials
    stock: Stock | None

    @classmethod
    def load(cls, settings: Settings) -> Client:
        """Raises InputError or BundleError for anything that cannot be read or used."""
        if settings.role != "client":
            raise InputError("this is not a client's configuration", got=f"role {settings.role}")
        program = Program.load(settings.program, weights=False)
        schedule = compile_program(program, settings.mpc)
        own = read_credentials(settings.certificates, settings.role)
        load_kernels(schedule.steps)
        stock = None if settings.stock is None else Stock(settings.stock)
        return cls(settings, program, schedule, own, stock)

    @property
    def terms(self) -> dict[str, Json]:
        return terms(self.program, self.settings.mpc)

    def connect(self, *, dealer: bool) -> RemoteTeam:
        """Meet the server, and the dealer if asked. Raises as `session`."""
        return RemoteTeam(self, dealer=dealer)

    def session(self, count: int) -> MPCSession:
        """A session for `count` images: with material in stock if there is enough, else with the dealer.

        Raises ProtocolError if a peer is missing, refuses, or disagrees.
        """
        if self.stock is not None and self.stock.lots(self.terms, self.stock.owner):
            team = self.connect(dealer=False)
            lot = team.open_lot(count)
            if lot is not None:
                return begin(self.program, self.settings.mpc, "stock", self.schedule, team, lot.about.batch)
            team.close()
        team = self.connect(dealer=True)
        return begin(self.program, self.settings.mpc, "remote", self.schedule, team)

    def fetch(self, batch: int, batches: int) -> str:
        """Have the dealer give a lot to client and server; its name. Raises InputError without a stock."""
        team = self.connect(dealer=True)
        try:
            return team.fetch(batch, batches)
        finally:
            team.close()

    def close(self) -> None:
        if self.stock is not None:
            self.stock.close()


def read_report(body: Mapping[str, Json], steps: int, peer: Role) -> PhaseReport:
    """What a peer says that it spent. Raises ProtocolError for anything else."""
    try:
        report = control.report_from_json(body)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise ProtocolError("a report that cannot be read", where=f"from {peer}") from error
    if len(report.rounds) != steps:
        raise ProtocolError("a report of another schedule", where=f"from {peer}", allowed=f"{steps} steps")
    return report


class RemoteTeam:
    """See `team.Team`: this party is the client, the others are services. After a failure it is closed."""

    def __init__(self, client: Client, *, dealer: bool) -> None:
        self._client = client
        self._lot: Lot | None = None
        self._number = 0
        self._begun: set[Role] = set()  # who works ahead
        self._channels: dict[Role, Channel] = {}
        settings, session, clock = client.settings, secrets.token_bytes(SESSION_BYTES), Clock()
        ask = {"ask": "session", "session": session.hex(), "dealer": dealer}
        peers: tuple[Role, ...] = ("server", "dealer") if dealer else ("server",)
        with self._closing():
            for peer in peers:
                self._channels[peer] = dial(settings, client.credentials, peer, clock, ask)
            self._worker = seat(
                "client", client.program, client.schedule, settings.mpc, session, self._channels, clock,
                client.credentials.fingerprint,
            )  # fmt: skip

    def call(self, command: Command, size: int, x: NDArray[Any] | None = None) -> dict[Role, Reply]:
        order: dict[str, Json] = {"command": command, "size": size}
        peers = [peer for peer in TAKES_PART[command] if peer in self._channels]
        stocked = self._lot is not None and command == "offline"
        with self._closing(), ExitStack() as stack:
            if self._lot is not None and stocked:
                order["number"] = self._number
                stack.enter_context(supplied(self._worker.party, self._lot, self._number))
                self._number += 1
            begun, self._begun = (self._begun, set()) if command == "offline" else (set(), self._begun)
            for peer in peers:
                if peer not in begun:
                    self._order(peer, order)
            replies: dict[Role, Reply] = {"client": self._worker.obey(command, size, x)}
            for peer in peers:
                replies[peer] = (self._report(peer), None)
        if stocked:
            replies["dealer"] = (as_dealer({role: report for role, (report, _) in replies.items()}), None)
        return replies

    def ahead(self, size: int) -> None:
        if self._lot is None:
            with self._closing():
                self._order("dealer", {"command": "offline", "size": size})
            self._begun.add("dealer")

    def fetch(self, batch: int, batches: int) -> str:
        """See `Client.fetch`."""
        client, stock = self._client, self._client.stock
        if stock is None:
            raise InputError("no [stock] in the configuration of the client")
        stock.check_room(batches * batch_bytes(client.schedule, batch, "client"))
        about = About(client.terms, batch, batches, stock.owner)
        order = {"command": "fetch", "size": batch, "batches": batches, "owner": stock.owner}
        every_s = beat_s(client.settings.mpc)
        with self._closing(), beating(every_s, lambda: self._channels["server"].beat(every_s)):
            self._common(stock)
            for peer in self._channels:
                self._order(peer, order)
            with receiving(stock, self._channels["dealer"], client.schedule, about) as name:
                self._channels["dealer"].send(0, ANSWER, json.dumps({"stored": name}).encode())
                for peer in self._channels:
                    if self._answer(peer) != {"stored": name}:
                        raise ProtocolError(f"{peer} has another lot", where="client")
        return name

    def open_lot(self, count: int) -> Lot | None:
        """Agree with the server on a lot that both have and that is enough for `count` images, if any."""
        stock = self._client.stock
        if stock is None:
            return None
        with self._closing():
            enough = [
                (lot.about.batches - first, lot.name, first)
                for lot, first in self._common(stock)
                if count % lot.about.batch == 0 and count // lot.about.batch <= lot.about.batches - first + 1
            ]
            if not enough:
                return None
            _, name, first = min(enough)  # begun lots are used up first
            self._order("server", {"command": "open", "lot": name})
            if self._answer("server") != {"opened": name}:
                raise ProtocolError("the server opened another lot", where="client")
        self._lot, self._number = stock.get(name), first
        return self._lot

    def _common(self, stock: Stock) -> list[tuple[Lot, int]]:
        """The lots that server and client both have, with the first number that neither has used."""
        mine = stock.lots(self._client.terms, stock.owner)
        self._order("server", {"command": "lots", "owner": stock.owner, "lots": sorted(mine)})
        theirs = self._answer("server").get("lots")
        if not isinstance(theirs, dict) or not all(type(n) is int for n in theirs.values()):
            raise ProtocolError("no list of lots", where="from server")
        stock.forget(lambda lot: lot.name in mine and lot.name not in theirs)
        return [(lot, max(lot.next, theirs[name])) for name, lot in mine.items() if name in theirs]

    def _order(self, peer: Role, order: Mapping[str, Json]) -> None:
        self._channels[peer].send(0, ASK, json.dumps(order).encode())

    def _answer(self, peer: Role) -> dict[str, Json]:
        return read_json(self._channels[peer].recv_bounded(0, ANSWER, MAX_ANSWER_BYTES), "an answer", peer)

    def _report(self, peer: Role) -> PhaseReport:
        return read_report(self._answer(peer), len(self._client.schedule.steps), peer)

    @contextmanager
    def _closing(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._end({})
            raise

    def close(self) -> None:
        self._end({"command": "close"})

    def _end(self, order: Mapping[str, Json]) -> None:
        for peer in tuple(self._channels):
            if order:
                with suppress(ProtocolError):
                    self._order(peer, order)
            self._channels.pop(peer).close()

    def peak_memory_bytes(self) -> int:
        return peak_memory_bytes()
