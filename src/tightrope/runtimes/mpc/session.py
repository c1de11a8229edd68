"""A session: the parties started, the weights shared once, then batch after batch."""

from __future__ import annotations

import platform
import secrets
from collections.abc import Mapping
from dataclasses import asdict, replace
from itertools import permutations, zip_longest
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tightrope.errors import InputError, ProtocolError
from tightrope.program import Program
from tightrope.runtimes.mpc.compiler import SMALLEST_RANGE
from tightrope.runtimes.mpc.config import MPC
from tightrope.runtimes.mpc.cost import Costs, joined, pieces, structural
from tightrope.runtimes.mpc.fixed import check_weights
from tightrope.runtimes.mpc.keys import Role
from tightrope.runtimes.mpc.party import PhaseReport
from tightrope.runtimes.mpc.prg import SESSION_BYTES
from tightrope.runtimes.mpc.processes import ProcessTeam
from tightrope.runtimes.mpc.schedule import Schedule, compile_program
from tightrope.runtimes.mpc.team import Command, LocalTeam, Reply, Team, threads_of
from tightrope.types import Cost, Measurement, OpTrace, total

MODES: Mapping[str, type[LocalTeam] | type[ProcessTeam]] = {"simulate": LocalTeam, "execute": ProcessTeam}
Reports = Mapping[Role, PhaseReport]
ROUNDED_BITS = 6  # of the fraction of a result, at most, for roundings on its way


def open_session(program: Program, config: MPC, mode: Literal["simulate", "execute"]) -> MPCSession:
    """See `MPC.open`."""
    if mode not in MODES:
        raise InputError("unknown mode", where="mpc", got=mode, allowed=", ".join(MODES))
    schedule = compile_program(program, config)
    check_weights(schedule.steps, program.tensors)
    team = MODES[mode](program, config, secrets.token_bytes(SESSION_BYTES))
    return begin(program, config, mode, schedule, team)


def begin(
    program: Program, config: MPC, mode: str, schedule: Schedule, team: Team, batch: int | None = None
) -> MPCSession:
    """A session of parties that have shaken hands: the server shares its weights. `batch`: see MPCSession."""
    try:
        setup = _call(team, "setup", 0)
    except BaseException:
        team.close()
        raise
    return MPCSession(program.public(), config, mode, schedule, team, _links(_reports(setup)), batch)


