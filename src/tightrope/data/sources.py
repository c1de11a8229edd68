"""Where the named data sets are found, and how their files become `Arrays`."""

from __future__ import annotations

import importlib
import lzma
import os
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tightrope.data.arrays import Arrays
from tightrope.data.base import Split, stratified_split
from tightrope.data.formats import read_cifar, read_idx
from tightrope.errors import InputError

ASSETS = Path(__file__).parent.parent / "assets"
FASHION_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
FASHION_MEAN, FASHION_STD = (0.2860,), (0.3530,)  # of the 60,000 training images
FASHION_FILES = {"train": "train", "test": "t10k"}
CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
HELD_OUT_IMAGES = 5000  # validation images of the sets that have 50,000 or more to train on


def embedded(root: Path | None, validation: float | int | None, seed: int) -> Arrays:
    """8,000 / 1,000 / 1,000 Fashion-MNIST images shipped with the package; its split is fixed.

    Its train and validation images lie in the same parts of the full set split with the default arguments.
    """
    del seed  # the split was drawn when the package was made
    if root is not None or validation is not None:
        raise InputError(
            "the embedded data set has a fixed place and split",
            got=f"root={root}, validation={validation}",
            fix="fashion-mnist, the full set, takes both",
        )
    with np.load(
        BytesIO(lzma.decompress((ASSETS / "embedded.npz.xz").read_bytes())), allow_pickle=False
    ) as file:
        parts: dict[Split, tuple[Tensor, Tensor]] = {
            split: (
                torch.from_numpy(file[f"{split}_images"]).unsqueeze(1),
                torch.from_numpy(file[f"{split}_labels"].astype(np.int64)),
            )
            for split in ("train", "validation", "test")
        }
    return Arrays("embedded", FASHION_CLASSES, FASHION_MEAN, FASHION_STD, parts)


def fashion_mnist(root: Path | None, validation: float | int | None, seed: int) -> Arrays:
    """Fashion-MNIST, 60,000 training (55,000 + 5,000 by default) and 10,000 test images of 28x28."""
    folder = _fashion_folder(root)
    official = {}
    for part, stem in FASHION_FILES.items():
        images = read_idx(_either(folder, f"{stem}-images-idx3-ubyte"))
        labels = read_idx(_either(folder, f"{stem}-labels-idx1-ubyte"))
        if images.ndim != 3 or images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
            raise InputError(
                "these are not Fashion-MNIST's images and labels",
                where=str(folder),
                got=f"images {images.shape}, labels {labels.shape}",
                allowed="(N, 28, 28) and (N,)",
            )
        official[part] = (images[:, None], labels.astype(np.int64))
    return _arrays(
        "fashion-mnist", FASHION_CLASSES, FASHION_MEAN, FASHION_STD, official, validation, seed, padding=2
    )


def cifar10(root: Path | None, validation: float | int | None, seed: int) -> Arrays:
    """CIFAR-10 in its binary version: 50,000 training (45,000 + 5,000 by default) and 10,000 test images."""
    folder = _cifar_folder(root, "cifar-10")
    files = {"train": [f"data_batch_{k}.bin" for k in range(1, 6)], "test": ["test_batch.bin"]}
    official = {part: _cifar(folder, names, 1, 10) for part, names in files.items()}
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    return _arrays("cifar10", CIFAR10_CLASSES, mean, std, official, validation, seed, padding=4)


def cifar100(root: Path | None, validation: float | int | None, seed: int) -> Arrays:
    """CIFAR-100 (fine labels) in its binary version; sizes as `cifar10`."""
    folder = _cifar_folder(root, "cifar-100")
    official = {part: _cifar(folder, [f"{part}.bin"], 2, 100) for part in ("train", "test")}
    names = folder / "fine_label_names.txt"
    classes = tuple(names.read_text().split()) if names.is_file() else tuple(f"class {k}" for k in range(100))
    if len(classes) != 100:
        raise InputError("CIFAR-100 has 100 class names", where=str(names), got=len(classes))
    mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    return _arrays("cifar100", classes, mean, std, official, validation, seed, padding=4)


Official = tuple[np.ndarray[Any, np.dtype[np.uint8]], np.ndarray[Any, np.dtype[np.int64]]]


