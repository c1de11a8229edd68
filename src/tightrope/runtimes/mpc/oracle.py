"""The integer model: the same fixed-point numbers as the protocol, by one party in the clear, exactly.

A secure value equals this one but for one unit in the last place per truncation (the protocol rounds up with
the probability of the dropped part, the model rounds down), and a gate but for a tile sum within one unit of
2^shift above its threshold (see `gates.compared_points`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tightrope.nn.block_relu import expand_gate, tile_gate
from tightrope.program import Program
from tightrope.runtimes.mpc.fixed import decode, encode, encode_weights, local, multiply
from tightrope.runtimes.mpc.schedule import Schedule
from tightrope.runtimes.mpc.steps import Gate, Local, Multiply, Step, Truncate


def gate_bits(step: Gate, z: Tensor) -> Tensor:
    """[tile sum > threshold * elements], per element: bool (thresholds, N, *shape); True for the identity."""
    maps = z.reshape(len(z), *step.map_shape)
    size = (maps.shape[-2], maps.shape[-1])
    bits = torch.ones((len(step.thresholds), *maps.shape), dtype=torch.bool)
    for k, threshold in enumerate(step.thresholds):
        for patch in sorted(set(step.kernel.patches) - {(0, 0)}):
            channels = [c for c, p in enumerate(step.kernel.patches) if p == patch]
            bits[k, :, channels] = expand_gate(tile_gate(maps[:, channels] - threshold, patch), patch, size)
    return bits.reshape(-1, *z.shape)


def _gate(step: Gate, program: Program, z: Tensor) -> Tensor:
    bits = gate_bits(step, z)
    x = z >> step.shift
    if len(step.thresholds) == 1:
        return x * bits[0]
    gated = torch.tensor([patch != (0, 0) for patch in step.kernel.patches])
    clipped = bits[1] & gated.reshape(-1, *(1,) * (z.dim() - 2))
    return torch.where(clipped, torch.tensor(step.upper), x * bits[0])


def _multiply(step: Multiply, program: Program, x: Tensor) -> Tensor:
    weight, bias = encode_weights(step, program.tensors)
    return multiply(step.kernel, weight, x) + bias


MODEL: dict[type[Step], Callable[..., Tensor]] = {
    Local: lambda step, program, *inputs: local(step, *inputs),
    Multiply: _multiply,
    Truncate: lambda step, program, z: z >> step.shift,
    Gate: _gate,
}


def apply(step: Step, program: Program, *inputs: Tensor) -> Tensor:
    """One step on ring values (N, *shape), int64: what its output must be."""
    return MODEL[type(step)](step, program, *inputs)


def evaluate(program: Program, schedule: Schedule, x: NDArray[Any]) -> NDArray[np.float64]:
    """(N, *input_shape) -> (N, *output shape), the whole program in the integer model."""
    wires = {schedule.input.name: encode(x, schedule.input.scale)}
    for step in schedule.steps:
        if isinstance(step, Local | Multiply | Truncate | Gate):  # a map of masks is a map of values too
            sources = step.inputs if isinstance(step, Local) else (step.input,)
            wires[step.output.name] = apply(step, program, *(wires[w.name] for w in sources))
    return decode(wires[schedule.output.name], schedule.output)
