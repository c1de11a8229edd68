"""The steps of one op by its rule, on wires as they usually are: for prices before any calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tightrope.errors import InputError, TraceError
from tightrope.program import HardSigmoid, HardSwish, MaxPool2d, Mul, Op, Polynomial, Program
from tightrope.runtimes.mpc.compiler import Compiler
from tightrope.runtimes.mpc.config import MPC
from tightrope.runtimes.mpc.rules import RULES
from tightrope.runtimes.mpc.steps import Step, Wire

TYPICAL_RANGE = 8.0  # of an activation, where no calibration says more
RULED = (HardSigmoid, HardSwish, MaxPool2d, Mul, Polynomial)


def by_rule(op: Op, config: MPC, sources: Sequence[Wire] | None = None) -> tuple[Step, ...]:
    """None for an op that the runtime refuses. Without `sources`: on wires of a shape that gives the op's,
    truncated ones, but hard-sigmoid and hard-swish on a layer's result."""
    values = [Program.INPUT, op.name]
    if isinstance(op, Polynomial):
        values += [f"{op.name}:stage{k}" for k in range(len(op.stages))]
    ranges: Mapping[str, float] = dict.fromkeys(values, TYPICAL_RANGE)
    compiler = Compiler(Program((), (1,), Program.INPUT, ranges=ranges), config)
    wires = list(sources) if sources is not None else [usual_wire(op, s, config) for s in _shapes(op)]
    try:
        RULES[type(op)](compiler, op, wires)
    except (InputError, TraceError):
        return ()
    return () if compiler.refused else tuple(compiler.steps)


def usual_wire(op: Op, shape: tuple[int, ...], config: MPC, *, static: bool | None = None) -> Wire:
    """What `op` reads, of this shape."""
    layer = isinstance(op, HardSigmoid | HardSwish)
    scale = config.fraction_bits + (config.weight_bits if layer else 0)
    limit = TYPICAL_RANGE * config.margin
    static = layer if static is None else static
    return Wire(Program.INPUT, shape, scale, 1.0, limit, static, config.ring_bits)


def _shapes(op: Op) -> list[tuple[int, ...]]:
    if isinstance(op, MaxPool2d):
        axes = zip(op.shape[1:], op.kernel, op.stride, op.padding, op.dilation, strict=True)
        sides = [max(1, n * s + d * (k - 1) - 2 * p) for n, k, s, p, d in axes]
        return [(op.shape[0], sides[0], sides[1])]
    return [op.shape] * len(op.inputs)
