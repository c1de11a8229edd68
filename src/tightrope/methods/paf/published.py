"""The coefficient tuning of SmartPAF (2024) with its released settings: the control of `tuning.tune`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import ReduceLROnPlateau

from tightrope.methods.paf.library import Paf, dense
from tightrope.methods.paf.tuning import Array, Fit, Histogram, measure
from tightrope.nn.polynomial import horner

EPOCHS, RATE, LEAST_RATE, PATIENCE, THRESHOLD = 40, 0.01, 1e-4, 2, 1e-8


def published(
    start: Paf,
    histogram: Histogram,
    scale: float,
    target: Callable[[Array], Array] = lambda x: np.maximum(x, 0),
    *,
    images: int = 45_000,
    batch: int = 100,
    values: int = 32,
    seed: int = 0,
) -> Fit:
    """`start`, which must be gated, after 40 epochs of Adam on the mean squared error of the activation.

    `images` of `values` inputs each stand for the stored activations; they are drawn from the histogram once
    and come in the same batches in every epoch. The rate falls to a tenth when the error on a ninth as many
    others stagnates, and the last epoch is kept. Published: 45,000 images in batches of 100 for CIFAR, 900 in
    batches of 40 for ImageNet; and the scale of each batch, where this has a static one as `tune` has.
    """
    rng = np.random.default_rng(seed)
    parts = (images, max(batch, images // 9))
    (x, y), held_out = (_drawn(histogram, target, (count, values), rng) for count in parts)
    stages = [torch.tensor(stage[1::2], requires_grad=True) for stage in start.stages]

    def error(x: Tensor, y: Tensor) -> Tensor:
        p = x / scale
        for stage in stages:
            p = p * horner(stage, p * p)
        return mse_loss(x * (1 + p) / 2, y)

    optimizer = torch.optim.Adam(stages, RATE)
    scheduler = ReduceLROnPlateau(optimizer, patience=PATIENCE, threshold=THRESHOLD, min_lr=LEAST_RATE)
    for _ in range(EPOCHS):
        for part in zip(torch.split(x, batch), torch.split(y, batch), strict=True):
            optimizer.zero_grad()
            torch.autograd.backward(error(*part))
            optimizer.step()
        with torch.no_grad():
            scheduler.step(float(error(*held_out)))
    tuned = tuple(dense(tuple(stage.tolist())) for stage in stages)
    return measure(Paf(start.name, tuned), histogram, scale, target)


def _drawn(
    histogram: Histogram, target: Callable[[Array], Array], size: tuple[int, int], rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Inputs (images, values) in the histogram's proportions, and what the activation makes of them."""
    x = rng.choice(histogram.centers, size, p=histogram.counts / histogram.counts.sum())
    return torch.tensor(x).float(), torch.tensor(target(x)).float()
