"""What the evaluator executes: a few kinds of steps over ciphertexts that hold values in known layouts.

Everything but the numbers is public: both sides compile the same circuit, the client without weights, and
compare its digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from tightrope.runtimes.ckks import bootstrapping
from tightrope.runtimes.ckks.diagonals import Block, conjugation, galois_element, steps
from tightrope.runtimes.ckks.layout import Layout
from tightrope.runtimes.ckks.parameters import Parameters


@dataclass(frozen=True)
class Value:
    """What ciphertexts hold: the value divided by `scale`, so about [-1, 1], in a layout, at a level."""

    layout: Layout
    scale: float
    level: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """Makes the value `name` of the values `sources`; `ops` are the ops of the Program that it executes."""

    name: str
    sources: tuple[str, ...]
    ops: tuple[str, ...]
    level: int  # of the inputs


@dataclass(frozen=True, kw_only=True)
class Affine(Step):
    """One linear map of all sources' ciphertexts, in order, and a bias: one level.

    blocks: (output, input ciphertext) -> diagonals. rotations: how often the result is added to itself,
    turned by slots/2, slots/4, ...; the bias (output ciphertexts, slots) is added before.
    """

    blocks: Mapping[tuple[int, int], Block]
    bias: NDArray[np.float64]
    rotations: int
    inputs: int

    @property
    def outputs(self) -> int:
        return len(self.bias)

    @property
    def depth(self) -> int:
        return 1

    @property
    def diagonals(self) -> int:
        return sum(len(block.shifts) for block in self.blocks.values())

    @property
    def encoded(self) -> int:
        """The most diagonals of one input ciphertext: as many are encoded at a time."""
        counts = [0] * self.inputs
        for (_, c), block in self.blocks.items():
            counts[c] += len(block.shifts)
        return max(counts)


@dataclass(frozen=True)
class Stage:
    """A polynomial on [-1, 1], ascending coefficients.

    (degree + 1,) in the Chebyshev basis for all slots, or (degree + 1, ciphertexts, slots) powers of x.
    """

    coefficients: NDArray[np.float64]

    @property
    def degree(self) -> int:
        return len(self.coefficients) - 1

    @property
    def levels(self) -> int:
        return self.degree.bit_length()

    @property
    def each(self) -> bool:
        """Whether slots have coefficients of their own."""
        return self.coefficients.ndim > 1

    def of(self, part: int) -> NDArray[np.float64]:
        """The coefficients for one ciphertext of the value."""
        return self.coefficients[:, part] if self.each else self.coefficients


@dataclass(frozen=True, kw_only=True)
class Composite(Step):
    """A composite polynomial, and its product with the input if `gated`: the levels of its stages, and one.

    Without weights the degrees of its stages alone count.
    """

    stages: tuple[Stage, ...]
    gated: bool

    @property
    def depth(self) -> int:
        return sum(stage.levels for stage in self.stages) + self.gated


@dataclass(frozen=True)
class Within:
    """Per element, calibrated inputs are at most `reach` from `centre`."""

    centre: NDArray[np.float64] | float = 0.0
    reach: NDArray[np.float64] | float = 1.0


@dataclass(frozen=True)
class Factors:
    """Inputs are half the sum of a product's factors, then half their difference; calibrated, each factor is
    at most 1. repeats: per factor, how often each of its elements stands in a row; of a value times itself
    once.
    """

    repeats: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Square(Step):
    """Every slot times itself: one level. calibrated: for a simulation alone."""

    calibrated: Within | Factors
    depth: ClassVar[int] = 1


@dataclass(frozen=True, kw_only=True)
class Refresh(Step):
    """A bootstrap of every ciphertext of a value, which repeats with at most `slots`: to the top level."""

    slots: int
    depth: ClassVar[int] = 0


AnyStep = Affine | Composite | Square | Refresh


@dataclass(frozen=True)
class Circuit:
    """Steps in order, the values that they make, and what keys they need."""

    parameters: Parameters
    steps: tuple[AnyStep, ...]
    values: Mapping[str, Value]
    input: str
    output: str

    @property
    def levels(self) -> int:
        """What the deepest path spends, bootstrapped or not."""
        return self.deepest({step.name: step.depth for step in self.steps})

    def deepest(self, spent: Mapping[str, int]) -> int:
        """The largest sum of what steps spend along any path to the output."""
        depth = {self.input: 0}
        for step in self.steps:
            depth[step.name] = spent[step.name] + max(depth[name] for name in step.sources)
        return depth[self.output]

    def op_levels(self, spent: Mapping[str, int]) -> dict[str, int]:
        """What each op's steps spend one after the other, from what each does; a step is its last op's."""
        reached: dict[str, tuple[str, int]] = {}
        levels: dict[str, int] = {}
        for step in self.steps:
            op = step.ops[-1]
            before = [reached[name][1] for name in step.sources if name in reached and reached[name][0] == op]
            reached[step.name] = (op, spent[step.name] + max(before, default=0))
            levels[op] = max(levels.get(op, 0), reached[step.name][1])
        return levels

    @property
    def bootstraps(self) -> int:
        """Of ciphertexts."""
        return sum(
            self.values[step.name].layout.ciphertexts for step in self.steps if isinstance(step, Refresh)
        )

    @property
    def boot_slots(self) -> int:
        """How many slots a bootstrap refreshes, 0 where there is none: keys belong to one number of them."""
        return max((step.slots for step in self.steps if isinstance(step, Refresh)), default=0)

    def boot_elements(self) -> tuple[int, ...]:
        """The Galois elements of bootstrapping's own keys, ascending."""
        if not self.boot_slots:
            return ()
        log_n = self.parameters.log_n
        turned = bootstrapping.rotations(log_n, self.boot_slots.bit_length() - 1)
        return tuple(sorted({conjugation(log_n), *(galois_element(k, log_n) for k in turned)}))

    def rotations(self) -> tuple[int, ...]:
        """Every rotation that a step makes."""
        slots, found = self.parameters.slots, set[int]()
        for step in self.steps:
            if isinstance(step, Affine):
                for block in step.blocks.values():
                    baby, giant = steps(block.shifts, slots)
                    found |= baby | giant
                found |= {slots >> k for k in range(1, step.rotations + 1)}
        return tuple(sorted(found - {0}))

    def galois_elements(self) -> tuple[int, ...]:
        """The elements of the keys that the server needs, ascending."""
        return tuple(sorted({galois_element(k, self.parameters.log_n) for k in self.rotations()}))

    def bare(self) -> Circuit:
        """Without the numbers of its maps, which only a server or a simulation needs."""
        steps = tuple(
            replace(step, blocks={pair: block.bare() for pair, block in step.blocks.items()})
            if isinstance(step, Affine)
            else step
            for step in self.steps
        )
        return replace(self, steps=steps)

    def diagonal_bytes(self) -> list[int]:
        """What the diagonals of every map take as numbers."""
        return [8 * self.parameters.slots * s.diagonals for s in self.steps if isinstance(s, Affine)]

    def digest(self) -> str:
        """SHA-256 of everything public."""
        digest = hashlib.sha256(json.dumps(asdict(self.parameters)).encode())
        for step in self.steps:
            about: list[object] = [step.name, step.sources, step.level]
            if isinstance(step, Affine):
                about += [step.rotations, step.inputs, step.outputs]
                about += [[pair, block.shifts, block.period] for pair, block in step.blocks.items()]
            elif isinstance(step, Composite):
                about += [[stage.degree for stage in step.stages], step.gated]
            else:
                about += [type(step).__name__, step.slots if isinstance(step, Refresh) else 0]
            digest.update(json.dumps(about).encode())
        for name, value in self.values.items():
            about = [name, value.scale, value.level, value.layout.shape, value.layout.period]
            digest.update(json.dumps(about).encode())
            digest.update(value.layout.positions.tobytes())
        return digest.hexdigest()
