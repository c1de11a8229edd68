"""One party as a process: `python -m tightrope.runtimes.mpc.worker`, obeying a session through its pipes.

First command: {"role", "session", "config", "credentials", "structure"}, and to the server the weights as its
body. Nothing of it touches the disk. A party that listens answers with its port; then {"ports"} makes the
links, and setup, offline and online follow. The process ends with its standard input, so no party outlives
the session that started it.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

import numpy as np
import torch

from tightrope.errors import InputError, ProtocolError
from tightrope.program import Program
from tightrope.runtimes.mpc import control
from tightrope.runtimes.mpc.channel import BEAT_S, Channel, Clock
from tightrope.runtimes.mpc.config import MPC
from tightrope.runtimes.mpc.keys import Credentials, Role, tls_context
from tightrope.runtimes.mpc.listen import LOOPBACK, Listener
from tightrope.runtimes.mpc.schedule import compile_program
from tightrope.runtimes.mpc.team import Worker, beat_s, beating, peak_memory_bytes, seat, threads_of
from tightrope.runtimes.mpc.tls import connect
from tightrope.runtimes.mpc.warm import load_kernels
from tightrope.types import Json

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt
SWITCH_S = 5e-5  # the interpreter's default is 5 ms, as long as a layer takes
CONNECT_S = 10.0
Peers = Mapping[Role, tuple[Role, ...]]
CONNECTS: Peers = {"client": ("server", "dealer"), "server": ("dealer",), "dealer": ()}
ACCEPTS: Peers = {"client": (), "server": ("client",), "dealer": ("client", "server")}
Command = tuple[dict[str, Json], bytes]


class Replies:
    """The pipe to the session. Beats come from a thread, so that a long step does not look like a hang."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def write(self, head: Mapping[str, Json], body: bytes = b"") -> None:
        with self._lock:
            control.write(self._stream, head, body)

    def beat(self) -> None:
        with suppress(OSError, ValueError):  # the session is gone, and soon this process
            self.write({"beat": True})


def tune_process() -> None:
    """Make this process a party's: have glibc use freed arrays again instead of giving them back to the
    system, and threads that send take their turn soon.

    The first touch of fresh pages costs more than all that is computed on them; a batch needs as much as the
    one before. A frame whose thread waits for the interpreter makes the peer wait too.
    """
    sys.setswitchinterval(SWITCH_S)
    with suppress(OSError, AttributeError):  # another C library does as it likes
        glibc = ctypes.CDLL(None)
        glibc.mallopt(M_MMAP_MAX, 0)
        glibc.mallopt(M_TRIM_THRESHOLD, -1)  # as an unsigned number: never


def keep_apart(role: Role, threads: int) -> None:
    """On two cores, let client and server compute on one each: now and then a scheduler puts both on one,
    while the other is idle, for as long as a layer takes. The dealer, and threads that only send, go
    anywhere.

    More cores or threads are left to the scheduler, which then has room.
    """
    with suppress(OSError, AttributeError):  # another system
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) == 2 and threads == 1 and role != "dealer":
            os.sched_setaffinity(0, cores[:1] if role == "client" else cores[1:])


def main() -> int:
    """Obey commands until told to close. Exit status 1 after a failure, which is reported first."""
    tune_process()
    replies = Replies(os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)  # whatever a library prints must not get between the replies
    commands: SimpleQueue[Command] = SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin.buffer, commands), daemon=True).start()
    worker = None
    try:
        worker = _start(commands, replies)
        while (command := commands.get())[0]["command"] != "close":
            with beating(beat_s(worker.party.config), replies.beat):
                _obey(worker, command, replies)
    except Exception as error:
        kind = type(error).__name__ if isinstance(error, InputError | ProtocolError) else "bug"
        text = str(error) if kind != "bug" else f"{type(error).__name__}: {error}"
        with suppress(OSError):
            replies.write({"error": kind, "text": text})
        return 1
    finally:
        if worker is not None:
            worker.party.close()
    return 0


def _listen(stream: IO[bytes], commands: SimpleQueue[Command]) -> None:
    """Queue the session's commands; if it vanishes without a close, so does this process, at once."""
    while (command := control.read(stream)) is not None:
        commands.put(command)
        if command[0].get("command") == "close":
            return
    os._exit(2)


def _start(commands: SimpleQueue[Command], replies: Replies) -> Worker:
    begin, weights = commands.get()
    with beating(BEAT_S, replies.beat):
        role: Role = begin["role"]
        session = bytes.fromhex(begin["session"])
        config = MPC(**begin["config"])
        torch.set_num_threads(threads_of(config))
        program = Program.decode(begin["structure"], weights if role == "server" else None, Path(role))
        schedule = compile_program(program, config)
        own = Credentials(*(text.encode() for text in begin["credentials"]))
        load_kernels(schedule.steps)
        listener = None
        if ACCEPTS[role]:
            port = config.port + begin["port_offset"] if config.port else 0
            listener = Listener(LOOPBACK, port, tls_context(own, accepts=True), role)
    replies.write({"port": listener.port if listener else 0})
    ports = commands.get()[0]["ports"]
    clock = Clock()
    channels: dict[Role, Channel] = {}
    timeout_s = config.timeout_s
    for peer in CONNECTS[role]:
        context = tls_context(own, accepts=False)
        channels[peer] = connect(
            LOOPBACK, ports[peer], context, role, peer, clock, within_s=CONNECT_S, timeout_s=timeout_s
        )
    if listener is not None:
        channels |= listener.accept(set(ACCEPTS[role]), clock, within_s=CONNECT_S, timeout_s=timeout_s)
        listener.close()
    worker = seat(role, program, schedule, config, session, channels, clock, own.fingerprint)
    keep_apart(role, threads_of(config))
    replies.write({"ready": True})
    return worker


def _obey(worker: Worker, command: Command, replies: Replies) -> None:
    head, body = command
    size = head["size"]
    x: Any = None
    if body:
        x = np.frombuffer(body, np.float64).reshape(size, *worker.party.program.input_shape)
    report, result = worker.obey(head["command"], size, x)
    reply = {"report": control.report_to_json(report), "peak_memory_bytes": peak_memory_bytes()}
    if result is None:
        replies.write(reply)
    else:
        replies.write(reply | {"shape": result.shape}, np.ascontiguousarray(result).tobytes())


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # at once: the listening thread may be inside a read, and nothing is left to clean up
