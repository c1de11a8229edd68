"""Training the supernet: what moves operators' weights, how operators go, and which run may be resumed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from methods.seesaw.small import DATA, QUICK, learn
from tightrope.methods.seesaw import SeesawMethod, objectives
from tightrope.methods.seesaw.decide import Judge, Wanted
from tightrope.methods.seesaw.prices import Prices
from tightrope.methods.seesaw.search import Search
from tightrope.methods.seesaw.supernet import Supernet
from tightrope.runtimes.mpc import MPC
from tightrope.shard import Shard

COST = MPC().pricing()
OPERATORS = "skip,conv_1,conv_3,van_conv_3"


def a_search(shard: Shard = Shard(), **config: Any) -> Search:
    method = SeesawMethod(**QUICK | {"distill": 0.0, "operators": OPERATORS, "epochs": 4} | config)
    space = method.space_for(DATA.input_shape, len(DATA.classes))
    torch.manual_seed(0)
    net = Supernet(space)
    judge = Judge(net, [next(DATA.batches("validation", 64))])
    wanted, prices = Wanted("drelus", 700, 1e9, 1.0), Prices(space, COST, COST)
    return method._search(net, DATA, prices, wanted, None, judge, lambda *_: None, shard)


def trained(**config: Any) -> torch.Tensor:
    """The weights of the operators, one row a block."""
    search = a_search(**config)
    search.run(None, {})
    return torch.stack([m.weights.detach() for m in search.net.mixtures])


@pytest.mark.parametrize("mode", ["reference", "dual"])
def test_the_variance_phase_drives_weights_apart(mode):
    plain, apart = (trained(mode=mode, keep=4, variance=v) for v in (0.0, 10.0))
    assert (apart.var(1) > 2 * plain.var(1)).all()


def test_the_published_regulariser_moves_the_weights_of_operators(monkeypatch):
    """In the release it did not. Against the same search with one operator at a multiple of its cost."""
    before = trained(mode="reference", lr=0.05)
    right = objectives.release_macs
    monkeypatch.setattr(
        objectives, "release_macs", lambda o, channels: right(o, channels) * (1e4 if o == "conv_3" else 1)
    )
    after = trained(mode="reference", lr=0.05)
    conv_3 = OPERATORS.split(",").index("conv_3")
    assert (after - before)[:, conv_3].abs().min() > 1e-2


def test_operators_go_where_a_step_takes_all_of_them():
    search = a_search(branches=0)
    search.run(None, {})
    assert [len(m.alive) for m in search.net.mixtures] == [2, 2]
    whole = a_search(mode="reference")
    whole.run(None, {})
    assert [len(m.alive) for m in whole.net.mixtures] == [4, 4]
