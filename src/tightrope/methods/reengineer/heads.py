"""The last layer of a re-engineered network: how the donor's outputs become the labels of a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx, nn

from tightrope.errors import InputError
from tightrope.graph import Graph, trace

HeadKind = Literal["slice", "linear", "relu_linear"]
HEADS: tuple[HeadKind, ...] = ("slice", "linear", "relu_linear")
Groups = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Headed:
    """A donor with another head: `name` is the head's linear layer, `trained` whether it learns."""

    model: fx.GraphModule
    name: str
    trained: bool


def attach(graph: Graph, kind: HeadKind, labels: int, groups: Groups, seed: int) -> Headed:
    """A copy of the network that returns `labels` numbers; `groups`: the donor's classes behind each label.

    `slice`: the rows of the donor's last layer, as they are. `linear`: a layer in its place that starts at
    the mean of the rows of each label and learns. `relu_linear`: ReLU and a linear layer after the donor's
    outputs (SeaM), which starts at random by `seed`. Without groups, `linear` starts at random too.

    Raises InputError for a slice where labels are not single classes, and for a network that does not end in
    a linear layer.
    """
    module = trace(graph.module, graph.input_shape).module
    output = next(n for n in module.graph.nodes if n.op == "output").args[0]
    generator = torch.Generator().manual_seed(seed)
    if kind == "relu_linear":
        return _after(module, output, graph, labels, generator)
    name = last_linear(module)
    if name is None:
        raise InputError(
            f"the head {kind!r} replaces a linear layer, and the network ends in something else",
            where=output.name,
            got=type(_layer(module, output)).__name__ if output.op == "call_module" else output.op,
            fix="--set head=relu_linear",
        )
    last = module.get_submodule(name)
    assert isinstance(last, nn.Linear)
    if kind == "slice" and not (groups and all(len(group) == 1 for group in groups)):
        raise InputError(
            "a slice of the donor's outputs needs labels that are one class of the donor each",
            fix="--set head=linear",
        )
    new = nn.Linear(last.in_features, labels)
    with torch.no_grad():
        if groups:
            bias = torch.zeros(last.out_features) if last.bias is None else last.bias
            new.weight.copy_(torch.stack([last.weight[list(group)].mean(0) for group in groups]))
            new.bias.copy_(torch.stack([bias[list(group)].mean() for group in groups]))
        else:
            _random(new, generator)
    module.set_submodule(name, new)
    return Headed(module, name, kind != "slice")


def last_linear(module: fx.GraphModule) -> str | None:
    """The linear layer that a traced network ends in, if it does."""
    node = next(n for n in module.graph.nodes if n.op == "output").args[0]
    while isinstance(_layer(module, node), nn.Identity | nn.Dropout):
        node = node.args[0]
    return str(node.target) if isinstance(_layer(module, node), nn.Linear) else None


def _layer(module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _after(
    module: fx.GraphModule, output: fx.Node, graph: Graph, labels: int, generator: torch.Generator
) -> Headed:
    shape = graph.shapes[output.name]
    if len(shape) != 1:
        raise InputError("the network must return one number per class", got=shape, allowed="(classes,)")
    new = nn.Linear(shape[0], labels)
    _random(new, generator)
    taken = {name for name, _ in module.named_modules()}
    names = [next(n for n in (w, f"{w}_new", f"{w}_task") if n not in taken) for w in ("head_relu", "head")]
    node = output
    for name, layer in zip(names, (nn.ReLU(), new), strict=True):
        module.add_submodule(name, layer)
        with module.graph.inserting_after(node):
            following = module.graph.call_module(name, (node,))
        node.replace_all_uses_with(following, lambda user, made=following: user is not made)  # type: ignore[misc]
        node = following
    module.recompile()
    return Headed(module, names[1], True)


def _random(layer: nn.Linear, generator: torch.Generator) -> None:
    """torch's own start of a linear layer, from a generator of one's own."""
    bound = layer.in_features**-0.5
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-bound, bound, generator=generator)
