"""What sites see and what options cost in accuracy, measured on training images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tightrope.graph import Graph
from tightrope.methods.paf.tuning import Histogram
from tightrope.place import place
from tightrope.types import FloatArray, Json, Site


def histograms(
    graph: Graph, sites: Sequence[Site], images: Iterable[Tensor]
) -> dict[str, tuple[Histogram, float]]:
    """Of the inputs of every site, all gathered by one pass: the histogram and the largest magnitude."""
    found: dict[str, Histogram] = {}
    largest: dict[str, float] = {}

    def note(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        values = args[0].detach().cpu().double().numpy().reshape(-1)
        found[name] = found[name].and_more(values) if name in found else Histogram.of(values)
        largest[name] = max(largest.get(name, 0.0), float(np.abs(values).max(initial=0.0)))

    hooks = [
        graph.module.get_submodule(s.name).register_forward_pre_hook(partial(note, s.name)) for s in sites
    ]
    try:
        with torch.no_grad():
            for x in images:
                graph.module(x)
    finally:
        for hook in hooks:
            hook.remove()
    return {s.name: (found[s.name], largest[s.name] or 1.0) for s in sites}


def distortions(
    graph: Graph,
    options: Mapping[str, Sequence[Json]],
    rewrite: Callable[[Site, nn.Module, Json], nn.Module],
    images: Iterable[Tensor],
    device: torch.device,
) -> Iterator[tuple[str, FloatArray, int]]:
    """By site, for each choice, summed over the images: the mean squared change of the outputs when that site
    alone is replaced. And the number of images. These are on `device`, where the graph need not be.
    """
    batches = list(images)
    network = place(graph, {}, rewrite).module.to(device)
    sites = {s.name: s for s in graph.sites}
    with torch.no_grad():
        wanted = [network(x) for x in batches]
    for name, choices in options.items():
        original, sums = network.get_submodule(name), np.zeros(len(choices))
        for j, choice in enumerate(choices):
            new = rewrite(sites[name], original, choice).eval()
            network.set_submodule(name, new.to(device))
            with torch.no_grad():
                for x, y in zip(batches, wanted, strict=True):
                    sums[j] += float((network(x) - y).double().square().flatten(1).mean(1).sum())
        network.set_submodule(name, original)
        yield name, sums, sum(len(x) for x in batches)
