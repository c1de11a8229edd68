"""Ciphertexts in the clear that keep the books of real ones: level, noise, values beyond their range.

The noise is the standard deviation of a slot. Every rescaling, key switch and encryption rounds each
coefficient of a polynomial and multiplies the rounding by the secret: sqrt((h + 1) / 12) per coefficient for
h nonzero ones, sqrt(N / 2) times that per slot (Kim et al. 2022, "Approximate homomorphic encryption with
reduced approximation error", section 3). A map adds variances, a polynomial multiplies by its slope. Where a
polynomial has coefficients of its own in every slot, its terms are rescaled by different primes and added as
if these were the scale: primes are 1 modulo 2N, so on average N ln(scale) apart, and the farthest of L is
L / 2 of these gaps away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.polynomial import chebyshev
from numpy.typing import NDArray

from tightrope.errors import ProtocolError
from tightrope.runtimes.ckks import bootstrapping
from tightrope.runtimes.ckks.circuit import Affine, Circuit, Composite, Refresh, Square, Stage
from tightrope.runtimes.ckks.parameters import Parameters

KEY_SIGMA = 3.2  # of the coefficients of a key's noise
BEYOND = 1.0 + 1e-9  # calibrated ranges are where the values reach 1


@dataclass(frozen=True)
class Simulated:
    slots: NDArray[np.float64]
    level: int
    noise: float


def rounding(parameters: Parameters) -> float:
    """The standard deviation that one rounding leaves in a slot."""
    h = parameters.slots
    return math.sqrt((h + 1) / 12 * parameters.slots) * 2.0**-parameters.scale_bits


def switching(parameters: Parameters) -> float:
    """The standard deviation that one key switch leaves in a slot: a rounding, and the noise of the key.

    Of the parts into which a ciphertext is decomposed the first counts, whose prime is the largest: products
    of it, uniform below Q_1, with the key's noise, divided by P.
    """
    n, count = 1 << parameters.log_n, len(parameters.p_bits)
    part = 2.0 ** (sum(parameters.q_bits[:count]) - sum(parameters.p_bits))
    key = n * (KEY_SIGMA * part) ** 2 / 12
    return math.hypot(rounding(parameters), math.sqrt(key * parameters.slots) * 2.0**-parameters.scale_bits)


def _evaluate(stage: Stage, part: int, x: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """The polynomial in every slot, and its steepest slope."""
    c = stage.of(part)
    if not stage.each:
        y = np.asarray(chebyshev.chebval(x, c), np.float64)
        return y, float(np.abs(chebyshev.chebval(x, chebyshev.chebder(c))).max())
    powers = np.arange(len(c))[:, None]
    slope = (powers[1:] * c[1:] * x ** (powers[1:] - 1)).sum(0)
    return (c * x**powers).sum(0), float(np.abs(slope).max())


def _drift(parameters: Parameters) -> float:
    """How far the farthest prime is from the scale, as a part of it."""
    gap = (1 << parameters.log_n) * parameters.scale_bits * math.log(2)
    return parameters.levels / 2 * gap * 2.0**-parameters.scale_bits


class Simulator:
    """A `Backend`. `beyond` counts, per polynomial, the values outside its calibrated range."""

    def __init__(self, circuit: Circuit) -> None:
        self._parameters = circuit.parameters
        self._values = circuit.values
        self._rounding = rounding(circuit.parameters)
        self._switching = switching(circuit.parameters)
        self._drift = _drift(circuit.parameters)
        self.beyond: dict[str, int] = {}

    def encrypt(self, slots: NDArray[np.float64], level: int) -> list[Simulated]:
        return [Simulated(row, level, self._rounding) for row in slots]

    def level(self, ciphertext: Simulated) -> int:
        return ciphertext.level

    def affine(self, step: Affine, inputs: Sequence[Simulated]) -> list[Simulated]:
        level = self._spend(step.name, min(x.level for x in inputs), 1)
        slots = self._parameters.slots
        made = []
        for r in range(step.outputs):
            total, variance = step.bias[r].copy(), np.zeros(slots)
            for c, x in enumerate(inputs):
                if (block := step.blocks.get((r, c))) is None:
                    continue
                for shift, diagonal in zip(block.shifts, block.dense(slots), strict=True):
                    total += diagonal * np.roll(x.slots, -shift)
                    variance += diagonal**2 * (x.noise**2 + self._switching**2)
            for k in range(1, step.rotations + 1):
                total += np.roll(total, -(slots >> k))
                variance += np.roll(variance, -(slots >> k)) + self._switching**2
            made.append(Simulated(total, level, math.sqrt(variance.max() + self._rounding**2)))
        return made

    def composite(self, step: Composite, inputs: Sequence[Simulated]) -> list[Simulated]:
        made = []
        for part, x in enumerate(inputs):
            level = self._spend(step.name, x.level, step.depth)
            y, noise = x.slots, x.noise
            for stage in step.stages:
                y, slope = _evaluate(stage, part, y)
                rounded = float(np.abs(stage.of(part)).sum(0).max()) * self._rounding
                drift = self._drift * float(np.abs(y).max()) if stage.each else 0.0
                noise = math.hypot(slope * noise, rounded, drift)
            if step.gated:
                largest = [float(np.abs(v).max()) for v in (x.slots, y)]
                y = x.slots * y
                noise = math.hypot(largest[0] * noise, largest[1] * x.noise, self._rounding)
            made.append(Simulated(y, level, noise))
        self._count(step, inputs)
        return made

    def square(self, step: Square, inputs: Sequence[Simulated]) -> list[Simulated]:
        self._count(step, inputs)
        made = []
        for x in inputs:
            noise = math.hypot(2 * float(np.abs(x.slots).max()) * x.noise, self._rounding)
            made.append(Simulated(x.slots**2, self._spend(step.name, x.level, 1), noise))
        return made

    def refresh(self, step: Refresh, inputs: Sequence[Simulated]) -> list[Simulated]:
        made = []
        for x in inputs:
            self._spend(step.name, x.level, bootstrapping.LEAST_LEVEL)
            slots = np.tile(x.slots[: step.slots], self._parameters.slots // step.slots)
            noise = math.hypot(x.noise, bootstrapping.NOISE)
            made.append(Simulated(slots, self._parameters.levels, noise))
        return made

    def _count(self, step: Composite | Square, inputs: Sequence[Simulated]) -> None:
        values = self._values[step.sources[0]].layout.unpack(np.stack([x.slots for x in inputs]))
        self.beyond[step.name] = self.beyond.get(step.name, 0) + int((np.abs(values) > BEYOND).sum())

    def _spend(self, step: str, level: int, levels: int) -> int:
        if level < levels:
            raise ProtocolError("no level is left", where=step, got=level, allowed=f"{levels} or more")
        return level - levels
