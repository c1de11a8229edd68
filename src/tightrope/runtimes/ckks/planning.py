"""Which steps a Program takes, before parameters are known: what is merged, squared, and how deep it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import scipy.sparse as sp

from tightrope.errors import InputError, TraceError
from tightrope.ops import Op, Shape
from tightrope.program import Flatten, Mul, Polynomial, Program
from tightrope.runtimes.ckks.affine import (
    MATRICES,
    Sum,
    Vector,
    compose,
    is_dense,
    plus,
    scaled,
    source,
    spread,
)
from tightrope.runtimes.ckks.circuit import Factors, Within
from tightrope.types import Merge

OPS = frozenset({op.kind for op in MATRICES} | {Polynomial.kind, Mul.kind})
MAX_GAIN = 2.0**10  # of noise, where a quadratic is a square: steep ones with hardly a square have more
SMALLEST_SCALE = 2.0**-20  # of values that calibration saw as zero


@dataclass(frozen=True)
class Squaring:
    """What is left of a quadratic or a product when the sums before and after it have taken the rest."""

    calibrated: Within | Factors
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
class Plan:
    """Sums are merged until a polynomial, the output or a second layer needs the value itself; what was
    merged before then stays so. A sum of layers and of what comes later waits for that, not for a level of
    its own: it reads the layers made, at no level, so that it merges with the next layer.

    A polynomial of degree 1 is a part of the sums around it.
    squares: whether quadratics a x^2 + b x + c whose results sums read become a square, one level instead of
    two: the sum before adds b / 2a, the one after multiplies by a and adds the rest. Values of it are of
    magnitude one: `unit`. Any quadratic then leaves what it reads as it was for the sums that read it later:
    the levels that those take do not depend on who reads the quadratic.
    """

    program: Program
    squares: bool
    steps: list[Planned] = field(default_factory=list)
    sums: dict[str, Sum] = field(default_factory=dict)
    real: dict[str, tuple[Shape, int]] = field(default_factory=dict)  # values in ciphertexts: shape, depth
    unit: set[str] = field(default_factory=set)
    pending: list[str] = field(default_factory=list)  # linear ops that no step executes yet
    order: dict[str, int] = field(init=False)  # of the ops
    in_sums: frozenset[str] = field(init=False)  # values that sums read

    def __post_init__(self) -> None:
        self.in_sums = _in_sums(self.program, self.squares)
        self.order = {op.name: k for k, op in enumerate(self.program.ops)}

    def add(self, op: Op) -> None:
        if isinstance(op, Polynomial):
            inner = self.sums[op.inputs[0]]
            if is_linear(op):
                self._add_linear(op, inner)
            elif self._squares(op) and op.name in self.in_sums and inner.copy_of is None:
                self._add_square(op, inner)
            else:
                made = (self._beside if self._squares(op) else self.materialise)(op.inputs[0])
                self.pending.append(op.name)
                self._emit(op.name, (made,), op, self.real[made][1] + op.levels, op.shape)
            return
        if isinstance(op, Mul):
            self._add_product(op)
            return
        inputs = [self.sums[value] for value in op.inputs]
        if is_dense(op) and any(inner.dense for inner in inputs):
            for value in op.inputs:
                self.materialise(value)
            inputs = [self.sums[value] for value in op.inputs]
        elif self._waits(inputs):
            inputs = [
                self._source(self._beside(value)) if inner.dense else inner
                for value, inner in zip(op.inputs, inputs, strict=True)
            ]
        self.pending.append(op.name)
        self.sums[op.name] = compose(op, self.program, inputs)

    def _waits(self, inputs: Sequence[Sum]) -> bool:
        """Whether the layers among these can be made before the others are there: then a sum of them all is
        none that holds a layer, and it merges with the next."""
        depths = [(part.dense, max(self.real[name][1] for name in part.terms)) for part in inputs]
        layers = max((depth for dense, depth in depths if dense), default=-1)
        others = max((depth for dense, depth in depths if not dense), default=-1)
        return 0 <= layers < others

    def _squares(self, op: Polynomial) -> bool:
        return self.squares and is_quadratic(op)

    def _add_linear(self, op: Polynomial, inner: Sum) -> None:
        """A factor and a constant of a sum that is made anyway: no level, and the step is the layer's."""
        self.pending.insert(0, op.name)
        constant, factor = _coefficients(op, self.program)
        made = scaled(inner, factor, np.zeros_like(factor))
        self.sums[op.name] = replace(made, bias=made.bias + constant)

    def _add_square(self, op: Polynomial, inner: Sum) -> None:
        a, shift, rest, scale = _completed(op, self.program)
        reach = _scale(self.program, op.inputs[0]) / scale
        within = Within(shift / scale, reach)
        square = self._squared(op, "shifted", scaled(inner, 1 / scale, shift), Squaring(within))
        self.sums[op.name] = Sum({square: sp.diags_array(a * scale**2).tocsr()}, rest)

    def _add_product(self, op: Mul) -> None:
        """x y = s ((x / s + y / t) / 2)^2 t - s ((x / s - y / t) / 2)^2 t for ranges s and t: two levels."""
        self.pending.append(op.name)
        scales = [_scale(self.program, value) for value in op.inputs]
        size = math.prod(op.shape)
        x, y = (
            scaled(spread(self.sums[value], size), np.full(size, 0.5 / scale), np.zeros(size))
            for value, scale in zip(op.inputs, scales, strict=True)
        )
        sizes = {value: math.prod(self.program.shape(value)) for value in op.inputs}
        factors = Factors(tuple(size // own for own in sizes.values()))
        terms = {}
        for name, sign in (("plus", 1.0), ("minus", -1.0)):
            part = plus(x, scaled(y, np.full(size, sign), np.zeros(size)))
            square = self._squared(op, name, part, Squaring(factors))
            terms[square] = sp.diags_array(np.full(size, sign * math.prod(scales))).tocsr()
        self.sums[op.name] = Sum(terms, np.zeros(size))

    def _squared(self, op: Op, what: str, total: Sum, squaring: Squaring) -> str:
        """The name of the square of a sum of magnitude one."""
        root, square = f"{op.name}:{what}", f"{op.name}:{what}:square"
        depth = max(self.real[name][1] for name in total.terms) + 1
        self._emit(root, tuple(total.terms), total, depth, op.shape)
        self.pending.append(op.name)
        self._emit(square, (root,), squaring, depth + 1, op.shape)
        self.unit |= {root, square}
        return square

    def materialise(self, value: str) -> str:
        """The name of the value in ciphertexts that equals `value`, after a step makes it if none did."""
        if value in self.real:
            self.sums[value] = self._source(value)
        total = self.sums[value]
        if total.copy_of is not None:
            return total.copy_of
        if not any(matrix.nnz for matrix in total.terms.values()):
            raise TraceError("a layer that reads nothing but padding has nothing to encrypt", where=value)
        sources = tuple(total.terms)
        depth = max(self.real[name][1] for name in sources) + 1
        self._emit(value, sources, total, depth, self.program.shape(value))
        return value

    def _beside(self, value: str) -> str:
        """As `materialise`, but sums that read it later still merge with what it was."""
        total = self.sums[value]
        made = self.materialise(value)
        self.sums[value] = total
        return made

    def _emit(
        self, name: str, sources: tuple[str, ...], what: Sum | Polynomial | Squaring, depth: int, shape: Shape
    ) -> None:
        done = [op for op in self.pending if self.order[op] <= self.order[base(name)]]
        self.pending = [op for op in self.pending if op not in done]
        self.steps.append(Planned(name, sources, tuple(done) or (base(name),), what, depth))
        self.start(name, shape, depth)

    def start(self, name: str, shape: Shape, depth: int) -> None:
        self.real[name] = (shape, depth)
        self.sums[name] = self._source(name)

    def _source(self, name: str) -> Sum:
        """Of a value in ciphertexts."""
        return source(name, math.prod(self.real[name][0]))


def _completed(op: Polynomial, program: Program) -> tuple[Vector, Vector, Vector, Vector]:
    """Per element a, b / 2a, c - b^2 / 4a, and the largest magnitude of x + b / 2a.

    Raises InputError where a is so small that the noise of the square would show, if the weights are there.
    """
    c, b, a = _coefficients(op, program)
    inside, outside = _scale(program, op.inputs[0]), _scale(program, op.name)
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = b / (2 * a)
        scale = inside + np.abs(shift)
        gain = np.abs(a) * scale**2 / outside
    if program.tensors and not (gain <= MAX_GAIN).all():
        worst = int(np.argmax(np.where(np.isfinite(gain), gain, np.inf)))
        channel = worst // math.prod(op.shape[1:])
        raise InputError(
            "a quadratic has hardly a square, which would magnify the noise",
            where=f"{op.name}, channel {channel}",
            got=f"{a[worst]:.3g} x^2 + {b[worst]:.3g} x + {c[worst]:.3g} on {inside:.3g}",
            fix="--no-squares (squares=False), which takes a level more for every quadratic",
        )
    return a, shift, c - a * shift**2, scale


def _coefficients(op: Polynomial, program: Program) -> list[Vector]:
    """Of an op of one stage, ascending, each per element."""
    count = op.stages[0] + 1
    given = np.asarray(program.tensors.get(f"{op.name}.stage0", np.ones(count)), np.float64)
    parts = (np.broadcast_to(part, (op.shape[0],)) for part in given.reshape(-1, count).T)
    return [np.repeat(part, math.prod(op.shape[1:])) for part in parts]


def _scale(program: Program, value: str) -> float:
    return max(program.ranges.get(value, 1.0), SMALLEST_SCALE)


def base(name: str) -> str:
    """The value of the Program that a value in ciphertexts belongs to."""
    return name.partition(":")[0]


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


def is_linear(op: Op) -> bool:
    return isinstance(op, Polynomial) and op.stages == (1,) and not op.gated


def is_quadratic(op: Op) -> bool:
    return isinstance(op, Polynomial) and op.stages == (2,) and not op.gated


def merge(op: Op, squares: bool) -> Merge:
    """What `Plan` does of an op beside others, as the choice of polynomials counts it."""
    if isinstance(op, Polynomial) and not is_linear(op):
        return "square" if squares and is_quadratic(op) else "none"
    if isinstance(op, Mul | Flatten):
        return "product" if isinstance(op, Mul) else "same"
    return "layer" if is_dense(op) else "sum"


def alone(op: Op, squares: bool) -> int:
    """Levels between two layers, where sums before and after it cost nothing."""
    how = merge(op, squares)
    if isinstance(op, Polynomial) and how == "none":
        return op.levels
    return int(how in ("layer", "square", "product"))


def plan(program: Program, squares: bool) -> Plan:
    """The steps and the levels that each spends. Raises TraceError for an op outside the runtime."""
    for op in program.ops:
        check(op)
    planned = Plan(program, squares)
    planned.start(Program.INPUT, program.input_shape, 0)
    for op in program.ops:
        planned.add(op)
    return planned


def _in_sums(program: Program, squares: bool) -> frozenset[str]:
    """The values of which a sum takes what is left of a square."""
    found = set[str]()
    for op in reversed(program.ops):
        whole = not (squares and is_quadratic(op) and op.name in found)
        if isinstance(op, Polynomial) and not is_linear(op) and whole:
            continue  # it reads the value itself
        found.update(op.inputs)
    return frozenset(found)
