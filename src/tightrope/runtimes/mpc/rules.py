"""How each op of a Program becomes steps: one rule per kind, (compiler, op, input wires) -> its wire."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tightrope.errors import InputError, TraceError
from tightrope.program import (
    Add,
    AvgPool2d,
    Concat,
    Conv2d,
    Flatten,
    GlobalAvgPool,
    HardSigmoid,
    HardSwish,
    Linear,
    MaxPool2d,
    Mul,
    Op,
    Pad,
    Polynomial,
    Relu,
    Upsample,
)
from tightrope.runtimes.mpc.compiler import Compiler, normal
from tightrope.runtimes.mpc.fixed import bilinear_divisor, pool_divisor
from tightrope.runtimes.mpc.polynomial import polynomial
from tightrope.runtimes.mpc.steps import Multiply, Piece, Product, RevealLabel, Wire
from tightrope.runtimes.mpc.tournament import (
    Axis,
    Difference,
    Level,
    Stage,
    Winners,
    max_pool_stages,
    window_axes,
)


def _multiply(c: Compiler, op: Any, inputs: list[Wire]) -> Wire:
    bits = c.config.weight_bits

    def result(source: Wire) -> Wire:
        return c.result(op, source.scale + bits, 1.0, static=True)

    source = inputs[0]
    if not c.fits(result(source)):
        source = c.narrow(source, op.name)
    output = result(source)
    c.check(output, op.name)
    c.open(source, op.name)
    c.emit(Multiply, op.name, kernel=op, input=source, output=output, weight_bits=bits)
    return output


def _aligned(c: Compiler, op: Op, inputs: list[Wire]) -> Wire:
    """Add and concat: bring the inputs to one scale and mu by integer factors, exact where the mus agree."""
    wire, factors = _common(c, inputs)
    if not c.fits(c.result(op, wire.scale, wire.mu)):
        inputs = [c.narrow(w, op.name) for w in inputs]
        wire, factors = _common(c, inputs)
    result = c.result(op, wire.scale, wire.mu)
    c.check(result, op.name)
    return c.local(op.name, op, inputs, result, factors)


def _common(c: Compiler, inputs: list[Wire]) -> tuple[Wire, tuple[int, ...]]:
    """A wire with the common scale and mu, and each input's factor; inexact ones keep fraction_bits bits."""
    widest = max(inputs, key=lambda w: w.scale)
    scale = max(w.scale + (0 if w.mu == widest.mu else c.config.fraction_bits) for w in inputs)
    scale = max(scale, widest.scale)
    factors = tuple(round(2 ** (scale - w.scale) * (w.mu / widest.mu)) for w in inputs)
    return replace(widest, scale=scale), factors


def _pool(c: Compiler, op: Any, inputs: list[Wire]) -> Wire:
    return _divided(c, op, inputs[0], pool_divisor(op, inputs[0].shape))


def _divided(c: Compiler, op: Op, source: Wire, divisor: int) -> Wire:
    """An integer map over `divisor`: the division goes into scale and mu."""
    more, mu = normal(source.mu / divisor)
    if not c.fits(c.result(op, source.scale + more, mu)):
        source = c.narrow(source, op.name)
    result = c.result(op, source.scale + more, mu)
    c.check(result, op.name)
    return c.local(op.name, op, [source], result)


def _upsample(c: Compiler, op: Any, inputs: list[Wire]) -> Wire:
    return _divided(c, op, inputs[0], bilinear_divisor(op.factor) if op.mode == "bilinear" else 1)


def _shape_only(c: Compiler, op: Op, inputs: list[Wire]) -> Wire:
    return c.local(op.name, op, inputs, c.result(op, inputs[0].scale, inputs[0].mu))


def _relu(c: Compiler, op: Any, inputs: list[Wire]) -> Wire:
    if not op.drelus:
        return _shape_only(c, op, inputs)
    limit, f = c.limit(f"{op.name}:tiles", op.name), c.config.fraction_bits
    source = c.comparable(inputs[0], limit, op.name, widen=True)
    pieces: tuple[Piece, ...] = (Piece(),)
    if op.upper is not None:
        clip = op.upper / source.mu
        pieces += (Piece(round(clip * 2**source.scale), linear=-1, constant=round(clip * 2**f)),)
    return c.gate(op.name, op, source, c.result(op, f, source.mu), pieces=pieces, limit=limit)


def _hard_sigmoid(c: Compiler, op: Any, inputs: list[Wire]) -> Wire:
    """[x > -3] * (x + 3) / 6 + [x > 3] * (3 - x) / 6."""
    limit, f = inputs[0].limit + 3, c.config.fraction_bits
    source = c.comparable(inputs[0], limit, op.name, widen=True)
    more, mu = normal(source.mu / 6)
    edge, three = (round(3 / source.mu * 2**scale) for scale in (source.scale, f))
    pieces = (Piece(-edge, constant=three), Piece(edge, linear=-1, constant=three))
    return c.gate(op.name, _every(op), source, c.result(op, f + more, mu), pieces=pieces, limit=limit)


