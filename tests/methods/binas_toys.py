"""A small search space, random supernets of it, and images that its networks learn in seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tightrope.data import Arrays
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


@dataclass(frozen=True)
class Textures(Arrays):
    """Noise over one of four textures, which is the label. Calls `at` before every training batch."""

    at: Callable[[], object] = lambda: None

    def batches(self, split: Any, batch_size: int, **kwargs: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in super().batches(split, batch_size, **kwargs):
            if split == "train":
                self.at()
            yield batch


def textures(at: Callable[[], object] = lambda: None, train: int = 96) -> Textures:
    row, column = torch.arange(8)[:, None], torch.arange(8)
    kinds = torch.stack([t.expand(8, 8) % 2 for t in (row, column, row + column, (row // 2) + column // 2)])
    generator = torch.Generator().manual_seed(0)

    def part(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(0, 4, (count,), generator=generator)
        noise = torch.randint(0, 156, (count, 1, 8, 8), generator=generator)
        return (100 * kinds[labels][:, None] + noise).to(torch.uint8), labels

    splits = {"train": part(train), "validation": part(64), "test": part(64)}
    return Textures("textures", tuple("abcd"), (0.5,), (0.25,), splits, at=at)
