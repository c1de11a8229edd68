"""compile_program(program, config) -> Schedule: the steps that all three parties and the cost model share.

It follows the public structure and the calibrated ranges only. A wire is truncated as late as possible: by
the ReLU that opens it anyway, else where a linear layer's result would not fit the ring.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tightrope.errors import InputError
from tightrope.program import (
    Add,
    AvgPool2d,
    Concat,
    Conv2d,
    Flatten,
    GlobalAvgPool,
    Linear,
    Op,
    Pad,
    Program,
    Relu,
    Upsample,
)
from tightrope.runtimes.mpc.config import MPC, RING_BITS
from tightrope.runtimes.mpc.fixed import pool_divisor
from tightrope.runtimes.mpc.steps import Gate, Local, Multiply, Open, Reveal, Step, Truncate, Wire

HEADROOM_BITS = RING_BITS - 2  # truncation needs |z| < 2^62
SMALLEST_RANGE = 2.0**-10  # a value that calibration saw as all zero still gets some room
MASK = "mask of "
SHAPING = (Concat, Flatten, Pad, Upsample)  # no new elements: masks of the inputs make one of the result


@dataclass(frozen=True)
class Schedule:
    """`finished[i]`: the wires, and masks of wires as `MASK + name`, that no step after i reads."""

    steps: tuple[Step, ...]
    input: Wire
    output: Wire
    finished: tuple[tuple[str, ...], ...]


def compile_program(program: Program, config: MPC) -> Schedule:
    """The schedule of a calibrated program.

    Raises TraceError for an op that the runtime does not have, InputError where the program has no calibrated
    ranges or they do not fit the ring, each naming the op.
    """
    for op in program.ops:
        config.check(op)
    return _Compiler(program, config).run()


class _Compiler:
    def __init__(self, program: Program, config: MPC) -> None:
        self.program = program
        self.config = config
        self.steps: list[Step] = []
        self.wires: dict[str, Wire] = {}
        self.made_by: dict[str, Local] = {}
        self.narrowed: dict[str, Wire] = {}
        self.masked: set[str] = set()

    def run(self) -> Schedule:
        name = Program.INPUT
        limit = self.limit(name, name)
        source = Wire(name, self.program.input_shape, self.config.fraction_bits, 1.0, limit, static=False)
        self.check(source, name)
        self.wires[name] = source
        for op in self.program.ops:
            self.wires[op.name] = COMPILE[type(op)](self, op, [self.wires[i] for i in op.inputs])
        output = self.wires[self.program.output]
        self.emit(Reveal, self.program.output, wire=output)
        steps = _live(self.steps)
        return Schedule(steps, source, output, _finished(steps))

    def emit(self, kind: type[Step], op: str, **fields: Any) -> None:
        step = kind(index=len(self.steps), op=op, **fields)
        self.steps.append(step)
        if isinstance(step, Local) and not step.masks:
            self.made_by[step.output.name] = step

    def limit(self, value: str, op: str) -> float:
        """How large a value may become: its calibrated range times the margin."""
        seen = self.program.ranges.get(value)
        if seen is None:
            raise InputError(
                "the program has no calibrated range for this value, so the ring cannot be checked",
                where=op,
                fix="program = tightrope.runtimes.plain.ranges(program, calibration batches)",
            )
        return self.config.margin * max(seen, SMALLEST_RANGE)

    def fits(self, wire: Wire) -> bool:
        return wire.ring_limit < 2.0**HEADROOM_BITS

    def check(self, wire: Wire, op: str) -> None:
        if not self.fits(wire):
            spare = math.log2(wire.ring_limit) - HEADROOM_BITS
            raise InputError(
                "values of this op could overflow the ring",
                where=op,
                got=f"{wire.limit:.4g} (range times margin) at {wire.scale} fractional bits",
                allowed=f"below 2^{HEADROOM_BITS} in all",
                fix=f"MPC(weight_bits={self.config.weight_bits - math.floor(spare) - 1}) or a smaller margin",
            )

    def local(
        self, op: Op, inputs: list[Wire], name: str, factors: tuple[int, ...], scale: int, mu: float
    ) -> Wire:
        """Emit a public linear map; `scale` and `mu` are those of the result."""
        static = all(w.static for w in inputs)
        wire = Wire(name, op.shape, scale, mu, self.limit(op.name, op.name), static)
        self.emit(Local, op.name, kernel=op, inputs=tuple(inputs), output=wire, factors=factors)
        return wire

    def narrow(self, wire: Wire, op: str) -> Wire:
        """The wire with `fraction_bits` fractional bits: truncated once, for all who ask."""
        if wire.scale == self.config.fraction_bits:
            return wire
        if wire.name not in self.narrowed:
            self.narrowed[wire.name] = self._narrow(wire, op)
        return self.narrowed[wire.name]

    def _narrow(self, wire: Wire, op: str) -> Wire:
        name = f"{wire.name}:narrow"
        step = self.made_by.get(wire.name)
        # Parts of a concatenation are truncated one by one: DenseNet reads the same parts again and again.
        if step is not None and isinstance(step.kernel, SHAPING) and len({w.mu for w in step.inputs}) == 1:
            parts = [self.narrow(w, op) for w in step.inputs]
            static = all(part.static for part in parts)
            result = replace(wire, name=name, scale=self.config.fraction_bits, static=static)
            factors = (1,) * len(parts)
            self.emit(Local, op, kernel=step.kernel, inputs=tuple(parts), output=result, factors=factors)
            return result
        self.check(wire, op)
        result = replace(wire, name=name, scale=self.config.fraction_bits, static=False)
        self.emit(Truncate, op, input=wire, output=result, shift=wire.scale - result.scale)
        return result

    def known(self, wire: Wire) -> bool:
        """Whether a mask of the wire follows from masks that exist."""
        step = self.made_by.get(wire.name)
        return wire.name in self.masked or (step is not None and all(self.known(w) for w in step.inputs))

    def open(self, wire: Wire, op: str) -> None:
        """Make sure that the server holds X0 - A of the wire."""
        if wire.name in self.masked:
            return
        step = self.made_by.get(wire.name)
        if step is not None and (isinstance(step.kernel, SHAPING) or self.known(wire)):
            for part in step.inputs:
                self.open(part, op)
            self.emit(
                Local,
                op,
                kernel=step.kernel,
                inputs=step.inputs,
                output=wire,
                factors=step.factors,
                masks=True,
            )
        else:
            self.emit(Open, op, wire=wire)
        self.masked.add(wire.name)


def _normal(mu: float) -> tuple[int, float]:
    """mu = m * 2^-k with 1/2 < m <= 1: (k, m), so that only what is no power of two stays in mu."""
    m, exponent = math.frexp(mu)
    return (1 - exponent, 1.0) if m == 0.5 else (-exponent, m)


def _multiply(c: _Compiler, op: Any, inputs: list[Wire]) -> Wire:
    def result(source: Wire) -> Wire:
        scale = source.scale + c.config.weight_bits
        return Wire(op.name, op.shape, scale, 1.0, c.limit(op.name, op.name), static=True)

    source = inputs[0]
    if not c.fits(result(source)):
        source = c.narrow(source, op.name)
    output = result(source)
    c.check(output, op.name)
    c.open(source, op.name)
    bits = c.config.weight_bits
    c.emit(Multiply, op.name, kernel=op, input=source, output=output, weight_bits=bits)
    return output


def _aligned(c: _Compiler, op: Op, inputs: list[Wire]) -> Wire:
    """Add and concat: bring the inputs to one scale and mu by integer factors, exact where the mus agree."""
    wire, factors = _common(c, inputs)
    limit = c.limit(op.name, op.name)
    if not c.fits(replace(wire, limit=limit)):
        inputs = [c.narrow(w, op.name) for w in inputs]
        wire, factors = _common(c, inputs)
    result = c.local(op, inputs, op.name, factors, wire.scale, wire.mu)
    c.check(result, op.name)
    return result


def _common(c: _Compiler, inputs: list[Wire]) -> tuple[Wire, tuple[int, ...]]:
    """A wire with the common scale and mu, and each input's factor; inexact ones keep fraction_bits bits."""
    widest = max(inputs, key=lambda w: w.scale)
    scale = max(w.scale + (0 if w.mu == widest.mu else c.config.fraction_bits) for w in inputs)
    scale = max(scale, widest.scale)
    factors = tuple(round(2 ** (scale - w.scale) * (w.mu / widest.mu)) for w in inputs)
    return replace(widest, scale=scale), factors


