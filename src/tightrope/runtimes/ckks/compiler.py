"""Translate a Program into a Circuit: merge linear ops, fold scales, lay values out, count levels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.polynomial import chebyshev
from numpy.typing import NDArray

from tightrope.errors import InputError, TraceError
from tightrope.ops import Op, Shape
from tightrope.program import Polynomial, Program
from tightrope.runtimes.ckks.affine import MATRICES, Sum, compose, is_dense, source
from tightrope.runtimes.ckks.circuit import Affine, AnyStep, Circuit, Composite, Refresh, Stage, Value
from tightrope.runtimes.ckks.diagonals import Block, blocks, folds
from tightrope.runtimes.ckks.layout import Canvas
from tightrope.runtimes.ckks.parameters import Parameters
from tightrope.runtimes.ckks.placement import place
from tightrope.solve.levels import Action, Node

OPS = frozenset({op.kind for op in MATRICES} | {Polynomial.kind})
MAX_CHANNEL_DEGREE = 3  # where channels have coefficients of their own
SMALLEST_SCALE = 2.0**-20  # of values that calibration saw as zero
Nodes = Callable[[int], Sequence[Node]]  # of the steps, by the slots of a ciphertext
Choose = Callable[[int, Nodes], Parameters]  # for so many levels, or with bootstraps on these nodes


@dataclass(frozen=True)
class Planned:
    """A step before parameters are known: a sum to be laid out, or the polynomial op that it is."""

    name: str
    sources: tuple[str, ...]
    ops: tuple[str, ...]
    what: Sum | Polynomial
    depth: int  # levels spent until its result

    @property
    def spends(self) -> int:
        return self.what.levels if isinstance(self.what, Polynomial) else 1


@dataclass
class _Plan:
    """Sums are merged until a polynomial, the output or a second layer needs the value itself."""

    program: Program
    steps: list[Planned] = field(default_factory=list)
    sums: dict[str, Sum] = field(default_factory=dict)
    real: dict[str, tuple[Shape, int]] = field(default_factory=dict)  # values in ciphertexts: shape, depth
    pending: list[str] = field(default_factory=list)  # linear ops that no step executes yet

    def add(self, op: Op, needed: bool) -> None:
        if isinstance(op, Polynomial):
            self.pending.append(op.name)
            made = self.materialise(op.inputs[0])
            depth = self.real[made][1] + op.levels
            self._emit(op.name, (made,), op, depth, op.shape)
            return
        inputs = [self.sums[value] for value in op.inputs]
        if is_dense(op) and any(inner.dense for inner in inputs):
            for value in op.inputs:
                self.materialise(value)
            inputs = [self.sums[value] for value in op.inputs]
        self.pending.append(op.name)
        self.sums[op.name] = compose(op, self.program, inputs)
        if needed:
            self.materialise(op.name)

    def materialise(self, value: str) -> str:
        """The name of the value in ciphertexts that equals `value`, after a step makes it if none did."""
        total = self.sums[value]
        if total.copy_of is not None:
            return total.copy_of
        sources = tuple(total.terms)
        depth = max(self.real[name][1] for name in sources) + 1
        self._emit(value, sources, total, depth, self.program.shape(value))
        return value

    def _emit(
        self, name: str, sources: tuple[str, ...], what: Sum | Polynomial, depth: int, shape: Shape
    ) -> None:
        self.steps.append(Planned(name, sources, tuple(self.pending), what, depth))
        self.pending.clear()
        self.start(name, shape, depth)

    def start(self, name: str, shape: Shape, depth: int) -> None:
        self.real[name] = (shape, depth)
        self.sums[name] = source(name, math.prod(shape))


def check(op: Op) -> None:
    """Raise TraceError, naming the op's kind and its name, if CKKS cannot execute it."""
    if op.kind not in OPS:
        raise TraceError(
            "the ckks runtime cannot execute this op",
            where=op.name,
            got=op.kind,
            allowed=tuple(sorted(OPS)),
            fix="replace activations by polynomials (method paf), max-pools by average pools",
        )


def plan(program: Program) -> _Plan:
    """The steps and the levels that each spends. Raises TraceError for an op outside the runtime."""
    for op in program.ops:
        check(op)
    planned = _Plan(program)
    planned.start(Program.INPUT, program.input_shape, 0)
    read = {v for op in program.ops if isinstance(op, Polynomial) for v in op.inputs} | {program.output}
    for op in program.ops:
        planned.add(op, op.name in read)
    return planned


