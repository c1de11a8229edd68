"""What server and dealer do when their client commands it: one handler per command, every word checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from tightrope.errors import InputError, ProtocolError
from tightrope.program import Program
from tightrope.runtimes.mpc import control
from tightrope.runtimes.mpc.channel import Channel
from tightrope.runtimes.mpc.cost import of_schedule
from tightrope.runtimes.mpc.fixed import check_weights
from tightrope.runtimes.mpc.frame import ANSWER
from tightrope.runtimes.mpc.keys import Credentials, Role, read_credentials
from tightrope.runtimes.mpc.party import terms
from tightrope.runtimes.mpc.prg import SESSION_BYTES
from tightrope.runtimes.mpc.rations import Rations
from tightrope.runtimes.mpc.schedule import Schedule, compile_program
from tightrope.runtimes.mpc.settings import Settings
from tightrope.runtimes.mpc.stock import NAME, About, Lot, Stock
from tightrope.runtimes.mpc.supply import LotMaker, receiving, supplied, weights_streams
from tightrope.runtimes.mpc.team import Command, Worker, beat_s, beating, threads_of
from tightrope.runtimes.mpc.warm import load_kernels
from tightrope.types import Json

MAX_BATCHES = 1 << 20
PHASES: Mapping[str, Command] = {"setup": "setup", "offline": "offline", "online": "online"}


@dataclass(frozen=True)
class House:
    """What a service reads once. most: the largest batch it takes part in; weights: their SHA-256."""

    settings: Settings
    program: Program
    schedule: Schedule
    credentials: Credentials
    stock: Stock | None
    weights: str
    most: int

    @classmethod
    def load(cls, settings: Settings) -> House:
        """Raises InputError, BundleError or TraceError for anything that cannot be read or used."""
        if settings.role == "client":
            raise InputError("a client does not serve", allowed="server, dealer", fix="tightrope infer")
        server = settings.role == "server"
        program = Program.load(settings.program, weights=server)
        schedule = compile_program(program, settings.mpc)
        if server:
            check_weights(schedule.steps, program.tensors)
        own = read_credentials(settings.certificates, settings.role)
        weights = hashlib.sha256(program.weights()).hexdigest() if server else ""
        per_sample = of_schedule(program, schedule, 1).total.offline_bytes
        most = max(1, int(settings.mpc.material_bytes // max(1, per_sample)))
        torch.set_num_threads(threads_of(settings.mpc))
        load_kernels(schedule.steps)
        stock = None if settings.stock is None else Stock(settings.stock)
        return cls(settings, program, schedule, own, stock, weights, most)

    @property
    def terms(self) -> dict[str, Json]:
        return terms(self.program, self.settings.mpc)

    def close(self) -> None:
        if self.stock is not None:
            self.stock.close()

    def kept(self) -> Stock:
        if self.stock is None:
            raise ProtocolError(
                f"the {self.settings.role} keeps no stock", fix="[stock] in its configuration"
            )
        return self.stock

    def maker(self) -> LotMaker:
        return LotMaker(self.program.public(), self.schedule, self.settings.mpc, self.kept())


@dataclass
class Duty:
    """One session of a service. `images`: how many it has classified so far. `idle`: nothing would be lost if
    it ended now."""

    house: House
    worker: Worker
    channels: Mapping[Role, Channel]
    rations: Rations
    lot: Lot | None = None
    images: int = 0
    shared_weights: bool = False

    @property
    def idle(self) -> bool:
        return self.worker.prepared is None

    def obey(self, order: Mapping[str, Json]) -> dict[str, Json]:
        """The answer to a command. Raises ProtocolError for one that is not allowed now, or malformed."""
        role = self.house.settings.role
        handler = HANDLERS[role].get(str(order.get("command")))
        if handler is None:
            raise ProtocolError("a command that this party does not take", where=role)
        return handler(self, order)


def _whole(order: Mapping[str, Json], key: str, low: int, high: int) -> int:
    value = order.get(key)
    if type(value) is not int or not low <= value <= high:
        raise ProtocolError(f"{key} is out of range", allowed=f"{low} to {high}")
    return value


def _name(value: Json) -> str:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise ProtocolError("not a name", allowed=f"{2 * SESSION_BYTES} hexadecimal digits")
    return value


def _play(duty: Duty, order: Mapping[str, Json]) -> dict[str, Json]:
    command = PHASES[order["command"]]
    if "dealer" not in (duty.channels.keys() | {duty.house.settings.role}) and duty.lot is None:
        raise ProtocolError("this session has neither a dealer nor a lot")
    if duty.shared_weights == (command == "setup"):
        raise ProtocolError("the weights are shared once, and first")
    size = 0 if command == "setup" else _whole(order, "size", 1, duty.house.most)
    with ExitStack() as stack:
        if duty.lot is not None and command == "offline":
            if size != duty.lot.about.batch:
                raise ProtocolError("the lot is for other batches", allowed=duty.lot.about.batch)
            number = _whole(order, "number", 1, MAX_BATCHES)
            stack.enter_context(supplied(duty.worker.party, duty.lot, number))
        if command == "online":
            duty.rations.take(duty.channels["client"].certificate, size)
            duty.images += size
        report, _ = duty.worker.obey(command, size, None)
    duty.shared_weights = True
    return control.report_to_json(report)


def _fetch(duty: Duty, order: Mapping[str, Json]) -> dict[str, Json]:
    house = duty.house
    size = _whole(order, "size", 1, house.most)
    batches = _whole(order, "batches", 1, MAX_BATCHES)
    if set(duty.channels) | {house.settings.role} != {"client", "server", "dealer"}:
        raise ProtocolError("only three parties can fetch a lot")
    every_s = beat_s(house.settings.mpc)

    def beat() -> None:
        for channel in duty.channels.values():
            channel.beat(every_s)

    with beating(every_s, beat):
        if house.settings.role == "dealer":
            return {"stored": house.maker().hand_over(size, batches, duty.channels)}
        about = About(house.terms, size, batches, _name(order.get("owner")), weights=house.weights)
        with receiving(house.kept(), duty.channels["dealer"], house.schedule, about) as name:
            duty.channels["dealer"].send(0, ANSWER, json.dumps({"stored": name}).encode())
        return {"stored": name}


def _lots(duty: Duty, order: Mapping[str, Json]) -> dict[str, Json]:
    """Tell which lots of the client can be used here, none without a stock; its others, on which both will
    never agree, go."""
    stock, listed = duty.house.stock, order.get("lots")
    if not isinstance(listed, list):
        raise ProtocolError("no list of lots")
    owner, names = _name(order.get("owner")), {_name(name) for name in listed}
    if stock is None:
        return {"lots": {}}
    usable = stock.lots(duty.house.terms, owner, duty.house.weights)
    both = {name: lot.next for name, lot in usable.items() if name in names}
    stock.forget(lambda lot: lot.about.owner == owner and lot.name not in both)
    return {"lots": both}


def _open(duty: Duty, order: Mapping[str, Json]) -> dict[str, Json]:
    """Choose the session's lot. One per session: the numbers of its batches must not come again."""
    name = _name(order.get("lot"))
    lot = duty.house.kept().get(name)
    if lot is None or duty.lot is not None or duty.shared_weights or "dealer" in duty.channels:
        raise ProtocolError("this lot cannot be opened here and now")
    if (lot.about.terms, lot.about.weights) != (duty.house.terms, duty.house.weights):
        raise ProtocolError("the lot was made for another network")
    duty.lot = lot
    party = duty.worker.party
    party.streams = {**party.streams, "dealer": weights_streams(lot)}
    return {"opened": name}


Handler = Callable[[Duty, Mapping[str, Json]], dict[str, Json]]
HANDLERS: Mapping[Role, Mapping[str, Handler]] = {
    "server": {**dict.fromkeys(PHASES, _play), "fetch": _fetch, "lots": _lots, "open": _open},
    "dealer": {"setup": _play, "offline": _play, "fetch": _fetch},
}
