"""How to train a rewritten network: a frozen description, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tightrope.errors import InputError

if TYPE_CHECKING:
    import torch

SEED_STRIDE = 1_000_003  # between recipe seeds: neighbouring ones share no epoch's order


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """SGD with Nesterov momentum; `lr` is the peak of a linear warm-up and a cosine to 0.

    `batch_size`: images per step, all devices together. `warmup`: share of the steps. `label`, `distill`:
    weights of the cross-entropy with the labels, and of the distillation from the teacher at `temperature`
    (Hinton et al. 2015, section 2); without a teacher the labels alone count. `smoothing`: share of a label
    that all classes divide. `hints`: weight of drawing the activations at rewritten sites, or others that the
    caller names, to the teacher's (Romero et al. 2015). `ema`: decay per step of the averaged weights, which
    are the result; 0 for none. Of polynomial activations: `coefficients` is their learning rate over that of
    the weights, without decay; `reach` the weight of keeping their inputs within the scales; `scales` says
    whether these stay, follow the largest input as a moving average, or are those of the batch until they are
    frozen at the end; `clip` is the largest norm of a gradient, 0 for any. `limit`: training images an epoch.
    With several
    `devices` or `nodes`, every process runs the calling program (Fabric starts those of its own machine).

    Raises InputError for a value out of range.
    """

    epochs: float = 3
    batch_size: int = 64
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup: float = 0.1
    label: float = 0.1
    smoothing: float = 0.0
    distill: float = 0.9
    temperature: float = 4.0
    hints: float = 1.0
    ema: float = 0.998
    coefficients: float = 0.1
    reach: float = 1.0
    scales: Literal["static", "ema", "dynamic"] = "static"
    clip: float = 1.0
    augment: bool = False
    limit: int | None = None
    seed: int = 0
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    accelerator: str = "auto"
    devices: int = 1
    nodes: int = 1
    channels_last: bool = True

    def __post_init__(self) -> None:
        for name, (holds, allowed) in _RANGES.items():
            value = getattr(self, name)
            if not holds(value):
                raise InputError(f"{name} of the recipe is out of range", got=value, allowed=allowed)
        if self.label + self.distill <= 0:
            raise InputError("the recipe learns from nothing", got="label=0, distill=0")
        if self.batch_size % (self.devices * self.nodes):
            raise InputError(
                "the batch cannot be divided over the devices",
                got=f"batch_size={self.batch_size}",
                allowed=f"a multiple of {self.devices * self.nodes}",
            )

    @property
    def memory_format(self) -> torch.memory_format:
        import torch  # the command line shows these settings without waiting for it

        return torch.channels_last if self.channels_last else torch.contiguous_format


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Of the step numbered `step`, from 0: linear up to `lr`, then half a cosine that ends near 0."""
    warm = round(recipe.warmup * steps)
    if step < warm:
        return recipe.lr * (step + 1) / warm
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def _positive(x: float) -> bool:
    return 0 < x < math.inf


def _not_negative(x: float) -> bool:
    return 0 <= x < math.inf


def _share(x: float) -> bool:
    return 0 <= x < 1


def _count(x: Any) -> bool:
    return isinstance(x, int) and x >= 1


_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("epochs", "lr", "temperature"), (_positive, "positive")),
    **dict.fromkeys(("batch_size", "devices", "nodes"), (_count, "a whole number, 1 or more")),
    **dict.fromkeys(
        ("weight_decay", "label", "distill", "hints", "coefficients", "reach", "clip"),
        (_not_negative, "0 or more"),
    ),
    **dict.fromkeys(("momentum", "warmup", "ema", "smoothing"), (_share, "0 or more, below 1")),
    "limit": (lambda x: x is None or _count(x), "None, or a whole number, 1 or more"),
    "seed": (lambda x: isinstance(x, int) and 0 <= x < 2**32, "a whole number from 0 to 2^32 - 1"),
    "scales": (lambda x: x in ("static", "ema", "dynamic"), "static, ema, dynamic"),
    "precision": (lambda x: x in ("32-true", "bf16-mixed"), "32-true, bf16-mixed"),
}
