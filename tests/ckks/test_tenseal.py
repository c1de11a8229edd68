"""Microsoft SEAL, through TenSEAL, as an oracle of the whole encrypted path on a shallow network.

Opt-in: `pip install 'tightrope[crosscheck]'`.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ckks_toys import ToyCKKS
from tightrope.errors import InputError, ProtocolError
from tightrope.nn import PolynomialActivation
from tightrope.program import Program
from tightrope.runtimes.ckks import CKKS
from tightrope.runtimes.plain import evaluate as plain

from test_packing import calibrated  # isort: skip


def shallow(coefficients: tuple[float, ...] = (0.2, 0.5, 0.25)) -> tuple[Program, Any]:
    act = PolynomialActivation([list(coefficients)], gated=False)
    net = nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), act, nn.Flatten(), nn.Linear(32, 3))
    return calibrated(net, (1, 8, 8))


class Shortcut(nn.Module):
    """Two branches that meet at different levels, a channel of zeros, and a layer of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 2, 3, 2, 1), nn.Conv2d(2, 2, 3, 1, 1)
        self.one, self.two = (PolynomialActivation([[0.2, 0.5, 0.25]], gated=False) for _ in range(2))
        self.fc, self.dead = nn.Linear(32, 3), nn.Linear(32, 3)
        with torch.no_grad():
            self.second.weight[0] = 1e-12
            self.dead.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = (x + self.two(self.second(self.one(x)))).flatten(1)
        y: Tensor = self.fc(x) + self.dead(x)
        return y


def test_without_tenseal_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tenseal", None)
    program, _ = shallow()
    with pytest.raises(InputError, match=r"tightrope\[crosscheck\]"):
        CKKS().open(program, "crosscheck")


@pytest.mark.slow
def test_seal_and_lattigo_agree_on_a_shallow_network() -> None:
    pytest.importorskip("tenseal")
    pytest.importorskip("lattigo")
    pytest.importorskip("orion_evaluator")
    program, x = shallow()
    want = plain(program, x[:2]).numpy()
    with CKKS().open(program, "crosscheck") as session:
        ours, measured = session.run(x[:2].numpy())
    with ToyCKKS().open(program) as session:
        theirs, _ = session.run(x[:2].numpy())
    assert np.abs(ours - theirs).max() < 1e-3
    assert np.abs(ours - want).max() < 1e-3 and np.abs(want).max() > 0.1
    assert measured.config["mode"] == "crosscheck"


@pytest.mark.slow
@pytest.mark.parametrize("scale_bits", [30, 40])
def test_seal_computes_branches_at_different_levels_and_what_is_zero(scale_bits: int) -> None:
    pytest.importorskip("tenseal")
    torch.manual_seed(0)
    program, x = calibrated(Shortcut(), (1, 8, 8))
    want = plain(program, x[:1]).numpy()
    with CKKS(scale_bits=scale_bits).open(program, "crosscheck") as session:
        ours, _ = session.run(x[:1].numpy())
    with CKKS(scale_bits=scale_bits).open(program, "simulate") as session:
        _, simulated = session.run(x[:1].numpy())
    # Its keys and its encryption are noisier than those that the prediction is of.
    assert np.abs(ours - want).max() < 5 * simulated.config["predicted_error"] < 0.05
    assert np.abs(want).max() > 0.1


@pytest.mark.slow
def test_what_crosscheck_does_not_execute_is_refused() -> None:
    pytest.importorskip("tenseal")
    cubic, _ = shallow((0.2, 0.5, 0.25, 0.1))
    with pytest.raises(InputError, match="quadratics alone"):
        CKKS().open(cubic, "crosscheck")
    program, x = shallow()
    with pytest.raises(InputError, match="more memory than allowed"):
        CKKS(memory_bytes=1 << 20).open(program, "crosscheck")
    with pytest.raises(InputError, match="unknown mode"):
        CKKS().open(program, "checked")  # type: ignore[arg-type]
    session = CKKS().open(program, "crosscheck")
    session.close()
    with pytest.raises(ProtocolError, match="closed"):
        session.run(x[:1].numpy())
