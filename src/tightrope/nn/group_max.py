"""A network's classes seen as fewer labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class GroupMax(nn.Module):
    """(N, classes) to (N, labels): the highest output among the classes of each label.

    Its argmax is the network's own answer where it may only answer within the groups.
    """

    def __init__(self, groups: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.groups = tuple(tuple(group) for group in groups)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, list(group)].amax(1) for group in self.groups], 1)
