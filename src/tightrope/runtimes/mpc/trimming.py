"""How often comparisons of too few bits go wrong: counted in the clear, on calibration data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from tightrope.program import Program
from tightrope.runtimes.mpc import oracle
from tightrope.runtimes.mpc.compiler import Calculation
from tightrope.runtimes.mpc.config import MPC
from tightrope.runtimes.mpc.schedule import compile_program
from tightrope.runtimes.mpc.steps import Gate


@dataclass(frozen=True)
class Flips:
    """Of the comparisons of one op: how many there were, and how many are wrong, the mean over all masks.

    low: within the dropped bits above the threshold, and taken for not above. high: so far from it that the
    difference does not fit `bits`, the width of the comparison.
    """

    comparisons: int
    low: float
    high: float
    bits: int

    @property
    def rate(self) -> float:
        return (self.low + self.high) / self.comparisons if self.comparisons else 0.0


def sign_flips(program: Program, config: MPC, batches: Iterable[NDArray[Any]]) -> dict[str, Flips]:
    """Per op that compares, over `batches` of inputs (N, *input_shape): `config` against exact signs.

    The values compared are those of the integer model with exact comparisons, so a flip at one site does not
    move another. Raises what `compile_program` does.
    """
    schedule = compile_program(program, config)
    found: dict[str, Flips] = {}

    def seen(step: Calculation, z: Tensor) -> None:
        if isinstance(step, Gate):
            before = found.get(step.op, Flips(0, 0.0, 0.0, step.bits))
            found[step.op] = _count(step, z, before)

    for x in batches:
        oracle.evaluate(program, schedule, x, seen)
    return found


def _count(step: Gate, z: Tensor, before: Flips) -> Flips:
    """The compared value is floor(excess / 2^trim) - 1, plus a carry with the probability of the rest."""
    comparisons, low, high = before.comparisons, before.low, before.high
    unit, half = 1 << step.trim, 1 << (step.bits - 1)
    for patch in oracle.patches(step):
        for excess in oracle.over(step, z, patch):
            value, carries = (excess >> step.trim) - 1, (excess % unit).double() / unit
            kept, carried = ((((value + c) % (2 * half)) < half) != (excess > 0) for c in (0, 1))
            wrong = torch.where(kept, 1 - carries, 0) + torch.where(carried, carries, 0)
            near = (excess > 0) & (excess < unit)
            comparisons += excess.numel()
            low += float(wrong[near].sum())
            high += float(wrong[~near].sum())
    return Flips(comparisons, low, high, max(before.bits, step.bits))
