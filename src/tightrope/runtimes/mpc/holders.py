"""Client and server, who hold the shares: offline preparation and the online run of one batch.

The client's share of a layer's result does not depend on its input, so it is made offline, and its masked
opening is sent offline too (`Wire.static`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tightrope.program import Program
from tightrope.runtimes.mpc import gates
from tightrope.runtimes.mpc._halftree import U64
from tightrope.runtimes.mpc._tiles import Words
from tightrope.runtimes.mpc.fixed import (
    decode,
    encode,
    encode_weights,
    in_ring,
    label,
    local,
    multiply,
    tensor,
    words,
)
from tightrope.runtimes.mpc.gates import CLIENT, SERVER
from tightrope.runtimes.mpc.keys import Role
from tightrope.runtimes.mpc.party import Arrays, Batch, Party, PhaseReport
from tightrope.runtimes.mpc.prg import WORDS
from tightrope.runtimes.mpc.steps import (
    Field,
    Gate,
    Local,
    Message,
    Multiply,
    Open,
    Product,
    Reveal,
    RevealLabel,
    Step,
    Truncate,
    Wire,
)

NUMBER: Mapping[Role, int] = {"client": CLIENT, "server": SERVER}
PEER: Mapping[Role, Role] = {"client": "server", "server": "client"}


@dataclass(frozen=True)
class Opening:
    """One-time material of an opening: the party's part of r, the client's part of z + r if that went ahead,
    what the dealer shared, and for a gate the roots of the comparison keys."""

    mask: Words
    ahead: Words | None
    shares: Arrays
    roots: U64


def setup(party: Party) -> PhaseReport:
    """Once per session: the server sends every F = W - B."""
    return party.play({Multiply: SETUP[party.role]}, Batch(0, 0), online=False)


def offline(party: Party, size: int) -> tuple[Batch, PhaseReport]:
    """Take the dealer's material for a batch and do all that does not need the input."""
    batch = party.new_batch(size)
    return batch, party.play(OFFLINE[party.role], batch, online=False)


def online(
    party: Party, batch: Batch, x: NDArray[Any] | None
) -> tuple[NDArray[np.float64] | None, PhaseReport]:
    """Run a prepared batch once; x (N, *input_shape) at the client, None at the server; so is the result."""
    party.clock.reset()
    source = party.schedule.input
    shape = (batch.size, *source.shape)
    known = np.zeros(shape) if x is None else x
    batch.wires[Program.INPUT] = encode(known, source.scale, source.ring_bits)
    report = party.play(ONLINE[party.role], batch, online=True)
    return batch.result, report


def _message(party: Party, messages: tuple[Message, ...], sender: Role) -> Message | None:
    """The message of `messages` from `sender` to this party, or from this party to its peer."""
    receiver = PEER[party.role] if sender == party.role else party.role
    return next((m for m in messages if (m.sender, m.receiver) == (sender, receiver)), None)


def _client_setup(party: Party, step: Multiply, batch: Batch) -> None:
    masked = party.receive(step, step.setup[0], batch.size)["weights"]
    party.weights[step.index] = tensor(masked, step.kernel.weight_shape)


def _server_setup(party: Party, step: Multiply, batch: Batch) -> None:
    weight, bias = encode_weights(step, party.program.tensors)
    stream = party.streams["dealer"].open("weights", step.index, 0)
    mask = stream.ring(step.kernel.weight_shape, step.output.ring_bits)
    party.send(step, step.setup[0], batch.size, {"weights": words(weight) - mask})
    party.weights[step.index], party.biases[step.index] = weight, bias


def _client_mask(party: Party, step: Open, batch: Batch) -> None:
    shape = (batch.size, *step.wire.shape)
    stream = party.streams["dealer"].open("mask", step.index, batch.counter)
    mask = tensor(stream.ring(shape, step.wire.ring_bits), shape)
    batch.masks[step.wire.name] = batch.material[step.index] = mask