def _pool(c: _Compiler, op: Any, inputs: list[Wire]) -> Wire:
    """Window sums; the division goes into scale and mu."""
    source = inputs[0]
    more, mu = _normal(source.mu / pool_divisor(op, source.shape))
    if not c.fits(replace(source, scale=source.scale + more, mu=mu, limit=c.limit(op.name, op.name))):
        source = c.narrow(source, op.name)
    result = c.local(op, [source], op.name, (1,), source.scale + more, mu)
    c.check(result, op.name)
    return result


def _shape_only(c: _Compiler, op: Op, inputs: list[Wire]) -> Wire:
    return c.local(op, inputs, op.name, (1,), inputs[0].scale, inputs[0].mu)


def _relu(c: _Compiler, op: Any, inputs: list[Wire]) -> Wire:
    source = inputs[0]
    if not op.drelus:
        return _shape_only(c, op, inputs)
    c.check(source, op.name)
    f = c.config.fraction_bits
    shift = source.scale - f
    sums = replace(source, limit=c.limit(f"{op.name}:tiles", op.name))
    c.check(sums, op.name)
    # floor, a possible carry and the strict comparison cost up to two units beyond the limit
    bits = 1 + math.ceil(math.log2(sums.ring_limit * 2.0**-shift + 2))
    upper = 0 if op.upper is None else round(op.upper / source.mu * 2**source.scale)
    output = Wire(op.name, op.shape, f, source.mu, c.limit(op.name, op.name), static=False)
    c.emit(
        Gate,
        op.name,
        kernel=op,
        input=source,
        output=output,
        shift=shift,
        bits=max(bits, 2),
        thresholds=(0,) if op.upper is None else (0, upper),
        upper=0 if op.upper is None else round(op.upper / source.mu * 2**f),
    )
    return output


