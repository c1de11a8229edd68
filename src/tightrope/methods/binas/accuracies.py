"""What networks are worth with the supernet's weights.

Only the validation split is read unless the caller says otherwise, training images where batch-norm is
re-calibrated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tightrope.data import Data, Split
from tightrope.errors import InputError
from tightrope.evaluate import recalibrate
from tightrope.methods import Progress
from tightrope.methods.binas.bank import Bank, folded
from tightrope.methods.binas.extract import extract
from tightrope.methods.binas.rows import Hits, Rows, identity
from tightrope.methods.binas.supernet import Supernet
from tightrope.solve.staged import Choice
from tightrope.types import FloatArray

BATCH = 200  # small enough for the maps to stay in a cache


@dataclass(frozen=True)
class Accuracies:
    """hits: (networks, images), whether a network classified an image correctly; all saw the same images."""

    choices: tuple[Choice, ...]
    hits: Hits

    @cached_property
    def mean(self) -> FloatArray:
        """(networks,) in [0, 1]."""
        return np.asarray(self.hits.mean(1, dtype=np.float64))

    @cached_property
    def error(self) -> FloatArray:
        """(networks,) standard error of `mean` as an estimate for all images of this kind."""
        return np.asarray(np.sqrt(self.mean * (1 - self.mean) / max(1, self.hits.shape[1] - 1)))

    @cached_property
    def paired_error(self) -> FloatArray:
        """(networks,) standard error of the difference to the average network, on the same images: the noise
        that matters for comparing networks.
        """
        apart = self.hits - self.hits.mean(0, dtype=np.float64)
        return np.asarray(apart.std(1, ddof=1) / np.sqrt(self.hits.shape[1]), dtype=np.float64)


def measure(
    supernet: Supernet,
    data: Data,
    choices: Sequence[Choice],
    *,
    images: int | None = None,
    calibration: int = 0,
    split: Split = "validation",
    file: Path | None = None,
    progress: Progress | None = None,
) -> Accuracies:
    """Accuracies of the networks of `choices`, with inherited weights, on the first `images` of a split.

    `calibration`: training images from which every network takes batch-norm statistics of its own; 0: those
    of the supernet. With `file` what is measured is kept, and a later call measures only what is not there.

    Raises InputError for choices of another space or without images, BundleError for a damaged file and for
    one of another supernet, data or setting.
    """
    for choice in choices:
        supernet.space.check(choice)
    images = data.size(split) if images is None else min(images, data.size(split))
    if images < 1 or not choices:
        raise InputError("nothing to measure", got=f"{images} images, {len(choices)} networks")
    keys = {json.dumps(choice): choice for choice in choices}
    bank = Bank(supernet)
    device = supernet.classifier.weight.device
    with Rows(file, identity(supernet, data, split, images) | {"calibration": calibration}, images) as rows:
        todo = {key: choice for key, choice in keys.items() if key not in rows.found}
        for k, (key, choice) in enumerate(todo.items()):
            if progress is not None:
                progress("accuracies", k, len(todo))
            forward = (
                _calibrated(supernet, choice, data, calibration) if calibration else partial(bank.one, choice)
            )
            batches = data.batches(split, BATCH, limit=images)
            rows.add(key, np.concatenate([hits(forward(x.to(device)), y) for x, y in batches]))
        return Accuracies(tuple(choices), np.stack([rows.found[json.dumps(choice)] for choice in choices]))


def hits(outputs: Tensor, labels: Tensor) -> Hits:
    """(N,): whether the highest output is the label's."""
    return np.asarray((outputs.argmax(1).cpu() == labels).numpy())


def _calibrated(supernet: Supernet, choice: Choice, data: Data, images: int) -> Callable[[Tensor], Tensor]:
    net = extract(supernet, choice)
    recalibrate(net, data.batches("train", BATCH, limit=images))
    return torch.inference_mode()(folded(net))
