"""A tiny network and made-up data for the tests of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tightrope.finetune import Recipe
from tightrope.nn import BlockReLU

Record = dict[str, Any]
CLASSES = 4


@dataclass(frozen=True)
class Stripes:
    """Noise with a bright row: its position is the label. Calls `at` before every training batch."""

    train: int = 96
    at: Callable[[int], None] = lambda k: None
    name: str = "stripes"
    input_shape: tuple[int, int, int] = (1, 8, 8)

    def size(self, split: str) -> int:
        return {"train": self.train, "validation": 64, "test": 64}[split]

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        augment: bool = False,
        limit: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(len(split))
        y = torch.randint(0, CLASSES, (self.size(split),), generator=generator)
        x = torch.randn(len(y), 1, 8, 8, generator=generator) * 0.5
        x[torch.arange(len(y)), 0, 2 * y] += 1.0
        draws = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(y), generator=draws) if shuffle else torch.arange(len(y))
        if augment:
            x = x + 0.1 * torch.randn(x.shape, generator=draws)
        mine = order[:limit][rank::world]
        for k, part in enumerate(mine.split(batch_size)):
            if split == "train":
                self.at(k)
            yield x[part], y[part]


def network(seed: int = 0, patch: tuple[int, int] = (2, 2)) -> nn.Sequential:
    """Batch-norm, dropout and BlockReLU: everything whose state could be lost."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            BlockReLU([(1, 1), patch, (1, 2), (0, 0)] * 2),
            nn.Dropout(0.1),
            nn.Conv2d(8, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, CLASSES),
        ).eval()


QUICK = Recipe(epochs=3, batch_size=16, lr=0.1, ema=0.9, accelerator="cpu")


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def without_time(records: list[Record]) -> list[Record]:
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]
