"""Translate a Program into a Circuit: merge linear ops, fold scales, lay values out, count levels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.polynomial import chebyshev
from numpy.typing import NDArray

from tightrope.errors import InputError, TraceError
from tightrope.program import Polynomial, Program
from tightrope.runtimes.ckks import bootstrapping
from tightrope.runtimes.ckks.circuit import Affine, AnyStep, Circuit, Composite, Refresh, Square, Stage, Value
from tightrope.runtimes.ckks.diagonals import Block, blocks, chunks, folds
from tightrope.runtimes.ckks.layout import Canvas
from tightrope.runtimes.ckks.parameters import Parameters
from tightrope.runtimes.ckks.placement import place
from tightrope.runtimes.ckks.planning import SMALLEST_SCALE, Plan, Planned, Squaring, base, plan
from tightrope.solve.levels import Action, Node

MAX_CHANNEL_DEGREE = 3  # where channels have coefficients of their own
Nodes = Callable[[int], Sequence[Node]]  # of the steps, by the slots of a ciphertext
Choose = Callable[[int, Nodes], Parameters]  # for so many levels, or with bootstraps on these nodes


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
        name: canvas.layout(base(name), real[0], parameters.slots) for name, real in planned.real.items()
    }
    slots = max(bootstrapping.LEAST_SLOTS, *(layouts[name].period for name in booted)) if booted else 0
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


def _nodes(planned: Plan, canvas: Canvas, slots: int) -> tuple[Node, ...]:
    """The steps as the placement of bootstraps sees them."""
    made = []
    for step in planned.steps:
        sources = tuple("" if name == Program.INPUT else name for name in step.sources)
        layout = canvas.layout(base(step.name), planned.real[step.name][0], slots)
        made.append(Node(step.name, sources, (Action("", step.spends),), layout.ciphertexts))
    return tuple(made)


def _step(step: Planned, program: Program, values: dict[str, Value]) -> AnyStep:
    level = min(values[name].level for name in step.sources)
    if isinstance(step.what, Squaring):
        return Square(
            name=step.name, sources=step.sources, ops=step.ops, level=level,
            calibrated=step.what.calibrated,
        )  # fmt: skip
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