class MPCSession:
    """A context manager that owns the parties. `setup_links`: what sharing the weights took, once, in bytes.

    Whoever calls `run` plays the client. In the modes `simulate` and `execute` he also started the server: on
    one machine, one user sees both the image and the weights. What the processes of the three parties see is
    what the protocol gives them. `batch`: the size of every batch, where material was made ahead for it.
    """

    def __init__(
        self,
        program: Program,
        config: MPC,
        mode: str,
        schedule: Schedule,
        team: Team,
        setup_links: Mapping[str, int],
        batch: int | None = None,
    ) -> None:
        self.program = program
        self.config = config
        self.mode = mode
        self.setup_links = dict(setup_links)
        self._schedule = schedule
        self._team = team
        self._batch = batch

    def run(self, x: NDArray[Any]) -> tuple[NDArray[np.float64], Measurement]:
        """(N, *input_shape) -> (N, *output shape), what the client learns, and what all of it cost.

        Per op, online_ms is the client's time, waiting included, and offline_ms the dealer's. In all,
        offline_ms is that of the slowest party; what the dealer makes of it while the batch before is online
        is counted there too.

        Raises InputError for an input of another shape, not finite, or beyond its calibrated range times
        `input_margin`, and for a result beyond its own times the margin, where something must have been out
        of range; ProtocolError, naming the party and the phase, if one fails. Then the session is closed.
        """
        x = np.ascontiguousarray(x, np.float64)
        self.program.check_input(x)
        self._check_range(x)
        outputs, spent, start = [], [], 0
        sizes = self._sizes(len(x))
        for size, following in zip_longest(sizes, sizes[1:]):
            offline = _call(self._team, "offline", size)
            if following is not None:
                self._team.ahead(following)
            online = _call(self._team, "online", size, x[start : start + size])
            start += size
            y = online["client"][1]
            if y is None:
                raise ProtocolError("the client has no result", where="client")
            outputs.append(y)
            spent.append(self._spent(size, _reports(offline), _reports(online)))
        found = np.concatenate(outputs)
        self._check_result(found)  # after the last batch: to stop earlier would tell the others
        return found, self._measurement(len(x), joined(spent))

    def _sizes(self, count: int) -> tuple[int, ...]:
        if self._batch is None:
            return pieces(self.program, self._schedule, self.config, count)
        if count % self._batch:
            raise InputError("the material is for whole batches", got=f"{count} images", allowed=self._batch)
        return (self._batch,) * (count // self._batch)

    def _check_result(self, y: NDArray[np.float64]) -> None:
        noise = 2.0**-self.config.noise_bits if self.config.noise_bits else 0.0
        rounding = 1 + 2.0 ** (ROUNDED_BITS - self.config.fraction_bits)
        limit = self._schedule.output.limit * rounding + noise
        if self.config.reveal == "logits" and float(np.abs(y).max()) > limit:
            raise InputError(
                "the result is far larger than on the calibration data, so values overflowed or may have",
                got=f"{float(np.abs(y).max()):.4g}",
                allowed=f"{limit:.4g} (range times margin)",
                fix="calibrate with such data, or a larger margin",
            )

    def _check_range(self, x: NDArray[np.float64]) -> None:
        """The margin of inner values is there for what calibration has not seen, not for such an input."""
        largest, seen = float(np.abs(x).max()), self.program.ranges[Program.INPUT]
        margin = min(self.config.input_margin, self.config.margin)
        limit = margin * max(seen, SMALLEST_RANGE)
        if largest > limit:
            raise InputError(
                "the input is larger than the calibration data, so inner values could overflow the ring",
                got=f"{largest:.4g}",
                allowed=f"{limit:.4g} (calibrated {seen:.4g} times input_margin {margin:g})",
                fix="normalise the input as in training, or calibrate with such data",
            )

    def _spent(self, batch: int, offline: Reports, online: Reports) -> Costs:
        """What the parties counted, as `cost.costs` predicts it."""
        ops = {op.name: structural(self.program, op.name, batch) for op in self.program.ops}
        ops.setdefault(self._schedule.output.name, Cost())
        before = 0
        for step in self._schedule.steps:
            rounds = max(report.rounds[step.index] for report in online.values())
            ops[step.op] += Cost(
                online_bytes=_bytes(online, step.index),
                offline_bytes=_bytes(offline, step.index),
                rounds=rounds - before,
            )
            before = rounds
        client, dealer = online["client"], offline["dealer"]
        for name, cost in ops.items():
            ops[name] = replace(
                cost,
                drelus=client.drelus.get(name, 0),
                online_ms=client.milliseconds.get(name, 0.0),
                offline_ms=dealer.milliseconds.get(name, 0.0),
            )
        whole = replace(
            total(ops.values()),
            online_ms=client.elapsed_ms,
            offline_ms=max(
                sum(dealer.milliseconds.values()),
                *(report.elapsed_ms for role, report in offline.items() if role != "dealer"),
            ),
        )
        return Costs(ops, whole, _links(online), _links(offline), {})

    def _measurement(self, batch: int, spent: Costs) -> Measurement:
        kinds = {op.name: op.kind for op in self.program.ops}
        return Measurement(
            runtime="mpc",
            batch=batch,
            ops=tuple(
                OpTrace(name, kinds.get(name, Program.INPUT), cost) for name, cost in spent.ops.items()
            ),
            total=spent.total,
            links=spent.links,
            offline_links=spent.offline_links,
            setup_links=self.setup_links,
            config=asdict(self.config),
            peak_memory_bytes=self._team.peak_memory_bytes(),
            host={
                "mode": self.mode,
                "system": platform.platform(),
                "python": platform.python_version(),
                "threads_per_party": threads_of(self.config),
            },
        )

    def close(self) -> None:
        """Stop the parties and wait until they are gone. Can be called again."""
        self._team.close()

    def __enter__(self) -> MPCSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def _call(team: Team, command: Command, size: int, x: NDArray[Any] | None = None) -> dict[Role, Reply]:
    """Have it done, and see that on each link the receiver counted what the sender did, step by step."""
    replies = team.call(command, size, x)
    reports = _reports(replies)
    for (sender, one), (receiver, other) in permutations(reports.items(), 2):
        sent = {step: count for (peer, step), count in one.sent.items() if peer == receiver}
        received = {step: count for (peer, step), count in other.received.items() if peer == sender}
        if sent != received:
            step = min(k for k in sent.keys() | received.keys() if sent.get(k) != received.get(k))
            team.close()
            raise ProtocolError(
                "sender and receiver counted different bytes",
                where=f"{sender}->{receiver}, {command} phase, step {step}",
                got=f"{received.get(step, 0)} received",
                allowed=f"{sent.get(step, 0)} sent",
            )
    return replies


def _reports(replies: Mapping[Role, Reply]) -> Reports:
    return {role: report for role, (report, _) in replies.items()}


def _bytes(reports: Reports, step: int) -> int:
    return sum(count for r in reports.values() for (_, index), count in r.sent.items() if index == step)


def _links(reports: Reports) -> dict[str, int]:
    links: dict[str, int] = {}
    for sender, report in reports.items():
        for (receiver, _), count in report.sent.items():
            name = f"{sender}->{receiver}"
            links[name] = links.get(name, 0) + count
    return links
