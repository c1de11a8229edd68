"""Polynomials explode beyond their scale: keep inputs within it while training, and freeze it at the end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tightrope.evaluate import evaluating
from tightrope.nn import PolynomialActivation
from tightrope.nn.polynomial import composite

MOMENTUM = 0.01  # of a scale that follows the largest input
BOUND = 1.2  # scales that a polynomial sees in training at most: tuned ones stay bounded up to there
STIFF = 1.05  # a gate that is tame only up to here has no room for its coefficients to move
GROWTH = 2.0  # times its largest value within the scale, which a polynomial in training does not pass
POINTS = 400


def activations(model: nn.Module) -> dict[str, PolynomialActivation]:
    return {name: m for name, m in model.named_modules() if isinstance(m, PolynomialActivation)}


def start(model: nn.Module, scales: Literal["static", "ema", "dynamic"]) -> None:
    """Let the scales of a network in training stay, follow its inputs, or be those of each batch; and bound
    what its polynomials see.

    Coefficients of a gate that explodes right beyond its scale stay as they are: each stage of a minimax
    composite begins exactly where the one before ends, so a step of one of them is enough to leave that.
    """
    for m in activations(model).values():
        m.dynamic, m.momentum, m.bound = scales == "dynamic", MOMENTUM if scales == "ema" else 0.0, tame(m)
        if not steerable(m):
            m.stages.requires_grad_(False)


def steerable(m: PolynomialActivation) -> bool:
    """Whether the coefficients can be trained: see `start`."""
    return not m.gated or tame(m) > STIFF


def tame(m: PolynomialActivation) -> float:
    """How many scales away, from 1 to BOUND, the polynomial is at most GROWTH times its largest value within
    the scale. Minimax composites leave 1 at once, and a few powers later a float."""
    with torch.no_grad():
        u = torch.linspace(0, BOUND, POINTS + 1, dtype=torch.float64)
        stages = [stage.detach().cpu().double() for stage in m.stages]
        channels = max(len(stage) if stage.dim() == 2 else 1 for stage in stages)
        both = torch.cat([u, -u])[:, None].expand(-1, channels)
        value = composite(stages, both)[-1].abs().nan_to_num(torch.inf).amax(1).view(2, -1).amax(0)
    wild = value > GROWTH * value[u <= 1].max()
    return max(1.0, float(u[~(wild.cumsum(0) > 0)].max()))


def freeze(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Fix every scale that is that of a batch to the largest input over `batches`, in evaluation mode."""
    found = {m: 0.0 for m in activations(model).values() if m.dynamic}
    if not found:
        return

    def note(m: Any, args: tuple[Tensor]) -> None:
        found[m] = max(found[m], float(args[0].abs().max()))

    hooks = [m.register_forward_pre_hook(note) for m in found]
    try:
        with evaluating(model), torch.no_grad():
            for x, _ in batches:
                model(x)
    finally:
        for hook in hooks:
            hook.remove()
    for m, largest in found.items():
        m.freeze(largest or 1.0)


class Reach:
    """Watches the inputs of a network's polynomial activations; the hooks live as long as it does."""

    def __init__(self, model: nn.Module) -> None:
        self.parts: list[Tensor] = []
        self.count = 0
        for m in activations(model).values():
            self.count += 1
            m.register_forward_pre_hook(self._note)

    def _note(self, m: Any, args: tuple[Tensor]) -> None:
        if m.training and not m.dynamic:
            over = (args[0].float().abs() / m.scale.clone() - 1).clamp_min(0)
            self.parts.append(over.square().flatten(1).sum(1).mean())

    def loss(self) -> Tensor | float:
        """Mean over the activations of the squared excess over the scale, summed over an image's values.

        Call it after the network has seen a batch; 0 where scales are those of the batch.
        """
        parts, self.parts = self.parts, []
        return sum(parts) / self.count if parts else 0.0
