"""Hold masks within hard limits: the smallest multiplier that meets each of them, found anew at every cut."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tightrope.nn.masked import Bits, Masked

METRICS = ("weights", "macs")
HALVINGS = 24
FAR = 2.0**20
CHEAPEST = 1e-3  # of the mean price: nothing is free


def found(masked: Masked, bits: Bits) -> dict[str, float]:
    """What masks leave, head excluded."""
    with torch.no_grad():
        return {metric: float(kept) for metric, kept in zip(METRICS, masked.kept(bits), strict=True)}


def fits(masked: Masked, bits: Bits, limits: Mapping[str, float]) -> bool:
    spent = found(masked, bits)
    return all(spent[metric] <= limit for metric, limit in limits.items())


def project(masked: Masked, limits: Mapping[str, float]) -> None:
    """Clamp scores to [-1, 1], then lower them just so far that the masks meet every limit.

    A score falls by a multiplier times its price, the derivative of the limited cost by its mask: what the
    Lagrangian of the budget takes from it. The multiplier is the smallest that meets the limit, by bisection,
    so there is none to be tuned.
    """
    with torch.no_grad():
        for score in masked.scores.values():
            score.clamp_(-1, 1)
    for metric, limit in limits.items():
        if found(masked, masked.snapshot())[metric] > limit:
            _lower(masked, metric, limit)


def _lower(masked: Masked, metric: str, limit: float) -> None:
    prices = _prices(masked, metric)

    def lowered(multiplier: float) -> Bits:
        return {name: score.detach() - multiplier * prices[name] > 0 for name, score in masked.scores.items()}

    low, high = 0.0, 1e-2
    while found(masked, lowered(high))[metric] > limit and high < FAR:
        low, high = high, 4 * high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if found(masked, lowered(middle))[metric] <= limit:
            high = middle
        else:
            low = middle
    with torch.no_grad():
        for name, score in masked.scores.items():
            score -= high * prices[name]


def _prices(masked: Masked, metric: str) -> Bits:
    """The derivative of a cost by every mask that is on, where the masks are; 1 on average, and never 0."""
    bits = {name: bit.float().requires_grad_() for name, bit in masked.snapshot().items()}
    torch.autograd.backward(dict(zip(METRICS, masked.kept(bits), strict=True))[metric])
    felt = {
        name: torch.zeros_like(bit) if bit.grad is None else bit.grad * bit.detach()
        for name, bit in bits.items()
    }
    mean = sum(float(f.sum()) for f in felt.values()) / max(
        sum(float((f > 0).sum()) for f in felt.values()), 1
    )
    return {name: (f / mean).clamp(min=CHEAPEST) for name, f in felt.items()}
