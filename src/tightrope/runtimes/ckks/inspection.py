"""Where precision goes: the slots of every step, decrypted, beside those of the simulation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from tightrope.runtimes.ckks.circuit import Circuit
from tightrope.runtimes.ckks.evaluate import evaluate
from tightrope.runtimes.ckks.simulated import Simulated, Simulator
from tightrope.types import Json

Slots = NDArray[np.float64]


class Inspection:
    """Errors of a circuit that has its weights; `errors` are over all samples so far."""

    def __init__(self, circuit: Circuit) -> None:
        self._circuit = circuit
        self.errors: dict[str, dict[str, Json]] = {}

    def note(self, packed: Slots, found: Mapping[str, Sequence[Slots]]) -> None:
        """packed: (ciphertexts, slots) that one sample was encrypted from. found: by step, its slots."""
        circuit, simulator = self._circuit, Simulator(self._circuit)

        def compare(name: str, wanted: list[Simulated]) -> None:
            scale = circuit.values[name].scale
            pairs = zip(found[name], wanted, strict=True)
            error = scale * max(float(np.abs(got - want.slots).max()) for got, want in pairs)
            predicted = scale * max(want.error for want in wanted)
            known = self.errors.get(name, {"error": 0.0})
            self.errors[name] = {
                "error": max(error, known["error"]),
                "predicted": predicted,
                "range": scale,
                "level": circuit.values[name].level,
            }

        inputs = simulator.encrypt(packed, circuit.values[circuit.input].level)
        evaluate(circuit, simulator, inputs, compare)
