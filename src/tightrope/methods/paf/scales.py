"""What the scales of a chosen network are worth on images that did not set them."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from tightrope.data import Data
from tightrope.evaluate import count_hits
from tightrope.reach import activations

IMAGES = 1000  # of the validation part, at most


def compare(model: nn.Module, data: Data, batch_size: int) -> tuple[str, ...]:
    """Validation accuracy of a rewritten network with static scales and with those of each batch (SS and DS
    of SmartPAF), and how many inputs lie beyond the static ones. Two passes, no training; the scales of
    `model` are dynamic afterwards.
    """
    sites = activations(model)
    beyond, seen = dict.fromkeys(sites, 0), dict.fromkeys(sites, 0)

    def count(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        beyond[name] += int((~(args[0].abs() <= module.scale)).sum())  # what exploded counts too
        seen[name] += args[0].numel()

    hooks = [module.register_forward_pre_hook(partial(count, name)) for name, module in sites.items()]
    static, images = count_hits(model, data.batches("validation", batch_size, limit=IMAGES))
    for hook in hooks:
        hook.remove()
    for module in sites.values():
        module.dynamic = True
    dynamic, _ = count_hits(model, data.batches("validation", batch_size, limit=IMAGES))
    return (
        f"of {images:,} validation images, before training, {static / images:.1%} are right with the plan's "
        f"static scales (SS), {dynamic / images:.1%} with those of each batch of {batch_size} (DS)",
        _beyond(beyond, sum(seen.values())),
    )


def _beyond(found: dict[str, int], seen: int) -> str:
    where = [name for name, count in found.items() if count]
    if not where:
        return f"none of {seen:,} inputs of polynomials lies beyond its static scale there"
    most = max(where, key=lambda name: found[name])
    return (
        f"{sum(found.values()):,} of {seen:,} inputs of polynomials lie beyond their static scale there, at "
        f"{len(where)} of {len(found)} sites, most at {most} ({found[most]:,})"
    )
