"""Trimmed comparisons: lossless above, as lossy below as counted in the clear."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from small_networks import NETWORKS, images, network
from tightrope.errors import InputError
from tightrope.lower import lower
from tightrope.nn import BlockReLU
from tightrope.program import Program
from tightrope.runtimes.mpc import MPC, compile_program, costs, oracle, sign_flips
from tightrope.runtimes.mpc.steps import Gate
from tightrope.runtimes.plain import evaluate, ranges

CALIBRATION = [images(64).numpy()]  # what `network` calibrates with


def widths(program: Program, config: MPC) -> dict[str, int]:
    return {s.op: s.bits for s in compile_program(program, config).steps if isinstance(s, Gate)}


@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - {"polynomials"}))  # which has no signs
def test_no_sign_is_lost_above_on_calibration_data(name: str) -> None:
    """Even without a margin; below, only what lies within 2^-22 of a threshold."""
    program = network(name)
    for config in (MPC(), MPC(margin=1.0)):
        flips = sign_flips(program, config, CALIBRATION)
        assert {op: f.bits for op, f in flips.items()} == widths(program, config)
        assert all(f.high == 0 for f in flips.values())
        assert sum(f.low for f in flips.values()) < 1e-4 * sum(f.comparisons for f in flips.values())
    assert sum(f.comparisons for f in flips.values()) == 64 * costs(program, MPC()).total.drelus


def test_ranges_that_are_too_small_lose_signs_and_are_found_out() -> None:
    program = network("patches")
    small = replace(program, ranges=program.ranges | {"body.1:tiles": program.ranges["body.1:tiles"] / 16})
    flips = sign_flips(small, MPC(margin=1.0), CALIBRATION)
    assert flips["body.1"].high > 0.01 * flips["body.1"].comparisons
    assert flips["body.1"].rate > 0.01


@pytest.mark.parametrize("name", ["patches", "pools"])
def test_fewer_bits_are_cheaper_and_wrong_more_often(name: str) -> None:
    program = network(name)
    exact, trimmed = MPC(), MPC(trim_bits=16)
    before, after = widths(program, exact), widths(program, trimmed)
    assert all(0 <= before[op] - 16 - after[op] + 1 <= 1 for op in before)  # rounding up to a power of two
    assert costs(program, trimmed).total.offline_bytes < 0.7 * costs(program, exact).total.offline_bytes
    assert costs(program, trimmed).links == costs(program, exact).links
    rates = [
        sum(f.rate for f in sign_flips(program, MPC(trim_bits=bits), CALIBRATION).values())
        for bits in (0, 8, 16, 20)
    ]
    assert rates == sorted(rates) and rates[0] < 1e-4 < 1e-3 < rates[2] < rates[3]


@pytest.mark.parametrize("patch", [(1, 1), (2, 3)])
def test_a_run_is_wrong_as_often_as_predicted(patch: tuple[int, int]) -> None:
    """An identity layer and a ReLU: an output is 0 where its gate stayed shut, which shows every flip."""
    layer = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.ones_(layer.weight)
    model = nn.Sequential(layer, BlockReLU([patch])).eval()
    x = torch.randn(200, 1, 8, 9, generator=torch.Generator().manual_seed(3))
    program = ranges(lower(model, (1, 8, 9)), [x])
    config = MPC(noise_bits=0, trim_bits=20)  # a quarter
    flips = sign_flips(program, config, [x.numpy()])["1"]
    with config.open(program, "simulate") as session:
        y, _ = session.run(x.numpy())
    want = evaluate(program, x).numpy()
    assert not ((y != 0) & (want == 0)).any()
    rows, columns = (np.arange(n) // p for n, p in zip((8, 9), patch, strict=True))
    tile = rows[:, None] * 9 + columns
    shut = sum(len(np.unique(tile[bad])) for bad in ((y == 0) & (want != 0))[:, 0])
    assert flips.low > 30 and flips.high == 0
    assert abs(shut - flips.low) < 5 * math.sqrt(flips.low)
    assert flips.comparisons == 200 * math.ceil(8 / patch[0]) * math.ceil(9 / patch[1])


def test_labels_and_maxima_survive_trimming_where_they_are_clear() -> None:
    """Maxima are wrong by less than the trimmed unit, so clear labels stay."""
    program, x = network("pools"), images(32, seed=2)
    config = MPC(trim_bits=6, reveal="label")
    exact = np.sort(evaluate(program, x).numpy(), 1)
    clear = exact[:, -1] - exact[:, -2] > 2**-10
    with config.open(program, "simulate") as session:
        y, _ = session.run(x.numpy())
    assert clear.sum() > 20
    assert (y.argmax(1) == evaluate(program, x).numpy().argmax(1))[clear].all()
    model = oracle.evaluate(program, compile_program(program, config), x.numpy())
    assert (model.argmax(1) == y.argmax(1))[clear].all()


def test_trimming_out_of_range_is_refused() -> None:
    with pytest.raises(InputError, match="trim_bits"):
        MPC(trim_bits=29)
