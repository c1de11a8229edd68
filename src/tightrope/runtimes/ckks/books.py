"""What both modes share: what goes into ciphertexts, what comes out, and how a run is written down."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tightrope.program import Program
from tightrope.runtimes.ckks import cost
from tightrope.runtimes.ckks.circuit import Circuit, Refresh
from tightrope.runtimes.ckks.evaluate import Spent
from tightrope.types import Json, Measurement, OpTrace, total

if TYPE_CHECKING:
    from tightrope.runtimes.ckks.config import CKKS


class Books:
    """The books of a session on a circuit. The program is kept without its weights."""

    def __init__(self, program: Program, config: CKKS, circuit: Circuit) -> None:
        self.program = program.public()
        self.config = config
        self.circuit = circuit

    def packed(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """(ciphertexts, slots) of one sample."""
        value = self.circuit.values[self.circuit.input]
        return value.layout.pack(x / value.scale)

    def unpacked(self, slots: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        value = self.circuit.values[self.circuit.output]
        y = value.layout.unpack(np.stack(slots)) * value.scale
        return y.reshape(self.program.shape(self.program.output))

    def measured(
        self, mode: str, spent: Sequence[Sequence[Spent]], memory_bytes: int, elapsed_ms: float, **more: Json
    ) -> Measurement:
        """Levels are those that the ciphertexts lost; merged ops show at the last op of their step."""
        batch = len(spent)
        costs = cost.op_costs(self.program, self.circuit, batch)
        ms = dict.fromkeys(costs, 0.0)
        bootstraps, lost = 0, dict[str, int]()
        steps = {step.name: step for step in self.circuit.steps}
        for sample in spent:
            for one in sample:
                step = steps[one.step]
                ms[step.ops[-1]] += one.ms
                lost[step.name] = 0 if isinstance(step, Refresh) else step.level - one.level
                if isinstance(step, Refresh):
                    bootstraps += self.circuit.values[step.name].layout.ciphertexts
        levels = dict.fromkeys(costs, 0) | self.circuit.op_levels(lost)
        traces = tuple(
            OpTrace(
                op.name, op.kind, replace(costs[op.name], online_ms=ms[op.name], ckks_levels=levels[op.name])
            )
            for op in self.program.ops
        )
        summed = total(trace.cost for trace in traces)
        parameters = self.circuit.parameters
        about: dict[str, Json] = {
            "mode": mode,
            "log_n": parameters.log_n,
            "log_qp": parameters.log_qp,
            "scale_bits": parameters.scale_bits,
            "threads": self.config.threads,
            "levels": parameters.levels,
            "levels_planned": self.circuit.levels,
            "keys": len(self.circuit.galois_elements()) + 1,
            "bootstraps": bootstraps / batch,
            "bootstraps_planned": self.circuit.bootstraps,
        }
        return Measurement(
            runtime="ckks",
            batch=batch,
            ops=traces,
            total=replace(summed, online_ms=elapsed_ms, ckks_levels=self.circuit.deepest(lost)),
            links=cost.links(self.circuit, batch),
            setup_links=cost.setup_links(self.circuit),
            config=about | more,
            peak_memory_bytes=memory_bytes,
            host={"machine": platform.machine(), "cores": os.cpu_count()},
        )
