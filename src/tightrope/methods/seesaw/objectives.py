"""What the steps of a search minimise: an expected cost held by a multiplier, or the published losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tightrope.methods.seesaw.operators import CONVOLUTIONS
from tightrope.methods.seesaw.prices import PublishedRates
from tightrope.methods.seesaw.supernet import Supernet

ASCENT = 0.1  # of the logarithm of the multiplier per step, for a cost of twice the limit
MULTIPLIER = (1e-3, 1e3)
TIGHTENED = 0.6  # share of the steps after which the limit has its value
SMALLEST = 1e-3  # of the largest cost: below it a limit is as good as none
TEMPERATURE = 4.0


@dataclass
class Dual:
    """Expected cost over the limit, times a multiplier that grows while that is above 1 and falls below it.

    The limit tightens geometrically from the largest cost over the first part of `steps`.
    """

    expected: Callable[[], Tensor]
    largest: float
    limit: float
    steps: int
    done: int = 0
    multiplier: float = 0.1

    def penalty(self) -> Tensor:
        self.done += 1
        share = max(self.limit / self.largest, SMALLEST) if self.largest else 1.0
        now = max(self.largest, 1e-9) * min(share, 1.0) ** min(1.0, self.done / (TIGHTENED * self.steps))
        over: Tensor = self.expected() / now
        grown = self.multiplier * math.exp(ASCENT * max(-1.0, min(1.0, float(over.detach()) - 1)))
        self.multiplier = min(max(grown, MULTIPLIER[0]), MULTIPLIER[1])
        return self.multiplier * over


@dataclass
class Reference:
    """The release's regulariser: 0.05 |L + N - R| / R + 0.01 |L - N| / N, R a fifth of the largest L + N.

    L are multiplications by its rate, not by the size of maps or groups as it counts them; N expected ReLUs.
    Unlike in the release, both have a gradient: of gates in a step of these, and of the operators' weights in
    a step of all weights.
    """

    net: Supernet
    done: int = 0
    multiplier: float = 0.0

    def penalty(self) -> Tensor:
        rates, space = PublishedRates(), self.net.space
        per_relu = rates.per_relu_online_ms + rates.per_relu_offline_ms
        linear, most = torch.zeros(()), 0.0
        for stage, mixture in zip(space.stages(), self.net.mixtures, strict=True):
            channels = space.shape(stage)[0]
            macs = torch.tensor([release_macs(o, channels) for o in mixture.names]) * rates.per_mac_ms
            linear = linear + mixture.shares() @ macs.to(mixture.weights)
            most += float(macs.max())
        relus = torch.tensor(float(space.floor))
        for k, choice in enumerate(list(self.net.choices.values())[: sum(space.blocks)]):
            relus = relus + choice.probabilities()[1] * space.block_relus(k)
        nonlinear = relus * per_relu
        wanted = 0.2 * (most + space.maximum * per_relu)
        apart = (linear + nonlinear - wanted).abs() / wanted
        return 0.05 * apart + 0.01 * (linear - nonlinear).abs() / nonlinear


def release_macs(operator: str, channels: int) -> float:
    """2 Cin Cout kh kw a convolution, whatever its groups and map: how the release weighs operators."""
    return float(sum(2 * channels**2 * math.prod(step.kernel) for step in CONVOLUTIONS.get(operator, ())))


def learned(outputs: Tensor, labels: Tensor, soft: Tensor | None, distill: float, smoothing: float) -> Tensor:
    """Cross-entropy, and `distill` of the divergence from a teacher's outputs (Hinton et al. 2015).

    Smoothing spreads over the wrong classes, as the release does.
    """
    wrong = smoothing * outputs.shape[1] / (outputs.shape[1] - 1)
    loss = F.cross_entropy(outputs, labels, label_smoothing=wrong)
    if soft is None or not distill:
        return loss
    T = TEMPERATURE
    divergence = F.kl_div(
        F.log_softmax(outputs / T, 1), F.log_softmax(soft / T, 1), log_target=True, reduction="batchmean"
    )
    return loss + distill * T * T * divergence
