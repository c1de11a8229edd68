"""Directories of images: parts, classes, decoding, damaged files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tightrope import data
from tightrope.data.base import SPLITS
from tightrope.errors import InputError


def fill(folder: Path, classes: dict[str, int], seed: int = 0, size: tuple[int, int] | None = None) -> None:
    """Smooth random images of one (width, height) or of varying ones, half PNG and half JPEG."""
    rng = np.random.default_rng(seed)
    for name, count in classes.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for k in range(count):
            pixels = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            image = pixels.resize(size or (40 + k, 50 - k), Image.Resampling.BICUBIC)
            image.save(folder / name / f"{k:03}.{'png' if k % 2 else 'jpg'}")


def everything(found: data.Data, **options) -> torch.Tensor:
    return torch.cat([x for split in SPLITS for x, _ in found.batches(split, 4, **options)])


def paths(found: data.Folder) -> dict[str, set[Path]]:
    return {split: set(found.splits[split][0]) for split in SPLITS}


def test_one_tree_is_split_by_class(tmp_path):
    fill(tmp_path, {"cat": 20, "dog": 40})
    found = data.load(str(tmp_path), image_size=16, validation=0.25)
    assert found.classes == ("cat", "dog") and found.input_shape == (3, 16, 16)
    assert [found.size(split) for split in SPLITS] == [40, 14, 6]
    parts = paths(found)
    assert len(set.union(*parts.values())) == 60
    test_labels = torch.cat([y for _, y in found.batches("test", 4)])
    assert test_labels.bincount().tolist() == [2, 4]
    for split in SPLITS:
        for path, label in zip(*found.splits[split], strict=True):
            assert path.parent.name == found.classes[label]


def test_given_parts_are_kept(tmp_path):
    for seed, part in enumerate(("train", "val", "test")):
        fill(tmp_path / part, {"cat": 4, "dog": 6}, seed)
    parts = paths(data.load(str(tmp_path)))
    folders = {split: {path.parent.parent.name for path in found} for split, found in parts.items()}
    assert folders == {"train": {"train"}, "validation": {"val"}, "test": {"test"}}
    with pytest.raises(InputError, match="own validation part"):
        data.load(str(tmp_path), validation=0.1)


def test_imagenet_layout_tests_on_val_and_validates_on_train(tmp_path):
    fill(tmp_path / "train", {"cat": 20, "dog": 20})
    fill(tmp_path / "val", {"cat": 5, "dog": 5}, 1)
    found = data.load(str(tmp_path))
    assert [found.size(split) for split in SPLITS] == [36, 4, 10]
    assert {path.parent.parent.name for path in paths(found)["test"]} == {"val"}


def test_reading_is_deterministic_and_the_same_with_workers(tmp_path):
    fill(tmp_path, {"cat": 12, "dog": 12})
    options = {"shuffle": True, "augment": True, "seed": 7}
    plain, again = (data.load(str(tmp_path), image_size=16) for _ in range(2))
    first = everything(plain, **options)
    assert torch.equal(first, everything(again, **options))
    assert torch.equal(first, everything(data.load(str(tmp_path), image_size=16, workers=1), **options))
    assert not torch.equal(first, everything(plain, **(options | {"seed": 8})))


def test_read_image_reads_as_the_batches_do(tmp_path):
    fill(tmp_path, {"cat": 12, "dog": 12})
    found = data.load(str(tmp_path), image_size=24)
    x, _ = next(found.batches("test", 1))
    assert torch.equal(x, data.read_image(found.splits["test"][0][0], found))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named(tmp_path, workers):
    fill(tmp_path, {"cat": 6, "dog": 6})
    broken = tmp_path / "dog" / "003.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(InputError, match="damaged") as caught:
        everything(data.load(str(tmp_path), image_size=8, workers=workers))
    assert str(broken) in str(caught.value)


def test_trees_that_are_no_data_set(tmp_path):
    with pytest.raises(InputError, match="no class folders"):
        data.load(str(tmp_path))
    fill(tmp_path, {"cat": 6, "dog": 0})
    with pytest.raises(InputError, match="without images"):
        data.load(str(tmp_path))
    fill(tmp_path / "parts" / "train", {"cat": 6, "dog": 6})
    fill(tmp_path / "parts" / "test", {"cat": 6, "dgo": 6})
    with pytest.raises(InputError, match=r"training part does not have(.|\n)*near: dog"):
        data.load(str(tmp_path / "parts"))


@pytest.mark.vision
def test_files_classes_and_pixels_agree_with_torchvision(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    for seed, part in enumerate(("train", "val")):
        # At this size its scaled image and its crop fall on whole pixels, so that both readers mean the same.
        fill(tmp_path / part, {"cat": 5, "ape": 5}, seed, size=(96, 64))
    found = data.load(str(tmp_path), image_size=28)
    steps = [
        torchvision.transforms.Resize(32),
        torchvision.transforms.CenterCrop(28),
        torchvision.transforms.ToTensor(),
        torchvision.transforms.Normalize(found.mean, found.std),
    ]
    oracle = torchvision.datasets.ImageFolder(tmp_path / "val", torchvision.transforms.Compose(steps))
    assert tuple(oracle.classes) == found.classes
    expected = {path: (oracle[k][0], label) for k, (path, label) in enumerate(oracle.samples)}
    x, y = next(found.batches("test", 10))
    assert len(expected) == len(x)
    for path, image, label in zip(found.splits["test"][0], x, y, strict=True):
        wanted, wanted_label = expected[str(path)]
        assert label == wanted_label
        assert (image - wanted).abs().max() <= 1.01 / 255 / min(found.std)  # one grey level of rounding
