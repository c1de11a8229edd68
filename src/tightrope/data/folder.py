"""Images in class folders (the ImageFolder layout), read and scaled as they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tightrope.data.arrays import normalise
from tightrope.data.base import Indices, Split, check_split, cut, epoch_order, stratified_split
from tightrope.data.image import MARGIN, open_image, resize_and_crop, to_tensor
from tightrope.errors import InputError, near

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
HELD_OUT = 0.1  # share cut off for a part that has no folder of its own
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VALIDATION_NAMES = ("validation", "val", "valid")
Listing = tuple[tuple[Path, ...], Indices]


@dataclass(frozen=True)
class Folder:
    """A `Data` over files; `splits` holds (paths, labels). RGB, scaled to a square and centre-cropped.

    Augmentation is a random part of the image (35 to 100 % of its area, aspect ratio 3/4 to 4/3; after
    Szegedy et al. 2015, section 6) scaled to the square, and a horizontal flip. `workers` processes decode
    ahead; 0 decodes in place.
    """

    name: str
    classes: tuple[str, ...]
    input_shape: tuple[int, int, int]
    splits: Mapping[Split, Listing] = field(repr=False)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    workers: int = 0
    any_size: bool = True

    def size(self, split: Split) -> int:
        check_split(split)
        return len(self.splits[split][0])

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
        """See `Data.batches`. A file that cannot be decoded raises InputError with its path."""
        check_split(split)
        paths, labels = self.splits[split]
        n = len(paths) if limit is None else min(limit, len(paths))
        order, places = epoch_order(
            len(paths), shuffle=shuffle, seed=seed, limit=limit, rank=rank, world=world
        )
        draws = None
        if augment:
            draws = torch.rand(n, 5, generator=torch.Generator().manual_seed(seed ^ 0x5EED))[places]
        slices = cut(n, batch_size, rank=rank, world=world)
        return self._iterate(
            _Batches(paths, torch.from_numpy(labels), order, slices, draws, self.input_shape[1])
        )

    def _iterate(self, batches: _Batches) -> Iterator[tuple[Tensor, Tensor]]:
        loader: Iterable[Any] = (batches[k] for k in range(len(batches)))
        if self.workers:
            loader = DataLoader(batches, batch_size=None, num_workers=self.workers)
        for item in loader:
            if isinstance(item, InputError):
                raise item
            x, y = cast(tuple[Tensor, Tensor], item)
            yield normalise(x, self.mean, self.std), y


@dataclass(frozen=True)
class _Batches(Dataset[Any]):
    """Item k is batch k as uint8, or the InputError: an exception raised in a worker would lose its class."""

    paths: tuple[Path, ...]
    labels: Tensor
    order: Tensor
    slices: list[slice]
    draws: Tensor | None
    side: int

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor] | InputError:
        part = self.slices[k]
        images = []
        try:
            for place in range(part.start, part.stop):
                image = open_image(self.paths[int(self.order[place])], channels=3)
                if self.draws is None:
                    image = resize_and_crop(image, self.side, self.side, MARGIN)
                else:
                    image = _random_part(image, self.side, self.draws[place].tolist())
                images.append(to_tensor(image))
        except InputError as error:
            return error
        return torch.stack(images), self.labels[self.order[part]]


def _random_part(image: Image.Image, side: int, draws: list[float]) -> Image.Image:
    """Scale a drawn box of `image` to (side, side) and flip it half of the time; `draws` are 5 in [0, 1)."""
    area, aspect, x, y, flip = draws
    root = ((0.35 + 0.65 * area) * image.width * image.height) ** 0.5
    ratio = (4 / 3) ** (2 * aspect - 1)
    width, height = min(root * ratio**0.5, image.width), min(root / ratio**0.5, image.height)
    left, top = x * (image.width - width), y * (image.height - height)
    image = image.resize((side, side), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip < 0.5 else image


def open_folder(
    root: Path, validation: float | int | None, seed: int, image_size: int = 224, workers: int = 0
) -> Folder:
    """The images under `root`, in one sub-folder per class, sorted by name into labels.

    With `train/`, `validation/` (or `val/`, `valid/`) and `test/` folders these are the parts. A missing
    validation part is cut from the training images, by class and seed. With `train/` and `val/` only, as in
    ImageNet, `val/` is the test split, since it is what a network trained on `train/` has not seen. Without
    any of them a tenth becomes the test split first.

    Raises InputError if classes are missing or differ between parts, or there are no images.
    """
    if image_size < 1 or workers < 0:
        raise InputError(
            "image_size must be positive and workers not negative", got=f"{image_size}, {workers}"
        )
    held_folder = next((root / name for name in VALIDATION_NAMES if (root / name).is_dir()), None)
    test_folder = root / "test" if (root / "test").is_dir() else None
    split_up = (root / "train").is_dir()
    if split_up and test_folder is None and held_folder is not None:
        held_folder, test_folder = None, held_folder
    base = root / "train" if split_up else root
    classes = tuple(sorted(p.name for p in base.iterdir() if p.is_dir() and not p.name.startswith(".")))
    if not classes:
        raise InputError("no class folders", where=str(base), allowed="one sub-folder of images per class")
    train = _list_images(base, classes)
    if split_up and test_folder is not None:
        test = _shuffled(_list_images(test_folder, classes), seed)
    else:
        train, test = _cut(train, HELD_OUT, seed)
    if split_up and held_folder is not None:
        if validation is not None:
            raise InputError(
                "the folder has its own validation part",
                where=str(held_folder),
                got=f"validation={validation}",
            )
        train, held = _shuffled(train, seed), _shuffled(_list_images(held_folder, classes), seed)
    else:
        train, held = _cut(train, HELD_OUT if validation is None else validation, seed)
    parts: dict[Split, Listing] = {"train": train, "validation": held, "test": test}
    return Folder(str(root), classes, (3, image_size, image_size), parts, workers=workers)


def _list_images(folder: Path, classes: tuple[str, ...]) -> Listing:
    paths: list[Path] = []
    labels: list[int] = []
    extra = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name not in classes)
    extra = [name for name in extra if not name.startswith(".")]
    if extra:
        raise InputError(
            "a class that the training part does not have",
            where=str(folder),
            got=", ".join(extra[:5]),
            fix=f"near: {near(extra[0], classes)}",
        )
    for label, name in enumerate(classes):
        found = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not found:
            raise InputError("a class without images", where=str(folder / name), allowed=" ".join(SUFFIXES))
        paths += found
        labels += [label] * len(found)
    return tuple(paths), np.array(labels, dtype=np.int64)


def _take(listing: Listing, chosen: Indices) -> Listing:
    return tuple(listing[0][int(k)] for k in chosen), listing[1][chosen]


def _shuffled(listing: Listing, seed: int) -> Listing:
    return _take(listing, np.argsort(np.random.default_rng(seed).random(len(listing[0])), kind="stable"))


def _cut(listing: Listing, held_out: float | int, seed: int) -> tuple[Listing, Listing]:
    rest, held = stratified_split(listing[1], held_out, seed)
    return _take(listing, rest), _take(listing, held)
