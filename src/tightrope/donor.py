"""A trained network and its images, read once for whatever a method is to make of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from tightrope import chain
from tightrope import data as datasets
from tightrope.data import Data
from tightrope.evaluate import chance
from tightrope.graph import Graph, trace
from tightrope.methods import Learner, Method, configure
from tightrope.runtimes import Pricing, runtime_type
from tightrope.types import Json, Link


@dataclass(frozen=True)
class Donor:
    """`about` is what a bundle says of them; `chain`: the searches that the network came out of."""

    net: nn.Module
    graph: Graph
    images: Data
    method: Method | Learner
    cost: Pricing
    about: Mapping[str, Json]
    chain: tuple[Link, ...]


def open_donor(
    *,
    model: str,
    data: str,
    method: str,
    config: Mapping[str, Json] | None = None,
    weights: Path | None = None,
    root: Path | None = None,
    image_size: int | None = None,
    runtime: str | None = None,
    pricing: Mapping[str, Json] | None = None,
) -> Donor:
    """See `pipeline.search`. Raises a TightropeError when one of them cannot be used."""
    chosen: Method | Learner = configure(method, config or {})
    priced_by = runtime or chosen.runtime
    cost: Pricing = runtime_type(priced_by)().pricing(**(pricing or {}))
    images = datasets.load(data, root=root, image_size=image_size)
    classes, channels = len(images.classes), images.input_shape[0]
    earlier = chain.links(model, images.input_shape)
    net = chain.resolve(model, num_classes=classes, in_channels=channels, weights=weights)
    about = {
        "model": chain.located(model),
        "num_classes": classes,
        "in_channels": channels,
        "data": datasets.located(data),
        "root": None if root is None else os.path.abspath(root),
        "image_size": image_size,
        "runtime": priced_by,
        "pricing": dict(cost.settings),
    }
    return Donor(net, trace(net, images.input_shape), images, chosen, cost, about, earlier)


def warn_of_chance(what: str, net: nn.Module, images: Data, warn: Callable[[str], object], fix: str) -> None:
    """Say it if the network is no better than guessing on validation images."""
    recall, luck = chance(net, images)
    if recall <= luck:
        warn(
            f"{what} classifies no better than chance: {recall:.1%} of the validation images, classes "
            f"counting the same.\n{fix}"
        )