def _hard_swish(c: Compiler, op: Any, inputs: list[Wire]) -> Wire:
    """[x > -3] * (x^2 + 3x) / 6 + [x > 3] * (3x - x^2) / 6, with twice the fractional bits."""
    limit, f = inputs[0].limit + 3, c.config.fraction_bits
    source = c.comparable(inputs[0], limit, op.name, widen=True)
    more, mu = normal(source.mu**2 / 6)
    edge, three = (round(3 / source.mu * 2**scale) for scale in (source.scale, f))
    pieces = (Piece(-edge, square=1, linear=three), Piece(edge, square=-1, linear=three))
    result = c.result(op, 2 * f + more, mu)
    c.check(result, op.name, "fraction_bits", 2)
    return c.gate(op.name, _every(op), source, result, pieces=pieces, limit=limit)


def _every(op: Op) -> Relu:
    """The geometry of a gate with one comparison per element."""
    return Relu(name=op.name, inputs=op.inputs, shape=op.shape, patches=((1, 1),) * op.shape[0])


def _product(c: Compiler, op: Any, inputs: list[Wire]) -> Wire:
    def result() -> Wire:
        more, mu = normal(inputs[0].mu * inputs[1].mu)
        return c.result(op, inputs[0].scale + inputs[1].scale + more, mu)

    if not c.fits(result()):
        inputs = [c.narrow(wire, op.name) for wire in inputs]
    output = result()
    c.check(output, op.name, "fraction_bits", 2)
    c.emit(Product, op.name, left=inputs[0], right=inputs[1], output=output)
    return output


def _max_pool(c: Compiler, op: Any, inputs: list[Wire]) -> Wire:
    source = inputs[0]
    size = (source.shape[1], source.shape[2])
    if any(not run for axis in window_axes(op, size) for run in axis.runs):
        raise TraceError("a window of a max-pool lies outside of its input", where=op.name, got=op)
    source = c.comparable(source, 2 * source.limit, op.name)
    return _play(c, op.name, max_pool_stages(op, size), source, c.result(op, source.scale, source.mu))


def _play(c: Compiler, op: str, stages: Sequence[Stage], wire: Wire, result: Wire) -> Wire:
    """A tournament, by max(a, b) = b + relu(a - b); nothing is truncated."""
    moving = [s for s in stages if s[1].later or s[1].take != tuple(range(wire.shape[s[0] - 1]))]
    moving = moving or list(stages[:1])
    for k, (axis, level) in enumerate(moving):
        last = k == len(moving) - 1
        output = result if last else _resized(wire, axis, len(level.take), f"{op}:{k}")
        wire = _level(c, op, axis, level, wire, output)
    return wire


def _level(c: Compiler, op: str, axis: int, level: Level, wire: Wire, output: Wire) -> Wire:
    parts = [wire]
    if level.later:
        size, name = len(level.later), output.name
        difference = replace(_resized(wire, axis, size, f"{name}:difference"), limit=2 * wire.limit)
        kernel = Difference(
            name=difference.name,
            inputs=(wire.name,),
            shape=difference.shape,
            axis=axis,
            later=level.later,
            earlier=level.earlier,
        )
        difference = c.local(op, kernel, [wire], difference)
        lead = _resized(wire, axis, size, f"{name}:lead")
        parts.append(c.gate(op, _every(kernel), difference, lead, truncate=False))
    winners = Winners(
        name=output.name,
        inputs=tuple(w.name for w in parts),
        shape=output.shape,
        axis=axis,
        earlier=level.earlier,
        take=level.take,
    )
    return c.local(op, winners, parts, output)


def _resized(wire: Wire, axis: int, size: int, name: str) -> Wire:
    shape = (*wire.shape[: axis - 1], size, *wire.shape[axis:])
    return replace(wire, name=name, shape=shape, static=False)


def label(c: Compiler, op: str, wire: Wire) -> None:
    """Reveal the first place of the largest value only.

    The tournament is on z * 2^k + (classes - 1 - place), k bits for a place: the winner's low bits say where
    it was, and of equal values the first wins. Only those bits are revealed.
    """
    classes = wire.shape[0]
    if len(wire.shape) != 1 or classes < 2:
        raise InputError("only a vector has a label", where=op, got=wire.shape, allowed="two or more classes")
    bits = (classes - 1).bit_length()

    def packed() -> Wire:
        limit = wire.limit + wire.mu * 2.0**-wire.scale
        return replace(wire, name=f"{op}:places", scale=wire.scale + bits, limit=limit)

    if not c.fits(replace(packed(), limit=2 * wire.limit)):
        wire = c.narrow(wire, op)
    identity = Flatten(name=op, inputs=(wire.name,), shape=wire.shape)
    places = tuple(range(classes - 1, -1, -1))
    source = c.local(op, identity, [wire], packed(), (1 << bits,), places)
    stages = [(1, level) for level in Axis(classes, (tuple(range(classes)),)).levels()]
    winner = _play(c, op, stages, source, replace(source, name=f"{op}:label", shape=(1,)))
    c.emit(RevealLabel, op, wire=winner, classes=classes)


RULES: Mapping[type[Op], Callable[[Compiler, Any, list[Wire]], Wire]] = {
    **dict.fromkeys((Conv2d, Linear), _multiply),
    **dict.fromkeys((Add, Concat), _aligned),
    **dict.fromkeys((AvgPool2d, GlobalAvgPool), _pool),
    **dict.fromkeys((Flatten, Pad), _shape_only),
    Upsample: _upsample,
    Relu: _relu,
    HardSigmoid: _hard_sigmoid,
    HardSwish: _hard_swish,
    Mul: _product,
    MaxPool2d: _max_pool,
    Polynomial: polynomial,
}
