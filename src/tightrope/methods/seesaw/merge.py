"""The same network with fewer operations: convolutions that follow or accompany each other become one.

What is merged is what costs less that way. Results differ by rounding alone: a merge that would not be exact
at the border of the map is not made.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from tightrope.errors import TraceError
from tightrope.graph import Graph, trace
from tightrope.methods.seesaw.convolutions import (
    Geometry,
    Map,
    added,
    after,
    averaging,
    beside,
    composed,
    convolution,
    geometry,
    unit,
)
from tightrope.program import AvgPool2d, Op

Price = Callable[[Op], float]
TOLERANCE = 1e-4  # of every logit of the float32 result
ROUNDING = 4.0  # times that of the given network in float32, where that alone takes up the tolerance
EXAMPLES = 8
ADDS = (operator.add, torch.add)


@dataclass(frozen=True)
class Path:
    """From a value to a leaf through `nodes`, in order; each but the leaf is read by the next alone."""

    source: fx.Node
    nodes: tuple[fx.Node, ...]
    shape: Geometry


def merge(model: nn.Module, input_shape: tuple[int, ...], price: Price) -> fx.GraphModule:
    """A copy of `model` (evaluation mode) with batch-norm folded and convolutions merged where `price` falls.

    Raises TraceError for a network that cannot be traced, or if a logit of the float32 result is apart from
    the given network's in float64 by `TOLERANCE` or more, which is more than rounding.
    """
    graph = trace(model, input_shape)
    module = _Merging(graph, price).run().float()
    example = torch.randn(EXAMPLES, *input_shape, generator=torch.Generator().manual_seed(0))
    given = graph.module.float()
    with torch.no_grad():
        found, rounded = module(example), given(example)
        expected = given.double()(example.double())
    apart = float((expected - found).abs().max())
    if not apart < max(TOLERANCE, ROUNDING * float((expected - rounded).abs().max())):
        raise TraceError("merging changed the network: this is a bug", got=f"outputs apart by {apart:.3g}")
    return module


class _Merging:
    def __init__(self, graph: Graph, price: Price) -> None:
        self.price = cache(price)
        self.module = trace(graph.module, graph.input_shape).module.double()
        self.shapes = {n: graph.shapes[n.name] for n in self.module.graph.nodes if n.name in graph.shapes}
        self.count = 0

    def run(self) -> fx.GraphModule:
        self._fold()
        while self._follow() or self._accompany():
            self.module.graph.eliminate_dead_code()
        self.module.delete_all_unused_submodules()
        self.module.recompile()
        return self.module

    def _fold(self) -> None:
        """Every batch-norm into the convolution before it or a convolution of its own; every module once."""
        for node in list(self.module.graph.nodes):
            found = self._module(node)
            if isinstance(found, nn.Identity | nn.Dropout | nn.Dropout2d):
                self._replace(node, node.args[0])
            elif isinstance(found, nn.BatchNorm2d) and found.running_var is not None:
                before = node.args[0]
                conv = self._module(before) if len(before.users) == 1 else None
                if isinstance(conv, nn.Conv2d):
                    folded, start = _normed(conv, found), before.args[0]
                else:
                    folded, start = _normed(unit(found.num_features).module(), found), before
                self._replace(node, self._insert(node, start, folded))
        self.module.graph.eliminate_dead_code()

    def _follow(self) -> bool:
        """Two convolutions in a row, where one costs no more."""
        for node in self.module.graph.nodes:
            shape = self._geometry(node)
            if shape is None or node.args[0] not in self.shapes:
                continue
            before = node.args[0]
            first = self._geometry(before)
            if first is None or len(before.users) > 1:
                continue
            whole = after(first, shape)
            if whole is None or self._price(node, whole) > self._cost([before, node]):
                continue
            one, two = self._map(before), self._map(node)
            assert one is not None and two is not None
            self._replace(node, self._insert(node, before.args[0], composed(one, two).module()))
            return True
        return False

    def _accompany(self) -> bool:
        """Paths from one value that are added: those with the smallest kernels, as many as pay off."""
        for root in self.module.graph.nodes:
            if not self._is_add(root) or (len(root.users) == 1 and self._is_add(next(iter(root.users)))):
                continue
            leaves = list(self._leaves(root))
            groups: dict[tuple[fx.Node, tuple[int, int]], dict[int, Path]] = {}
            for k, leaf in enumerate(leaves):
                for path in self._paths(leaf):
                    groups.setdefault((path.source, path.shape.stride), {})[k] = path
            best = max(
                (self._saving(root, g) for g in groups.values()), default=(-1.0, {}), key=lambda s: s[0]
            )
            if best[0] >= 0 and best[1]:
                self._rebuild(root, leaves, best[1])
                return True
        return False

    def _saving(self, root: fx.Node, group: dict[int, Path]) -> tuple[float, dict[int, Path]]:
        """What merging the best choice of these paths saves, and that choice; (-1, {}) if none does."""
        order = sorted(group, key=lambda k: max(group[k].shape.kernel))
        found: tuple[float, dict[int, Path]] = (-1.0, {})
        for count in range(1, len(order) + 1):
            chosen = {k: group[k] for k in order[:count]}
            if sum(max(len(path.nodes), 1) for path in chosen.values()) < 2:
                continue
            whole = beside([path.shape for path in chosen.values()])
            source = next(iter(chosen.values())).source
            if whole.size(self.shapes[source][1:]) != self.shapes[root][1:]:  # type: ignore[arg-type]
                continue
            spent = sum(self._cost(list(path.nodes)) for path in chosen.values())
            found = max(found, (spent - self._price(root, whole), chosen), key=lambda s: s[0])
        return found

    def _rebuild(self, root: fx.Node, leaves: list[fx.Node], chosen: dict[int, Path]) -> None:
        paths = list(chosen.values())
        merged = self._insert(root, paths[0].source, added([self._along(path) for path in paths]).module())
        rest = [leaf for k, leaf in enumerate(leaves) if k not in chosen]
        result = merged
        with self.module.graph.inserting_before(root):
            for leaf in rest:
                result = self.module.graph.call_function(operator.add, (result, leaf))
                self.shapes[result] = self.shapes[root]
        self._replace(root, result)

    def _is_add(self, node: fx.Node) -> bool:
        """Of two maps of one shape."""
        if node.op != "call_function" or node.target not in ADDS or node.kwargs or len(node.args) != 2:
            return False
        shapes = {self.shapes.get(arg) if isinstance(arg, fx.Node) else None for arg in node.args}
        return len(shapes) == 1 and len(shapes.pop() or ()) == 3

    def _leaves(self, node: fx.Node) -> Iterator[fx.Node]:
        for arg in node.args:
            assert isinstance(arg, fx.Node)
            if self._is_add(arg) and len(arg.users) == 1:
                yield from self._leaves(arg)
            else:
                yield arg

    def _paths(self, leaf: fx.Node) -> Iterator[Path]:
        """The leaf itself, and it as one convolution of a value before it, ever further back."""
        shape = unit(self.shapes[leaf][0]).geometry
        yield Path(leaf, (), shape)
        nodes: tuple[fx.Node, ...] = ()
        node = leaf
        while len(node.users) == 1 and (step := self._geometry(node)) is not None:
            whole = after(step, shape)
            if whole is None:
                return
            shape, nodes, node = whole, (node, *nodes), node.args[0]  # type: ignore[assignment]
            yield Path(node, nodes, shape)

    def _along(self, path: Path) -> Map:
        whole = unit(path.shape.inputs)
        for node in path.nodes:
            step = self._map(node)
            assert step is not None
            whole = composed(whole, step)
        return whole

    def _module(self, node: Any) -> nn.Module | None:
        known = isinstance(node, fx.Node) and node.op == "call_module"
        return self.module.get_submodule(str(node.target)) if known else None

    def _geometry(self, node: Any) -> Geometry | None:
        found = self._module(node)
        if isinstance(found, nn.Conv2d):
            return geometry(found)
        if isinstance(found, nn.AvgPool2d):
            made = averaging(found, self.shapes[node][0])
            return None if made is None else made.geometry
        return None

    def _map(self, node: Any) -> Map | None:
        found = self._module(node)
        if isinstance(found, nn.AvgPool2d):
            return averaging(found, self.shapes[node][0])
        return convolution(found) if isinstance(found, nn.Conv2d) else None

    def _cost(self, nodes: list[fx.Node]) -> float:
        """What these nodes cost as they are."""
        spent = 0.0
        for node in nodes:
            found, shape = self._module(node), self._geometry(node)
            assert shape is not None
            if isinstance(found, nn.AvgPool2d):
                op: Op = AvgPool2d(
                    name="pool", inputs=("input",), shape=self.shapes[node], kernel=shape.kernel,
                    stride=shape.stride, padding=shape.padding,
                )  # fmt: skip
            else:
                assert isinstance(found, nn.Conv2d)
                # as it is written: groups and dilation cost less than the map they make
                kernel, groups = (found.kernel_size[0], found.kernel_size[1]), found.groups
                op = replace(shape.op(self.shapes[node][1:]), kernel=kernel, groups=groups)  # type: ignore[arg-type]
            spent += self.price(op)
        return spent

    def _price(self, node: fx.Node, shape: Geometry) -> float:
        return self.price(shape.op(self.shapes[node][1:]))  # type: ignore[arg-type]

    def _insert(self, before: fx.Node, source: Any, made: nn.Conv2d) -> fx.Node:
        self.count += 1
        name = f"merged_{self.count}"
        self.module.add_submodule(name, made.eval())
        with self.module.graph.inserting_before(before):
            node = self.module.graph.call_module(name, (source,))
        self.shapes[node] = self.shapes[before]
        return node

    def _replace(self, old: fx.Node, new: Any) -> None:
        old.replace_all_uses_with(new)
        self.module.graph.erase_node(old)


def _normed(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """Both as one convolution, of the groups and dilation of the first."""
    folded = copy.deepcopy(conv)
    assert norm.running_var is not None and norm.running_mean is not None
    factor: Tensor = (norm.running_var + norm.eps).rsqrt()
    if norm.affine:
        factor = factor * norm.weight.detach()
    shift = -norm.running_mean * factor + (norm.bias.detach() if norm.affine else 0.0)
    before = torch.zeros_like(shift) if conv.bias is None else conv.bias.detach()
    folded.weight = nn.Parameter(conv.weight.detach() * factor[:, None, None, None])
    folded.bias = nn.Parameter(before * factor + shift)
    return folded
