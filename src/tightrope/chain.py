"""One search after another: the network that a bundle holds is the model of the next search.

So `block_relu` goes on below the blocks that seesaw found. The methods know nothing of each other: what the
second one gets is a network like any other, in the form that the first bundle executes.
"""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from tightrope import models
from tightrope.bundle import Bundle
from tightrope.errors import InputError
from tightrope.methods import Finishes
from tightrope.replan import pricing_of
from tightrope.rewrite import method_of
from tightrope.types import Link


def source(spec: str) -> Path | None:
    """The directory of the bundle that `spec` names; None for every other network of `models.resolve`."""
    if spec in models.NAMES or ":" in spec or spec.endswith(".py"):
        return None
    path = Path(os.path.abspath(Path(spec).expanduser()))
    return path if os.sep in spec or os.path.isfile(path / "bundle.json") else None


def located(spec: str) -> str:
    """`models.located`, also of a bundle."""
    return str(source(spec) or models.located(spec))


def resolve(
    spec: str, *, num_classes: int | None, in_channels: int | None, weights: Path | None = None
) -> nn.Module:
    """`models.resolve`, to which a bundle's directory may be given too: its network, as it is executed.

    Raises InputError for a bundle of other classes or channels, of a task of its own, or without a network.
    """
    path = source(spec)
    if path is None:
        return models.resolve(spec, num_classes=num_classes, in_channels=in_channels, weights=weights)
    bundle = Bundle.open(path)
    if bundle.task() is not None:
        raise InputError(
            "the network of this bundle answers a task of its own, not the classes of the data",
            where=str(path),
            fix="a bundle that was made without --classes, --superclasses and --new-data",
        )
    about = bundle.about
    for key, wanted in (("num_classes", num_classes), ("in_channels", in_channels)):
        if wanted is not None and wanted != about.get(key):
            raise InputError(
                "the network of this bundle is for other images",
                where=str(path),
                got=f"{key}={wanted}",
                allowed=about.get(key),
                fix=f"--data {about.get('data')}",
            )
    if not (path / "model.safetensors").is_file():
        raise InputError(
            "the bundle holds a plan and no network yet", where=str(path), fix=f"tightrope finetune {path}"
        )
    net = finished(bundle, bundle.model())
    if weights is not None:
        models.load_weights(net, weights.expanduser())
    return net.eval()


def finished(bundle: Bundle, model: nn.Module) -> nn.Module:
    """A network of the bundle in the form that its method wants executed."""
    plan = bundle.plan()
    method = method_of(plan)
    if isinstance(method, Finishes):
        return method.finish(model, plan.input_shape, pricing_of(bundle))
    return model


def links(spec: str, input_shape: tuple[int, ...]) -> tuple[Link, ...]:
    """The searches that the network `spec` came out of, the first one first; () if of no bundle.

    Raises InputError for a bundle of images of another shape.
    """
    path = source(spec)
    if path is None:
        return ()
    plan = Bundle.open(path).plan()
    if plan.input_shape != input_shape:
        raise InputError(
            "the network of this bundle is for other images",
            where=str(path),
            got=f"images of {input_shape}",
            allowed=plan.input_shape,
        )
    own = Link(
        bundle=str(path), method=plan.method, budget=plan.budget, base=plan.base, base_sha256=plan.base_sha256
    )
    return (*plan.chain, own)
