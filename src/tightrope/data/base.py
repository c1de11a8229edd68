"""What every data set offers, and the index arithmetic they share: splits, shards, batches."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tightrope.errors import InputError, meant

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Indices = npt.NDArray[np.int64]


class Data(Protocol):
    """A labelled image set in three disjoint parts. `test` is read by `batches("test")` and nothing else."""

    @property
    def name(self) -> str: ...
    @property
    def classes(self) -> tuple[str, ...]:
        """The class names; label k is `classes[k]`."""

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel, subtracted from pixels in [0, 1]."""

    @property
    def std(self) -> tuple[float, ...]:
        """Per channel, divides after `mean` is subtracted."""

    @property
    def any_size(self) -> bool:
        """Whether its images come in any size, so that resizing one is part of reading it."""

    def size(self, split: Split) -> int:
        """Number of images in `split`."""

    def batches(
        self,
        split: Split,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        augment: bool = False,
        limit: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised float32 images (N, C, H, W) and int64 labels (N,), with N <= `batch_size`.

        `limit` keeps the first images of the split, which is in a seeded random order: the same ones
        whatever the other arguments. `shuffle` and `augment` are a function of `seed` alone; give each epoch
        its own. Rank r of `world` processes gets every world-th image; the ranks together give each image
        once, and all ranks give the same number of batches (unless a batch is one image), as collective
        training needs.

        Raises InputError for an unknown split, a batch size or limit below 1, or a rank outside `world`.
        """


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise InputError("unknown split", got=split, allowed=", ".join(SPLITS), fix=meant(split, SPLITS))


def stratified_split(labels: Indices, held_out: float | int, seed: int) -> tuple[Indices, Indices]:
    """(rest, held out): indices into `labels`, disjoint, together all of them, each in random order.

    `held_out` is a share of the images (float below 1) or a number of them (int). Every class gives its
    share, rounded by largest remainder so that the total is exact.

    Raises InputError if either part would be empty.
    """
    n = len(labels)
    wanted = held_out if isinstance(held_out, int) else round(held_out * n)
    if not 0 < wanted < n:
        raise InputError(
            "the validation split would leave a part without images",
            got=f"validation={held_out} of {n} training images",
            allowed=f"a share between 0 and 1, or a whole number from 1 to {max(n - 1, 1)}",
        )
    classes, counts = np.unique(labels, return_counts=True)
    quota = counts * (wanted / n)
    take = np.floor(quota).astype(np.int64)
    short = wanted - int(take.sum())
    take[np.argsort(take - quota, kind="stable")[:short]] += 1
    order = np.argsort(np.random.default_rng(seed).random(n), kind="stable").astype(np.int64)
    held = np.zeros(n, dtype=bool)
    for cls, k in zip(classes, take, strict=True):
        held[order[labels[order] == cls][:k]] = True
    return order[~held[order]], order[held[order]]


def epoch_order(
    n: int, *, shuffle: bool, seed: int, limit: int | None, rank: int, world: int
) -> tuple[Tensor, Tensor]:
    """What this rank reads: (positions in the split, positions in the epoch), both int64.

    The second names the random draws of an image: augmentation does not depend on the number of ranks.
    """
    if limit is not None and limit < 1:
        raise InputError("a limit must be at least one image", got=f"limit={limit}")
    if not 0 <= rank < world:
        raise InputError(
            "rank outside the world", got=f"rank={rank}, world={world}", allowed="0 <= rank < world"
        )
    n = min(n, limit) if limit is not None else n
    images = torch.arange(n)
    if shuffle:
        images = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    places = torch.arange(rank, n, world)
    return images[places], places


def cut(n: int, batch_size: int, *, rank: int, world: int) -> list[slice]:
    """Batches of one rank's shard of `n` images: as many as rank 0, the longest shard, has."""
    if batch_size < 1:
        raise InputError("a batch needs at least one image", got=f"batch_size={batch_size}")
    mine = len(range(rank, n, world))
    edges = [*range(0, mine, batch_size), mine]
    steps = -(-len(range(0, n, world)) // batch_size)
    if 1 < len(edges) == steps and edges[-1] - edges[-2] > 1:
        # Shards differ by one image at most, so a rank is short by one batch only when its last one is full.
        edges.insert(-1, (edges[-2] + edges[-1]) // 2)
    return [slice(a, b) for a, b in pairwise(edges) if b > a]
