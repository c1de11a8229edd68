"""What the scales of a chosen network are worth on images that did not set them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from tightrope.data import Data
from tightrope.evaluate import outputs_of
from tightrope.methods import Progress
from tightrope.reach import activations

IMAGES = 1000  # of the validation part, at most


def compare(model: nn.Module, data: Data, batch_size: int, progress: Progress) -> tuple[str, ...]:
    """Validation accuracy of a rewritten network with static scales and with those of each batch (SS and DS
    of SmartPAF), and how many inputs lie beyond the static ones. Two passes, no training; the scales of
    `model` are dynamic afterwards. Without the accuracy, and in one pass, where the outputs are not (N,
    classes).
    """
    sites = activations(model)
    beyond, seen = dict.fromkeys(sites, 0), dict.fromkeys(sites, 0)

    def count(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        beyond[name] += int((~(args[0].abs() <= module.scale)).sum())  # what exploded counts too
        seen[name] += args[0].numel()

    hooks = [module.register_forward_pre_hook(partial(count, name)) for name, module in sites.items()]
    static, images, classes = _hits(model, data, batch_size, partial(progress, "trial of static scales"))
    for hook in hooks:
        hook.remove()
    found = _beyond(beyond, sum(seen.values()))
    if not classes:
        return f"{images:,} validation images: outputs that are not (N, classes) have no accuracy", found
    for module in sites.values():
        module.dynamic = True
    dynamic, *_ = _hits(model, data, batch_size, partial(progress, "trial of scales of each batch"))
    return (
        f"of {images:,} validation images, before training, {static / images:.1%} are right with the plan's "
        f"static scales (SS), {dynamic / images:.1%} with those of each batch of {batch_size} (DS)",
        found,
    )


def _hits(
    model: nn.Module, data: Data, batch_size: int, progress: Callable[[int, int], None]
) -> tuple[int, int, bool]:
    """(images classified correctly, images, whether outputs are (N, classes))."""
    hits, seen, classes = 0, 0, True
    of = min(IMAGES, data.size("validation"))
    for outputs, y in outputs_of(model, data.batches("validation", batch_size, limit=IMAGES)):
        classes = classes and outputs.dim() == 2
        if classes:
            hits += int((outputs.argmax(1) == y).sum())
        seen += len(y)
        progress(seen, of)
    return hits, seen, classes


def _beyond(found: dict[str, int], seen: int) -> str:
    where = [name for name, count in found.items() if count]
    if not where:
        return f"none of {seen:,} inputs of polynomials lies beyond its static scale there"
    most = max(where, key=lambda name: found[name])
    return (
        f"{sum(found.values()):,} of {seen:,} inputs of polynomials lie beyond their static scale there, at "
        f"{len(where)} of {len(found)} sites, most at {most} ({found[most]:,})"
    )
