"""What each step of a schedule has the parties do, in the units of a `Profile`, phase by phase.

Online, a step is a part before its first exchange and one after each. Offline it is one part before the
dealer's messages and one after them, in which the client makes what it sends ahead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from tightrope.program import Conv2d
from tightrope.runtimes.mpc.convolution import beside
from tightrope.runtimes.mpc.fss import word_levels
from tightrope.runtimes.mpc.keys import Role
from tightrope.runtimes.mpc.steps import (
    ELEMENTS,
    UNIT_BITS,
    Field,
    Gate,
    Local,
    Multiply,
    Open,
    Product,
    Reveal,
    RevealLabel,
    Step,
    Truncate,
    Unit,
    Wire,
)

Work = Mapping[str, float]  # unit -> how many
Part = Mapping[Role, Work]
BLOCK_BYTES = 16
PACKED: frozenset[Unit] = frozenset({"word40", "word48"})
PACKING = 5.0  # times what an element of a sum takes to be read or written


def _both(work: Work) -> Part:
    return {"client": work, "server": work}


def _packing(*wires: Wire) -> float:
    """Elements that are read and written to pack or unpack one of a wire, of those with no machine word."""
    return PACKING if any(ELEMENTS[wire.ring_bits] in PACKED for wire in wires) else 0.0


def _masking(static: bool, size: float, *wires: Wire) -> Part:
    """Adding a mask, packing; the client's static share was masked offline."""
    masked = {"element": (2 + _packing(*wires)) * size}
    return {"server": masked} if static else _both(masked)


def _local(step: Local, batch: int) -> tuple[Part, ...]:
    """A static result is made offline at the client, and so is every mask."""
    work = {"step": 1.0, "element": batch * (sum(w.size for w in step.inputs) + step.output.size)}
    return ({"server": work} if step.masks or step.output.static else _both(work),)


def _open(step: Open, batch: int) -> tuple[Part, ...]:
    work = {"step": 1.0, "element": (2 + _packing(step.wire)) * batch * step.wire.size}
    return ({"client": work}, {"server": work})


def _product_of_layer(step: Multiply, batch: int) -> dict[str, float]:
    kernel = step.kernel
    macs = batch * math.prod(kernel.weight_shape) * step.output.size // kernel.weight_shape[0]
    work = {"mac": macs, "element": 2.0 * batch * step.output.size}
    if isinstance(kernel, Conv2d):
        work["row"] = batch * math.prod(kernel.weight_shape)
        work["gathered"] = macs / kernel.weight_shape[0] * kernel.groups
        work["beside"] = batch * beside(kernel)
        work["group"] = kernel.groups * (2 + batch) / 3  # measured: partly once a call, partly per sample
    return work


def _multiply(step: Multiply, batch: int) -> tuple[Part, ...]:
    return ({"server": {"step": 1.0, **_product_of_layer(step, batch)}},)


def _truncate(step: Truncate, batch: int) -> tuple[Part, ...]:
    size = float(batch * step.input.size)
    work = {"step": 1.0, "opened": size, "element": _packing(step.input) * size}
    return (_masking(step.input.static, size, step.input), _both(work))


def _gate(step: Gate, batch: int) -> tuple[Part, ...]:
    opened, gated = float(batch * step.opened_size), float(batch * step.gated_size)
    compared = batch * step.drelus
    levels = compared * word_levels(step.bits)
    squares = sum(1 + (piece.square != 0) for piece in step.pieces)
    return (
        _masking(step.input.static, opened, step.input),
        _both(
            {
                "gate": 1.0,
                "opened": opened,
                "compared": compared,
                "level": levels,
                "element": _packing(step.input) * opened,
            }
        ),
        _both({"selected": gated * squares}),
    )


def _product(step: Product, batch: int) -> tuple[Part, ...]:
    size = float(batch * (step.left.size + step.right.size))
    packing = _packing(step.left, step.right)
    result = {"step": 1.0, "element": (2 + packing) * size + 6.0 * batch * step.output.size}
    return (_masking(step.left.static and step.right.static, size, step.left, step.right), _both(result))


def _reveal(step: Reveal | RevealLabel, batch: int) -> tuple[Part, ...]:
    work = {"step": 1.0, "element": (2 + _packing(step.wire)) * batch * step.wire.size}
    return ({"server": work}, {"client": work})


