"""Put other modules at the sites of a graph; name a network by its content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import nn

from tightrope.errors import BundleError, InputError, near
from tightrope.graph import Graph, trace
from tightrope.types import Json, Site

Rewrite = Callable[[Site, nn.Module, Json], nn.Module]


def model_sha256(model: nn.Module) -> str:
    """Hash of every name, shape and byte of the state dict: the identity of a trained network."""
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def place(graph: Graph, choices: Mapping[str, Json], rewrite: Rewrite) -> Graph:
    """Put `rewrite(site, module, choice)` at every chosen site of a fresh copy of the graph.

    Raises InputError for a site that the network does not have, BundleError for a choice of a wrong form.
    """
    module = trace(graph.module, graph.input_shape).module
    sites = {site.name: site for site in graph.sites}
    for name, choice in choices.items():
        if name not in sites:
            raise InputError(
                "the plan names a site that the network does not have", got=name, allowed=near(name, sites)
            )
        try:
            new = rewrite(sites[name], module.get_submodule(name), choice)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BundleError(
                "a choice of the plan cannot be read", where=name, got=repr(choice)[:80]
            ) from error
        module.set_submodule(name, new.eval())
    return trace(module, graph.input_shape)
