"""Compiled loops, run once on one element before the first batch, so that no batch waits for the compiler."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch

from tightrope.program import Conv2d, Relu
from tightrope.runtimes.mpc import fss
from tightrope.runtimes.mpc.convolution import convolve, matmul
from tightrope.runtimes.mpc.fixed import DTYPES
from tightrope.runtimes.mpc.gates import CLIENT, evaluate_bits, mask_points, select, share_gate
from tightrope.runtimes.mpc.prg import Stream
from tightrope.runtimes.mpc.steps import Gate, Multiply, Piece, Step, Truncate, Wire


def load_kernels(steps: Iterable[Step]) -> None:
    """Those that the steps use."""
    layers, gates = set(), set()
    for step in steps:
        if isinstance(step, Multiply):
            layers.add(step.output.ring_bits)
        elif isinstance(step, Truncate | Gate):
            gates.add((step.input.ring_bits, step.output.ring_bits))
    for ring_bits in sorted(layers):
        warm_linear(ring_bits)
    for before, after in sorted(gates):
        warm_gates(before, after)


def warm_linear(ring_bits: int) -> None:
    op = Conv2d(name="", inputs=("",), shape=(1, 1, 1), kernel=(1, 2), in_channels=1)
    x = torch.ones(op.weight_shape, dtype=DTYPES[ring_bits])
    convolve(op, x, x)
    matmul(x.flatten(1), x.flatten(1))


def warm_gates(before: int, after: int) -> None:
    """From one ring to another."""
    relu = Relu(name="", inputs=("",), shape=(1, 1, 1), patches=((1, 1),))
    wire = Wire("", relu.shape, 20, 1.0, 1.0, static=False, ring_bits=before)
    step = Gate(
        index=0, op="", kernel=relu, input=wire, output=replace(wire, ring_bits=after), shift=10, trim=10,
        bits=20, pieces=(Piece(), Piece(square=1)),
    )  # fmt: skip
    stream = Stream(bytes(32))  # a fixed key: nothing secret is here
    r = stream.ring(1, before)
    bits = np.zeros(2, np.uint8)
    roots = stream.blocks(1)
    shares = share_gate(step, r, bits, stream)
    shares["hash_key"] = np.zeros(fss.HASH_KEY_BYTES, np.uint8)
    key = shares["hash_key"].tobytes()
    shares["words"], shares["bit"] = fss.gen(mask_points(step, r), bits, step.bits, roots, roots, bits, key)
    evaluate_bits(CLIENT, step, r, roots, shares, 1)
    select(CLIENT, step, r, r.reshape(1, 1, 1, 1), shares, bits)
