"""What a run will cost: `costs` of the whole schedule, exactly; `price` of one op alone, for comparisons."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from tightrope.program import Conv2d, Linear, Op, Polynomial, Program, Relu, base_cost
from tightrope.runtimes.mpc.alone import RULED, TYPICAL_RANGE, by_rule, usual_wire
from tightrope.runtimes.mpc.config import MPC
from tightrope.runtimes.mpc.frame import HEADER_BYTES
from tightrope.runtimes.mpc.polynomial import check_degrees
from tightrope.runtimes.mpc.schedule import Schedule, compile_program
from tightrope.runtimes.mpc.steps import (
    UNIT_BITS,
    Gate,
    Message,
    Multiply,
    Open,
    Piece,
    Product,
    Reveal,
    Step,
    Truncate,
    Wire,
)
from tightrope.types import Cost, total


@dataclass(frozen=True)
class Costs:
    """Of one batch. Links map `sender->receiver` to bytes with frame headers; `setup_links` is paid once per
    session (the weights' frames; the hellos of the handshake are not in it)."""

    ops: Mapping[str, Cost]
    total: Cost
    links: Mapping[str, int]
    offline_links: Mapping[str, int]
    setup_links: Mapping[str, int]
    about: str = ""


def costs(program: Program, config: MPC, batch: int = 1) -> Costs:
    """For `batch` samples together; milliseconds are 0. Raises what `compile_program` does."""
    schedule = compile_program(program, config)
    return joined([of_schedule(program, schedule, size) for size in pieces(program, schedule, config, batch)])


def pieces(program: Program, schedule: Schedule, config: MPC, batch: int) -> tuple[int, ...]:
    """The sizes in which a batch is run, in order, so that the material of none exceeds `material_bytes`."""
    per_sample = of_schedule(program, schedule, 1).total.offline_bytes
    count = -(-batch // max(1, int(config.material_bytes // max(1, per_sample))))
    return tuple(batch // count + (k < batch % count) for k in range(count))


def joined(parts: Sequence[Costs]) -> Costs:
    """Batches one after the other: everything adds up, but the weights are the same ones."""
    ops = {
        name: replace(total(part.ops[name] for part in parts), weights=cost.weights)
        for name, cost in parts[0].ops.items()
    }
    whole = replace(total(part.total for part in parts), weights=parts[0].total.weights)

    def links(of: str) -> dict[str, int]:
        names = {name for part in parts for name in getattr(part, of)}
        return {name: sum(getattr(part, of).get(name, 0) for part in parts) for name in names}

    return Costs(ops, whole, links("links"), links("offline_links"), parts[0].setup_links)


def frame_bytes(message: Message, batch: int) -> int:
    return HEADER_BYTES + message.payload_bytes(batch)


def of_schedule(program: Program, schedule: Schedule, batch: int) -> Costs:
    """See `costs`."""
    spent = {op.name: structural(program, op.name, batch) for op in program.ops}
    spent.setdefault(schedule.output.name, Cost())  # a program of no ops reveals its input
    clock = {"client": 0, "server": 0, "dealer": 0}
    for step in schedule.steps:
        before = max(clock.values())
        online = [message for exchange in step.online for message in exchange]
        for exchange in step.online:
            _pass(clock, exchange)
        spent[step.op] += Cost(
            drelus=step.drelus * batch,
            online_bytes=sum(frame_bytes(m, batch) for m in online),
            offline_bytes=sum(frame_bytes(m, batch) for m in step.offline),
            rounds=max(clock.values()) - before,
        )
    return Costs(
        ops=spent,
        total=total(spent.values()),
        links=_links((m for s in schedule.steps for exchange in s.online for m in exchange), batch),
        offline_links=_links((m for s in schedule.steps for m in s.offline), batch),
        setup_links=_links((m for s in schedule.steps for m in s.setup), batch),
    )


def structural(program: Program, op: str, batch: int) -> Cost:
    """MACs and weights of an op, which no runtime changes; the weights count once, whatever the batch."""
    base = base_cost(program.op(op))
    return replace(base.scaled(batch), drelus=0, weights=base.weights, ckks_levels=0)


def _pass(clock: dict[str, int], exchange: tuple[Message, ...]) -> None:
    """Lamport's rule: a message is one later than all its sender has received. All send, then all receive."""
    sent = [(message.receiver, clock[message.sender] + 1) for message in exchange]
    for receiver, time in sent:
        clock[receiver] = max(clock[receiver], time)


def _links(messages: Iterable[Message], batch: int) -> dict[str, int]:
    links: dict[str, int] = {}
    for message in messages:
        name = f"{message.sender}->{message.receiver}"
        links[name] = links.get(name, 0) + frame_bytes(message, batch)
    return links


def price(op: Op, config: MPC) -> Cost:
    """What one op adds per sample, taken alone: payload without frame headers, packed bits unrounded.

    Assumes the common surroundings: a layer reads a value that nothing else opened and its result goes to a
    ReLU, which truncates it, identity channels included. The width of comparisons, so only offline bytes, is
    guessed from an activation range of 8. A ReLU has two rounds; a network has up to two more for its first
    opening and its result, and two where a layer reads a layer. An op that this runtime cannot execute has
    the DReLUs, MACs and weights that every runtime would count, and no communication. But raises TraceError
    for a polynomial that it has not the digits for, which would seem the cheapest of all.
    """
    if isinstance(op, Polynomial):
        check_degrees(op)
    return _price(op, steps_alone(op, config))


def steps_alone(op: Op, config: MPC) -> tuple[Step, ...]:
    """The steps that `price` counts; none for an op that this runtime cannot execute."""
    return ALONE.get(type(op), _nothing)(op, config)


def prices(program: Program, config: MPC) -> dict[str, Cost]:
    """The price of every op among the others: a value that several layers read is opened once, a layer's
    result is truncated before another layer reads it, and the output is revealed. Needs no calibrated
    ranges; see `price` for what it assumes.
    """
    return {name: _price(program.op(name), steps) for name, steps in usual_steps(program, config).items()}


def usual_steps(program: Program, config: MPC) -> dict[str, tuple[Step, ...]]:
    """By op, in order, the steps that `prices` counts."""
    opened: set[str] = set()
    static = {Program.INPUT: False}  # whether the client's share is known offline, and so its opening
    wide = {Program.INPUT: False}  # whether the fixed point is that of a product: the next layer truncates
    found = {}
    for op in program.ops:
        steps = steps_alone(op, config)
        if isinstance(op, Conv2d | Linear):
            source = _wire(program.shape(op.inputs[0]), config.fraction_bits, config)
            steps = tuple(replace(step, wire=source) if isinstance(step, Open) else step for step in steps)
            if op.inputs[0] in opened:
                steps = tuple(step for step in steps if not isinstance(step, Open))
            elif wide[op.inputs[0]]:
                product = replace(
                    source, scale=source.scale + config.weight_bits, static=static[op.inputs[0]]
                )
                cut = Truncate(index=0, op=op.name, input=product, output=source, shift=config.weight_bits)
                steps = (cut, *steps)
            opened.add(op.inputs[0])
            static[op.name] = True
        elif isinstance(op, Relu):
            steps = tuple(
                replace(step, input=replace(step.input, static=static[op.inputs[0]]))
                for step in steps
                if isinstance(step, Gate | Truncate)
            )
            static[op.name] = False
        elif isinstance(op, RULED):
            sources = [usual_wire(op, program.shape(v), config, static=static[v]) for v in op.inputs]
            steps = by_rule(op, config, sources)
            static[op.name] = False
        else:
            static[op.name] = all(static[value] for value in op.inputs)
        layer, settled = isinstance(op, Conv2d | Linear), isinstance(op, (Relu, *RULED))
        wide[op.name] = layer or (not settled and any(wide[value] for value in op.inputs))
        found[op.name] = steps
    if program.output in found:
        reveal = Reveal(index=0, op=program.output, wire=_wire(program.shape(program.output), 0, config))
        found[program.output] += (reveal,)
    return found


def _price(op: Op, steps: tuple[Step, ...]) -> Cost:
    online = [m for step in steps for exchange in step.online for m in exchange]
    base = replace(base_cost(op), ckks_levels=0)
    if any(not isinstance(step, Reveal) for step in steps):
        base = replace(base, drelus=sum(step.drelus for step in steps))
    return base + Cost(
        online_bytes=sum(payload_bytes(m) for m in online),
        offline_bytes=sum(payload_bytes(m) for step in steps for m in step.offline),
        rounds=sum(len(step.online) for step in steps if isinstance(step, Gate | Product | Reveal)),
    )


def payload_bytes(message: Message) -> float:
    """Per sample, packed bits unrounded."""
    return sum(f.count * UNIT_BITS[f.unit] / 8 for f in message.fields if not f.fixed)


def _nothing(op: Op, config: MPC) -> tuple[Step, ...]:
    return ()


def _layer_alone(op: Conv2d | Linear, config: MPC) -> tuple[Step, ...]:
    source = _wire(_input_shape(op), config.fraction_bits, config)
    result = _wire(op.shape, config.fraction_bits + config.weight_bits, config)
    layer = Multiply(
        index=1, op=op.name, kernel=op, input=source, output=result, weight_bits=config.weight_bits
    )
    return (Open(index=0, op=op.name, wire=source), layer)


def _relu_alone(op: Relu, config: MPC) -> tuple[Step, ...]:
    source = _wire(op.shape, config.fraction_bits + config.weight_bits, config)
    result = _wire(op.shape, config.fraction_bits, config)
    shift = config.weight_bits
    if not op.drelus:
        return (Truncate(index=0, op=op.name, input=source, output=result, shift=shift),)
    H, W = op.shape[1:] if len(op.shape) == 3 else (1, 1)
    largest = max(min(p, H) * min(q, W) for p, q in op.patches)
    bits = 1 + config.fraction_bits + math.ceil(math.log2(config.margin * TYPICAL_RANGE * largest))
    pieces = (Piece(),) if op.upper is None else (Piece(), Piece())
    gate = Gate(
        index=0,
        op=op.name,
        kernel=op,
        input=source,
        output=result,
        shift=shift,
        trim=shift + config.trim_bits,
        bits=min(max(bits - config.trim_bits, 2), config.ring_bits - shift),
        pieces=pieces,
    )
    return (gate,)


def _wire(shape: tuple[int, ...], scale: int, config: MPC) -> Wire:
    return Wire("", shape, scale, 1.0, TYPICAL_RANGE, static=True, ring_bits=config.ring_bits)


def _input_shape(op: Conv2d | Linear) -> tuple[int, ...]:
    """What the layer reads, without rows and columns that no window reaches."""
    if isinstance(op, Linear):
        return (op.in_features,)
    left, right, top, bottom = op.padding
    sizes = []
    for n, k, s, d, p in zip(
        op.shape[1:], op.kernel, op.stride, op.dilation, (top + bottom, left + right), strict=True
    ):
        sizes.append(max(1, (n - 1) * s + d * (k - 1) + 1 - p))
    return (op.in_channels, sizes[0], sizes[1])


ALONE: Mapping[type[Op], Callable[..., tuple[Step, ...]]] = {
    Conv2d: _layer_alone,
    Linear: _layer_alone,
    Relu: _relu_alone,
    **dict.fromkeys(RULED, by_rule),
}
