"""Ciphertexts in the clear that keep the books of real ones: level, noise, values beyond their range.

The noise is drawn, a few times over, and goes through maps and polynomials as values do, so that what slots
have in common adds up. Every rescaling, key switch and encryption rounds each coefficient of a polynomial
and multiplies the rounding by the secret: sqrt((h + 1) / 12) per coefficient for h nonzero ones, sqrt(N /
2) times that per slot (Kim et al. 2022, "Approximate homomorphic encryption with reduced approximation
error", section 3). The value of the secret at a slot is Rayleigh distributed over the slots, and its
product with a Gaussian Laplacian, with the tails of that. Where a polynomial has coefficients of its own in
every slot, its terms are rescaled by different primes and added as if these were the scale: primes are 1
modulo 2N, so on average N ln(scale) apart, and the farthest of L is L / 2 of these gaps away.
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
from tightrope.runtimes.ckks.circuit import (
    Affine,
    Circuit,
    Composite,
    Factors,
    Refresh,
    Square,
    Stage,
    Within,
)
from tightrope.runtimes.ckks.parameters import Parameters

KEY_SIGMA = 3.2  # of the coefficients of a key's noise
DRAWS = 4
# Of a predicted error over the largest of the draws: other keys and inputs draw others, and what bootstraps
# leave is not independent in all slots. Measured errors were 0.3 to 6 times the largest draw.
MARGIN = 8.0
EDGE = 1e-9  # of a calibrated range, which packed values reach but for rounding


@dataclass(frozen=True)
class Simulated:
    """noise: (DRAWS, slots)."""

    slots: NDArray[np.float64]
    level: int
    noise: NDArray[np.float64]

    @property
    def error(self) -> float:
        """The largest that is expected of a slot."""
        return MARGIN * float(np.abs(self.noise).max())


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


def _evaluate(stage: Stage, part: int, x: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """The polynomial in every slot, and its slope there."""
    c = stage.of(part)
    if not stage.each:
        y = np.asarray(chebyshev.chebval(x, c), np.float64)
        return y, np.asarray(chebyshev.chebval(x, chebyshev.chebder(c)), np.float64)
    powers = np.arange(len(c))[:, None]
    slope = (powers[1:] * c[1:] * x ** (powers[1:] - 1)).sum(0)
    return (c * x**powers).sum(0), slope


def _drift(parameters: Parameters) -> float:
    """How far the farthest prime is from the scale, as a part of it."""
    gap = (1 << parameters.log_n) * parameters.scale_bits * math.log(2)
    return parameters.levels / 2 * gap * 2.0**-parameters.scale_bits


class Simulator:
    """A `Backend`. `beyond` counts, per op that is not linear, its inputs outside their calibrated range."""

    def __init__(self, circuit: Circuit) -> None:
        self._parameters = circuit.parameters
        self._values = circuit.values
        self._rounding = rounding(circuit.parameters)
        self._switching = switching(circuit.parameters)
        self._drift = _drift(circuit.parameters)
        self._generator = np.random.default_rng(0)
        self._sums: dict[str, NDArray[np.float64]] = {}  # of factors, until their difference is there
        self.beyond: dict[str, int] = {}

    def _drawn(self, deviation: float | NDArray[np.float64]) -> NDArray[np.float64]:
        draws = self._generator.laplace(scale=math.sqrt(0.5), size=(DRAWS, self._parameters.slots))
        return np.asarray(draws * deviation, np.float64)

    def encrypt(self, slots: NDArray[np.float64], level: int) -> list[Simulated]:
        return [Simulated(row, level, self._drawn(self._rounding)) for row in slots]

    def level(self, ciphertext: Simulated) -> int:
        return ciphertext.level

    def affine(self, step: Affine, inputs: Sequence[Simulated]) -> list[Simulated]:
        level = self._spend(step.name, min(x.level for x in inputs), 1)
        slots = self._parameters.slots
        made = []
        for r in range(step.outputs):
            total, noise, variance = step.bias[r].copy(), np.zeros((DRAWS, slots)), np.zeros(slots)
            for c, x in enumerate(inputs):
                if (block := step.blocks.get((r, c))) is None:
                    continue
                for shift, diagonal in zip(block.shifts, block.dense(slots), strict=True):
                    total += diagonal * np.roll(x.slots, -shift)
                    noise += diagonal * np.roll(x.noise, -shift, 1)
                    variance += diagonal**2 * self._switching**2
            for k in range(1, step.rotations + 1):
                total += np.roll(total, -(slots >> k))
                noise += np.roll(noise, -(slots >> k), 1)
                variance += np.roll(variance, -(slots >> k)) + self._switching**2
            noise += self._drawn(np.sqrt(variance + self._rounding**2))
            made.append(Simulated(total, level, noise))
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
                noise = slope * noise + self._drawn(math.hypot(rounded, drift))
            if step.gated:
                noise = x.slots * noise + y * x.noise + self._drawn(self._rounding)
                y = x.slots * y
            made.append(Simulated(y, level, noise))
        self._count(step, inputs, Within())
        return made

    def square(self, step: Square, inputs: Sequence[Simulated]) -> list[Simulated]:
        self._count(step, inputs, step.calibrated)
        made = []
        for x in inputs:
            noise = 2 * x.slots * x.noise + self._drawn(self._rounding)
            made.append(Simulated(x.slots**2, self._spend(step.name, x.level, 1), noise))
        return made

    def refresh(self, step: Refresh, inputs: Sequence[Simulated]) -> list[Simulated]:
        made = []
        for x in inputs:
            self._spend(step.name, x.level, bootstrapping.LEAST_LEVEL)
            slots = np.tile(x.slots[: step.slots], self._parameters.slots // step.slots)
            noise = x.noise + self._drawn(bootstrapping.NOISE)
            noise = np.tile(noise[:, : step.slots], self._parameters.slots // step.slots)
            made.append(Simulated(slots, self._parameters.levels, noise))
        return made

    def _count(
        self, step: Composite | Square, inputs: Sequence[Simulated], calibrated: Within | Factors
    ) -> None:
        values = self._values[step.sources[0]].layout.unpack(np.stack([x.slots for x in inputs])).reshape(-1)
        op = step.ops[-1]
        if isinstance(calibrated, Within):
            self._add(op, values - calibrated.centre, calibrated.reach)
        elif op not in self._sums:
            self._sums[op] = values
        else:
            half = self._sums.pop(op)
            for factor, every in zip((half + values, half - values), calibrated.repeats, strict=False):
                self._add(op, factor[::every], 1.0)

    def _add(self, op: str, values: NDArray[np.float64], reach: NDArray[np.float64] | float) -> None:
        self.beyond[op] = self.beyond.get(op, 0) + int((~(np.abs(values) <= reach + EDGE)).sum())

    def _spend(self, step: str, level: int, levels: int) -> int:
        if level < levels:
            raise ProtocolError("no level is left", where=step, got=level, allowed=f"{levels} or more")
        return level - levels