def _client_product(party: Party, step: Multiply, batch: Batch) -> None:
    share = multiply(step.kernel, party.weights[step.index], batch.masks[step.input.name])
    product = party.receive(step, step.offline[0], batch.size)["product"]
    batch.wires[step.output.name] = share.add_(tensor(product, (batch.size, *step.output.shape)))


def _server_product(party: Party, step: Multiply, batch: Batch) -> None:
    shape = (batch.size, *step.output.shape)
    stream = party.streams["dealer"].open("product", step.index, batch.counter)
    share = tensor(stream.ring(shape, step.output.ring_bits), shape)
    batch.material[step.index] = share.add_(party.biases[step.index])


def _client_local_offline(party: Party, step: Local, batch: Batch) -> None:
    if step.masks or step.output.static:
        _local(step, batch)


def _client_local_online(party: Party, step: Local, batch: Batch) -> None:
    if not step.masks and not step.output.static:
        _local(step, batch)


def _server_local(party: Party, step: Local, batch: Batch) -> None:
    _local(step, batch)
    if step.constant:
        (batch.masks if step.masks else batch.wires)[step.output.name] += torch.tensor(step.constant)


def _local(step: Local, batch: Batch) -> None:
    values = batch.masks if step.masks else batch.wires
    values[step.output.name] = local(step, *(values[w.name] for w in step.inputs))


def _part(step: Truncate | Gate, share: Tensor) -> Words:
    """The elements of a share that the step opens, flat."""
    if isinstance(step, Truncate) or len(step.opened) == step.map_shape[0]:
        return words(share).reshape(-1)
    maps = share.reshape(len(share), *step.map_shape)
    return words(maps[:, list(step.opened)]).reshape(-1)


def _client_opening(party: Party, step: Truncate | Gate, batch: Batch) -> None:
    stream = party.streams["dealer"].open("opening", step.index, batch.counter)
    size, fields, keys = _opening_shape(step)
    mask = stream.ring(batch.size * size, step.input.ring_bits)
    shares = {f.name: gates.draw(stream, f, batch.size) for f in fields}
    roots = stream.blocks(batch.size * keys)
    key = _message(party, step.offline, "dealer")
    if key is not None:
        shares |= party.receive(step, key, batch.size)
    ahead = None
    message = _message(party, step.offline, "client")
    if message is not None:
        ahead = _part(step, batch.wires[step.input.name]) + mask
        party.send(step, message, batch.size, {"masked": ahead})
    batch.material[step.index] = Opening(mask, ahead, shares, roots)


def _server_opening(party: Party, step: Truncate | Gate, batch: Batch) -> None:
    stream = party.streams["dealer"].open("opening", step.index, batch.counter)
    size, _, keys = _opening_shape(step)
    mask = stream.ring(batch.size * size, step.input.ring_bits)
    roots = stream.blocks(batch.size * keys)
    message = _message(party, step.offline, "dealer")
    shares = {} if message is None else party.receive(step, message, batch.size)
    message = _message(party, step.offline, "client")
    ahead = None if message is None else party.receive(step, message, batch.size)["masked"]
    batch.material[step.index] = Opening(mask, ahead, shares, roots)


def _opening_shape(step: Truncate | Gate) -> tuple[int, tuple[Field, ...], int]:
    """(elements opened, fields that the dealer shares, comparison keys), per sample."""
    if isinstance(step, Gate):
        return step.opened_size, step.share_fields, step.tiles
    return step.input.size, step.share_fields, 0


def _client_open(party: Party, step: Open, batch: Batch) -> None:
    masked = batch.wires[step.wire.name] - batch.material.pop(step.index)
    party.send(step, step.online[0][0], batch.size, {"opened": words(masked)})


def _server_open(party: Party, step: Open, batch: Batch) -> None:
    masked = party.receive(step, step.online[0][0], batch.size)["opened"]
    share = batch.wires[step.wire.name]
    batch.masks[step.wire.name] = tensor(masked, tuple(share.shape)) + share


def _server_multiply(party: Party, step: Multiply, batch: Batch) -> None:
    share = multiply(step.kernel, party.weights[step.index], batch.masks[step.input.name])
    batch.wires[step.output.name] = share.add_(batch.material.pop(step.index))


