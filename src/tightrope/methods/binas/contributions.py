"""The mean accuracy of random networks with one decision fixed, for every decision, from shared evaluations.

The published measurement fixes one decision, draws the others, and repeats this for all decisions. Here all
are drawn, image by image, and every evaluation counts for each decision that it took: the same means, from
many times as many evaluations each. What makes an image easy or hard cancels, since each is seen under many
networks: only the differences to the image's own mean are compared.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tightrope.data import Data, Split
from tightrope.errors import InputError
from tightrope.methods import Progress
from tightrope.methods.binas.accuracies import hits
from tightrope.methods.binas.bank import Bank
from tightrope.methods.binas.objective import Contributions
from tightrope.methods.binas.paths import Paths, blocks, random_paths
from tightrope.methods.binas.rows import Hits, Rows, identity
from tightrope.methods.binas.space import Space
from tightrope.methods.binas.supernet import Supernet
from tightrope.recipe import SEED_STRIDE
from tightrope.types import FloatArray

BATCH = 1000
PERCENT = 100.0


def contributions(
    supernet: Supernet,
    data: Data,
    *,
    passes: int = 20,
    images: int | None = None,
    split: Split = "validation",
    seed: int = 0,
    file: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Contributions, Contributions]:
    """(means, standard errors) in points of %. Errors of decisions are those of their difference to the mean
    of all networks; the error of that mean is of images as much as of networks.

    A pass shows every one of the first `images` of the split to a random network of its own, with the
    supernet's batch-norm statistics: passes * images evaluations in all. With `file` finished passes are
    kept; more passes later add to them.

    Raises InputError for fewer than 2 passes, and when a decision was never drawn.
    """
    table = evaluations(
        supernet, data, passes=passes, images=images, split=split, seed=seed, file=file, progress=progress
    )
    images = table.shape[1]
    return summary(supernet.space, table, (drawn(supernet.space, images, seed, k) for k in range(passes)))


def evaluations(
    supernet: Supernet,
    data: Data,
    *,
    passes: int,
    images: int | None = None,
    split: Split = "validation",
    seed: int = 0,
    file: Path | None = None,
    progress: Progress | None = None,
) -> Hits:
    """(passes, images): what `summary` makes contributions of; arguments and errors as of `contributions`."""
    if passes < 2:
        raise InputError(
            "contributions compare an image with itself", got=f"passes={passes}", allowed="2 or more"
        )
    images = data.size(split) if images is None else min(images, data.size(split))
    bank, space = Bank(supernet), supernet.space
    device = supernet.classifier.weight.device
    with Rows(file, identity(supernet, data, split, images) | {"seed": seed}, images) as rows:
        for k in range(passes):
            if str(k) in rows.found:
                continue
            if progress is not None:
                progress("contributions", k, passes)
            paths = drawn(space, images, seed, k)
            batches = data.batches(split, BATCH, limit=images)
            parts, start = [], 0
            for x, y in batches:
                parts.append(hits(bank.mixed(paths[start : start + len(y)], x.to(device)), y))
                start += len(y)
            rows.add(str(k), np.concatenate(parts))
        return np.stack([rows.found[str(k)] for k in range(passes)])


def drawn(space: Space, images: int, seed: int, index: int) -> Paths:
    """The networks of one pass."""
    return random_paths(space, images, torch.Generator().manual_seed(seed * SEED_STRIDE + index))


@dataclass
class _Sums:
    """Per value of one decision: how often, and the sums of differences and of their squares."""

    count: FloatArray
    total: FloatArray
    square: FloatArray

    @classmethod
    def of(cls, values: int) -> _Sums:
        return cls(*(np.zeros(values) for _ in range(3)))

    def add(self, value: NDArray[np.int64], apart: FloatArray) -> None:
        n = len(self.count)
        self.count += np.bincount(value, minlength=n)
        self.total += np.bincount(value, apart, n)
        self.square += np.bincount(value, apart**2, n)

    def result(self) -> tuple[FloatArray, FloatArray]:
        """(mean, standard error)."""
        if self.count.min() < 2:
            raise InputError("a decision was hardly ever drawn", fix="more passes, or more images")
        mean = self.total / self.count
        return mean, np.sqrt(np.maximum(self.square / self.count - mean**2, 0) / (self.count - 1))


def summary(space: Space, table: Hits, paths: Iterable[Paths]) -> tuple[Contributions, Contributions]:
    """See `contributions`. table: (passes, images), whether the network that `paths`, one per pass, gave an
    image classified it correctly.
    """
    passes, images = table.shape
    of_image = table.mean(0, dtype=np.float64)
    depth = [_Sums.of(len(stage.depths)) for stage in space.stages]
    block = [[_Sums.of(len(space.options)) for _ in range(stage.depths[-1])] for stage in space.stages]
    assert blocks(space) == sum(map(len, block))
    for row, path in zip(table, paths, strict=True):
        # An image's mean contains the evaluation that is compared with it.
        apart = PERCENT * (row - of_image) * passes / (passes - 1)
        depths, options = path.depths.numpy(), path.options.numpy()
        place = 0
        for s, stage in enumerate(space.stages):
            depth[s].add(np.searchsorted(stage.depths, depths[:, s]), apart)
            for b in range(stage.depths[-1]):
                # `objective`: measured at the least depth that has the block, the first one at any.
                least = min(d for d in stage.depths if d > b)
                on = (depths[:, s] == least) | (b == 0)
                block[s][b].add(options[on, place], apart[on])
                place += 1
    mean = PERCENT * float(of_image.mean())
    error = PERCENT * float(of_image.std(ddof=1)) / images**0.5
    found = [sums.result() for sums in depth]
    inside = [[sums.result() for sums in row] for row in block]
    return (
        Contributions(
            mean,
            tuple(mean + value for value, _ in found),
            tuple(mean + np.stack([value for value, _ in row]) for row in inside),
        ),
        Contributions(
            error, tuple(e for _, e in found), tuple(np.stack([e for _, e in row]) for row in inside)
        ),
    )
