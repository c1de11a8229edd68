"""The rule of a polynomial op: powers by products of secrets, then one secret factor each.

A stage works on z = x / 2^k, where 2^k is the power of two above the calibrated range of x, truncated to
`fraction_bits`: whatever the scale of the network, |z| <= 1 has all the bits. Sums of terms wrap harmlessly;
what must fit the ring is each power within the margin, and the result. High powers have no room for a wide
margin, and no use for it: where x is 4 times its range, x^13 is 2^26 times as large, and the result beyond
any margin of its own. So a stage takes of the margin what its highest power has room for, `LEAST_MARGIN` or
more, and not less than the `input_margin` of whoever compiles.

The coefficients of powers grow with the degree, and what truncation leaves of z^n counts so many times: of
the minimax composites, 7,7,13 is off by 2^-11 of its range, and 15,15,27 by more than its result.
"""

from __future__ import annotations

import math
from dataclasses import replace

from tightrope.errors import InputError, TraceError
from tightrope.program import Add, Polynomial
from tightrope.runtimes.mpc.compiler import Compiler, normal
from tightrope.runtimes.mpc.steps import Multiply, Product, Truncate, Wire
from tightrope.runtimes.mpc.terms import Term

MAX_DEGREE = 13  # of a stage
LEAST_MARGIN = 1.25  # of the values that a power is taken of


def check_degrees(op: Polynomial) -> None:
    """Raise TraceError for a stage whose powers have too few digits."""
    if max(op.stages) > MAX_DEGREE:
        raise TraceError(
            "the mpc runtime has not the digits for powers of this degree",
            where=op.name,
            got=f"stages of degree {', '.join(map(str, op.stages))}",
            allowed=f"degrees up to {MAX_DEGREE}",
            fix="a composite of lower degrees, or --runtime ckks",
        )


def polynomial(c: Compiler, op: Polynomial, inputs: list[Wire]) -> Wire:
    """Raises InputError where a power of the value in its least margin, or the result, does not fit the ring,
    and what `check_degrees` does.
    """
    check_degrees(op)
    gate, unit = _unit(c, op, inputs[0], 0)
    z, wire = gate, inputs[0]
    for stage, degree in enumerate(op.stages):
        if stage:
            z, unit = _unit(c, op, wire, stage)
        last = stage == len(op.stages) - 1 and not op.gated
        name = op.name if last else f"{op.name}:stage{stage}"
        wire = _stage(c, op, z, unit, stage, degree, name)
    if not op.gated:
        return wire
    unit = _unit_bits(c, inputs[0])
    right = _short(c, wire, op.name)
    more, mu = normal(gate.mu * right.mu)
    result = c.result(op, gate.scale + right.scale + more - unit, mu)
    c.check(result, op.name, "fraction_bits", 2)
    c.emit(Product, op.name, left=gate, right=right, output=result)
    return result


def _unit_bits(c: Compiler, wire: Wire) -> int:
    """The k with range <= 2^k, margin left out."""
    return math.ceil(math.log2(wire.limit / c.config.margin))


def _unit(c: Compiler, op: Polynomial, wire: Wire, stage: int) -> tuple[Wire, int]:
    """(z, k): the same ring elements read as x / 2^k, truncated to at most `fraction_bits`."""
    k = _unit_bits(c, wire)
    z = replace(wire, scale=wire.scale + k, limit=wire.limit / 2.0**k)
    shift = z.scale - c.config.fraction_bits
    if shift <= 0:
        return z, k
    c.check(z, op.name)
    name = f"{op.name}:unit{stage}"
    result = replace(z, name=name, scale=c.config.fraction_bits, static=False, ring_bits=c.ring(name))
    c.emit(Truncate, op.name, input=z, output=result, shift=shift)
    return result, k


def _stage(c: Compiler, op: Polynomial, z: Wire, unit: int, stage: int, degree: int, name: str) -> Wire:
    """The wire `name`: the sum of the terms of one stage."""
    powers = {1: _within(c, op, z, degree)}
    for n in range(2, degree + 1):
        left, right = (_short(c, powers[part], op.name) for part in (n - n // 2, n // 2))
        powers[n] = _product(c, op, left, right, f"{op.name}:power{stage}.{n}")
    limit = c.limit(name, op.name)
    total = _term(c, op, powers[1], unit, stage, 1, name if degree == 1 else f"{op.name}:term{stage}.1")
    for n in range(2, degree + 1):
        term = _term(c, op, _short(c, powers[n], op.name), unit, stage, n, f"{op.name}:term{stage}.{n}")
        scale = max(total.scale, term.scale)
        factors = (2 ** (scale - total.scale), 2 ** (scale - term.scale))
        summed = name if n == degree else f"{op.name}:sum{stage}.{n}"
        kernel = Add(name=summed, inputs=(total.name, term.name), shape=op.shape)
        total = c.local(op.name, kernel, [total, term], replace(total, name=summed, scale=scale), factors)
    total = replace(total, limit=limit)
    c.check(total, op.name)
    return total


def _within(c: Compiler, op: Polynomial, z: Wire, degree: int) -> Wire:
    """z with so much of its margin as z^degree has room for, a product of two powers of `fraction_bits`."""
    f = c.config.fraction_bits
    rounded = 0 if z.mu == 1 else 2  # bits by which the multipliers of both powers may come short of 1
    inside = z.limit / c.config.margin
    least = min(c.config.margin, max(c.config.input_margin, LEAST_MARGIN))  # of what a party may let in
    room = 2.0 ** ((c.headroom_bits - rounded - 2 * f) / degree) * (1 - 1e-9)
    if degree > 1 and room < least * inside:
        spare = c.headroom_bits - rounded - degree * math.log2(least * inside / (1 - 1e-9))
        bits = math.floor(spare / 2)
        raise InputError(
            "powers of this op could overflow the ring",
            where=op.name,
            got=f"degree {degree} at {f} fractional bits, of values up to {least:g} times their range",
            allowed=f"{bits} fractional bits, or a lower degree",
            fix=f"MPC(fraction_bits={bits}), or in a search --set polynomials='degree *'",
        )
    return replace(z, limit=min(z.limit, room)) if degree > 1 else z


def _short(c: Compiler, wire: Wire, op: str) -> Wire:
    return c.narrow(wire, op) if wire.scale > c.config.fraction_bits else wire


def _product(c: Compiler, op: Polynomial, left: Wire, right: Wire, name: str) -> Wire:
    more, mu = normal(left.mu * right.mu)
    limit = left.limit * right.limit
    result = Wire(name, op.shape, left.scale + right.scale + more, mu, limit, False, c.ring(name))
    c.check(result, op.name, "fraction_bits", 2)
    c.emit(Product, op.name, left=left, right=right, output=result)
    return result


def _term(c: Compiler, op: Polynomial, source: Wire, unit: int, stage: int, power: int, name: str) -> Wire:
    """The secret c_power times source = z^power; sums of these may wrap, so only the last one is checked."""
    kernel = Term(
        name=name,
        inputs=(source.name,),
        shape=op.shape,
        polynomial=op.name,
        stage=stage,
        power=power,
        unit=unit,
    )
    scale = source.scale + c.config.weight_bits
    result = Wire(name, op.shape, scale, 1.0, math.inf, True, c.ring(name))
    c.open(source, op.name)
    fields = {"kernel": kernel, "input": source, "output": result, "weight_bits": c.config.weight_bits}
    c.emit(Multiply, op.name, **fields)
    return result
