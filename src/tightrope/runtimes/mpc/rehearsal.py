"""The small network whose sessions tell what a loop alone does not: see `calibrate`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tightrope.program import Add, Conv2d, Program, Relu

LINKS = 4  # of each kind that repeats
RANGE = 8.0  # of every value


def conv(
    i: int,
    o: int,
    k: int,
    n: int,
    groups: int = 1,
    name: str = "conv",
    source: str = "input",
    stride: int = 1,
) -> Conv2d:
    return Conv2d(
        name=name, inputs=(source,), shape=(o, n // stride, n // stride), kernel=(k, k),
        padding=(k // 2,) * 4, stride=(stride, stride), in_channels=i, groups=groups,
    )  # fmt: skip


class Chain:
    """Ops one after the other, in groups by the first letter of their names."""

    def __init__(self, channels: int, n: int) -> None:
        self.input = (channels, n, n)
        self.ops: list[Any] = []

    @property
    def last(self) -> tuple[str, tuple[int, ...]]:
        return (self.ops[-1].name, self.ops[-1].shape) if self.ops else (Program.INPUT, self.input)

    def conv(self, group: str, channels: int, k: int, stride: int = 1) -> None:
        source, (before, n, _) = self.last
        name = f"{group}_conv{len(self.ops)}"
        self.ops.append(conv(before, channels, k, n, name=name, source=source, stride=stride))

    def relu(self, group: str, patch: tuple[int, int]) -> None:
        source, shape = self.last
        name = f"{group}_relu{len(self.ops)}"
        self.ops.append(Relu(name=name, inputs=(source,), shape=shape, patches=(patch,) * shape[0]))

    def add(self, group: str) -> None:
        source, shape = self.last
        self.ops.append(Add(name=f"{group}{len(self.ops)}", inputs=(source, source), shape=shape))

    def program(self) -> Program:
        generator, tensors = np.random.default_rng(0), {}
        for op in self.ops:
            if isinstance(op, Conv2d):
                spread = math.prod(op.weight_shape[1:])
                tensors[f"{op.name}.weight"] = generator.standard_normal(op.weight_shape) / spread
                tensors[f"{op.name}.bias"] = np.zeros(op.shape[0])
        names = [Program.INPUT, *(op.name for op in self.ops)]
        ranges = dict.fromkeys([*names, *(f"{name}:tiles" for name in names)], RANGE)
        return Program(tuple(self.ops), self.input, self.last[0], tensors, ranges)


def session_program() -> Program:
    """A small network: large maps, middling, small ones; then layers after layers, layers after ReLUs of
    small and of larger tiles, and additions."""
    chain = Chain(16, 32)
    chain.conv("big", 16, 3)
    for group, channels, patch in (("big", 16, (2, 2)), ("middling", 32, (1, 1)), ("small", 64, (1, 1))):
        chain.relu(group, patch)
        chain.conv(group, channels, 3)
        chain.relu(group, patch)
        if channels < 64:
            chain.conv(group, 2 * channels, 3, stride=2)
    for _ in range(LINKS):
        chain.conv("layers", 32, 1)
    for group, patch in (("gates", (2, 2)), ("relus", (1, 1))):
        for _ in range(LINKS):
            chain.relu(group, patch)
            chain.conv(group, 32, 1)
    for _ in range(3 * LINKS):
        chain.add("adds")
    return chain.program()
