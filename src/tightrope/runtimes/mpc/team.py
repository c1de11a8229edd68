"""A team: one worker per role and a way to command all of them. Here: threads of this process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from tightrope.errors import ProtocolError
from tightrope.program import Program
from tightrope.runtimes.mpc import dealer, holders
from tightrope.runtimes.mpc.channel import BEAT_S, Channel, Clock
from tightrope.runtimes.mpc.config import MPC
from tightrope.runtimes.mpc.keys import ROLES, Role
from tightrope.runtimes.mpc.local import local_channels
from tightrope.runtimes.mpc.network import Network
from tightrope.runtimes.mpc.party import Batch, Party, PhaseReport, introduce
from tightrope.runtimes.mpc.schedule import Schedule, compile_program
from tightrope.runtimes.mpc.shaped import ShapedLink

T = TypeVar("T")
Command = Literal["setup", "offline", "online"]
Reply = tuple[PhaseReport, NDArray[np.float64] | None]


class Team(Protocol):
    def call(self, command: Command, size: int, x: NDArray[Any] | None = None) -> dict[Role, Reply]:
        """Return when all who take part are done. x goes to the client, whose reply has the result."""

    def ahead(self, size: int) -> None:
        """Let the dealer begin with the material of the next batch while the others run this one; the call of
        "offline" that follows is for that size, and waits for what is still to do."""

    def close(self) -> None:
        """Release everything; can be called again."""

    def peak_memory_bytes(self) -> int:
        """Of all parties together."""


@dataclass
class Worker:
    """A party and the batch that it has prepared and not yet run."""

    party: Party
    prepared: Batch | None = None

    def obey(self, command: Command, size: int, x: NDArray[Any] | None) -> Reply:
        """Do it, and meanwhile give the peers signs of life, however long a single step takes."""
        every_s = beat_s(self.party.config)

        def beat() -> None:
            for channel in self.party.channels.values():
                channel.beat(every_s)

        with beating(every_s, beat):
            return OBEY[command](self, size, x)


def beat_s(config: MPC) -> float:
    """How often a party that works gives signs of life."""
    return min(BEAT_S, config.timeout_s / 4)


@contextmanager
def beating(every_s: float, beat: Callable[[], None]) -> Iterator[None]:
    """Call `beat` again and again from a thread, while the block runs."""
    done = threading.Event()

    def run() -> None:
        while not done.wait(every_s):
            beat()

    thread = threading.Thread(target=run, name="tightrope-beat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _setup(worker: Worker, size: int, x: NDArray[Any] | None) -> Reply:
    if worker.party.role == "dealer":
        return dealer.setup(worker.party), None
    return holders.setup(worker.party), None


def _offline(worker: Worker, size: int, x: NDArray[Any] | None) -> Reply:
    if worker.party.role == "dealer":
        return dealer.offline(worker.party, size), None
    worker.prepared, report = holders.offline(worker.party, size)
    return report, None


def _online(worker: Worker, size: int, x: NDArray[Any] | None) -> Reply:
    batch, worker.prepared = worker.prepared, None
    if batch is None or batch.size != size:
        prepared = "none" if batch is None else f"{batch.size} samples"
        raise ProtocolError("no material for this batch", where=worker.party.role, got=prepared, allowed=size)
    result, report = holders.online(worker.party, batch, x)
    return report, result


OBEY: Mapping[Command, Callable[[Worker, int, NDArray[Any] | None], Reply]] = {
    "setup": _setup,
    "offline": _offline,
    "online": _online,
}
TAKES_PART: Mapping[Command, tuple[Role, ...]] = {
    "setup": ROLES,
    "offline": ROLES,
    "online": ("client", "server"),
}


def threads_of(config: MPC) -> int:
    """Threads per party: as configured, else half of the cores, as two parties compute at the same time."""
    return config.threads or max(1, len(os.sched_getaffinity(0)) // 2)


def seat(
    role: Role,
    program: Program,
    schedule: Schedule,
    config: MPC,
    session: bytes,
    channels: Mapping[Role, Channel],
    clock: Clock,
    certificate: str = "",
) -> Worker:
    """Shake hands with both peers and be ready for commands. Raises ProtocolError if they disagree."""
    network = Network.parse(config.network)
    if network != Network():
        for channel in channels.values():
            channel.through(partial(ShapedLink, network=network))
    streams = introduce(role, channels, session, program, config, certificate)
    return Worker(Party(role, program, schedule, config, channels, clock, streams, threads_of(config)))


class LocalTeam:
    """The parties as threads of this process, over queues instead of sockets: same code, same frames."""

    def __init__(self, program: Program, config: MPC, session: bytes) -> None:
        schedule = compile_program(program, config)
        clocks = {role: Clock() for role in ROLES}
        self._channels: dict[Role, dict[Role, Channel]] = {role: {} for role in ROLES}
        for one, other in combinations(ROLES, 2):
            pair = local_channels((one, clocks[one]), (other, clocks[other]), timeout_s=config.timeout_s)
            self._channels[one][other], self._channels[other][one] = pair
        self._pool = ThreadPoolExecutor(len(ROLES), thread_name_prefix="tightrope-party")

        def take_seat(role: Role) -> Worker:
            known = program if role == "server" else program.public()
            return seat(role, known, schedule, config, session, self._channels[role], clocks[role])

        self._begun: dict[Role, Future[Reply]] = {}
        self.workers: dict[Role, Worker] = self._all(take_seat, ROLES)

    def call(self, command: Command, size: int, x: NDArray[Any] | None = None) -> dict[Role, Reply]:
        def obey(role: Role) -> Reply:
            return self.workers[role].obey(command, size, x if role == "client" else None)

        begun, self._begun = (self._begun, {}) if command == "offline" else ({}, self._begun)
        return self._all(obey, TAKES_PART[command], begun)

    def ahead(self, size: int) -> None:
        self._begun["dealer"] = self._pool.submit(self.workers["dealer"].obey, "offline", size, None)

    def _all(
        self,
        work: Callable[[Role], T],
        roles: tuple[Role, ...],
        begun: Mapping[Role, Future[T]] = MappingProxyType({}),
    ) -> dict[Role, T]:
        """Run one call per party; the first failure closes all channels, so that the others end too."""
        running = dict(begun)
        running |= {role: self._pool.submit(work, role) for role in roles if role not in running}
        done, _ = wait(running.values(), return_when=FIRST_EXCEPTION)
        error = next((future.exception() for future in done if future.exception()), None)
        if error is not None:
            self.close()
            raise error
        return {role: future.result() for role, future in running.items()}

    def close(self) -> None:
        for channels in self._channels.values():
            for channel in channels.values():
                channel.close()
        self._pool.shutdown(wait=True)

    def peak_memory_bytes(self) -> int:
        return peak_memory_bytes()


def peak_memory_bytes() -> int:
    """The largest resident size that this process ever had."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
