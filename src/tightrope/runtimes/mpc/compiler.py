"""What the rules of all ops share: wires with their scales and limits, truncations, openings, gates.

A wire is truncated as late as possible: by the gate that opens it anyway, else where the result of a product
would not fit the ring.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tightrope.errors import InputError
from tightrope.program import Concat, Flatten, Op, Pad, Program, Relu, Upsample
from tightrope.runtimes.mpc.config import FEWEST_BITS, MPC
from tightrope.runtimes.mpc.steps import (
    Gate,
    Local,
    Multiply,
    Open,
    Piece,
    Product,
    Reveal,
    RevealLabel,
    Step,
    Truncate,
    Wire,
)

SMALLEST_RANGE = 2.0**-10  # a value that calibration saw as all zero still gets some room
WIDER: Mapping[int, tuple[int, ...]] = {32: (40, 48)}  # rings for sums; from 64 bits on nothing is spared
Calculation = Local | Multiply | Product | Truncate | Gate  # of a wire from wires
SHAPING = (Concat, Flatten, Pad, Upsample)  # as many values as in the inputs, or fewer: open those instead
Rings = Mapping[str, int]  # of wires by name, where it is not that of the configuration


class Compiler:
    """The steps and wires so far. `wires` maps a value of the Program to its wire.

    rings: of the wires that have a larger ring than the configuration's, because sums of theirs are compared.
    `asked`: in which ring other wires would have to be, so that a gate need not truncate them first, or could
    compare their sums at all; `refused`: what is wrong if the latter are not granted.
    """

    def __init__(self, program: Program, config: MPC, rings: Rings | None = None) -> None:
        self.program = program
        self.config = config
        self.headroom_bits = headroom(config.ring_bits)
        self.steps: list[Step] = []
        self.asked: dict[str, int] = {}
        self._held: dict[str, int] = {}  # as `asked`, of the sums that do fit
        self.refused: list[InputError] = []
        self._stopgaps: set[str] = set()  # wires that a gate reads until it is granted what it asked for
        self._rings = rings or {}
        name = Program.INPUT
        self.input = Wire(
            name,
            program.input_shape,
            config.fraction_bits,
            1.0,
            self.limit(name, name),
            static=False,
            ring_bits=self.ring(name),
        )
        self.check(self.input, name, "fraction_bits")
        self.wires: dict[str, Wire] = {name: self.input}
        self._made_by: dict[str, Local] = {}
        self._narrowed: dict[str, Wire] = {}
        self._masked: set[str] = set()

    def emit(self, kind: type[Step], op: str, **fields: Any) -> None:
        step = kind(index=len(self.steps), op=op, **fields)
        assert may_follow(step), f"{step.op}: an input has a smaller ring than the result"
        self.steps.append(step)
        if isinstance(step, Local) and not step.masks:
            self._made_by[step.output.name] = step

    def ring(self, name: str) -> int:
        """Of the wire of this name."""
        return self._rings.get(name, self.config.ring_bits)

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
        return Wire(op.name, op.shape, scale, mu, limit, static, self.ring(op.name))

    def fits(self, wire: Wire, ring_bits: int | None = None) -> bool:
        """Whether its values have room in the configuration's ring, or in another."""
        return wire.ring_limit < 2.0 ** headroom(ring_bits or self.config.ring_bits)

    def check(
        self,
        wire: Wire,
        op: str,
        setting: str = "weight_bits",
        share: int = 1,
        ring_bits: int | None = None,
    ) -> None:
        """Raise InputError if values of the wire could overflow. Its scale holds `setting` `share` times."""
        if not self.fits(wire, ring_bits):
            headroom_bits = headroom(ring_bits or self.config.ring_bits)
            spare = math.floor(math.log2(wire.ring_limit)) - headroom_bits + 1
            raise InputError(
                "values of this op could overflow the ring",
                where=op,
                got=f"{wire.limit:.4g} (range times margin) at {wire.scale} fractional bits",
                allowed=f"below 2^{headroom_bits} in all",
                fix=f"{self._narrower(spare, setting, share)}a smaller margin",
            )

    def _narrower(self, spare: int, setting: str, share: int) -> str:
        """The setting that makes `spare` bits of room, or another that can, or a larger ring."""
        for name, part in ((setting, share), ("fraction_bits", 1)):
            allowed = getattr(self.config, name) - -(-spare // part)
            if allowed >= FEWEST_BITS:
                return f"MPC({name}={allowed}) or "
        return "MPC(ring_bits=64) or " if self.config.ring_bits < 64 else ""

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
        static = all(w.static for w in inputs)
        output = replace(output, static=static, ring_bits=self.ring(output.name))
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
        try:
            self.check(sums, op, ring_bits=source.ring_bits)
        except InputError as error:
            if source.name not in self._stopgaps:
                raise
            self.refused.append(error)
        output = replace(output, ring_bits=self.ring(output.name))
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

    def comparable(self, wire: Wire, limit: float, op: str, *, widen: bool = False) -> Wire:
        """The wire, truncated if sums of up to `limit` do not fit the ring beside its bits.

        With `widen` the sums may be in a larger ring than the configuration's, if the wire is; else it is
        asked for.
        """
        if self.fits(wire) and self._holds(wire, limit, widen):
            return wire
        short = self.narrow(wire, op)
        if widen and not self._holds(short, limit, widen):
            self._stopgaps.add(short.name)
        return short

    def _holds(self, wire: Wire, limit: float, widen: bool) -> bool:
        """Whether sums of up to `limit` fit the wire's ring; else a larger one is asked for."""
        sums = replace(wire, limit=limit)
        if self.fits(sums):
            return True
        wider = WIDER.get(self.config.ring_bits, ()) if widen else ()
        enough = next((bits for bits in wider if self.fits(sums, bits)), None)
        if enough is None:
            return False
        holds = wire.ring_bits >= enough
        noted = self._held if holds else self.asked
        noted[wire.name] = max(enough, noted.get(wire.name, 0))
        return holds

    @property
    def tries(self) -> list[Rings]:
        """Other rings to compile with: those that are still needed, and for each wire that is asked for its
        own with them, where it can be had, and that of all it is made of."""
        made_by = {step.output.name: step for step in self.steps if isinstance(step, Calculation)}
        needed: dict[str, int] = {}
        for name, bits in self._held.items():
            _raise(needed, _origins(name, made_by), bits)
        found = [needed]
        for name, bits in self.asked.items():
            more = dict(needed)
            _raise(more, _origins(name, made_by), bits)
            found.append(more)
        return [rings for rings in found if rings != self._rings]

    def narrow(self, wire: Wire, op: str) -> Wire:
        """The wire with `fraction_bits` fractional bits: truncated once, for all who ask."""
        if wire.scale == self.config.fraction_bits:
            return wire
        if wire.name not in self._narrowed:
            self._narrowed[wire.name] = self._narrow(wire, op)
        return self._narrowed[wire.name]

    def _narrow(self, wire: Wire, op: str) -> Wire:
        name, scale = f"{wire.name}:narrow", self.config.fraction_bits
        result = replace(wire, name=name, scale=scale, static=False, ring_bits=self.ring(name))
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


def _raise(rings: dict[str, int], names: set[str] | None, bits: int) -> None:
    rings.update({name: max(bits, rings.get(name, 0)) for name in names or ()})


def headroom(ring_bits: int) -> int:
    """Bits of a value that truncation has room for: a bit is the sign, another keeps z offset below half."""
    return ring_bits - 2


def may_follow(step: Step) -> bool:
    """Whether the step can make a result in the ring of its output from inputs in theirs."""
    if not isinstance(step, Calculation) or (isinstance(step, Truncate | Gate) and step.shift):
        return True
    return all(wire.ring_bits >= step.output.ring_bits for wire in sources(step))


def wires(step: Step) -> tuple[Wire, ...]:
    """All that it reads and makes."""
    if isinstance(step, Open | Reveal | RevealLabel):
        return (step.wire,)
    return (*sources(step), step.output) if isinstance(step, Calculation) else ()


def sources(step: Calculation) -> tuple[Wire, ...]:
    if isinstance(step, Local):
        return step.inputs
    return (step.left, step.right) if isinstance(step, Product) else (step.input,)


def _origins(name: str, made_by: Mapping[str, Calculation]) -> set[str] | None:
    """The wire and all that it is made of, back to inputs and truncations, which can be in any ring; None if
    something else is in between that does not pass a larger ring on."""
    found: set[str] = set()
    todo = [name]
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        step = made_by.get(name)
        if isinstance(step, Local | Multiply):
            todo += [wire.name for wire in sources(step)]
        elif isinstance(step, Product) or (step is not None and not step.shift):
            return None
    return found


def _rearranges(step: Local) -> bool:
    """Whether the values of the result are those of the inputs, of one mu, or zero."""
    kernel = step.kernel
    copies = kernel.mode == "nearest" if isinstance(kernel, Upsample) else isinstance(kernel, SHAPING)
    return copies and not step.constant and len({w.mu for w in step.inputs}) == 1


def normal(mu: float) -> tuple[int, float]:
    """mu = m * 2^-k with 1/2 < m <= 1: (k, m), so that only what is no power of two stays in mu."""
    m, exponent = math.frexp(mu)
    return (1 - exponent, 1.0) if m == 0.5 else (-exponent, m)
