"""Walk a circuit with any operands: real ciphertexts or simulated ones. The one evaluator there is."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from tightrope.errors import ProtocolError
from tightrope.runtimes.ckks.circuit import Affine, Circuit, Composite, Refresh, Square

C = TypeVar("C")  # a ciphertext


class Backend(Protocol[C]):
    """What executes steps. Everything that a CKKS library must offer stands here and in `lattigo.Client`."""

    def affine(self, step: Affine, inputs: Sequence[C]) -> list[C]: ...

    def composite(self, step: Composite, inputs: Sequence[C]) -> list[C]: ...

    def square(self, step: Square, inputs: Sequence[C]) -> list[C]: ...

    def refresh(self, step: Refresh, inputs: Sequence[C]) -> list[C]: ...

    def level(self, ciphertext: C) -> int: ...


@dataclass(frozen=True)
class Spent:
    """What one step took for one sample: milliseconds, and the level of its result."""

    step: str
    ms: float
    level: int


@dataclass(frozen=True)
class Outcome(Generic[C]):
    outputs: list[C]
    spent: tuple[Spent, ...]


def evaluate(
    circuit: Circuit,
    backend: Backend[C],
    inputs: Sequence[C],
    seen: Callable[[str, list[C]], object] = lambda *_: None,
) -> Outcome[C]:
    """Run one sample; `seen(value, ciphertexts)` is called after each step. Values are freed after their use.

    Raises ProtocolError if a result is not at the level that was planned.
    """
    last_use = {value: k for k, step in enumerate(circuit.steps) for value in step.sources}
    values = {circuit.input: list(inputs)}
    spent = []
    for k, step in enumerate(circuit.steps):
        start = time.perf_counter()
        operands = [ciphertext for value in step.sources for ciphertext in values[value]]
        if isinstance(step, Affine):
            made = backend.affine(step, operands)
        elif isinstance(step, Composite):
            made = backend.composite(step, operands)
        elif isinstance(step, Square):
            made = backend.square(step, operands)
        else:
            made = backend.refresh(step, operands)
        level = min(backend.level(ciphertext) for ciphertext in made)
        if level != circuit.values[step.name].level:
            raise ProtocolError(
                "a step left another level than planned",
                where=step.name,
                got=level,
                allowed=circuit.values[step.name].level,
            )
        spent.append(Spent(step.name, (time.perf_counter() - start) * 1e3, level))
        seen(step.name, made)
        values[step.name] = made
        for value in step.sources:
            if last_use[value] == k and value != circuit.output:
                values.pop(value, None)
    return Outcome(values[circuit.output], tuple(spent))
