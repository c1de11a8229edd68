"""What a network costs: weights and multiplications, by the conventions of the field."""

from __future__ import annotations

import math

from torch import nn

from tightrope.graph import Graph


def layers(module: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """Convolutions and linear layers by name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def positions(graph: Graph) -> dict[str, int]:
    """How often one image uses every weight of each layer: output positions, over all calls."""
    counts: dict[str, int] = {}
    known = layers(graph.module)
    for node in graph.module.graph.nodes:
        if node.op == "call_module" and str(node.target) in known:
            name = str(node.target)
            counts[name] = counts.get(name, 0) + math.prod(graph.shapes[node.name][1:])
    return counts


def weights(module: nn.Module) -> int:
    """Weights and biases of convolutions and linear layers; batch-norm is not counted."""
    return sum(p.numel() for layer in layers(module).values() for p in layer.parameters())


def published_macs(graph: Graph) -> int:
    """Multiplications as fvcore counts them and papers print them: weights that are not 0, times positions;
    2 per element of a batch-norm; 1 per element that an adaptive average pool reads.
    """
    total = 0
    used = positions(graph)
    for name, layer in layers(graph.module).items():
        total += int(layer.weight.detach().count_nonzero()) * used.get(name, 0)
    for node in graph.module.graph.nodes:
        if node.op == "call_module":
            called = graph.module.get_submodule(str(node.target))
            size = math.prod(graph.shapes[node.args[0].name]) if node.args[0].name in graph.shapes else 0
            if isinstance(called, nn.BatchNorm2d):
                total += 2 * size
            elif isinstance(called, nn.AdaptiveAvgPool2d):
                total += size
    return total
