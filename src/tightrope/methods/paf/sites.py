"""What sites see and what options cost in accuracy, measured on training images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tightrope.graph import Graph
from tightrope.methods.paf.tuning import Array, Histogram
from tightrope.place import place
from tightrope.types import FloatArray, Json, Site


@dataclass(frozen=True)
class Seen:
    """Of the inputs of one site: all in the histogram; count, sum and sum of squares by channel (C,)."""

    histogram: Histogram
    count: int
    total: Array
    squares: Array
    largest: float

    @classmethod
    def of(cls, values: Array) -> Seen:
        """Of inputs (N, C, ...)."""
        return cls(Histogram.of(values.reshape(-1)), *_sums(values))

    def and_more(self, values: Array) -> Seen:
        count, total, squares, largest = _sums(values)
        return Seen(
            self.histogram.and_more(values.reshape(-1)),
            self.count + count,
            self.total + total,
            self.squares + squares,
            max(self.largest, largest),
        )

    @property
    def mean(self) -> Array:
        return self.total / self.count

    @property
    def deviation(self) -> Array:
        return np.sqrt(np.maximum(self.squares / self.count - self.mean**2, 0))


def _sums(values: Array) -> tuple[int, Array, Array, float]:
    by_channel = np.moveaxis(values, 1, 0).reshape(values.shape[1], -1)
    largest = float(np.abs(values).max(initial=0.0))
    return by_channel.shape[1], by_channel.sum(1), (by_channel**2).sum(1), largest


def histograms(graph: Graph, sites: Sequence[Site], images: Iterable[Tensor]) -> dict[str, Seen]:
    """What every site sees, gathered by one pass."""
    found: dict[str, Seen] = {}

    def note(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        values = args[0].detach().cpu().double().numpy()
        found[name] = found[name].and_more(values) if name in found else Seen.of(values)

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
    return {s.name: found[s.name] for s in sites}


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
