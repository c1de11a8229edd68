"""The integer model: the same fixed-point numbers as the protocol, by one party in the clear, exactly.

A secure value equals this one but for one unit in the last place per truncation (the protocol rounds up with
the probability of the dropped part, the model rounds down), and a gate but for a tile sum within one unit of
2^trim above its threshold (see `gates.compared_points`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tightrope.nn.block_relu import IDENTITY, Patch, expand_gate
from tightrope.program import Program
from tightrope.runtimes.mpc.compiler import Calculation, sources
from tightrope.runtimes.mpc.fixed import (
    decode,
    encode,
    encode_weights,
    in_ring,
    label,
    local,
    multiply,
    signed,
)
from tightrope.runtimes.mpc.schedule import Schedule
from tightrope.runtimes.mpc.steps import Gate, Local, Multiply, Product, RevealLabel, Step, Truncate


def tile_sums(step: Gate, z: Tensor, patch: Patch) -> Tensor:
    """Sums over the tiles of the channels with this patch: int64 (N, channels, rows, columns) of tiles."""
    maps = z.reshape(len(z), *step.map_shape)[:, _channels(step, patch)]
    rows, columns = -(-maps.shape[2] // patch[0]), -(-maps.shape[3] // patch[1])
    padded = F.pad(maps, (0, -maps.shape[3] % patch[1], 0, -maps.shape[2] % patch[0]))
    return padded.reshape(len(z), -1, rows, patch[0], columns, patch[1]).sum((3, 5))


def _channels(step: Gate, patch: Patch) -> list[int]:
    return [c for c, p in enumerate(step.kernel.patches) if p == patch]


def patches(step: Gate) -> list[Patch]:
    """Those of the gated channels, each once."""
    return sorted(set(step.kernel.patches) - {IDENTITY})


def over(step: Gate, z: Tensor, patch: Patch) -> list[Tensor]:
    """By how much the tile sums exceed the threshold of each piece times their elements, as `tile_sums`."""
    sums = tile_sums(step, z, patch)
    elements = tile_sums(step, torch.ones_like(z), patch)
    return [sums - piece.threshold * elements for piece in step.pieces]


def gate(step: Gate, z: Tensor, *, carry: int = 0, unit: bool = False) -> Tensor:
    """What a gate makes of z, int64 (N, *shape), if the truncation of every element rounds up by `carry`.

    With `unit`, sums that are up to 2^trim above their threshold count as not above, as they may.
    """
    x = (z >> step.shift).reshape(len(z), *step.map_shape) + carry
    out = torch.where(torch.tensor([p == IDENTITY for p in step.kernel.patches])[:, None, None], x, 0)
    for patch in patches(step):
        channels = _channels(step, patch)
        part = x[:, channels]
        for piece, excess in zip(step.pieces, over(step, z, patch), strict=True):
            b = expand_gate(excess > (1 << step.trim if unit else 0), patch, (x.shape[2], x.shape[3]))
            out[:, channels] += b * (piece.square * part * part + piece.linear * part + piece.constant)
    return out.reshape(z.shape)


def _local(step: Local, program: Program, *inputs: Tensor) -> Tensor:
    result = local(step, *inputs)
    return result + torch.tensor(step.constant, dtype=result.dtype) if step.constant else result


def _multiply(step: Multiply, program: Program, x: Tensor) -> Tensor:
    weight, bias = encode_weights(step, program.tensors)
    return multiply(step.kernel, weight, x) + bias


MODEL: dict[type[Step], Callable[..., Tensor]] = {
    Local: _local,
    Multiply: _multiply,
    Product: lambda step, program, x, y: x * y,
    Truncate: lambda step, program, z: z >> step.shift,
    Gate: lambda step, program, z: gate(step, z),
}


def apply(step: Calculation, program: Program, *inputs: Tensor) -> Tensor:
    """One step on ring values (N, *shape), signed: what its output must be."""
    return signed(in_ring(MODEL[type(step)](step, program, *inputs), step.output), step.output)


def evaluate(
    program: Program,
    schedule: Schedule,
    x: NDArray[Any],
    seen: Callable[[Calculation, Tensor], object] = lambda *_: None,
) -> NDArray[np.float64]:
    """(N, *input_shape) -> (N, *output shape), the whole program in the integer model.

    `seen(step, z)` is called before every calculation with its first input.
    """
    wires = {schedule.input.name: encode(x, schedule.input.scale, schedule.input.ring_bits)}
    for step in schedule.steps:
        if isinstance(step, Calculation):  # a map of masks is a map of values too
            inputs = [wires[w.name] for w in sources(step)]
            seen(step, inputs[0])
            wires[step.output.name] = apply(step, program, *inputs)
    last = schedule.steps[-1]
    if isinstance(last, RevealLabel):
        return label(last, wires[last.wire.name])
    return decode(wires[schedule.output.name], schedule.output)