def _masked_opening(party: Party, step: Truncate | Gate, batch: Batch, opening: Opening) -> Words:
    """z + r, flat: send the own part and add the peer's, unless the client's went ahead."""
    to_peer = _message(party, step.online[0], party.role)
    from_peer = _message(party, step.online[0], PEER[party.role])
    if to_peer is None:
        own = opening.ahead
    else:
        own = _part(step, batch.wires[step.input.name]) + opening.mask
        party.send(step, to_peer, batch.size, {"masked": own})
    theirs = opening.ahead if from_peer is None else party.receive(step, from_peer, batch.size)["masked"]
    assert own is not None and theirs is not None  # `ahead` is there where the schedule has no message
    return own + theirs


def _truncate(party: Party, step: Truncate, batch: Batch) -> None:
    opening: Opening = batch.material.pop(step.index)
    opened = _masked_opening(party, step, batch, opening)
    share = gates.truncate(NUMBER[party.role], step, opened, opening.shares)
    batch.wires[step.output.name] = tensor(share, (batch.size, *step.output.shape))


def _gate(party: Party, step: Gate, batch: Batch) -> None:
    opening: Opening = batch.material.pop(step.index)
    number, shares = NUMBER[party.role], opening.shares
    opened = _masked_opening(party, step, batch, opening)
    bits = gates.evaluate_bits(number, step, opened, opening.roots, shares, party.threads)
    party.drelus[step.op] = party.drelus.get(step.op, 0) + bits.size
    peer = PEER[party.role]
    to_peer, from_peer = (_message(party, step.online[1], sender) for sender in (party.role, peer))
    assert to_peer is not None and from_peer is not None
    party.send(step, to_peer, batch.size, {"bits": bits})
    bits = bits ^ party.receive(step, from_peer, batch.size)["bits"]
    z = words(batch.wires[step.input.name]).reshape(batch.size, *step.map_shape)
    share = gates.select(number, step, opened, z, shares, bits)
    batch.wires[step.output.name] = tensor(share, (batch.size, *step.output.shape))


def _client_factors(party: Party, step: Product, batch: Batch) -> None:
    stream = party.streams["dealer"].open("opening", step.index, batch.counter)
    masks = {
        name: stream.ring(batch.size * wire.size, wire.ring_bits) for name, wire in _factors(step).items()
    }
    product = stream.ring(batch.size * step.output.size, step.output.ring_bits)
    batch.material[step.index] = masks | {"product": product}
    message = _message(party, step.offline, "client")
    if message is not None:
        ahead = _masked_factors(step, batch, masks, [f.name for f in message.fields])
        party.send(step, message, batch.size, ahead)


def _server_factors(party: Party, step: Product, batch: Batch) -> None:
    stream = party.streams["dealer"].open("opening", step.index, batch.counter)
    masks = {
        name: stream.ring(batch.size * wire.size, wire.ring_bits) for name, wire in _factors(step).items()
    }
    message = _message(party, step.offline, "dealer")
    assert message is not None  # a product always has material
    material = masks | party.receive(step, message, batch.size)
    message = _message(party, step.offline, "client")
    if message is not None:
        material |= {f"{k} ahead": v for k, v in party.receive(step, message, batch.size).items()}
    batch.material[step.index] = material


def _factors(step: Product) -> dict[str, Wire]:
    return {"left": step.left, "right": step.right}


def _masked_factors(step: Product, batch: Batch, masks: Arrays, names: Iterable[str]) -> Arrays:
    """The party's shares of these factors, plus its parts of their masks."""
    wires = _factors(step)
    return {name: words(batch.wires[wires[name].name]).reshape(-1) + masks[name] for name in names}


