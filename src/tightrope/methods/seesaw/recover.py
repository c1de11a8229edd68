"""Train a network a little after operators and ReLUs have gone."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import nn

from tightrope.data import Data
from tightrope.evaluate import recalibrate
from tightrope.methods import Progress
from tightrope.methods.seesaw.objectives import learned
from tightrope.shard import Shard

CALIBRATION_BATCHES = 50


class Recovery(Protocol):
    """The settings that matter here, of `SeesawMethod`."""

    @property
    def recovery(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def limit(self) -> int | None: ...
    @property
    def lr(self) -> float: ...
    @property
    def distill(self) -> float: ...
    @property
    def seed(self) -> int: ...


def recover(
    model: nn.Module,
    data: Data,
    teacher: nn.Module | None,
    settings: Recovery,
    progress: Progress,
    shard: Shard,
) -> None:
    """Epochs of SGD from half the rate down to 0, then batch-norm statistics; ends in evaluation mode.

    Every process of the shard trains on all images: it is short, and so all hold the same network.
    """
    images = min(data.size("train"), settings.limit or data.size("train"))
    steps = math.ceil(images / settings.batch_size) * settings.recovery
    optimizer = torch.optim.SGD(
        model.parameters(), lr=settings.lr, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    model.train()
    done = 0
    for epoch in range(settings.recovery):
        for x, y in data.batches(
            "train", settings.batch_size, shuffle=True, seed=settings.seed + epoch, limit=settings.limit
        ):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * 0.25 * (1 + math.cos(math.pi * done / steps))
            x, y = x.to(shard.device), y.to(shard.device)
            soft = None
            if teacher is not None:
                with torch.no_grad():
                    soft = teacher(x)
            optimizer.zero_grad()
            torch.autograd.backward(learned(model(x), y, soft, settings.distill, 0.0))
            optimizer.step()
            done += 1
        progress("recovery", epoch + 1, settings.recovery)
    some = min(images, CALIBRATION_BATCHES * settings.batch_size)
    recalibrate(model, data.batches("train", settings.batch_size, shuffle=True, limit=some))
    model.eval()
