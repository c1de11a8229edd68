"""The three parties as processes of their own, over mutual TLS on the loopback interface.

The session's process only orchestrates. Throw-away certificates, the public program, and the weights for the
server go to the processes through their standard input; nothing is written to disk.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from queue import Empty, Queue, SimpleQueue
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from tightrope.errors import InputError, ProtocolError, TightropeError
from tightrope.program import Program
from tightrope.runtimes.mpc import control
from tightrope.runtimes.mpc.config import MPC
from tightrope.runtimes.mpc.keys import ROLES, Credentials, Role, make_credentials
from tightrope.runtimes.mpc.listen import LOOPBACK, bound
from tightrope.runtimes.mpc.team import TAKES_PART, Command, Reply
from tightrope.types import Json

START_S = 120.0  # to import torch and, the first time, compile the loops on a busy machine
HANDSHAKE_S = 30.0
CERTIFICATE_DAYS = 1
BLAME_S = 1.0  # what is waited for further reports before one party is blamed
CLOSE_S = 5.0
PORT_OFFSET: Mapping[Role, int] = {"server": 0, "dealer": 1, "client": 0}
DIED, SILENT = "died", "silent"
INNOCENCE: Mapping[str, int] = {DIED: 0, SILENT: 1}
Event = tuple[Role, dict[str, Json], bytes]
Answer = tuple[dict[str, Json], bytes]
Processes = dict[Role, "subprocess.Popen[bytes]"]
Commands = dict[Role, SimpleQueue[tuple[Mapping[str, Json], bytes] | None]]


class ProcessTeam:
    """See `team.Team`. Raises InputError if a fixed port is taken, ProtocolError if a party fails."""

    def __init__(self, program: Program, config: MPC, session: bytes) -> None:
        listening: tuple[Role, ...] = ("server", "dealer") if config.port else ()
        for role in listening:  # before anything that takes seconds
            bound(LOOPBACK, config.port + PORT_OFFSET[role], role).close()
        self._config = config
        self._events: Queue[Event] = Queue()
        self._processes: Processes = {}
        self._memory_bytes: dict[Role, int] = {}
        self._failure: TightropeError | None = None
        self._errors: dict[Role, IO[bytes]] = {}
        self._commands: Commands = {}
        self._begun: set[Role] = set()  # who works ahead, and what they have answered
        self._early: dict[Role, Answer] = {}
        self._end = weakref.finalize(self, _kill, self._processes, self._commands)
        try:
            self._start(program, session, make_credentials(days=CERTIFICATE_DAYS))
        except BaseException:
            self._abandon("could not start")
            raise

    def _start(self, program: Program, session: bytes, credentials: Mapping[Role, Credentials]) -> None:
        for role in ROLES:
            self._errors[role] = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the team
            process = subprocess.Popen(
                [sys.executable, "-m", "tightrope.runtimes.mpc.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors[role],
                start_new_session=True,  # an interrupt from the keyboard is the session's to handle
            )
            self._processes[role] = process
            self._commands[role] = SimpleQueue()
            follow = (role, process.stdout, self._events)
            threading.Thread(target=_follow, args=follow, daemon=True).start()
            threading.Thread(target=_tell, args=(process.stdin, self._commands[role]), daemon=True).start()
        structure = program.structure()
        common = {"session": session.hex(), "config": asdict(self._config), "structure": structure}
        begin = {
            role: common
            | {"role": role, "port_offset": PORT_OFFSET[role], "credentials": _text(credentials[role])}
            for role in ROLES
        }
        started = self._ask("start", begin, START_S, {"server": program.weights()})
        ports = {role: head["port"] for role, (head, _) in started.items()}
        self._ask("handshake", {role: {"ports": ports} for role in ROLES}, HANDSHAKE_S)

    def call(self, command: Command, size: int, x: NDArray[Any] | None = None) -> dict[Role, Reply]:
        heads = {role: {"command": command, "size": size} for role in TAKES_PART[command]}
        body = b"" if x is None else np.ascontiguousarray(x, np.float64).tobytes()
        replies: dict[Role, Reply] = {}
        answers = self._ask(command, heads, 2 * self._config.timeout_s, {"client": body})
        for role, (head, data) in answers.items():
            self._memory_bytes[role] = head["peak_memory_bytes"]
            result = np.frombuffer(data, np.float64).reshape(head["shape"]) if "shape" in head else None
            replies[role] = (control.report_from_json(head["report"]), result)
        return replies

    def ahead(self, size: int) -> None:
        self._commands["dealer"].put(({"command": "offline", "size": size}, b""))
        self._begun.add("dealer")

    def _ask(
        self,
        phase: str,
        heads: Mapping[Role, Mapping[str, Json]],
        silence_s: float,
        bodies: Mapping[Role, bytes] | None = None,
    ) -> dict[Role, Answer]:
        """Send every role its command and wait for all answers, as long as somebody shows signs of life."""
        if self._failure is not None:
            raise self._failure
        begun, self._begun = (self._begun, set()) if phase == "offline" else (set(), self._begun)
        for role, head in heads.items():
            if role in begun:
                continue
            self._commands[role].put((head, (bodies or {}).get(role, b"")))
        try:
            return self._answers(phase, tuple(heads), silence_s)
        except BaseException:  # also an interrupt: answers still to come would be taken for later ones
            self._abandon(f"was interrupted in the {phase} phase")
            raise

    def _answers(self, phase: str, roles: tuple[Role, ...], silence_s: float) -> dict[Role, Answer]:
        answers = {role: self._early.pop(role) for role in roles if role in self._early}
        while waiting := [role for role in roles if role not in answers]:
            try:
                role, answer, body = self._events.get(timeout=silence_s)
            except Empty:
                silent = {"error": SILENT, "text": f"no sign of life for {silence_s:g} s"}
                raise self._fail(phase, dict.fromkeys(waiting, silent)) from None
            if "error" in answer:
                raise self._fail(phase, {role: answer})
            if "beat" not in answer:
                (answers if role in roles else self._early)[role] = (answer, body)
        return answers

    def _fail(self, phase: str, reports: dict[Role, Mapping[str, Json]]) -> TightropeError:
        """Hear what the others say, blame the likeliest cause, and stop everything."""
        deadline = time.monotonic() + BLAME_S
        while len(reports) < len(ROLES) and (left_s := deadline - time.monotonic()) > 0:
            with suppress(Empty):
                role, answer, _ = self._events.get(timeout=left_s)
                if "error" in answer:
                    reports.setdefault(role, answer)
        if all(_echo(report) for report in reports.values()):
            said = "; ".join(f"{role}: {report['text'].splitlines()[0]}" for role, report in reports.items())
            for role in ROLES:
                if role not in reports and f"lost {role}" in said:
                    reports[role] = {"error": SILENT, "text": f"no answer ({said})"}
        role = min(reports, key=lambda r: _innocence(reports[r]))
        kind, text = reports[role]["error"], reports[role]["text"]
        if kind == "InputError":
            self._failure = InputError(text)
        else:
            got = text + (self._last_words(role) if kind == DIED else "")
            self._failure = ProtocolError(f"the {role} failed in the {phase} phase", where=role, got=got)
        return self._failure

    def _abandon(self, why: str) -> None:
        """End the session at once, for the reason already known or for this one."""
        self._failure = self._failure or ProtocolError(f"the session {why}")
        self.close()

    def _last_words(self, role: Role) -> str:
        """How a process ended, and the end of what it wrote to its error stream."""
        try:
            status: object = self._processes[role].wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            status = "unknown"
        file = self._errors[role]
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
        lines = file.read().decode(errors="replace").strip().splitlines()
        return f", status {status}" + "".join(f"\n           {line}" for line in lines[-3:])

    def close(self) -> None:
        if self._failure is None and self._end.alive:
            for commands in self._commands.values():
                commands.put(({"command": "close"}, b""))
            deadline = time.monotonic() + CLOSE_S
            for process in self._processes.values():
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))
        self._end()
        for file in self._errors.values():
            file.close()
        self._failure = self._failure or ProtocolError("the session is closed")

    def peak_memory_bytes(self) -> int:
        return sum(self._memory_bytes.values())


def _follow(role: Role, stream: IO[bytes], events: Queue[Event]) -> None:
    """Turn what a process says into events, until it ends."""
    while (message := control.read(stream)) is not None:
        events.put((role, *message))
    events.put((role, {"error": DIED, "text": "the process ended"}, b""))


def _tell(stream: IO[bytes], commands: SimpleQueue[tuple[Mapping[str, Json], bytes] | None]) -> None:
    """Write commands, from a thread: a process that hangs must not hang the session with it."""
    while (command := commands.get()) is not None:
        with suppress(OSError, ValueError):  # a dead process is noticed by its end of stream
            control.write(stream, *command)


def _text(own: Credentials) -> list[str]:
    return [pem.decode("ascii") for pem in (own.authority, own.certificate, own.key)]


def _echo(report: Mapping[str, Json]) -> bool:
    """Whether a party only says that it lost another."""
    return bool(report["error"] == "ProtocolError" and report["text"].startswith(("lost ", "cannot send ")))


def _innocence(report: Mapping[str, Json]) -> int:
    return 3 if _echo(report) else INNOCENCE.get(report["error"], 2)


def _kill(processes: Processes, commands: Commands) -> None:
    """Whatever still runs is stopped and waited for."""
    for queue in commands.values():
        queue.put(None)
    for process in processes.values():
        process.kill()
    for process in processes.values():
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