def compile_program(program: Program, choose: Choose) -> Circuit:
    """The circuit of a calibrated program; `choose` gives parameters for the levels that it needs.

    Where it gives fewer, values are bootstrapped, as few as possible.

    Without weights the same circuit comes out but for its numbers. Raises TraceError for what CKKS cannot
    execute and InputError for a program without ranges.
    """
    planned = plan(program)
    missing = [name for name in planned.real if name not in program.ranges]
    if missing:
        raise InputError(
            "the program has no calibrated ranges", where=missing[0], fix="plain.ranges(program, batches)"
        )
    wild = [name for name, seen in program.ranges.items() if not np.isfinite(seen)]
    if wild:
        raise InputError(
            "values exploded on the calibration data",
            where=wild[0],
            fix="polynomials with smaller coefficients",
        )
    output = planned.materialise(program.output)
    canvas = Canvas.of(program)
    levels = max(depth for _, depth in planned.real.values())
    parameters = choose(levels, lambda slots: _nodes(planned, canvas, slots))
    booted: set[str] = set()
    if parameters.levels < levels:
        booted |= set(place(_nodes(planned, canvas, parameters.slots), parameters.levels).bootstrapped)
    layouts = {name: canvas.layout(name, real[0], parameters.slots) for name, real in planned.real.items()}
    slots = max((layouts[name].period for name in booted), default=0)
    scales = {name: max(program.ranges[name], SMALLEST_SCALE) for name in layouts}
    values = {Program.INPUT: Value(layouts[Program.INPUT], scales[Program.INPUT], parameters.levels)}
    fresh = {name: f"{name}:refreshed" if name in booted else name for name in layouts}
    done: list[AnyStep] = []
    for step in planned.steps:
        step = replace(step, sources=tuple(fresh[name] for name in step.sources))
        level = min(values[name].level for name in step.sources)
        value = Value(layouts[step.name], scales[step.name], level - step.spends)
        values[step.name] = value
        done.append(_step(step, program, values))
        if step.name in booted:
            name = fresh[step.name]
            values[name] = replace(value, level=parameters.levels)
            done.append(
                Refresh(name=name, sources=(step.name,), ops=step.ops, level=value.level, slots=slots)
            )
    return Circuit(parameters, tuple(done), values, Program.INPUT, output)


def _nodes(planned: _Plan, canvas: Canvas, slots: int) -> tuple[Node, ...]:
    """The steps as the placement of bootstraps sees them."""
    made = []
    for step in planned.steps:
        sources = tuple("" if name == Program.INPUT else name for name in step.sources)
        layout = canvas.layout(step.name, planned.real[step.name][0], slots)
        made.append(Node(step.name, sources, (Action("", step.spends),), layout.ciphertexts))
    return tuple(made)


def _step(step: Planned, program: Program, values: dict[str, Value]) -> Affine | Composite:
    level = min(values[name].level for name in step.sources)
    if isinstance(step.what, Polynomial):
        stages = _stages(step.what, program, values[step.sources[0]], values[step.name])
        return Composite(
            name=step.name,
            sources=step.sources,
            ops=step.ops,
            level=level,
            stages=stages,
            gated=step.what.gated,
        )
    target = values[step.name]
    rotations = max(folds(values[name].layout, target.layout) for name in step.sources)
    found: dict[tuple[int, int], Block] = {}
    first = 0
    for name, matrix in zip(step.sources, step.what.terms.values(), strict=True):
        own = values[name]
        scaled = matrix * (own.scale / target.scale)
        part = blocks(scaled, own.layout, target.layout, rotations)
        found |= {(r, first + c): block for (r, c), block in part.items()}
        first += own.layout.ciphertexts
    bias = target.layout.pack(step.what.bias / target.scale)
    if rotations:
        bias[:, target.layout.period :] = 0
    return Affine(
        name=step.name, sources=step.sources, ops=step.ops, level=level,
        blocks=found, bias=bias, rotations=rotations, inputs=first,
    )  # fmt: skip


def _stages(op: Polynomial, program: Program, inside: Value, outside: Value) -> tuple[Stage, ...]:
    """Each stage between values of magnitude one; in the Chebyshev basis: powers of degree 27 lose digits."""
    before, made = inside.scale, []
    for k, degree in enumerate(op.stages):
        after = max(program.ranges.get(f"{op.name}:stage{k}", 1.0), SMALLEST_SCALE)
        if k == len(op.stages) - 1:
            after = outside.scale / inside.scale if op.gated else outside.scale
        powers = before ** np.arange(degree + 1) / after
        given = np.asarray(program.tensors.get(f"{op.name}.stage{k}", np.ones(degree + 1)), np.float64)
        if given.ndim == 2 and (given != given[0]).any():
            made.append(_per_channel(op, k, given * powers, outside))
        else:
            basis = chebyshev.poly2cheb(given.reshape(-1, degree + 1)[0] * powers)
            made.append(Stage(np.pad(basis, (0, degree + 1 - len(basis)))))  # it drops leading zeros
        before = after
    return tuple(made)


def _per_channel(op: Polynomial, k: int, coefficients: NDArray[np.float64], value: Value) -> Stage:
    degree = coefficients.shape[1] - 1
    if degree > MAX_CHANNEL_DEGREE:
        raise TraceError(
            "the ckks runtime evaluates one polynomial of this degree for all channels",
            where=f"{op.name}, stage {k}",
            got=f"degree {degree} with coefficients of their own in {len(coefficients)} channels",
            allowed=f"one set of coefficients, or degree {MAX_CHANNEL_DEGREE}",
            fix="choose coefficients per layer",
        )
    per_element = np.repeat(coefficients, math.prod(op.shape[1:]), axis=0)
    return Stage(np.stack([value.layout.pack(column) for column in per_element.T]))
