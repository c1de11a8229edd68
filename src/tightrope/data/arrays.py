"""Data sets that fit in memory: uint8 pixels, normalised and augmented a whole batch at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from tightrope.data.base import Split, check_split, cut, epoch_order


@dataclass(frozen=True)
class Arrays:
    """A `Data` held as one (images, labels) pair per split: uint8 (N, C, H, W) and int64 (N,).

    Augmentation is a random crop out of the image padded by `padding` pixels of black, and a horizontal flip.
    """

    name: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    splits: Mapping[Split, tuple[Tensor, Tensor]] = field(repr=False)
    padding: int = 2
    any_size: bool = False

    @property
    def input_shape(self) -> tuple[int, int, int]:
        _, c, h, w = self.splits["train"][0].shape
        return (c, h, w)

    def size(self, split: Split) -> int:
        check_split(split)
        return len(self.splits[split][1])

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
        """See `Data.batches`."""
        check_split(split)
        images, labels = self.splits[split]
        n = len(labels) if limit is None else min(limit, len(labels))
        order, places = epoch_order(
            len(labels), shuffle=shuffle, seed=seed, limit=limit, rank=rank, world=world
        )
        slices = cut(n, batch_size, rank=rank, world=world)
        draws = _draw(n, self.padding, seed)[places] if augment else None
        return self._iterate(images, labels, order, slices, draws)

    def _iterate(
        self, images: Tensor, labels: Tensor, order: Tensor, slices: list[slice], draws: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for part in slices:
            x = images[order[part]]
            if draws is not None:
                x = crop_and_flip(x, draws[part], self.padding)
            yield normalise(x, self.mean, self.std), labels[order[part]]


def _draw(n: int, padding: int, seed: int) -> Tensor:
    """(n, 3) int64: row offset and column offset in 0..2*padding, and whether to flip."""
    generator = torch.Generator().manual_seed(seed ^ 0x5EED)  # apart from the stream that shuffles
    offsets = torch.randint(0, 2 * padding + 1, (n, 2), generator=generator)
    return torch.cat([offsets, torch.randint(0, 2, (n, 1), generator=generator)], dim=1)


def crop_and_flip(x: Tensor, draws: Tensor, padding: int) -> Tensor:
    """Crop each (C, H, W) of `x` at its own offsets out of its padded self, then flip where drawn."""
    h, w = x.shape[2:]
    columns = draws[:, 1, None] + torch.arange(w)
    columns = torch.where(draws[:, 2, None] == 1, columns.flip(1), columns)
    rows = draws[:, 0, None] + torch.arange(h)
    padded = pad(x, (padding,) * 4).movedim(1, -1)
    cropped = padded[torch.arange(len(x))[:, None, None], rows[:, :, None], columns[:, None, :]]
    return cropped.movedim(-1, 1).contiguous()


def normalise(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 (N, C, H, W) in 0..255 to float32 with each channel's mean subtracted and divided by its std."""
    scale = torch.tensor([1 / (255 * s) for s in std]).view(1, -1, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(1, -1, 1, 1)
    return torch.addcmul(shift, x.float(), scale)
