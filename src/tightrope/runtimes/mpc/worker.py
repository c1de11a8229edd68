"""One party as a process: `python -m tightrope.runtimes.mpc.worker`, obeying a session through its pipes.

First command: {"role", "directory", "session", "config"}. `directory` holds `certificates/`, `public/` (the
program without weights) and, which only the server opens, `server/` (with weights). A party that listens
answers with its port; then {"ports"} makes the links, and setup, offline and online follow. The process ends
with its standard input, so no party outlives the session that started it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

import numpy as np
import torch

from tightrope.errors import InputError, ProtocolError
from tightrope.program import Program
from tightrope.runtimes.mpc import control, gates
from tightrope.runtimes.mpc.channel import Channel, Clock
from tightrope.runtimes.mpc.config import MPC
from tightrope.runtimes.mpc.keys import Role, tls_context
from tightrope.runtimes.mpc.schedule import compile_program
from tightrope.runtimes.mpc.team import Worker, peak_memory_bytes, seat, threads_of
from tightrope.runtimes.mpc.tls import Listener, connect
from tightrope.types import Json

HOST = "127.0.0.1"
CONNECT_S = 10.0
BEAT_S = 1.0
Peers = Mapping[Role, tuple[Role, ...]]
CONNECTS: Peers = {"client": ("server", "dealer"), "server": ("dealer",), "dealer": ()}
ACCEPTS: Peers = {"client": (), "server": ("client",), "dealer": ("client", "server")}
Command = tuple[dict[str, Json], bytes]


def main() -> int:
    """Obey commands until told to close. Exit status 1 after a failure, which is reported first."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not get between the replies
    commands: SimpleQueue[Command] = SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin.buffer, commands), daemon=True).start()
    worker = None
    try:
        worker = _start(commands, replies)
        while (command := commands.get())[0]["command"] != "close":
            _obey(worker, command, replies)
    except Exception as error:
        kind = type(error).__name__ if isinstance(error, InputError | ProtocolError) else "bug"
        text = str(error) if kind != "bug" else f"{type(error).__name__}: {error}"
        with suppress(OSError):
            control.write(replies, {"error": kind, "text": text})
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


def _start(commands: SimpleQueue[Command], replies: IO[bytes]) -> Worker:
    begin, _ = commands.get()
    role: Role = begin["role"]
    directory, session = Path(begin["directory"]), bytes.fromhex(begin["session"])
    config = MPC(**begin["config"])
    torch.set_num_threads(threads_of(config))
    server = role == "server"
    program = Program.load(directory / ("server" if server else "public"), weights=server)
    schedule = compile_program(program, config)
    certificates = directory / "certificates"
    gates.load_kernels()
    listener = None
    if ACCEPTS[role]:
        port = config.port + begin["port_offset"] if config.port else 0
        listener = Listener(HOST, port, tls_context(certificates, role, accepts=True), role)
    control.write(replies, {"port": listener.port if listener else 0})
    ports = commands.get()[0]["ports"]
    clock = Clock()
    channels: dict[Role, Channel] = {}
    limits = {"within_s": CONNECT_S, "timeout_s": config.timeout_s}
    for peer in CONNECTS[role]:
        context = tls_context(certificates, role, accepts=False)
        channels[peer] = connect(HOST, ports[peer], context, role, peer, clock, **limits)
    if listener is not None:
        channels |= listener.accept(set(ACCEPTS[role]), clock, **limits)
        listener.close()
    worker = seat(role, program, schedule, config, session, channels, clock, _beat(replies))
    control.write(replies, {"ready": True})
    return worker


def _beat(replies: IO[bytes]) -> Callable[[], None]:
    """Tell the session once a second that work goes on."""
    last = time.monotonic()

    def beat() -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > BEAT_S:
            last = now
            control.write(replies, {"beat": True})

    return beat


def _obey(worker: Worker, command: Command, replies: IO[bytes]) -> None:
    head, body = command
    size = head["size"]
    x: Any = None
    if body:
        x = np.frombuffer(body, np.float64).reshape(size, *worker.party.program.input_shape)
    report, result = worker.obey(head["command"], size, x)
    reply = {"report": control.report_to_json(report), "peak_memory_bytes": peak_memory_bytes()}
    if result is None:
        control.write(replies, reply)
    else:
        control.write(replies, reply | {"shape": result.shape}, np.ascontiguousarray(result).tobytes())


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # at once: the listening thread may be inside a read, and nothing is left to clean up
