"""Which channels of a network live and die together, from torch-pruning's dependency groups."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, fx, nn

from tightrope.errors import InputError, TraceError
from tightrope.nn.masked import Channels

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def find_channels(model: fx.GraphModule, input_shape: tuple[int, ...]) -> Channels:
    """The units of a traced network; channels of its outputs belong to none.

    Torch-pruning (Fang et al. 2023) says what depends on what. A grouped convolution's groups stay whole, so
    that what remains is again a grouped convolution. Raises InputError without torch-pruning, TraceError
    for a network that it cannot follow.
    """
    net = copy.deepcopy(model).requires_grad_()
    groups = list(_groups(net, input_shape))
    last = _last(model)
    ids: dict[tuple[str, str, int], int] = {}
    merged = _Merged()
    for members in groups:
        if any(name in last and side == "out" for name, side, _, _ in members):
            continue
        base = merged.add(1 + max(root for *_, roots in members for root in roots))
        for name, side, at, roots in members:
            for channel, root in zip(at, roots, strict=True):
                before = ids.setdefault((name, side, channel), base + root)
                merged.join(before, base + root)
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            _whole_groups(name, layer, ids, merged)
    numbers = merged.numbers(ids.values())
    sides: dict[str, dict[str, Tensor]] = {"out": {}, "into": {}}
    for (name, side, channel), unit in ids.items():
        table = sides[side]
        if name not in table:
            table[name] = torch.full((_size(net.get_submodule(name), side),), -1)
        table[name][channel] = numbers[merged.root(unit)]
    chains = {tuple(sorted(set(v.tolist()) - {-1})) for v in sides["out"].values() if (v >= 0).all()}
    return Channels(len(set(numbers.values())), sides["out"], sides["into"], tuple(sorted(chains)))


def _last(model: fx.GraphModule) -> set[str]:
    """The layers whose outputs the network returns, however pooled, added or reshaped."""
    waiting, found = [next(n for n in model.graph.nodes if n.op == "output")], set()
    while waiting:
        for node in waiting.pop().all_input_nodes:
            layer = model.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(layer, nn.Conv2d | nn.Linear):
                found.add(str(node.target))
            else:
                waiting.append(node)
    return found


Members = list[tuple[str, str, list[int], list[int]]]  # layer, side, its channels, the group's channels


def _groups(net: fx.GraphModule, input_shape: tuple[int, ...]) -> Iterable[Members]:
    try:
        pruning: Any = import_module("torch_pruning")
    except ImportError as error:
        raise InputError(
            "whole channels need torch-pruning", got=str(error), fix="pip install 'tightrope[reengineer]'"
        ) from error
    names = {module: name for name, module in net.named_modules()}
    example = torch.randn(2, *input_shape, generator=torch.Generator().manual_seed(0))
    try:
        graph = pruning.DependencyGraph().build_dependency(net, example_inputs=example, verbose=False)
        found = list(graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]))
    except Exception as error:  # torch-pruning raises many kinds
        raise TraceError("torch-pruning cannot follow the network", got=str(error)[:200]) from error
    for group in found:
        members = []
        for item in group:
            module = item.dep.target.module
            if module not in names or not isinstance(module, (nn.Conv2d, nn.Linear, *NORMS)):
                continue
            out = isinstance(module, NORMS) or graph.is_out_channel_pruning_fn(item.dep.handler)
            roots = item.root_idxs if item.root_idxs is not None else item.idxs
            members.append((names[module], "out" if out else "into", list(item.idxs), list(roots)))
        yield members


def _whole_groups(name: str, layer: nn.Conv2d, ids: dict[tuple[str, str, int], int], merged: _Merged) -> None:
    """Inputs and outputs of each group of a grouped (or depthwise) convolution become one unit."""
    for side, size in (("out", layer.out_channels), ("into", layer.in_channels)):
        each = size // layer.groups
        for channel in range(size):
            first = ids.get((name, "out", channel // each * (layer.out_channels // layer.groups)))
            if first is not None:  # torch-pruning names the outputs of a depthwise convolution only
                merged.join(first, ids.setdefault((name, side, channel), first))


def _size(layer: nn.Module, side: str) -> int:
    words = {"out": ("out_channels", "out_features", "num_features"), "into": ("in_channels", "in_features")}
    return next(int(getattr(layer, word)) for word in words[side] if hasattr(layer, word))


class _Merged:
    """Disjoint sets of channels."""

    def __init__(self) -> None:
        self.parent: list[int] = []

    def add(self, count: int) -> int:
        base = len(self.parent)
        self.parent += range(base, base + count)
        return base

    def root(self, k: int) -> int:
        while self.parent[k] != k:
            self.parent[k] = k = self.parent[self.parent[k]]
        return k

    def join(self, a: int, b: int) -> None:
        self.parent[self.root(b)] = self.root(a)

    def numbers(self, used: Iterable[int]) -> dict[int, int]:
        return {root: k for k, root in enumerate(sorted({self.root(unit) for unit in used}))}
