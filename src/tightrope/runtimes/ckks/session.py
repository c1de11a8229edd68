"""Open a session: in the clear on simulated ciphertexts, or encrypted with a server of its own."""

from __future__ import annotations

import ctypes
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import count
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tightrope.errors import InputError
from tightrope.program import Program, beyond_range
from tightrope.runtimes.ckks import cost, memory
from tightrope.runtimes.ckks.books import Books
from tightrope.runtimes.ckks.circuit import Circuit
from tightrope.runtimes.ckks.compiler import compile_program
from tightrope.runtimes.ckks.evaluate import evaluate
from tightrope.runtimes.ckks.execute import CKKSSession
from tightrope.runtimes.ckks.seal import CrosscheckSession
from tightrope.runtimes.ckks.simulated import Simulator
from tightrope.types import Measurement

if TYPE_CHECKING:
    from tightrope.runtimes.ckks.config import CKKS

MODES = ("simulate", "execute", "crosscheck")


def open_session(
    program: Program, config: CKKS, mode: str
) -> CKKSSession | SimulatedSession | CrosscheckSession:
    """See `CKKS.open`."""
    if mode not in MODES:
        raise InputError("unknown mode", where="ckks", got=mode, allowed=MODES)
    circuit = compile_program(
        program if mode != "execute" or config.inspect else program.public(),
        config.parameters,
        config.squares,
    )
    if mode == "execute" and not config.inspect:
        circuit = circuit.bare()
        _trim()
    return begin(program, config, circuit, mode)


def _trim() -> None:
    """glibc keeps what large arrays took, a gigabyte after compiling a deep network; keys need it."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def begin(
    program: Program, config: CKKS, circuit: Circuit, mode: str
) -> CKKSSession | SimulatedSession | CrosscheckSession:
    """A session of a compiled circuit. The client's has no weights in it, unless it inspects every step."""
    if mode == "crosscheck":
        return CrosscheckSession(program, config, circuit)
    estimate = cost.estimate(circuit, config.threads)
    print(f"ckks: {estimate}", file=sys.stderr)
    if mode == "simulate":
        return SimulatedSession(program, config, circuit)
    memory.check(program, config, circuit, estimate)
    return CKKSSession(program, config, circuit)


class SimulatedSession(Books):
    """The same evaluator on simulated ciphertexts: exact packing, predicted levels, noise and times."""

    def __init__(self, program: Program, config: CKKS, circuit: Circuit) -> None:
        super().__init__(program, config, circuit)
        self._progress: Callable[[str, int, int], object] = lambda *_: None

    def watch(self, progress: Callable[[str, int, int], object]) -> None:
        """See `runtimes.Watchable`; steps of all images are counted."""
        self._progress = progress

    def run(self, x: NDArray[Any]) -> tuple[NDArray[np.float64], Measurement]:
        """(N, *input_shape) -> (N, *output shape) without noise. The measurement's config holds
        `predicted_error`, which the largest error of a real run should stay below, and `beyond_range`, per
        product and polynomial that is not linear the number of its inputs outside the calibrated range, as
        `plain` counts them; a warning tells of them.

        Raises InputError for an input of another shape or not finite.
        """
        x = np.ascontiguousarray(x, np.float64)
        self.program.check_input(x)
        outputs, spent, error = [], [], 0.0
        simulator = Simulator(self.circuit)
        level = self.circuit.values[self.circuit.input].level
        predicted = cost.steps_ms(self.circuit)
        done, of = count(1), len(x) * len(self.circuit.steps)
        for sample in x:
            inputs = simulator.encrypt(self.packed(sample), level)
            outcome = evaluate(
                self.circuit, simulator, inputs, lambda *_: self._progress("simulated steps", next(done), of)
            )
            outputs.append(self.unpacked([y.slots for y in outcome.outputs]))
            spent.append([replace(one, ms=predicted[one.step]) for one in outcome.spent])
            error = max(error, *(y.error for y in outcome.outputs))
        beyond = {name: number for name, number in simulator.beyond.items() if number}
        if beyond:
            warnings.warn(beyond_range(beyond), stacklevel=2)
        elapsed = sum(one.ms for sample in spent for one in sample)
        memory = cost.estimate(self.circuit, self.config.threads).memory_bytes
        error *= self.circuit.values[self.circuit.output].scale
        measurement = self.measured(
            "simulate", spent, memory, elapsed, predicted_error=error, beyond_range=beyond
        )
        return np.stack(outputs), measurement

    def __enter__(self) -> SimulatedSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        return None
