"""Put other modules at the sites of a graph; name a network by its content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx, nn

from tightrope.errors import BundleError, InputError, near
from tightrope.graph import Graph, trace
from tightrope.types import Json, Site

Rewrite = Callable[[Site, nn.Module, Json], nn.Module]


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hash of every name, shape, type and byte."""
    digest = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def model_sha256(model: nn.Module) -> str:
    """The identity of a trained network: its tensors, and what they do not show. These are the name, kind
    and settings of every module, and, once it is traced, every call in order.
    """
    digest = hashlib.sha256(tensors_sha256(model.state_dict()).encode())
    for name, module in model.named_modules():
        if name:  # a traced network is of another class than the one it came from
            kind, patches = type(module).__qualname__, getattr(module, "patches", "")
            digest.update(f"{name}:{kind}({module.extra_repr()}){patches}\n".encode())
    if isinstance(model, fx.GraphModule):
        for node in model.graph.nodes:
            target = getattr(node.target, "__name__", node.target)
            digest.update(f"{node.name}={node.op} {target}{node.args}{node.kwargs}\n".encode())
    return digest.hexdigest()


def place(graph: Graph, choices: Mapping[str, Json], rewrite: Rewrite) -> Graph:
    """Put `rewrite(site, module, choice)` at every chosen site of a fresh copy of the graph.

    What is put there may have sites of its own, whose choices are among `choices` too.

    Raises InputError for a site that the network does not have, BundleError for a choice of a wrong form.
    """
    module = trace(graph.module, graph.input_shape).module
    sites = {site.name: site for site in graph.sites}
    later = {name: choice for name, choice in choices.items() if name not in sites}
    if later and len(later) == len(choices):
        name = next(iter(later))
        raise InputError(
            "the plan names a site that the network does not have", got=name, allowed=near(name, sites)
        )
    for name in [name for name in choices if name in sites]:
        try:
            new = rewrite(sites[name], module.get_submodule(name), choices[name])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BundleError(
                "a choice of the plan cannot be read", where=name, got=repr(choices[name])[:80]
            ) from error
        module.set_submodule(name, new.eval())
    placed = trace(module, graph.input_shape)
    return place(placed, later, rewrite) if later else placed
