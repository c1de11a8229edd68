"""Which convolutions of a graph become one: decided by shapes and prices alone.

Merging acts on these decisions, and prices ask for them without any weights.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from tightrope.methods.seesaw.convolutions import Geometry, Pair, after, beside, unit
from tightrope.program import Add, AvgPool2d, Op, Program

Shape = tuple[int, ...]
Paths = tuple[tuple[Op, ...], ...]
Price = Callable[[Shape, Paths], float]  # of paths from one value of this shape, whose results are added
ADDS = (operator.add, torch.add)


@dataclass(frozen=True)
class Link:
    """A convolution or an average pool: as it is written, and as one convolution where it is one."""

    op: Op
    shape: Geometry | None


@dataclass(frozen=True)
class Path:
    """From a value to a leaf through `nodes`, in order; each but the leaf is read by the next alone."""

    source: fx.Node
    nodes: tuple[fx.Node, ...]
    shape: Geometry


def written(shape: Geometry, size: Pair, kernel: Pair, dilation: Pair, groups: int) -> Link:
    """A convolution with output (H, W) `size`; its groups and dilation cost less than the map they make."""
    return Link(replace(shape.op(size), kernel=kernel, dilation=dilation, groups=groups), shape)


def pool(shape: Geometry, size: Pair) -> AvgPool2d:
    """The average pool of this geometry."""
    return AvgPool2d(
        name="pool", inputs=("input",), shape=(shape.outputs, *size), kernel=shape.kernel,
        stride=shape.stride, padding=shape.padding,
    )  # fmt: skip


class Reduction:
    """`links` of the nodes that are convolutions or pools, `shapes` (C, H, W) of all values."""

    def __init__(self, graph: fx.Graph, shapes: dict[fx.Node, Shape], price: Price) -> None:
        self.graph, self.shapes, self.price = graph, shapes, price
        self.links: dict[fx.Node, Link] = {}
        self.count = 0

    def write(self, name: str, paths: list[Path]) -> None:
        """Called before `name` takes the place of the sum of these paths: whoever has weights makes it."""

    def append(self, link: Link, source: fx.Node, name: str) -> fx.Node:
        node = self.graph.call_module(name, (source,))
        self.shapes[node], self.links[node] = link.op.shape, link
        return node

    def add(self, one: fx.Node, two: fx.Node) -> fx.Node:
        node = self.graph.call_function(operator.add, (one, two))
        self.shapes[node] = self.shapes[one]
        return node

    def reduce(self) -> None:
        """Merge while that costs no more."""
        while self._follow() or self._accompany():
            for node in reversed(self.graph.nodes):
                if not node.users and (node in self.links or self._is_add(node)):
                    self.graph.erase_node(node)

    def ops(self) -> tuple[Op, ...]:
        """Convolutions, pools and additions that there are now, of a graph of nothing else."""
        names = {node: Program.INPUT if node.op == "placeholder" else node.name for node in self.graph.nodes}
        found: list[Op] = []
        for node in self.graph.nodes:
            inputs = tuple(names[arg] for arg in node.args if isinstance(arg, fx.Node))
            if node in self.links:
                found.append(replace(self.links[node].op, name=node.name, inputs=inputs))
            elif self._is_add(node):
                found.append(Add(name=node.name, inputs=inputs, shape=self.shapes[node]))
        return tuple(found)

    def _follow(self) -> bool:
        """Two convolutions in a row, where one costs no more."""
        for node in self.graph.nodes:
            shape = self._geometry(node)
            if shape is None:
                continue
            before = node.args[0]
            assert isinstance(before, fx.Node)
            first = self._geometry(before)
            if first is None or len(before.users) > 1:
                continue
            source, whole = before.args[0], after(first, shape)
            assert isinstance(source, fx.Node)
            if whole is None or self._whole(source, node, whole) > self._apart(source, [(before, node)]):
                continue
            self._replace(node, self._insert(node, [Path(source, (before, node), whole)]))
            return True
        return False

    def _accompany(self) -> bool:
        """Paths from one value that are added: those with the smallest kernels, as many as pay off."""
        for root in self.graph.nodes:
            if not self._is_add(root) or (len(root.users) == 1 and self._is_add(next(iter(root.users)))):
                continue
            leaves = list(self._leaves(root))
            groups: dict[tuple[fx.Node, Pair], dict[int, Path]] = {}
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
            if whole.size(self._size(source)) != self._size(root):
                continue
            spent = self._apart(source, [path.nodes for path in chosen.values()])
            found = max(found, (spent - self._whole(source, root, whole), chosen), key=lambda s: s[0])
        return found

    def _rebuild(self, root: fx.Node, leaves: list[fx.Node], chosen: dict[int, Path]) -> None:
        result = self._insert(root, list(chosen.values()))
        with self.graph.inserting_before(root):
            for leaf in (leaf for k, leaf in enumerate(leaves) if k not in chosen):
                result = self.add(result, leaf)
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

    def _geometry(self, node: fx.Node) -> Geometry | None:
        link = self.links.get(node)
        return None if link is None else link.shape

    def _size(self, node: fx.Node) -> Pair:
        _, H, W = self.shapes[node]
        return (H, W)

    def _apart(self, source: fx.Node, paths: Sequence[tuple[fx.Node, ...]]) -> float:
        """What these paths cost as they are."""
        ops = tuple(tuple(self.links[node].op for node in nodes) for nodes in paths)
        return self.price(self.shapes[source], ops)

    def _whole(self, source: fx.Node, node: fx.Node, shape: Geometry) -> float:
        """What one convolution in their place costs, with the result of `node`."""
        return self.price(self.shapes[source], ((shape.op(self._size(node)),),))

    def _insert(self, before: fx.Node, paths: list[Path]) -> fx.Node:
        self.count += 1
        name = f"merged_{self.count}"
        self.write(name, paths)
        shape = beside([path.shape for path in paths])
        with self.graph.inserting_before(before):
            return self.append(Link(shape.op(self._size(before)), shape), paths[0].source, name)

    def _replace(self, old: fx.Node, new: fx.Node) -> None:
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)
