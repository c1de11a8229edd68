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
    rings: Rings = {}
    compiler = _compiled(program, config, rings)
    while more := compiler.granted():  # what a gate no longer truncates may let another have its sums
        rings = {**rings, **more}
        compiler = _compiled(program, config, rings)
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
