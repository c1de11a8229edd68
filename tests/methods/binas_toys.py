"""A small search space and random supernets of it."""

from __future__ import annotations

import torch
from torch import nn

from tightrope.methods.binas.space import Space, Stage
from tightrope.methods.binas.supernet import Norms, Supernet

SPACE = Space(
    "toy", (1, 8, 8), 4, stem=8, stride=1, first=8,
    stages=(Stage(8, 1, (1, 3), "re"), Stage(16, 2, (1, 2), "hs")), last=16, head=16,
    expansions=(1, 3), kernels=(3, 5), ses=(0, 0.5),
)  # fmt: skip


def random_supernet(space: Space = SPACE, norms: Norms = "path", seed: int = 0) -> Supernet:
    """In float64, random also in what training would move: every batch-norm has statistics of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        supernet = Supernet(space, norms)
        for module in supernet.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_(0, 0.3)
    return supernet.double().eval()