ONLINE: Mapping[type[Step], Callable[..., tuple[Part, ...]]] = {
    Local: _local,
    Open: _open,
    Multiply: _multiply,
    Truncate: _truncate,
    Gate: _gate,
    Product: _product,
    **dict.fromkeys((Reveal, RevealLabel), _reveal),
}


def _bytes(wire: Wire, size: int, batch: int) -> float:
    return batch * size * UNIT_BITS[ELEMENTS[wire.ring_bits]] / 8


def _drawn(wire: Wire, size: int, batch: int) -> dict[str, float]:
    """Elements from a keystream, unpacked."""
    return {"drawn": _bytes(wire, size, batch), "element": _packing(wire) * batch * size}


def _local_offline(step: Local, batch: int) -> tuple[Part, ...]:
    work = {"element": batch * (sum(w.size for w in step.inputs) + step.output.size)}
    if step.masks:
        return ({"client": work, "dealer": {"deal": 1.0, **work}}, {})
    return ({"client": work} if step.output.static else {}, {})


def _open_offline(step: Open, batch: int) -> tuple[Part, ...]:
    work = {"deal": 1.0, **_drawn(step.wire, step.wire.size, batch)}
    return ({"client": work, "dealer": work}, {})


def _multiply_offline(step: Multiply, batch: int) -> tuple[Part, ...]:
    layer = {"deal": 1.0, **_product_of_layer(step, batch)}
    drawn = _drawn(step.output, step.output.size, batch)
    added = 2.0 * batch * step.output.size + drawn["element"]
    server = {"deal": 1.0, **drawn, "element": added}
    dealer = {**layer, **drawn, "element": layer["element"] + drawn["element"]}
    return ({"client": layer, "server": server, "dealer": dealer}, {})


def _opening_offline(
    wire: Wire, size: int, fields: tuple[Field, ...], keys: int, levels: int, batch: int
) -> tuple[Part, ...]:
    """r, its shares and the roots of the keys, drawn by whoever uses them; the dealer makes the rest."""
    own = _bytes(wire, size, batch) + BLOCK_BYTES * batch * keys
    shares = sum(f.bytes(batch) for f in fields)
    words = float(batch * sum(f.count for f in fields if f.unit != "bit"))
    mask = _packing(wire) * batch * size
    small = PACKING * batch * sum(f.count for f in fields if f.unit in PACKED)
    return (
        {
            "client": {"deal": 1.0, "drawn": own + shares, "element": mask + small},
            "server": {"deal": 1.0, "drawn": own, "element": mask + small},
            "dealer": {
                "deal": 1.0, "drawn": 2 * own + shares, "shared": words,
                "keyed": float(batch * keys * levels), "element": 2 * mask + 2 * small,
            },
        },
        {"client": {"element": (2 + _packing(wire)) * batch * size}} if wire.static else {},
    )  # fmt: skip


def _truncate_offline(step: Truncate, batch: int) -> tuple[Part, ...]:
    return _opening_offline(step.input, step.input.size, step.share_fields, 0, 0, batch)


def _gate_offline(step: Gate, batch: int) -> tuple[Part, ...]:
    levels = word_levels(step.bits) + 1
    return _opening_offline(step.input, step.opened_size, step.share_fields, step.tiles, levels, batch)


def _product_offline(step: Product, batch: int) -> tuple[Part, ...]:
    factors, size = step.left.size + step.right.size, step.output.size
    own = sum(_bytes(wire, wire.size, batch) for wire in (step.left, step.right))
    share = _bytes(step.output, size, batch)
    dealer = {"deal": 1.0, "drawn": 2 * own + share, "element": 4.0 * batch * size}
    masked = {"element": 2.0 * batch * factors} if step.left.static or step.right.static else {}
    client, server = ({"deal": 1.0, "drawn": drawn} for drawn in (own + share, own))
    return ({"client": client, "server": server, "dealer": dealer}, {"client": masked})


def _nothing_offline(step: Reveal | RevealLabel, batch: int) -> tuple[Part, ...]:
    return ({}, {})


OFFLINE: Mapping[type[Step], Callable[..., tuple[Part, ...]]] = {
    Local: _local_offline,
    Open: _open_offline,
    Multiply: _multiply_offline,
    Truncate: _truncate_offline,
    Gate: _gate_offline,
    Product: _product_offline,
    **dict.fromkeys((Reveal, RevealLabel), _nothing_offline),
}
