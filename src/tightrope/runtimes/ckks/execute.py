"""The client of an encrypted session, and the server's process that it starts."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tightrope.errors import InputError, ProtocolError, TightropeError, TraceError
from tightrope.forms import Amount, mismatch
from tightrope.program import Program
from tightrope.runtimes.ckks import cost, keymaker, lattigo
from tightrope.runtimes.ckks.books import Books
from tightrope.runtimes.ckks.circuit import Circuit
from tightrope.runtimes.ckks.evaluate import Spent
from tightrope.runtimes.ckks.format import check_ciphertext
from tightrope.runtimes.ckks.inspection import Inspection
from tightrope.runtimes.ckks.link import (
    BOOT,
    EVALUATE,
    HELLO,
    KEY,
    READY,
    RESULT,
    Identity,
    Link,
    make_identity,
    tls_context,
)
from tightrope.runtimes.ckks.parameters import Parameters
from tightrope.types import Json, Measurement

if TYPE_CHECKING:
    from tightrope.runtimes.ckks.config import CKKS

# What the server may say beside ciphertexts.
READY_FORM: Any = {"peak_memory_bytes": int}
RESULT_FORM: Any = {
    "spent": [[{"step": str, "ms": Amount, "level": int}]], "cpu_ms": Amount, "peak_memory_bytes": int,
}  # fmt: skip

# How far the library's heap grows before it is collected, in percent: keys fill most of it. And the bytes
# from which an array's memory goes back to the system at once: glibc would keep a gigabyte after compiling.
MEMORY = {"GOGC": "40", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
INPUT_MARGIN = 1.25  # how far beyond its calibrated range an input may be
KINDS: Mapping[str, type[TightropeError]] = {"InputError": InputError, "TraceError": TraceError}


class CKKSSession(Books):
    """The client, with the secret key, and the process of the server. `setup_ms`: keys made, sent and read.

    Whoever calls `run` plays the client, and here also started the server. What the server's process gets is
    the weights, evaluation keys and ciphertexts; results are decrypted here and never sent anywhere: their
    noise would tell about the key (Li and Micciancio 2021).
    """

    def __init__(self, program: Program, config: CKKS, circuit: Circuit) -> None:
        super().__init__(program, config, circuit)
        start = time.perf_counter()
        self._inspection = Inspection(circuit) if config.inspect else None
        own, other = make_identity("client"), make_identity("server")
        limit = cost.estimate(circuit, config.threads).limit_bytes
        self._process, errors = _start(program, config, circuit.parameters, own, other, limit)
        self._errors = errors
        self._end = weakref.finalize(self, _kill, self._process, errors)
        self._client: lattigo.Client | None = None
        self._link: Link | None = None
        try:
            raw = socket.create_connection(("127.0.0.1", self._port()), timeout=config.timeout_s)
            context = tls_context(own, other.certificate, accepts=False)
            self._link = Link(raw, context, "the server", config.timeout_s)
            self._client = lattigo.Client(circuit)
            self._send_keys(self._link, self._client)
        except BaseException:
            self.close()
            raise
        self.setup_ms = (time.perf_counter() - start) * 1e3
        self.setup_links = {"client->server": self._link.sent}

    def _port(self) -> int:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        reply = json.loads(line) if line else {"error": "ProtocolError", "text": self._last_words()}
        if "error" in reply:
            kind = KINDS.get(reply["error"], ProtocolError)
            raise kind("the server could not start", where="ckks server", got=reply["text"])
        return int(reply["port"])

    def _send_keys(self, link: Link, client: lattigo.Client) -> None:
        link.send(HELLO, {"digest": self.circuit.digest()})
        try:
            if self.circuit.boot_slots:
                for part in keymaker.made(self.circuit, client.secret()):
                    link.send(BOOT, {}, [part])
            for _, data in client.make_keys():
                link.send(KEY, {}, [data])
        except ProtocolError as lost:
            self._hear(link, lost)
        self._memory_bytes = int(self._expect(link, READY, READY_FORM, 0, 0)[0]["peak_memory_bytes"])

    def _expect(
        self, link: Link, kind: int, form: Any, count: int, part_bytes: int
    ) -> tuple[dict[str, Json], list[bytes]]:
        try:
            message = link.receive(kind, count, part_bytes)
        except ProtocolError as error:
            raise self._with_last_words(error) from error
        if message is None:
            raise self._with_last_words(ProtocolError("the server ended the session"))
        if fault := mismatch(message[0], form):
            raise ProtocolError("the server sent something it must not", where="ckks server", got=fault)
        return message

    def _hear(self, link: Link, lost: ProtocolError) -> None:
        """A send failed: what the server said last is the better reason."""
        with contextlib.suppress(TimeoutError):
            link.receive(READY, 0, 0)
        raise self._with_last_words(lost)

    def run(self, x: NDArray[Any]) -> tuple[NDArray[np.float64], Measurement]:
        """(N, *input_shape) -> (N, *output shape), decrypted by the client, and what it cost.

        Milliseconds of ops are summed over the batch and overlap with `threads`; the total is elapsed time,
        from the first encryption to the last decryption.

        Raises InputError for an input of another shape, not finite or beyond its calibrated range;
        ProtocolError if the server fails or sends something it must not. Then the session is closed.
        """
        x = np.ascontiguousarray(x, np.float64)
        self.program.check_input(x)
        self._check_range(x)
        if self._link is None or self._client is None:
            raise ProtocolError("the session is closed")
        outputs, spent, cpu_ms = [], [], 0.0
        start = time.perf_counter()
        try:
            for k in range(0, len(x), self.config.threads):
                made, about = self._images(self._link, self._client, x[k : k + self.config.threads])
                outputs += made
                spent += self._spent(about["spent"], len(made))
                cpu_ms += float(about["cpu_ms"])
                self._memory_bytes = int(about["peak_memory_bytes"])
        except BaseException:
            self.close()
            raise
        elapsed = (time.perf_counter() - start) * 1e3
        more: dict[str, Json] = {"setup_ms": self.setup_ms, "server_cpu_ms": cpu_ms}
        if self._inspection is not None:
            more["slots"] = self._inspection.errors
        return np.stack(outputs), self.measured("execute", spent, self._memory_bytes, elapsed, **more)

    def _images(
        self, link: Link, client: lattigo.Client, x: NDArray[np.float64]
    ) -> tuple[list[NDArray[np.float64]], dict[str, Json]]:
        circuit = self.circuit
        level = circuit.values[circuit.input].level
        parts = [client.encrypt(row, level) for sample in x for row in self.packed(sample)]
        names = [step.name for step in circuit.steps] if self._inspection else [circuit.output]
        expected = [name for name in names for _ in range(circuit.values[name].layout.ciphertexts)]
        largest = max(circuit.values[name].level for name in names)
        limit = circuit.parameters.ciphertext_bytes(largest) + (1 << 12)
        try:
            link.send(EVALUATE, {}, parts)
        except ProtocolError as lost:
            self._hear(link, lost)
        about, results = self._expect(link, RESULT, RESULT_FORM, len(expected) * len(x), limit)
        if len(results) != len(expected) * len(x):
            raise ProtocolError("the server sent another number of ciphertexts", got=len(results))
        outputs = []
        for k, sample in enumerate(x):
            slots: dict[str, list[NDArray[np.float64]]] = {name: [] for name in names}
            returned = results[k * len(expected) : (k + 1) * len(expected)]
            for name, data in zip(expected, returned, strict=True):
                level = check_ciphertext(data, circuit.parameters, "the server's result")
                if level != circuit.values[name].level:
                    raise ProtocolError(
                        "the result is at another level than planned",
                        got=level,
                        allowed=circuit.values[name].level,
                    )
                slots[name].append(client.decrypt(data))
            if self._inspection is not None:
                self._inspection.note(self.packed(sample), slots)
            outputs.append(self.unpacked(slots[circuit.output]))
        return outputs, about

    def _spent(self, said: Sequence[Sequence[Mapping[str, Json]]], images: int) -> list[list[Spent]]:
        """Of every image, what the server says that the steps took; it may choose the times alone."""
        spent = [[Spent(one["step"], one["ms"], one["level"]) for one in sample] for sample in said]
        planned = [(step.name, self.circuit.values[step.name].level) for step in self.circuit.steps]
        if [[(one.step, one.level) for one in sample] for sample in spent] != [planned] * images:
            raise ProtocolError(
                "the server reports other steps than planned", where="ckks server",
                got=f"{len(spent)} images, {sum(map(len, spent))} steps",
                allowed=f"{images} images of the {len(planned)} steps, each at its level",
            )  # fmt: skip
        return spent

    def _check_range(self, x: NDArray[np.float64]) -> None:
        largest, seen = float(np.abs(x).max()), self.program.ranges[Program.INPUT]
        if largest > INPUT_MARGIN * seen:
            raise InputError(
                "the input is larger than the calibration data, where polynomials explode",
                got=f"{largest:.4g}",
                allowed=f"{INPUT_MARGIN * seen:.4g} (calibrated {seen:.4g} times {INPUT_MARGIN:g})",
                fix="normalise the input as in training, or calibrate with such data",
            )

    def _with_last_words(self, error: ProtocolError) -> ProtocolError:
        words = self._last_words()
        return ProtocolError(str(error), where="ckks server", got=words) if words else error

    def _last_words(self) -> str:
        """The status and last lines of a server that ended by itself; nothing while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.5)
        if self._process.poll() in (None, 0, 1):
            return ""
        self._errors.seek(0)
        lines = self._errors.read(1 << 16).decode(errors="replace").strip().splitlines()
        return f"it ended with status {self._process.returncode}: {' '.join(lines[:2])[:300]}"

    def close(self) -> None:
        if self._link is not None:
            self._link.close()
        if self._client is not None:
            self._client.close()
        self._link = self._client = None
        self._end()

    def __enter__(self) -> CKKSSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def _start(
    program: Program, config: CKKS, parameters: Parameters, client: Identity, server: Identity, limit: int
) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
    """The server's process, told what it needs: the client's certificate, and of its keys nothing.

    limit: bytes, near which the library collects its garbage more eagerly.
    """
    errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the session
    process = subprocess.Popen(
        [sys.executable, "-m", "tightrope.runtimes.ckks.server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        env=os.environ | MEMORY | {"GOMEMLIMIT": str(limit)},
        start_new_session=True,  # an interrupt from the keyboard is the session's to handle
    )
    weights = program.weights()
    about: Mapping[str, Json] = {
        "structure": program.structure(),
        "parameters": asdict(parameters),
        "squares": config.squares,
        "certificate": server.certificate.decode(),
        "key": server.key.decode(),
        "client_certificate": client.certificate.decode(),
        "port": config.port,
        "threads": config.threads,
        "timeout_s": config.timeout_s,
        "weights_bytes": len(weights),
        "inspect": config.inspect,
    }
    assert process.stdin is not None
    with contextlib.suppress(OSError):  # a dead process is noticed by its silence
        process.stdin.write(json.dumps(about).encode() + b"\n")
        process.stdin.write(weights)
        process.stdin.flush()
    return process, errors


def _kill(process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, errors):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
