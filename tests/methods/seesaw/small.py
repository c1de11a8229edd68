"""A space, images and a teacher so small that a search takes a second."""

from __future__ import annotations

from typing import Any

import torch

from networks import TinyResNet, settle
from tightrope.data import Arrays
from tightrope.graph import trace
from tightrope.methods import CostModel, Learned
from tightrope.methods.seesaw import SeesawMethod
from tightrope.runtimes.mpc import MPC
from tightrope.shard import Shard
from tightrope.types import Budget

SHAPE = (1, 8, 8)
QUICK: dict[str, Any] = {
    "space": "1,1", "width": 4, "operators": "skip,conv_1,conv_3,avg_pool_3", "epochs": 2, "batch_size": 32,
    "branches": 2, "keep": 2, "samples": 64,
}  # fmt: skip


def images(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows, columns or checks, with noise."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (count,), generator=draw)
    rows = torch.arange(8)[:, None].expand(8, 8) % 2
    patterns = torch.stack([rows, rows.T, (rows + rows.T) % 2])[y][:, None]
    noise = torch.randint(0, 120, (count, *SHAPE), generator=draw)
    return (patterns * 130 + noise).to(torch.uint8), y


DATA = Arrays(
    "patterns", ("rows", "columns", "checks"), (0.5,), (0.25,),
    {"train": images(256, 0), "validation": images(96, 1), "test": images(32, 2)},
)  # fmt: skip
COST = MPC().pricing()
SINGLE = Shard()
GRAPH = trace(settle(TinyResNet(channels=1, classes=3), weights=False), SHAPE)


def learn(
    budget: str = "drelus<=700",
    workdir=None,
    progress=lambda *_: None,
    cost: CostModel = COST,
    shard: Shard = SINGLE,
    **config: Any,
) -> Learned:
    method = SeesawMethod(**QUICK | {"distill": 0.0} | config)
    return method.learn(
        GRAPH, DATA, task=None, budget=Budget.parse(budget), cost=cost, workdir=workdir,
        progress=progress, shard=shard,
    )  # fmt: skip
