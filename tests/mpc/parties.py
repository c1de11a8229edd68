"""Parties as processes of their own that can be made to die at a chosen moment.

They are forked from one process that has imported everything, so that each starts at once.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PHASES = ("handshake", "offline", "mid-layer", "result")
HERE = Path(__file__).parent


def start(target: Callable[..., None], *args: Any) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm"])
    with pytest.MonkeyPatch.context() as patch:  # for the process that all are forked from, see warm.py
        patch.setenv("PYTHONPATH", f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        process: BaseProcess = context.Process(target=target, args=args)
        process.start()
    return process


def serve(config: Path, log: Path, phase: str | None) -> None:
    """A service. It writes its log to a file, dies in that phase, or stops on SIGTERM."""
    from tightrope.runtimes.mpc.duties import House
    from tightrope.runtimes.mpc.service import Log, Service
    from tightrope.runtimes.mpc.settings import read_settings

    settings = read_settings(config)
    _die_in(phase)
    with log.open("a") as stream:
        service = Service(House.load(settings), Log(settings.role, stream))
        signal.signal(signal.SIGTERM, lambda *_: service.stop())
        service.run()


def infer(config: Path, x: np.ndarray, answer: Path, phase: str | None) -> None:
    """A client. It writes its result, or the error that it ended with, to a file."""
    from tightrope.errors import TightropeError
    from tightrope.runtimes.mpc.remote import Client
    from tightrope.runtimes.mpc.settings import read_settings

    _die_in(phase)
    client = Client.load(read_settings(config))
    try:
        with client.session(len(x)) as session:
            y, _ = session.run(x)
            said: Any = {"result": y.tolist(), "mode": session.mode}
    except TightropeError as error:
        said = {"error": str(error)}
    finally:
        client.close()
    answer.write_text(json.dumps(said))
    sys.stdout.flush()


def _die_in(phase: str | None) -> None:
    """End this process without any clean-up: after its own hellos, in the middle of the material or of the
    layers, or when only the result is left to be sent or received."""
    from tightrope.runtimes.mpc import party, team
    from tightrope.runtimes.mpc.channel import Channel
    from tightrope.runtimes.mpc.steps import Reveal, Tag

    if phase is None:
        return
    now, frames, greeted = [""], [0], list[Any]()
    obey, send, receive, hello = team.Worker.obey, party.Party.send, party.Party.receive, Channel.send

    def obeying(self: Any, command: Any, size: int, x: Any) -> Any:
        now[0], frames[0] = command, 0
        return obey(self, command, size, x)

    def dying(usual: Any) -> Any:
        def called(self: Any, step: Any, *args: Any) -> Any:
            frames[0] += 1
            last = isinstance(step, Reveal)
            if {
                "offline": now[0] == "offline" and frames[0] == 3,
                "mid-layer": now[0] == "online" and frames[0] == 4,
                "result": now[0] == "online" and last,
            }.get(phase, False):
                os.kill(os.getpid(), signal.SIGKILL)
            return usual(self, step, *args)

        return called

    def greeting(self: Any, step: int, tag: int, *parts: Any) -> None:
        hello(self, step, tag, *parts)
        if phase == "handshake" and tag == Tag.HELLO:
            greeted.append(self)
        if len(greeted) == 2:
            for channel in greeted:
                channel.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    team.Worker.obey = obeying  # type: ignore[method-assign]
    party.Party.send, party.Party.receive = dying(send), dying(receive)  # type: ignore[method-assign]
    Channel.send = greeting  # type: ignore[method-assign]
