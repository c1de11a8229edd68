"""Hold masks within hard limits: the smallest multiplier that meets each of them, found anew at every cut."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tightrope.nn.masked import CHANNELS, Bits, Masked

METRICS = ("weights", "macs")
HALVINGS = 24
FAR = 2.0**20
CHEAPEST = 1e-3
SPARED = 1 / 8  # of the channels of a tensor, where the limit allows it
BARE = 1e-6  # how far from 0 a score is put on its side


def found(masked: Masked, bits: Bits) -> dict[str, float]:
    """What masks leave, head excluded."""
    with torch.no_grad():
        return {metric: float(kept) for metric, kept in zip(METRICS, masked.kept(bits), strict=True)}


def fits(masked: Masked, bits: Bits, limits: Mapping[str, float]) -> bool:
    spent = found(masked, bits)
    return all(spent[metric] <= limit for metric, limit in limits.items())


def smallest(masked: Masked, multiple: int = 1) -> Bits:
    """The masks that leave the least: single weights off, and of every tensor so many channels as `multiple`
    says, or all where it has fewer; of 1, none: compaction keeps one that is 0.
    """
    off = {name: torch.full_like(score, -1.0) for name, score in masked.scores.items()}
    return _living(masked, off, masked.scores, multiple)


def project(masked: Masked, limits: Mapping[str, float], multiple: int = 1) -> None:
    """Clamp scores to [-1, 1], then lower them just so far that the masks meet every limit, the channels of
    every tensor being a multiple of `multiple`.

    A score falls by a multiplier times its price; the multiplier is the smallest one that meets the limit, by
    bisection, so there is none to be tuned. Prices follow what the Lagrangian of the budget takes, the
    derivative of the limited cost by the mask, within a factor of two: a network without its dearest channels
    is dead.
    """
    with torch.no_grad():
        for score in masked.scores.values():
            score.clamp_(-1, 1)
    ranked = {name: score.detach().clone() for name, score in masked.scores.items()}
    for metric, limit in limits.items():
        if found(masked, _living(masked, masked.scores, ranked, multiple))[metric] > limit:
            _lower(masked, ranked, metric, limit, multiple)
    _put(masked, _living(masked, masked.scores, ranked, multiple))


def _put(masked: Masked, bits: Bits) -> None:
    """Every score on the side of 0 that these masks say."""
    with torch.no_grad():
        for name, bit in bits.items():
            score = masked.scores[name]
            score.copy_(torch.where(bit, score.clamp(min=BARE), score.clamp(max=-BARE)))


def _living(
    masked: Masked, scores: Mapping[str, Tensor], ranked: Mapping[str, Tensor], multiple: int
) -> Bits:
    """What scores keep: of every tensor the nearest multiple of channels, or all of them; at least one
    multiple. `scores` say how many, `ranked` which: prices have moved the scores of living units alone.
    """
    bits = {name: score.detach() > 0 for name, score in scores.items()}
    if multiple > 1 and CHANNELS in bits:
        for chain in masked.channels.separate:
            units = torch.tensor(chain, device=masked.device)
            living = int(bits[CHANNELS][units].sum())
            kept = min(max(1, round(living / multiple)) * multiple, len(chain))
            if len(chain) - living < abs(kept - living):
                kept = len(chain)
            best = ranked[CHANNELS][units].topk(kept).indices
            bits[CHANNELS][units] = False
            bits[CHANNELS][units[best]] = True
    return bits


def _lower(masked: Masked, ranked: Mapping[str, Tensor], metric: str, limit: float, multiple: int) -> None:
    """Spares some channels of every tensor if it can, else one multiple. A limit that no masks can meet
    leaves the fewest, and scores as they were.
    """

    def lowered(multiplier: float) -> Bits:
        scores = {name: score.detach() - multiplier * prices[name] for name, score in masked.scores.items()}
        return _living(masked, scores, ranked, multiple)

    for spared in (SPARED, 0.0):
        prices = _prices(masked, metric, spared)
        low, high = 0.0, 1e-2
        while high <= FAR and found(masked, lowered(high))[metric] > limit:
            low, high = high, 4 * high
        if high <= FAR:
            break
    else:
        _put(masked, lowered(high))
        return
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if found(masked, lowered(middle))[metric] <= limit:
            high = middle
        else:
            low = middle
    with torch.no_grad():
        for name, score in masked.scores.items():
            score -= high * prices[name]


def _prices(masked: Masked, metric: str, spared: float) -> Bits:
    """Of every score: near 0 where the mask costs nothing or is off, else 1/2 to 2. The best channel of
    every tensor has none, so that it never loses all, nor has this share of its channels.
    """
    bits = {name: bit.float().requires_grad_() for name, bit in masked.snapshot().items()}
    torch.autograd.backward(dict(zip(METRICS, masked.kept(bits), strict=True))[metric])
    felt = {n: torch.zeros_like(b) if b.grad is None else b.grad * b.detach() for n, b in bits.items()}
    count = sum(int((f > 0).sum()) for f in felt.values())
    mean = sum(float(f.sum()) for f in felt.values()) / max(count, 1)
    prices = {n: torch.where(f > 0, (f / mean).clamp(0.5, 2), CHEAPEST) for n, f in felt.items()}
    if CHANNELS in prices:
        scores = masked.scores[CHANNELS].detach()
        for chain in masked.channels.chains:
            units = torch.tensor(chain, device=scores.device)
            best = units[scores[units].topk(max(1, math.ceil(len(chain) * spared))).indices]
            prices[CHANNELS][best] = 0
    return prices