COMPILE: dict[type[Op], Callable[[_Compiler, Any, list[Wire]], Wire]] = {
    **dict.fromkeys((Conv2d, Linear), _multiply),
    **dict.fromkeys((Add, Concat), _aligned),
    **dict.fromkeys((AvgPool2d, GlobalAvgPool), _pool),
    **dict.fromkeys((Flatten, Pad, Upsample), _shape_only),
    Relu: _relu,
}


def _reads(step: Step) -> list[str]:
    if isinstance(step, Local):
        return [MASK + w.name if step.masks else w.name for w in step.inputs]
    if isinstance(step, Open | Reveal):
        return [step.wire.name]
    if isinstance(step, Multiply):
        return [MASK + step.input.name]
    return [step.input.name] if isinstance(step, Truncate | Gate) else []


def _live(steps: list[Step]) -> tuple[Step, ...]:
    """Without the local maps that nobody reads (of wires where only the mask is used, or the reverse)."""
    read: set[str] = set()
    kept: list[Step] = []
    for step in reversed(steps):
        if isinstance(step, Local):
            made = MASK + step.output.name if step.masks else step.output.name
            if made not in read:
                continue
        read.update(_reads(step))
        kept.append(step)
    return tuple(replace(step, index=i) for i, step in enumerate(reversed(kept)))


def _finished(steps: tuple[Step, ...]) -> tuple[tuple[str, ...], ...]:
    last_use = {name: step.index for step in steps for name in _reads(step)}
    finished: list[list[str]] = [[] for _ in steps]
    for name, index in last_use.items():
        finished[index].append(name)
    return tuple(tuple(names) for names in finished)
