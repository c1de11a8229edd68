"""Labelled images in three parts: `load(name)` gives a `Data`, `read_image` a single input."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tightrope.data.arrays import Arrays
from tightrope.data.base import SPLITS, Data, Split
from tightrope.data.folder import Folder, open_folder
from tightrope.data.image import ImageSpec, read_image
from tightrope.data.sources import ASSETS, cifar10, cifar100, embedded, fashion_mnist
from tightrope.data.task import Task, parse_task, sample_sha256, view
from tightrope.errors import InputError, meant

__all__ = [
    "ASSETS",
    "NAMES",
    "SPLITS",
    "Arrays",
    "Data",
    "Folder",
    "ImageSpec",
    "Split",
    "Task",
    "load",
    "located",
    "parse_task",
    "read_image",
    "sample_sha256",
    "view",
]

_SOURCES: dict[str, Callable[[Path | None, float | int | None, int], Arrays]] = {
    "embedded": embedded,
    "fashion-mnist": fashion_mnist,
    "cifar10": cifar10,
    "cifar100": cifar100,
}
NAMES = tuple(_SOURCES)


def located(name: str) -> str:
    """`name` as it means the same from every directory: the path of a directory becomes absolute."""
    return name if name in _SOURCES else os.path.abspath(Path(name).expanduser())


def load(
    name: str,
    *,
    root: str | Path | None = None,
    validation: float | int | None = None,
    seed: int = 0,
    image_size: int | None = None,
    workers: int = 0,
) -> Data:
    """The data set `name`: embedded, fashion-mnist, cifar10, cifar100, or a directory of class folders.

    `root` is where the files of a named set are, instead of $TIGHTROPE_DATA/name, the system's folder and
    ~/.cache/tightrope/name. `validation` is cut from the training images only, by class and by `seed`: a
    share (float) or a number (int) of them; None takes 5,000 of Fashion-MNIST and CIFAR, a tenth of a folder.
    The embedded set has its split already. `image_size` (224) and `workers` (0) are for directories.

    Raises InputError for an unknown name, missing or corrupt files, or a split that cannot be.
    """
    source = _SOURCES.get(name)
    if source is not None:
        if image_size is not None or workers:
            raise InputError("image_size and workers are for directories", got=f"data set {name}")
        return source(None if root is None else Path(root), validation, seed)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise InputError(
            "unknown data set, and no such directory",
            got=name,
            allowed=", ".join(NAMES) + ", or a directory with one folder of images per class",
            fix=meant(name, NAMES) or "--data embedded",
        )
    if root is not None:
        raise InputError("root is for named data sets; a directory is its own root", got=f"root={root}")
    return open_folder(folder, validation, seed, 224 if image_size is None else image_size, workers)
