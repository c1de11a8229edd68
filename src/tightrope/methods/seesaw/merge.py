"""The same network with fewer operations: convolutions that follow or accompany each other become one.

What is merged is what costs less that way. Results differ by rounding alone: a merge that would not be exact
at the border of the map is not made.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from tightrope.errors import TraceError
from tightrope.graph import Graph, trace
from tightrope.methods.seesaw.convolutions import Map, added, averaging, composed, convolution, geometry, unit
from tightrope.methods.seesaw.reduction import Link, Path, Price, Reduction, pool, written

TOLERANCE = 1e-4  # of every logit of the float32 result
ROUNDING = 4.0  # times that of the given network in float32, where that alone takes up the tolerance
EXAMPLES = 8


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


class _Merging(Reduction):
    def __init__(self, graph: Graph, price: Price) -> None:
        self.module = trace(graph.module, graph.input_shape).module.double()
        shapes = {n: graph.shapes[n.name] for n in self.module.graph.nodes if n.name in graph.shapes}
        super().__init__(self.module.graph, shapes, cache(price))

    def run(self) -> fx.GraphModule:
        self._fold()
        self.links = {n: link for n in self.graph.nodes if (link := self._link(n)) is not None}
        self.reduce()
        self.module.delete_all_unused_submodules()
        self.module.recompile()
        return self.module

    def write(self, name: str, paths: list[Path]) -> None:
        self.module.add_submodule(name, added([self._along(path) for path in paths]).module().eval())

    def _fold(self) -> None:
        """Every batch-norm into the convolution before it or a convolution of its own; every module once."""
        for node in list(self.graph.nodes):
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
                name = f"folded_{node.name}"
                self.module.add_submodule(name, folded.eval())
                with self.graph.inserting_before(node):
                    new = self.graph.call_module(name, (start,))
                self.shapes[new] = self.shapes[node]
                self._replace(node, new)
        self.graph.eliminate_dead_code()

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

    def _link(self, node: fx.Node) -> Link | None:
        found = self._module(node)
        if isinstance(found, nn.Conv2d) and (shape := geometry(found)) is not None:
            (kh, kw), (dh, dw) = found.kernel_size, found.dilation
            return written(shape, self._size(node), (kh, kw), (dh, dw), found.groups)
        if isinstance(found, nn.AvgPool2d) and (made := averaging(found, self.shapes[node][0])) is not None:
            return Link(pool(made.geometry, self._size(node)), made.geometry)
        return None

    def _map(self, node: Any) -> Map | None:
        found = self._module(node)
        if isinstance(found, nn.AvgPool2d):
            return averaging(found, self.shapes[node][0])
        return convolution(found) if isinstance(found, nn.Conv2d) else None


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