def _product(party: Party, step: Product, batch: Batch) -> None:
    """x * y = E*F - E*b - F*a + a*b from the opened E = x + a and F = y + b."""
    number, material = NUMBER[party.role], batch.material.pop(step.index)
    to_peer = _message(party, step.online[0], party.role)
    from_peer = _message(party, step.online[0], PEER[party.role])
    own = _masked_factors(step, batch, material, _factors(step))
    if to_peer is not None:
        party.send(step, to_peer, batch.size, own)
    theirs = {name: material[f"{name} ahead"] for name in own if f"{name} ahead" in material}
    if from_peer is not None:
        theirs |= party.receive(step, from_peer, batch.size)

    def shaped(name: str, value: Words) -> Tensor:
        return tensor(value, (batch.size, *_factors(step)[name].shape))

    E, F = (shaped(name, own[name] + theirs[name]) for name in own)
    a, b = (shaped(name, material[name]) for name in own)
    share = in_ring(E * (number * F - b) - F * a, step.output)
    share += tensor(material["product"], tuple(share.shape))
    batch.wires[step.output.name] = share


def _client_reveal(party: Party, step: Reveal, batch: Batch) -> None:
    own = batch.wires[step.wire.name]
    share = party.receive(step, step.online[0][0], batch.size)["result"]
    batch.result = decode(own + tensor(share, tuple(own.shape)), step.wire)


def _client_label(party: Party, step: RevealLabel, batch: Batch) -> None:
    share = party.receive(step, step.online[0][0], batch.size)["label"]
    low = words(batch.wires[step.wire.name]).reshape(-1) + share
    batch.result = label(step, tensor(low, (batch.size, 1)))


def _server_label(party: Party, step: RevealLabel, batch: Batch) -> None:
    """No more than the low bits of the share may leave: the others would reveal the largest value."""
    low = words(batch.wires[step.wire.name]).reshape(-1) % (1 << step.bits)
    party.send(step, step.online[0][0], batch.size, {"label": low.astype(np.uint32)})


def _server_reveal(party: Party, step: Reveal, batch: Batch) -> None:
    share = words(batch.wires[step.wire.name])
    if party.config.noise_bits:
        share = share + _noise(party, step, batch, share.shape)
    party.send(step, step.online[0][0], batch.size, {"result": share})


def _noise(party: Party, step: Reveal, batch: Batch, shape: tuple[int, ...]) -> Words:
    """Within [-2^-noise_bits, 2^-noise_bits), in units of the revealed wire: the sum of four uniform parts.

    A single one has sharp edges, and what lies at an edge tells of a shift by one unit.
    """
    stream = party.streams[party.role].open("noise", step.index, batch.counter)
    bits = max(0, step.wire.scale - party.config.noise_bits - math.ceil(math.log2(step.wire.mu))) + 1
    ring_bits = step.wire.ring_bits
    if bits > ring_bits - 2:  # nothing that the ring could hold
        return np.zeros(shape, WORDS[ring_bits])
    parts, width = (4, bits - 2) if bits > 2 else (1, bits)
    drawn = (stream.ring((parts, *shape)) >> np.uint64(64 - width)).sum(0, dtype=np.uint64)
    noise: U64 = drawn - np.uint64(1 << (bits - 1))
    return noise.astype(WORDS[ring_bits])


Handlers = dict[type[Step], Callable[..., None]]
SETUP: dict[Role, Callable[..., None]] = {"client": _client_setup, "server": _server_setup}
OFFLINE: dict[Role, Handlers] = {
    "client": {
        Open: _client_mask,
        Local: _client_local_offline,
        Multiply: _client_product,
        Product: _client_factors,
        **dict.fromkeys((Truncate, Gate), _client_opening),
    },
    "server": {
        Multiply: _server_product,
        Product: _server_factors,
        **dict.fromkeys((Truncate, Gate), _server_opening),
    },
}
ONLINE: dict[Role, Handlers] = {
    "client": {
        Open: _client_open,
        Local: _client_local_online,
        Truncate: _truncate,
        Gate: _gate,
        Product: _product,
        Reveal: _client_reveal,
        RevealLabel: _client_label,
    },
    "server": {
        Open: _server_open,
        Local: _server_local,
        Multiply: _server_multiply,
        Truncate: _truncate,
        Gate: _gate,
        Product: _product,
        Reveal: _server_reveal,
        RevealLabel: _server_label,
    },
}
