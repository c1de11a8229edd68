"""What the server adds to what it reveals: fresh, within its bound, and without edges."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from small_networks import images, network
from tightrope.runtimes.mpc import MPC, compile_program, holders
from tightrope.runtimes.mpc.prg import SEED_BYTES, SESSION_BYTES, Streams
from tightrope.runtimes.mpc.steps import Reveal


def test_what_the_server_reveals_carries_fresh_noise_below_its_bound() -> None:
    """The client must not read truncation carries off the last bits: same input, other noise each time."""
    program = network("residual")
    x = np.repeat(images(1, seed=1).numpy(), 8, 0)
    with MPC(noise_bits=0).open(program, "simulate") as session:
        exact, _ = session.run(x)
    with MPC(noise_bits=10).open(program, "simulate") as session:
        noisy = np.stack([session.run(x)[0] for _ in range(4)])
    error = np.abs(noisy - exact[0])
    assert 2**-12 < error.max() <= 2**-10 + 2**-18
    assert np.unique(noisy).size == noisy.size


def test_the_noise_of_the_server_has_no_edges() -> None:
    """One uniform number would lie within a tenth of its bound's ends in a tenth of all cases: whoever asks
    often finds values there, and each tells of a shift by one unit. The sum of four hardly ever does."""
    program = network("residual")
    x = np.repeat(images(1, seed=1).numpy(), 400, 0)
    with MPC(noise_bits=0).open(program, "simulate") as session:
        exact, _ = session.run(x[:1])
    with MPC(noise_bits=8).open(program, "simulate") as session:
        noise = (session.run(x)[0] - exact) * 2**8
    assert np.abs(noise).max() < 1 and abs(noise.mean()) < 0.05
    assert noise.std() == pytest.approx(12**-0.5, rel=0.1)
    assert (np.abs(noise) > 0.9).mean() < 0.005


@pytest.mark.parametrize("noise_bits, bound", [(12, 1.0), (10, 2.0), (9, 8.0)])
def test_narrow_noise_stays_within_its_bound(noise_bits: int, bound: float) -> None:
    """In units of the result, where there is hardly room for four parts."""
    config = MPC(noise_bits=noise_bits)
    program = network("residual")
    schedule = compile_program(program, config)
    step = schedule.steps[-1]
    assert isinstance(step, Reveal)
    step = replace(step, wire=replace(step.wire, scale=noise_bits + int(np.log2(bound)), mu=1.0))
    party: Any = SimpleNamespace(
        config=config, role="server", streams={"server": Streams(bytes(SEED_BYTES), bytes(SESSION_BYTES))}
    )
    batch: Any = SimpleNamespace(counter=1)
    drawn = holders._noise(party, step, batch, (4096,)).astype(np.int64)
    assert -bound <= drawn.min() and drawn.max() < bound and np.unique(drawn).size > 1
