"""The dealer: makes correlated randomness ahead of time, from public facts only; it sees no online frame."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from torch import Tensor

from tightrope.runtimes.mpc import fss, gates
from tightrope.runtimes.mpc.fixed import in_ring, local, multiply, tensor, words
from tightrope.runtimes.mpc.party import Batch, Party, PhaseReport
from tightrope.runtimes.mpc.steps import Gate, Local, Multiply, Open, Product, Step, Truncate, Wire


def setup(party: Party) -> PhaseReport:
    """Draw the mask B of every layer's weights, the same that the server draws."""
    return party.play({Multiply: _weights}, Batch(0, 0), online=False)


def offline(party: Party, size: int) -> PhaseReport:
    """Make and send the material of one batch."""
    return party.play(OFFLINE, party.new_batch(size), online=False)


def _weights(party: Party, step: Multiply, batch: Batch) -> None:
    stream = party.streams["server"].open("weights", step.index, 0)
    mask = stream.ring(step.kernel.weight_shape, step.output.ring_bits)
    party.weights[step.index] = tensor(mask, step.kernel.weight_shape)


def _open(party: Party, step: Open, batch: Batch) -> None:
    shape = (batch.size, *step.wire.shape)
    mask = party.streams["client"].open("mask", step.index, batch.counter).ring(shape, step.wire.ring_bits)
    batch.masks[step.wire.name] = tensor(mask, shape)


def _local(party: Party, step: Local, batch: Batch) -> None:
    if step.masks:
        batch.masks[step.output.name] = local(step, *(batch.masks[w.name] for w in step.inputs))


def _multiply(party: Party, step: Multiply, batch: Batch) -> None:
    shape = (batch.size, *step.output.shape)
    product = multiply(step.kernel, party.weights[step.index], batch.masks[step.input.name])
    server = party.streams["server"].open("product", step.index, batch.counter)
    product -= tensor(server.ring(shape, step.output.ring_bits), shape)
    party.send(step, step.offline[0], batch.size, {"product": words(product)})


def _truncate(party: Party, step: Truncate, batch: Batch) -> None:
    client = party.streams["client"].open("opening", step.index, batch.counter)
    server = party.streams["server"].open("opening", step.index, batch.counter)
    size = batch.size * step.input.size
    r = client.ring(size, step.input.ring_bits) + server.ring(size, step.input.ring_bits)
    party.send(step, step.offline[0], batch.size, gates.share_truncation(step, r, client))


def _product(party: Party, step: Product, batch: Batch) -> None:
    client = party.streams["client"].open("opening", step.index, batch.counter)
    server = party.streams["server"].open("opening", step.index, batch.counter)

    def mask(wire: Wire) -> Tensor:
        shape = (batch.size, *wire.shape)
        return tensor(client.ring(shape, wire.ring_bits) + server.ring(shape, wire.ring_bits), shape)

    a, b = mask(step.left), mask(step.right)
    product = words(in_ring(a * b, step.output)).reshape(-1)
    share = product - client.ring(batch.size * step.output.size, step.output.ring_bits)
    party.send(step, step.offline[0], batch.size, {"product": share})


def _gate(party: Party, step: Gate, batch: Batch) -> None:
    client = party.streams["client"].open("opening", step.index, batch.counter)
    server = party.streams["server"].open("opening", step.index, batch.counter)
    own = party.streams["dealer"].open("opening", step.index, batch.counter)
    size, comparisons = batch.size * step.opened_size, batch.size * step.drelus
    r = client.ring(size, step.input.ring_bits) + server.ring(size, step.input.ring_bits)
    c = own.bits(comparisons)
    shares = gates.share_gate(step, r, c, client)
    bit0 = client.bits(comparisons)
    keys = batch.size * step.tiles
    roots = client.blocks(keys), server.blocks(keys)
    hash_key = own.raw(fss.HASH_KEY_BYTES)
    key_words, bit1 = fss.gen(
        gates.mask_points(step, r), c, step.bits, *roots, bit0, hash_key, threads=party.threads
    )
    shares |= {"hash_key": np.frombuffer(hash_key, np.uint8), "words": key_words, "bit": bit1}
    for message in step.offline[:2]:
        party.send(step, message, batch.size, shares)


OFFLINE: Mapping[type[Step], Callable[..., None]] = {
    Open: _open,
    Local: _local,
    Multiply: _multiply,
    Truncate: _truncate,
    Product: _product,
    Gate: _gate,
}
