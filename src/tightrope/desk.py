"""The client as a service: paths of images in, predictions out, over one session for as long as it lasts."""

from __future__ import annotations

import json
import os
import select
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tightrope.bundle import read_json, write_json
from tightrope.data import Data, ImageSpec, read_image
from tightrope.errors import BundleError, InputError, ProtocolError, TightropeError
from tightrope.program import Program

if TYPE_CHECKING:
    from tightrope.runtimes.mpc.remote import Client
    from tightrope.runtimes.mpc.service import Log
    from tightrope.runtimes.mpc.session import MPCSession

Json = Any
INPUT_FILE = "input.json"
INPUT_FORM = {"classes": [str], "mean": [float], "std": [float], "any_size": bool}
CHUNK_BYTES = 1 << 16
MAX_LINE_BYTES = 1 << 16


def write_input(directory: Path, data: Data) -> None:
    """Class names, and how an image becomes an input, beside a public program."""
    about = {"classes": data.classes, "mean": data.mean, "std": data.std, "any_size": data.any_size}
    write_json(directory / INPUT_FILE, about)


def read_input(directory: Path, program: Program) -> tuple[list[str], ImageSpec]:
    """What `write_input` wrote. Raises InputError if it is missing, damaged or for another network."""
    path = directory / INPUT_FILE
    try:
        body = read_json(path, INPUT_FORM)
    except BundleError as error:
        raise InputError(str(error), fix="tightrope export-public") from error
    shape, outputs = program.input_shape, program.op(program.output).shape
    found = (len(body["mean"]), len(body["std"]), len(body["classes"]))
    if len(shape) != 3 or found != (shape[0], shape[0], *outputs):
        raise InputError(
            "the image format does not fit the network",
            where=str(path),
            got="{} means, {} deviations, {} classes".format(*found),
            allowed=f"input {shape}, output {outputs}",
            fix="tightrope export-public",
        )
    channels, height, width = shape
    spec = ImageSpec((channels, height, width), tuple(body["mean"]), tuple(body["std"]), body["any_size"])
    return body["classes"], spec


class Desk:
    """Answers every line of `source`, the path of an image, with one JSON object on standard output:
    {"image", "prediction", "online_ms", "offline_ms"} or {"image", "error"}.

    A session that ended, because its material was used up or a peer restarted, is followed by a new one.
    """

    def __init__(
        self, client: Client, classes: list[str], spec: ImageSpec, log: Log, source: int = 0
    ) -> None:
        self._client = client
        self._classes = classes
        self._spec = spec
        self._log = log
        self._source = source
        self._session: MPCSession | None = None
        self._alarm, self._waker = os.pipe()
        self._served = 0

    def run(self) -> None:
        """Until the lines end or `stop` is called; what has begun is finished."""
        self._log("ready", program=self._client.program.sha256())
        try:
            for line in self._lines():
                answer = self._answer(Path(os.fsdecode(line)))
                with suppress(BrokenPipeError):
                    print(json.dumps({"image": os.fsdecode(line), **answer}), flush=True)
                self._served += 1
        except InputError as error:
            self._log("failed", why=str(error).splitlines())
        finally:
            self._end()
            self._log("stopped", served=self._served)

    def stop(self) -> None:
        os.write(self._waker, b"x")

    def _lines(self) -> Iterator[bytes]:
        rest = b""
        while self._alarm not in (ready := select.select([self._alarm, self._source], [], [])[0]):
            more = os.read(ready[0], CHUNK_BYTES)
            *lines, rest = (rest + (more or b"\n")).split(b"\n")
            for line in lines:
                if select.select([self._alarm], [], [], 0)[0]:
                    return
                if line.strip():
                    yield line.strip()
            if not more:
                return
            if len(rest) > MAX_LINE_BYTES:
                raise InputError("a line is too long for a path", got=f"{len(rest)} bytes")

    def _answer(self, image: Path) -> dict[str, Json]:
        try:
            x = read_image(image, self._spec).numpy()
            try:
                fresh = self._session is None
                outputs, measured = self._open().run(x)
            except ProtocolError as error:
                self._end()
                if fresh:
                    raise
                self._log("again", why=str(error).splitlines())
                outputs, measured = self._open().run(x)
        except TightropeError as error:
            self._log("failed", why=str(error).splitlines())
            if isinstance(error, ProtocolError):
                self._end()
            return {"error": str(error)}
        spent = measured.total
        return {
            "prediction": self._classes[int(outputs[0].argmax())],
            "online_ms": round(spent.online_ms, 3),
            "offline_ms": round(spent.offline_ms, 3),
        }

    def _open(self) -> MPCSession:
        if self._session is None:
            self._session = self._client.session(1)
            self._log("session", mode=self._session.mode)
        return self._session

    def _end(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()
