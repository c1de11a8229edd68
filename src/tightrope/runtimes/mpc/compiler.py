"""What the rules of all ops share: wires with their scales and limits, truncations, openings, gates.

A wire is truncated as late as possible: by the gate that opens it anyway, else where the result of a product
would not fit the ring.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from tightrope.errors import InputError
from tightrope.program import Concat, Flatten, Op, Pad, Program, Relu, Upsample
from tightrope.runtimes.mpc.config import MPC
from tightrope.runtimes.mpc.steps import Gate, Local, Open, Piece, Step, Truncate, Wire

SMALLEST_RANGE = 2.0**-10  # a value that calibration saw as all zero still gets some room
SHAPING = (Concat, Flatten, Pad, Upsample)  # as many values as in the inputs, or fewer: open those instead


class Compiler:
    """The steps and wires so far. `wires` maps a value of the Program to its wire."""

    def __init__(self, program: Program, config: MPC) -> None:
        self.program = program
        self.config = config
        self.steps: list[Step] = []
        name = Program.INPUT
        self.headroom_bits = config.ring_bits - 2  # truncation needs |z| < 2^62 in the ring Z_2^64
        self.input = Wire(
            name,
            program.input_shape,
            config.fraction_bits,
            1.0,
            self.limit(name, name),
            static=False,
            ring_bits=config.ring_bits,
        )
        self.check(self.input, name, "fraction_bits")
        self.wires: dict[str, Wire] = {name: self.input}
        self._made_by: dict[str, Local] = {}
        self._narrowed: dict[str, Wire] = {}
        self._masked: set[str] = set()

    def emit(self, kind: type[Step], op: str, **fields: Any) -> None:
        step = kind(index=len(self.steps), op=op, **fields)
        self.steps.append(step)
        if isinstance(step, Local) and not step.masks:
            self._made_by[step.output.name] = step

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

    def result(self, op: Op, scale: int, mu: float, *, static: bool = False) -> Wire:
        """The wire of an op's result."""
        limit = self.limit(op.name, op.name)
        return Wire(op.name, op.shape, scale, mu, limit, static, self.config.ring_bits)

    def fits(self, wire: Wire) -> bool:
        return wire.ring_limit < 2.0**self.headroom_bits

    def check(self, wire: Wire, op: str, setting: str = "weight_bits", share: int = 1) -> None:
        """Raise InputError if values of the wire could overflow. Its scale holds `setting` `share` times."""
        if not self.fits(wire):
            spare = math.floor(math.log2(wire.ring_limit)) - self.headroom_bits + 1
            allowed = getattr(self.config, setting) - -(-spare // share)
            raise InputError(
                "values of this op could overflow the ring",
                where=op,
                got=f"{wire.limit:.4g} (range times margin) at {wire.scale} fractional bits",
                allowed=f"below 2^{self.headroom_bits} in all",
                fix=f"MPC({setting}={allowed}) or a smaller margin",
            )

    def local(
        self,
        op: str,
        kernel: Op,
        inputs: list[Wire],
        output: Wire,
        factors: tuple[int, ...] | None = None,
        constant: tuple[int, ...] = (),
    ) -> Wire:
        """Emit a public affine map to `output`, which is static if all inputs are."""
        output = replace(output, static=all(w.static for w in inputs))
        self.emit(
            Local,
            op,
            kernel=kernel,
            inputs=tuple(inputs),
            output=output,
            factors=factors or (1,) * len(inputs),
            constant=constant,
        )
        return output

    def gate(
        self,
        op: str,
        kernel: Relu,
        source: Wire,
        output: Wire,
        *,
        pieces: tuple[Piece, ...] = (Piece(),),
        limit: float | None = None,
        truncate: bool = True,
    ) -> Wire:
        """Emit a gate. `limit`: of the compared sums, if it is not that of the source.

        With `truncate` the pieces read the source at `fraction_bits`, else as it is; scale and mu of `output`
        must agree with that. The comparison is at `fraction_bits`, less `trim_bits`, either way.
        """
        self.check(source, op)
        excess = source.scale - self.config.fraction_bits
        trim = excess + self.config.trim_bits
        sums = source if limit is None else replace(source, limit=limit)
        self.check(sums, op)
        # floor, a possible carry and the strict comparison cost up to two units beyond the limit
        bits = 1 + math.ceil(math.log2(sums.ring_limit * 2.0**-trim + 2))
        self.emit(
            Gate,
            op,
            kernel=kernel,
            input=source,
            output=output,
            shift=excess if truncate else 0,
            trim=trim,
            bits=bits,
            pieces=pieces,
        )
        return output

    def comparable(self, wire: Wire, limit: float, op: str) -> Wire:
        """The wire, truncated if sums of up to `limit` do not fit the ring beside its bits."""
        fits = self.fits(wire) and self.fits(replace(wire, limit=limit))
        return wire if fits else self.narrow(wire, op)

    def narrow(self, wire: Wire, op: str) -> Wire:
        """The wire with `fraction_bits` fractional bits: truncated once, for all who ask."""
        if wire.scale == self.config.fraction_bits:
            return wire
        if wire.name not in self._narrowed:
            self._narrowed[wire.name] = self._narrow(wire, op)
        return self._narrowed[wire.name]

    def _narrow(self, wire: Wire, op: str) -> Wire:
        result = replace(wire, name=f"{wire.name}:narrow", scale=self.config.fraction_bits, static=False)
        step = self._made_by.get(wire.name)
        # Parts of a concatenation are truncated one by one: DenseNet reads the same parts again and again.
        if step is not None and _rearranges(step):
            return self.local(op, step.kernel, [self.narrow(w, op) for w in step.inputs], result)
        self.check(wire, op)
        self.emit(Truncate, op, input=wire, output=result, shift=wire.scale - result.scale)
        return result

    def _known(self, wire: Wire) -> bool:
        """Whether a mask of the wire follows from masks that exist."""
        step = self._made_by.get(wire.name)
        return wire.name in self._masked or (step is not None and all(self._known(w) for w in step.inputs))

    def open(self, wire: Wire, op: str) -> None:
        """Make sure that the server holds X0 - A of the wire."""
        if wire.name in self._masked:
            return
        step = self._made_by.get(wire.name)
        if step is not None and (isinstance(step.kernel, SHAPING) or self._known(wire)):
            for part in step.inputs:
                self.open(part, op)
            fields = {"factors": step.factors, "constant": step.constant, "masks": True}
            self.emit(Local, op, kernel=step.kernel, inputs=step.inputs, output=wire, **fields)
        else:
            self.emit(Open, op, wire=wire)
        self._masked.add(wire.name)


def _rearranges(step: Local) -> bool:
    """Whether the values of the result are those of the inputs, of one mu, or zero."""
    kernel = step.kernel
    copies = kernel.mode == "nearest" if isinstance(kernel, Upsample) else isinstance(kernel, SHAPING)
    return copies and not step.constant and len({w.mu for w in step.inputs}) == 1


def normal(mu: float) -> tuple[int, float]:
    """mu = m * 2^-k with 1/2 < m <= 1: (k, m), so that only what is no power of two stays in mu."""
    m, exponent = math.frexp(mu)
    return (1 - exponent, 1.0) if m == 0.5 else (-exponent, m)