def _arrays(
    name: str,
    classes: tuple[str, ...],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    official: dict[str, Official],
    validation: float | int | None,
    seed: int,
    padding: int,
) -> Arrays:
    """Cut the validation part from the official training part; the official test part stays as it is."""
    images, labels = official["train"]
    for part, (_, values) in official.items():
        if values.size == 0 or values.max() >= len(classes):
            raise InputError(
                f"{name}: labels outside its classes",
                where=f"{part} part",
                allowed=f"0 to {len(classes) - 1}",
            )
    if validation is None:
        # The set's own number for its own size; a cut-down copy keeps the share.
        validation = HELD_OUT_IMAGES if len(labels) >= 50_000 else 0.1
    rest, held = stratified_split(labels, validation, seed)
    parts: dict[Split, tuple[Tensor, Tensor]] = {
        "train": (torch.from_numpy(images[rest]), torch.from_numpy(labels[rest])),
        "validation": (torch.from_numpy(images[held]), torch.from_numpy(labels[held])),
        # A copy, since frombuffer gives read-only memory.
        "test": (torch.from_numpy(official["test"][0].copy()), torch.from_numpy(official["test"][1])),
    }
    return Arrays(name, classes, mean, std, parts, padding)


def _roots(root: Path | None, name: str, system: Iterable[Path] = ()) -> list[Path]:
    """Folders to look in, in order: only `root` if the user named one."""
    if root is not None:
        return [root, root / name]
    own = os.environ.get("TIGHTROPE_DATA")
    return [*([Path(own) / name] if own else []), *system, Path.home() / ".cache" / "tightrope" / name]


def _either(folder: Path, stem: str) -> Path:
    packed = folder / f"{stem}.gz"
    return packed if packed.exists() else folder / stem


def _fashion_folder(root: Path | None) -> Path:
    folders = _roots(root, "fashion-mnist", [Path("/usr/share/datasets/fashion-mnist")])
    kinds = ("images-idx3-ubyte", "labels-idx1-ubyte")
    stems = [f"{part}-{kind}" for part in FASHION_FILES.values() for kind in kinds]

    def find() -> Path | None:
        nested = (inner for folder in folders for inner in (folder, folder / "FashionMNIST" / "raw"))
        return next((f for f in nested if all(_either(f, stem).is_file() for stem in stems)), None)

    found = find()
    reason = "root was given: nothing is downloaded into it"
    if found is None and root is None:
        reason = _download_fashion(folders[-1])
        found = find()
    if found is not None:
        return found
    raise InputError(
        "Fashion-MNIST is not on this machine",
        where=", ".join(map(str, folders)),
        got=reason,
        fix="apt-get install dataset-fashion-mnist, or put its four files in a folder and set TIGHTROPE_DATA "
        "to the folder above it; the `embedded` data set needs no files",
    )


def _download_fashion(target: Path) -> str:
    """Let torchvision fetch the files into `target`/FashionMNIST/raw; returns what went wrong, if it did."""
    try:
        datasets = importlib.import_module("torchvision.datasets")
        datasets.FashionMNIST(str(target), train=True, download=True)
    except (ImportError, OSError, RuntimeError) as error:
        return f"no download through torchvision: {error}"
    return "downloaded through torchvision, and still incomplete"


def _cifar_folder(root: Path | None, name: str) -> Path:
    binary = f"{name}-batches-bin" if name == "cifar-10" else f"{name}-binary"
    folders = _roots(root, name)
    for folder in (f for base in folders for f in (base, base / binary)):
        if any(folder.glob("*.bin")):
            return folder
    pickled = next(
        (p for f in folders for p in (f, f / f"{name}-batches-py", f / f"{name}-python") if _has_pickles(p)),
        None,
    )
    url = f"https://www.cs.toronto.edu/~kriz/{name}-binary.tar.gz"
    raise InputError(
        f"{name.upper()}: the binary version is not there"
        + (", only the Python one, whose pickles can run code when read" if pickled else ""),
        where=", ".join(map(str, [pickled] if pickled else folders)),
        allowed=f"a folder with the .bin files of {url}",
        fix=f"curl -L {url} | tar xz -C FOLDER, then --root FOLDER (root=), or set TIGHTROPE_DATA "
        f"and use its {name} sub-folder",
    )


def _has_pickles(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("batches.meta", "data_batch_1", "meta"))


def _cifar(folder: Path, names: list[str], label_bytes: int, classes: int) -> Official:
    parts = [read_cifar(folder / name, label_bytes) for name in names]
    return np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])
