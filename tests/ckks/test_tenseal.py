"""Microsoft SEAL, through TenSEAL, as an oracle of the whole encrypted path on a shallow network.

Opt-in: `pip install 'tightrope[crosscheck]'`.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from torch import nn

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
        theirs, executed = session.run(x[:2].numpy())
    assert np.abs(ours - theirs).max() < 1e-3
    assert np.abs(ours - want).max() < 1e-3 and np.abs(want).max() > 0.1
    assert measured.config["mode"] == "crosscheck"
    assert measured.total.ckks_levels == executed.total.ckks_levels


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
