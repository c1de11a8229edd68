"""Which network every sample of a batch goes through: one decision per stage and block, sample by sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tightrope.methods.binas.space import Space
from tightrope.solve.staged import Choice


@dataclass(frozen=True)
class Paths:
    """depths: int64 (N, stages), numbers of blocks. options: int64 (N, blocks of all stages at full depth).

    Options of blocks that a sample's depth leaves out mean nothing.
    """

    depths: Tensor
    options: Tensor

    def __len__(self) -> int:
        return len(self.depths)

    def to(self, device: torch.device) -> Paths:
        return Paths(self.depths.to(device), self.options.to(device))

    def __getitem__(self, samples: slice | Tensor) -> Paths:
        return Paths(self.depths[samples], self.options[samples])


def random_paths(space: Space, samples: int, generator: torch.Generator | None = None) -> Paths:
    """Every decision uniform by itself, as `Space.random` draws them, and balanced: over the samples, the
    values of one decision occur equally often, up to one. `generator` None: torch's own.
    """

    def balanced(count: int) -> Tensor:
        start = torch.randint(count, (1,), generator=generator)
        return (torch.randperm(samples, generator=generator) + start) % count

    depths = [torch.tensor(stage.depths)[balanced(len(stage.depths))] for stage in space.stages]
    options = [balanced(len(space.options)) for _ in range(blocks(space))]
    return Paths(torch.stack(depths, 1), torch.stack(options, 1))


def same_path(space: Space, choice: Choice, samples: int) -> Paths:
    """All samples through the network of `choice`. Raises InputError for one that is not of this space."""
    space.check(choice)
    row = [
        (*options, *[0] * (stage.depths[-1] - len(options)))
        for stage, options in zip(space.stages, choice, strict=True)
    ]
    depths = torch.tensor([len(options) for options in choice])
    return Paths(depths.expand(samples, -1), torch.tensor(sum(row, ())).expand(samples, -1))


def blocks(space: Space) -> int:
    """Of all stages, at full depth."""
    return sum(stage.depths[-1] for stage in space.stages)
