"""Networks of a space as plain modules: the frame that all share, and architectures with all branches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from tightrope.methods.seesaw.operators import build, scale
from tightrope.methods.seesaw.space import STEMS, Aggregate, Architecture, Pool, Space


class Sum(nn.Module):
    """Branches of one input, added."""

    def __init__(self, branches: dict[str, nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleDict(branches)

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = self.branches.values()
        y: Tensor = first(x)
        for branch in rest:
            y = y + branch(x)
        return y


class Join(nn.Module):
    """1x1 convolutions of the stem, the earlier aggregates and a stage to one width and size, added.

    Input: their results in this order; output (N, C, H, W) as the stage.
    """

    def __init__(self, space: Space, stage: int) -> None:
        super().__init__()
        C = space.shape(stage)[0]
        widths = [space.shape(s)[0] for s in range(-1, stage + 1)]
        strides = [2 ** max(stage - k, 0) for k in range(stage + 2)]
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, C, 1, stride, bias=False), nn.BatchNorm2d(C))
            for width, stride in zip(widths, strides, strict=True)
        )

    def forward(self, values: Sequence[Tensor]) -> Tensor:
        y: Tensor = self.parts[0](values[0])
        for part, value in zip(list(self.parts)[1:], list(values)[1:], strict=True):
            y = y + part(value)
        return y


def pooling(pool: Pool, channels: int) -> nn.Module:
    """Halves (N, channels, H, W); the convolution starts as the average."""
    if pool == "max":
        return nn.MaxPool2d(2)
    if pool == "avg":
        return nn.AvgPool2d(2)
    conv = nn.Conv2d(channels, channels, 2, 2, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.eye(channels)[:, :, None, None].expand(-1, -1, 2, 2) / 4)
    return nn.Sequential(conv, nn.BatchNorm2d(channels))


def activation(relu: bool) -> nn.Module:
    return nn.ReLU() if relu else nn.Identity()


class Frame(nn.Module):
    """Stem, stages and aggregates in their places, and a classifier on the mean over the last map.

    Input (N, *space.input_shape), output (N, classes). `blocks` keep shape; `joins` take the results so far
    and that of a stage and halve it.
    """

    def __init__(self, space: Space, blocks: Sequence[nn.Module], joins: Sequence[nn.Module]) -> None:
        super().__init__()
        self.counts = space.blocks
        k = STEMS[space.stem_stride]
        conv = nn.Conv2d(space.input_shape[0], space.stem, k, space.stem_stride, k // 2, bias=False)
        self.stem = nn.Sequential(conv, nn.BatchNorm2d(space.stem))
        widths = [space.shape(stage)[0] for stage in range(-1, len(space.blocks))]
        self.transitions = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 1), nn.BatchNorm2d(b)) for a, b in pairwise(widths)
        )
        self.blocks = nn.ModuleList(blocks)
        self.joins = nn.ModuleList(joins)
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(widths[-1], space.classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        results, done = [x], 0
        for stage, count in enumerate(self.counts):
            x = self.transitions[stage](x)
            for block in list(self.blocks)[done : done + count]:
                x = block(x)
            done += count
            if stage < len(self.joins):
                x = self.joins[stage]([*results, x])
                results.append(x)
        logits: Tensor = self.classifier(torch.flatten(self.mean(x), 1))
        return logits


class Joined(nn.Module):
    """An aggregate whose pool and activation are chosen."""

    def __init__(self, space: Space, stage: int, choice: Aggregate) -> None:
        super().__init__()
        self.join = Join(space, stage)
        self.pool = pooling(choice.pool, space.shape(stage)[0])
        self.act = activation(choice.relu)

    def forward(self, values: Sequence[Tensor]) -> Tensor:
        y: Tensor = self.act(self.pool(self.join(values)))
        return y


def assemble(space: Space, network: Architecture) -> Frame:
    """The plain network of an architecture, weights random, every branch counting the same at first."""
    blocks = []
    for stage, block in zip(space.stages(), network.blocks, strict=True):
        branches = {o: build(o, space.shape(stage)[0], space.borders) for o in block.operators}
        for branch in branches.values():
            scale(branch, 1 / len(branches))
        blocks.append(nn.Sequential(Sum(branches), activation(block.relu)))
    joins = [Joined(space, stage, choice) for stage, choice in enumerate(network.aggregates)]
    for join in joins:
        for part in join.join.parts:
            scale(part, 1 / len(join.join.parts))
    return Frame(space, blocks, joins)
