"""compile_program(program, config) -> Schedule: the steps that all three parties and the cost model share.

It follows the public structure and the calibrated ranges only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tightrope.program import Program
from tightrope.runtimes.mpc.compiler import Compiler, Rings
from tightrope.runtimes.mpc.config import MPC
from tightrope.runtimes.mpc.rules import RULES, label
from tightrope.runtimes.mpc.steps import (
    UNIT_BITS,
    Gate,
    Local,
    Multiply,
    Open,
    Product,
    Reveal,
    RevealLabel,
    Step,
    Truncate,
    Wire,
)

MASK = "mask of "


@dataclass(frozen=True)
class Schedule:
    """`output`: the wire of the program's output. `finished[i]`: the wires, and masks of wires as
    `MASK + name`, that no step after i reads."""

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
    compiler = _compiled(program, config, {})
    while (better := _better(compiler)) is not None:
        compiler = better
    if compiler.refused:
        raise compiler.refused[0]
    steps = _live(compiler.steps)
    return Schedule(steps, compiler.input, compiler.wires[program.output], _finished(steps))


def _compiled(program: Program, config: MPC, rings: Rings) -> Compiler:
    compiler = Compiler(program, config, rings)
    for op in program.ops:
        inputs = [compiler.wires[i] for i in op.inputs]
        compiler.wires[op.name] = RULES[type(op)](compiler, op, inputs)
    output = compiler.wires[program.output]
    if config.reveal == "label":
        label(compiler, program.output, output)
    else:
        compiler.emit(Reveal, program.output, wire=output)
    return compiler


def _better(compiler: Compiler) -> Compiler | None:
    """The first compilation with other rings that is worth more, if any."""
    others = (_compiled(compiler.program, compiler.config, rings) for rings in compiler.tries)
    return next((other for other in others if _worth(other) < _worth(compiler)), None)


def _worth(compiler: Compiler) -> tuple[int, int]:
    """(sums that no ring of theirs holds, bits online per sample): a larger ring takes bits from one gate's
    truncation and adds some to all that its values are made of."""
    online = (m for step in compiler.steps for exchange in step.online for m in exchange)
    return len(compiler.refused), sum(f.count * UNIT_BITS[f.unit] for m in online for f in m.fields)


def _reads(step: Step) -> list[str]:
    if isinstance(step, Local):
        return [MASK + w.name if step.masks else w.name for w in step.inputs]
    if isinstance(step, Open | Reveal | RevealLabel):
        return [step.wire.name]
    if isinstance(step, Multiply):
        return [MASK + step.input.name]
    if isinstance(step, Product):
        return [step.left.name, step.right.name]
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
