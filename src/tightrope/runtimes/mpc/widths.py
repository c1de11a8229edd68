"""Which fixed-point widths a small ring has room for, and what precision they leave."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tightrope.errors import InputError
from tightrope.program import Program
from tightrope.runtimes.mpc import oracle
from tightrope.runtimes.mpc.config import MPC
from tightrope.runtimes.mpc.cost import costs
from tightrope.runtimes.mpc.schedule import compile_program

LEAST, MOST = 4, 20
FEWER = 3  # fraction_bits less than the most are tried too: they may spare truncations
ENOUGH = 2.0  # times the smallest error


def fit(program: Program, config: MPC, x: NDArray[Any]) -> tuple[MPC, float]:
    """`config` with the fraction_bits and weight_bits that serve x (N, *input_shape) best, in the clear.

    Every weight_bits is tried with the most fraction_bits that the calibrated ranges leave room for, and a
    few less. Of those with at most twice the smallest error, that of the fewest online bytes is taken. The
    second result is its error: the largest difference of an output to that of a 64-bit ring with 22 bits
    each. Powers in polynomials may be left with little of the margin (`polynomial.py`). Raises InputError if
    nothing fits.
    """
    config = replace(config, reveal="logits")
    candidates = [
        candidate
        for weight_bits in range(LEAST, MOST + 1)
        for candidate in _fitting(program, replace(config, weight_bits=weight_bits))
    ]
    if not candidates:
        raise InputError(
            "the program's ranges leave no room for fixed-point numbers",
            got=f"ring_bits={config.ring_bits}, margin={config.margin:g}",
            fix="ring_bits=64 or a smaller margin",
        )
    wide = replace(config, ring_bits=64, fraction_bits=22, weight_bits=22, margin=1.0)
    want = oracle.evaluate(program, compile_program(program, wide), x)
    found: list[tuple[MPC, float]] = []
    for candidate in candidates:
        got = oracle.evaluate(program, compile_program(program, candidate), x)
        found.append((candidate, float(np.abs(got - want).max())))
    limit = ENOUGH * min(error for _, error in found)
    near = [(candidate, error) for candidate, error in found if error <= limit]
    return min(near, key=lambda pair: (costs(program, pair[0]).total.online_bytes, pair[1]))


def _fitting(program: Program, config: MPC) -> list[MPC]:
    """With the most fraction_bits that fit the ring, and a few less."""
    fitting: list[MPC] = []
    for fraction_bits in range(MOST, LEAST - 1, -1):
        candidate = replace(config, fraction_bits=fraction_bits)
        try:
            compile_program(program, candidate)
        except InputError:
            continue
        fitting.append(candidate)
        if len(fitting) > FEWER:
            break
    return fitting
