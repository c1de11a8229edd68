"""What a program will cost on ciphertexts, before any session."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tightrope.program import Program
from tightrope.runtimes.ckks import memory
from tightrope.runtimes.ckks.compiler import compile_program
from tightrope.runtimes.ckks.cost import estimate, op_costs, steps_ms
from tightrope.types import Cost, total

if TYPE_CHECKING:
    from tightrope.runtimes.ckks.config import CKKS


@dataclass(frozen=True)
class Predicted:
    """What a batch will cost, by op and in all; `about`: parameters, keys and memory."""

    ops: Mapping[str, Cost]
    total: Cost
    about: str


def predict(program: Program, config: CKKS, batch: int = 1) -> Predicted:
    """Counts as a run makes them, and milliseconds. See `CKKS.estimate`."""
    if not program.ranges:
        names = (Program.INPUT, *(op.name for op in program.ops))
        program = replace(program.public(), ranges=dict.fromkeys(names, 1.0))
    circuit = compile_program(program, config.parameters, config.squares)
    costs = op_costs(program, circuit, batch)
    times = steps_ms(circuit)
    for step in circuit.steps:
        costs[step.ops[-1]] += Cost(online_ms=batch * times[step.name])
    found = estimate(circuit, config.threads)
    allowed = memory.allowed(config)
    refused = f"; a session would be refused here: {allowed / 1e9:.3g} GB allowed"
    about = str(found) + (refused if found.memory_bytes > allowed else "")
    return Predicted(costs, replace(total(costs.values()), ckks_levels=circuit.levels), about)
