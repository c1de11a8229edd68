"""Translate a Program into a Circuit: merge linear ops, fold scales, lay values out, count levels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import scipy.sparse as sp
from numpy.polynomial import chebyshev
from numpy.typing import NDArray

from tightrope.errors import InputError, TraceError
from tightrope.ops import Op, Shape
from tightrope.program import Polynomial, Program
from tightrope.runtimes.ckks.affine import MATRICES, Sum, Vector, compose, is_dense, scaled, source
from tightrope.runtimes.ckks.circuit import Affine, AnyStep, Circuit, Composite, Refresh, Square, Stage, Value
from tightrope.runtimes.ckks.diagonals import Block, blocks, chunks, folds
from tightrope.runtimes.ckks.layout import Canvas
from tightrope.runtimes.ckks.parameters import Parameters
from tightrope.runtimes.ckks.placement import place
from tightrope.solve.levels import Action, Node

OPS = frozenset({op.kind for op in MATRICES} | {Polynomial.kind})
MAX_CHANNEL_DEGREE = 3  # where channels have coefficients of their own
MAX_GAIN = 2.0**10  # of noise, where a quadratic is a square: steep ones with hardly a square have more
SHIFTED = ":shifted"
SMALLEST_SCALE = 2.0**-20  # of values that calibration saw as zero
Nodes = Callable[[int], Sequence[Node]]  # of the steps, by the slots of a ciphertext
Choose = Callable[[int, Nodes], Parameters]  # for so many levels, or with bootstraps on these nodes


@dataclass(frozen=True)
class Squaring:
    """What is left of a quadratic when the sums before and after it have taken the rest."""

    levels: int = 1


@dataclass(frozen=True)
class Planned:
    """A step before parameters are known: a sum to be laid out, a polynomial op, or a square."""

    name: str
    sources: tuple[str, ...]
    ops: tuple[str, ...]
    what: Sum | Polynomial | Squaring
    depth: int  # levels spent until its result

    @property
    def spends(self) -> int:
        return 1 if isinstance(self.what, Sum) else self.what.levels


@dataclass
class _Plan:
    """Sums are merged until a polynomial, the output or a second layer needs the value itself.

    squares: the quadratics a x^2 + b x + c that become a square, one level instead of two: the sum before
    adds b / 2a, the one after multiplies by a and adds the rest. Values of it are of magnitude one: `unit`.
    """

    program: Program
    squares: frozenset[str]
    steps: list[Planned] = field(default_factory=list)
    sums: dict[str, Sum] = field(default_factory=dict)
    real: dict[str, tuple[Shape, int]] = field(default_factory=dict)  # values in ciphertexts: shape, depth
    unit: set[str] = field(default_factory=set)
    pending: list[str] = field(default_factory=list)  # linear ops that no step executes yet

    def add(self, op: Op, needed: bool) -> None:
        if isinstance(op, Polynomial):
            inner = self.sums[op.inputs[0]]
            if op.name in self.squares and inner.copy_of is None:
                self._add_square(op, inner)
                return
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

    def _add_square(self, op: Polynomial, inner: Sum) -> None:
        a, shift, rest, scale = _completed(op, self.program)
        shifted = scaled(inner, 1 / scale, shift)
        self.pending = self.pending or [op.name]
        depth = max(self.real[name][1] for name in shifted.terms) + 1
        name = op.name + SHIFTED
        self._emit(name, tuple(shifted.terms), shifted, depth, op.shape)
        self.pending.append(op.name)
        self._emit(op.name, (name,), Squaring(), depth + 1, op.shape)
        self.unit |= {name, op.name}
        self.sums[op.name] = Sum({op.name: sp.diags_array(a * scale**2).tocsr()}, rest)

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
        self, name: str, sources: tuple[str, ...], what: Sum | Polynomial | Squaring, depth: int, shape: Shape
    ) -> None:
        self.steps.append(Planned(name, sources, tuple(self.pending), what, depth))
        self.pending.clear()
        self.start(name, shape, depth)

    def start(self, name: str, shape: Shape, depth: int) -> None:
        self.real[name] = (shape, depth)
        self.sums[name] = source(name, math.prod(shape))


def _completed(op: Polynomial, program: Program) -> tuple[Vector, Vector, Vector, Vector]:
    """Per element a, b / 2a, c - b^2 / 4a, and the largest magnitude of x + b / 2a.

    Raises InputError where a is so small that the noise of the square would show.
    """
    given = np.asarray(program.tensors.get(f"{op.name}.stage0", np.ones(3)), np.float64).reshape(-1, 3)
    c, b, a = (np.broadcast_to(part, (op.shape[0],)) for part in given.T)
    inside, outside = (max(program.ranges.get(v, 1.0), SMALLEST_SCALE) for v in (op.inputs[0], op.name))
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = b / (2 * a)
        scale = inside + np.abs(shift)
        gain = np.abs(a) * scale**2 / outside
    if not (gain <= MAX_GAIN).all():
        worst = int(np.argmax(np.where(np.isfinite(gain), gain, np.inf)))
        raise InputError(
            "a quadratic has hardly a square, which would magnify the noise",
            where=f"{op.name}, channel {worst}",
            got=f"{a[worst]:.3g} x^2 + {b[worst]:.3g} x + {c[worst]:.3g} on {inside:.3g}",
            fix="--no-squares (squares=False), which takes a level more for every quadratic",
        )
    size = math.prod(op.shape[1:])
    rest = c - a * shift**2
    a, shift, rest, scale = (np.repeat(part, size) for part in (a, shift, rest, scale))
    return a, shift, rest, scale


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


def plan(program: Program, squares: bool) -> _Plan:
    """The steps and the levels that each spends. Raises TraceError for an op outside the runtime."""
    for op in program.ops:
        check(op)
    polynomials = [op for op in program.ops if isinstance(op, Polynomial)]
    direct = {v for op in polynomials for v in op.inputs} | {program.output}  # no sum takes what is left
    quadratic = {op.name for op in polynomials if op.stages == (2,) and not op.gated} - direct
    planned = _Plan(program, frozenset(quadratic if squares else ()))
    planned.start(Program.INPUT, program.input_shape, 0)
    read = {v for op in polynomials if op.name not in planned.squares for v in op.inputs} | {program.output}
    for op in program.ops:
        planned.add(op, op.name in read)
    return planned


def compile_program(program: Program, choose: Choose, squares: bool = True) -> Circuit:
    """The circuit of a calibrated program; `choose` gives parameters for the levels that it needs.

    Where it gives fewer, values are bootstrapped, as few as possible. squares: whether quadratics between
    sums become squares.

    Without weights the same circuit comes out but for its numbers. Raises TraceError for what CKKS cannot
    execute and InputError for a program without ranges.
    """
    planned = plan(program, squares)
    missing = [name for name in planned.real if name not in program.ranges and name not in planned.unit]
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
    layouts = {
        name: canvas.layout(name.removesuffix(SHIFTED), real[0], parameters.slots)
        for name, real in planned.real.items()
    }
    slots = max((layouts[name].period for name in booted), default=0)
    scales = {
        name: 1.0 if name in planned.unit else max(program.ranges[name], SMALLEST_SCALE) for name in layouts
    }
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
        layout = canvas.layout(step.name.removesuffix(SHIFTED), planned.real[step.name][0], slots)
        made.append(Node(step.name, sources, (Action("", step.spends),), layout.ciphertexts))
    return tuple(made)


def _step(step: Planned, program: Program, values: dict[str, Value]) -> AnyStep:
    level = min(values[name].level for name in step.sources)
    if isinstance(step.what, Squaring):
        return Square(name=step.name, sources=step.sources, ops=step.ops, level=level)
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
    sources: list[str] = []
    first = 0
    for name, matrix in zip(step.sources, step.what.terms.values(), strict=True):
        own = values[name]
        unit = matrix * (own.scale / target.scale)
        for part in chunks(blocks(unit, own.layout, target.layout, rotations)):
            found |= {(r, first + c): block for (r, c), block in part.items()}
            first += own.layout.ciphertexts
            sources.append(name)
    bias = target.layout.pack(step.what.bias / target.scale)
    if rotations:
        bias[:, target.layout.period :] = 0
    return Affine(
        name=step.name, sources=tuple(sources), ops=step.ops, level=level,
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
