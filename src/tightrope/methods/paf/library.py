"""The polynomials that stand for the sign function, and what each costs (SmartPAF 2024, table 2).

A composite applies its stages in order. The default order of the published names is that of Cheon et al.
2020: the steep g first, the polishing f last; `published=True` gives the order in which SmartPAF runs them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.polynomial import polynomial
from numpy.typing import ArrayLike, NDArray

from tightrope.errors import InputError, near
from tightrope.methods.paf.remez import epsilon_for, minimax_composite

Array = NDArray[np.floating[Any]]
Coefficients = tuple[float, ...]

# Of x, x^3, x^5, ...: Cheon et al. 2020 (f and g), Lee et al. 2021 (a7).
BASES: dict[str, Coefficients] = {
    "f1": (3 / 2, -1 / 2),
    "f2": (15 / 8, -10 / 8, 3 / 8),
    "g1": (2126 / 1024, -1359 / 1024),
    "g2": (3334 / 1024, -6108 / 1024, 3796 / 1024),
    "g3": (4589 / 1024, -16577 / 1024, 25614 / 1024, -12860 / 1024),
    "a7.1": (7.30445164958251, -34.6825871108659, 59.8596518298826, -31.8755225906466),
    "a7.2": (2.40085652217597, -2.63125454261783, 1.54912674773593, -0.331172956504304),
}
COMPOSITES: dict[str, tuple[str, ...]] = {  # g first
    "f1^2 g1^2": ("g1", "g1", "f1", "f1"),
    "a7": ("a7.1", "a7.2"),
    "f2 g3": ("g3", "f2"),
    "f2 g2": ("g2", "f2"),
    "f1 g2": ("g2", "f1"),
}
MINIMAX: dict[str, tuple[tuple[int, ...], int]] = {  # degrees, bits of precision (Lee et al. 2021)
    "7,7,13": ((7, 7, 13), 10),
    "15,15,27": ((15, 15, 27), 13),
}
SINGLE = (1, 2, 3, 5, 7)  # degrees of one polynomial in place of the whole activation
# Hermite expansions of ReLU with coefficients per channel (AESPA 2022): here for N(0, 1), see `hermite.py`
HERMITE: dict[str, Coefficients] = {"herpn": (1 / math.sqrt(8 * math.pi), 1 / 2, 1 / math.sqrt(8 * math.pi))}
# Of odd polynomials evaluated by odd baby steps and giant steps (Lee et al. 2022, table of MPCNN).
ODD_MULTIPLICATIONS = {1: 0, 3: 2, 5: 3, 7: 5, 13: 7, 15: 8, 27: 10}
GRID = 200_001


@dataclass(frozen=True)
class Paf:
    """p = p_k(...p_1(x)) on [-1, 1], ascending coefficients a stage.

    `gated`: p is near the sign and the activation is x * (1 + p(x)) / 2; else p is the activation itself.
    """

    name: str
    stages: tuple[Coefficients, ...]
    gated: bool = True

    @property
    def degrees(self) -> tuple[int, ...]:
        return tuple(len(stage) - 1 for stage in self.stages)

    @property
    def degree(self) -> int:
        """Of the composite; of the activation one more, if gated."""
        return math.prod(self.degrees)

    @property
    def levels(self) -> int:
        """Of the activation: ceil(log2(degree + 1)) a stage, one for the product with x."""
        return sum(degree.bit_length() for degree in self.degrees) + self.gated

    @property
    def multiplications(self) -> int:
        """Products of two ciphertexts in the activation."""
        return sum(map(multiplications, self.stages)) + self.gated

    def __call__(self, x: ArrayLike) -> Array:
        """p(x)."""
        y: Array = np.asarray(x, np.float64)
        for stage in self.stages:
            y = polynomial.polyval(y, stage)
        return y

    def activation(self, x: ArrayLike) -> Array:
        """What stands for ReLU on [-1, 1]."""
        values = np.asarray(x, np.float64)
        return values * (1 + self(values)) / 2 if self.gated else self(values)

    def sign_error(self, epsilon: float) -> float:
        """max |p(x) - 1| over [epsilon, 1]."""
        return float(np.abs(self(np.linspace(epsilon, 1, GRID)) - 1).max())

    def relu_error(self) -> float:
        """max |activation(x) - relu(x)| over [-1, 1]."""
        x = np.linspace(-1, 1, GRID)
        return float(np.abs(self.activation(x) - np.maximum(x, 0)).max())


def multiplications(stage: Sequence[float]) -> int:
    """Products of ciphertexts for one polynomial: by the published table if it is odd, else by baby steps of
    k powers and giant steps, with the best k (Paterson and Stockmeyer 1973)."""
    degree = len(stage) - 1
    if not any(stage[0::2]) and degree in ODD_MULTIPLICATIONS:
        return ODD_MULTIPLICATIONS[degree]
    costs = [max(0, degree - 1)]
    for k in range(2, degree + 1):
        chunks = -(-(degree + 1) // k)
        costs.append((k - 1) + max(0, math.ceil(math.log2(chunks)) - 1) + (chunks - 1))
    return min(costs)


def names() -> tuple[str, ...]:
    """Every polynomial of the library, the cheapest first: `degree N` is one polynomial for ReLU itself,
    `herpn` one a channel."""
    everything = [*(f"degree {n}" for n in SINGLE), *HERMITE, *COMPOSITES, *MINIMAX]
    return tuple(sorted(everything, key=lambda name: (paf(name).levels, paf(name).multiplications)))


@cache
def paf(name: str, *, published: bool = False) -> Paf:
    """The polynomial of this name. Raises InputError naming the known ones."""
    if name in COMPOSITES:
        order = COMPOSITES[name]
        if published and name != "a7":
            order = order[::-1]
        return Paf(name, tuple(dense(BASES[base]) for base in order))
    if name in MINIMAX:
        degrees, bits = MINIMAX[name]
        return Paf(name, _tuples(minimax_composite(degrees, epsilon_for(degrees, 2.0**-bits))[0]))
    if name in {f"degree {n}" for n in SINGLE}:
        return Paf(name, (_relu_fit(int(name.split()[1])),), gated=False)
    if name in HERMITE:
        return Paf(name, (HERMITE[name],), gated=False)
    known = (*(f"degree {n}" for n in SINGLE), *HERMITE, *COMPOSITES, *MINIMAX)
    raise InputError("no such polynomial", got=repr(name), allowed=near(name, known))


def dense(odd: Coefficients) -> Coefficients:
    """0, c1, 0, c3, ... of the odd coefficients."""
    return tuple(c for value in odd for c in (0.0, value))


def _tuples(stages: Sequence[Array]) -> tuple[Coefficients, ...]:
    return tuple(tuple(map(float, stage)) for stage in stages)


def _relu_fit(degree: int) -> Coefficients:
    """The least-squares polynomial for ReLU on [-1, 1], all x alike."""
    x = np.linspace(-1, 1, 20_001)
    fit = np.polynomial.Polynomial.fit(x, np.maximum(x, 0), degree, domain=[-1, 1], window=[-1, 1])
    return tuple(map(float, fit.coef))
