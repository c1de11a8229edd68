"""The small ring: what fits, how precise it is, and that it halves the bytes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from small_networks import NETWORKS, images, network
from tightrope.errors import InputError
from tightrope.runtimes.mpc import MPC, compile_program, costs, fit, oracle
from tightrope.runtimes.mpc.frame import HEADER_BYTES
from tightrope.runtimes.plain import evaluate

SMALL = MPC(ring_bits=32, noise_bits=0, margin=2.0)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_small_ring_that_fits_is_nearly_as_good(name: str) -> None:
    program, x = network(name), images(16, seed=4)
    config, error = fit(program, SMALL, x.numpy())
    assert config == replace(SMALL, fraction_bits=config.fraction_bits, weight_bits=config.weight_bits)
    assert 0 < error < 2**-10
    want = evaluate(program, x).numpy()
    with config.open(program, "simulate") as session:
        got, measured = session.run(x.numpy())
    assert np.abs(got - want).max() < 4 * error + 2**-12
    predicted = costs(program, config, 16)
    assert (measured.links, measured.offline_links) == (predicted.links, predicted.offline_links)


def test_no_other_widths_are_as_good() -> None:
    """By hand: the error of every pair that fits, against 64 bits."""
    program, x = network("residual"), images(8, seed=4).numpy()
    config, error = fit(program, SMALL, x)
    want = oracle.evaluate(program, compile_program(program, MPC()), x)
    errors = []
    for fraction_bits in range(8, 18):
        for weight_bits in range(8, 18):
            other = replace(SMALL, fraction_bits=fraction_bits, weight_bits=weight_bits)
            try:
                schedule = compile_program(program, other)
            except InputError:
                continue
            errors.append(np.abs(oracle.evaluate(program, schedule, x) - want).max())
            if other == config:
                assert errors[-1] == error
    assert error <= 2 * min(errors)


def test_the_same_steps_cost_half_as_much() -> None:
    """With the same widths the schedules are equal but for their ring: all but headers and bits is halved."""
    program = network("residual")
    small = replace(SMALL, fraction_bits=10, weight_bits=11)
    large = replace(small, ring_bits=64)
    steps = [compile_program(program, config).steps for config in (small, large)]
    assert [type(s) for s in steps[0]] == [type(s) for s in steps[1]]
    exchanges = [m for s in steps[0] for exchange in s.online for m in exchange]
    bits = sum(m.payload_bytes(1) for m in exchanges if m.fields[0].unit == "bit")
    payloads = [
        costs(program, config).total.online_bytes - bits - HEADER_BYTES * len(exchanges)
        for config in (small, large)
    ]
    assert 2 * payloads[0] == payloads[1]
    for op in program.ops:
        prices = [config.price(op).online_bytes for config in (small, large)]
        assert prices[0] <= 0.6 * prices[1]


@pytest.mark.slow
def test_processes_agree_on_the_small_ring() -> None:
    program, x = network("squeeze"), images(3)
    config = replace(SMALL, fraction_bits=11, weight_bits=11)
    with config.open(program, "execute") as session:
        got, measured = session.run(x.numpy())
    assert np.abs(got - evaluate(program, x).numpy()).max() < 2**-7
    assert measured.links == costs(program, config, 3).links


def test_labels_in_the_small_ring() -> None:
    program, x = network("squeeze"), images(32, seed=6)
    config, error = fit(program, replace(SMALL, reveal="label"), x.numpy())
    config = replace(config, reveal="label")
    want = np.sort(evaluate(program, x).numpy(), 1)
    clear = want[:, -1] - want[:, -2] > 4 * error
    with config.open(program, "simulate") as session:
        got, _ = session.run(x.numpy())
    assert clear.sum() > 20
    assert (got.argmax(1) == evaluate(program, x).numpy().argmax(1))[clear].all()


def test_what_has_no_room_is_refused() -> None:
    program = network("residual")
    wide = replace(program, ranges={name: 2.0**20 * v for name, v in program.ranges.items()})
    with pytest.raises(InputError, match="no room"):
        fit(wide, replace(SMALL, margin=8.0), images(2).numpy())
    with pytest.raises(InputError, match="overflow"):
        compile_program(program, MPC(ring_bits=32))  # the widths of the large ring
