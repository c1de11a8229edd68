"""Data sets: the splits, the batches, the file formats, single images."""

from __future__ import annotations

import gzip
import struct
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tightrope import data
from tightrope.data import sources
from tightrope.data.arrays import Arrays, crop_and_flip
from tightrope.data.base import SPLITS, cut, stratified_split
from tightrope.data.formats import read_cifar, read_idx
from tightrope.data.image import ImageSpec
from tightrope.errors import InputError

FULL = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(scope="module")
def embedded() -> data.Data:
    return data.load("embedded")


@pytest.fixture
def numbered() -> Arrays:
    """103 training images, image k filled with the value k, so that a batch names its images."""
    images = torch.arange(103, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 6).contiguous()
    part = (images, torch.arange(103) % 3)
    return Arrays("numbered", ("a", "b", "c"), (0.0,), (1 / 255,), dict.fromkeys(SPLITS, part))


def ids(batches) -> list[int]:
    return [round(float(image.max())) for x, _ in batches for image in x]


# --- splits -----------------------------------------------------------------------------------------------


@given(
    labels=st.lists(st.integers(0, 4), min_size=2, max_size=200),
    share=st.floats(0.05, 0.95),
    seed=st.integers(0, 2**32),
)
def test_split_is_a_stratified_partition(labels, share, seed):
    labels = np.array(labels)
    wanted = round(share * len(labels))
    if not 0 < wanted < len(labels):
        with pytest.raises(InputError, match="without images"):
            stratified_split(labels, share, seed)
        return
    rest, held = stratified_split(labels, share, seed)
    assert sorted([*rest, *held]) == list(range(len(labels)))
    assert len(held) == wanted
    for cls in range(5):
        exact = (labels == cls).sum() * wanted / len(labels)
        assert abs((labels[held] == cls).sum() - exact) < 1


def test_split_follows_its_seed():
    labels = np.arange(100) % 4
    first, again, other = (stratified_split(labels, 20, seed)[1] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(np.sort(first), np.sort(other))


@pytest.mark.parametrize("held_out", [0, 100, -3, 0.0, 1.0, 1.5])
def test_split_refuses_an_empty_part(held_out):
    with pytest.raises(InputError, match="without images"):
        stratified_split(np.zeros(100, dtype=np.int64), held_out, 0)


# --- batches ----------------------------------------------------------------------------------------------


@given(n=st.integers(1, 300), size=st.integers(2, 40), world=st.integers(1, 7))
def test_shards_partition_the_images_in_equally_many_batches(n, size, world):
    shards = [cut(n, size, rank=rank, world=world) for rank in range(world)]
    for rank, shard in enumerate(shards):
        covered = [k for part in shard for k in range(part.start, part.stop)]
        assert covered == list(range(len(range(rank, n, world))))
        assert all(0 < part.stop - part.start <= size for part in shard)
    if n >= 2 * world:
        assert len({len(shard) for shard in shards}) == 1


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("world", [1, 2, 5])
def test_ranks_together_give_each_image_once(numbered, world, augment):
    options = {"shuffle": True, "seed": 3, "augment": augment}
    shards = [list(numbered.batches("train", 8, rank=r, world=world, **options)) for r in range(world)]
    assert sorted(k for shard in shards for k in ids(shard)) == list(range(103))
    images = {k: x for shard in shards for xs, _ in shard for k, x in zip(ids([(xs, 0)]), xs, strict=True)}
    for xs, ys in numbered.batches("train", 103, **options):
        for k, x, y in zip(ids([(xs, ys)]), xs, ys, strict=True):
            assert y == k % 3
            assert torch.equal(images[k], x)  # augmentation does not depend on the number of ranks


def test_order_and_augmentation_follow_the_seed(numbered):
    def run(seed):
        return torch.cat([x for x, _ in numbered.batches("train", 10, shuffle=True, augment=True, seed=seed)])

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert ids(numbered.batches("train", 10)) == list(range(103))


def test_limit_keeps_the_same_images_under_shuffling(numbered):
    shuffled = ids(numbered.batches("train", 4, shuffle=True, seed=5, limit=10))
    assert sorted(shuffled) == ids(numbered.batches("train", 4, limit=10)) == list(range(10))
    assert shuffled != list(range(10))
    assert len(ids(numbered.batches("train", 4, limit=1000))) == 103


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("valid", 8, {}), "unknown split"),
        (("train", 0, {}), "at least one image"),
        (("train", 8, {"limit": 0}), "limit"),
        (("train", 8, {"rank": 2, "world": 2}), "rank"),
    ],
)
def test_batches_refuse_nonsense_at_once(numbered, arguments, message):
    split, size, options = arguments
    with pytest.raises(InputError, match=message):
        numbered.batches(split, size, **options)


def test_crops_are_windows_of_the_padded_image_flipped_or_not():
    x = torch.randint(1, 256, (40, 3, 5, 7), dtype=torch.uint8)
    draws = torch.stack([torch.arange(40) % 5, torch.arange(40) // 8, torch.arange(40) % 2], dim=1)
    padded = torch.zeros(40, 3, 9, 11, dtype=torch.uint8)
    padded[:, :, 2:7, 2:9] = x
    for image, out, (top, left, flip) in zip(padded, crop_and_flip(x, draws, 2), draws.tolist(), strict=True):
        window = image[:, top : top + 5, left : left + 7]
        assert torch.equal(out, window.flip(-1) if flip else window)


# --- the embedded set -------------------------------------------------------------------------------------


def test_embedded_is_balanced_normalised_and_disjoint(embedded):
    seen: set[bytes] = set()
    for split, per_class in {"train": 800, "validation": 100, "test": 100}.items():
        x, y = (torch.cat(parts) for parts in zip(*embedded.batches(split, 1000), strict=True))
        assert x.shape == (10 * per_class, *embedded.input_shape) and x.dtype == torch.float32
        assert torch.bincount(y, minlength=10).tolist() == [per_class] * 10 and y.dtype == torch.int64
        assert abs(float(x.mean())) < 0.05 and abs(float(x.std()) - 1) < 0.05
        images = {image.numpy().tobytes() for image in x}
        assert not images & seen
        seen |= images


def test_embedded_pixels_are_normalised_as_documented(embedded):
    raw = embedded.splits["test"][0][:5].numpy().astype(np.float64)
    x, _ = next(embedded.batches("test", 5))
    np.testing.assert_allclose(x.numpy(), (raw / 255 - embedded.mean[0]) / embedded.std[0], atol=1e-6)


def test_embedded_refuses_another_split():
    with pytest.raises(InputError, match="fixed"):
        data.load("embedded", validation=0.2)


@pytest.mark.skipif(not FULL.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_embedded_parts_lie_in_the_same_parts_of_the_full_set(embedded):
    full = data.load("fashion-mnist", root=FULL)
    assert [full.size(split) for split in SPLITS] == [55_000, 5_000, 10_000]
    for split in SPLITS:
        whole = {image.numpy().tobytes() for image in full.splits[split][0]}
        assert all(image.numpy().tobytes() in whole for image in embedded.splits[split][0])


# --- IDX --------------------------------------------------------------------------------------------------


def idx(values: np.ndarray) -> bytes:
    return (
        struct.pack(f">2xBB{values.ndim}I", 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()
    )


def write_fashion(folder: Path, n: int = 40) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for stem in ("train", "t10k"):
        images, labels = rng.integers(0, 256, (n, 28, 28)), np.arange(n) % 10
        (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (folder / f"{stem}-labels-idx1-ubyte").write_bytes(idx(labels))


def test_fashion_mnist_is_found_through_the_environment(tmp_path, monkeypatch):
    write_fashion(tmp_path / "fashion-mnist")
    monkeypatch.setenv("TIGHTROPE_DATA", str(tmp_path))
    found = data.load("fashion-mnist", validation=10, seed=4)
    assert [found.size(split) for split in SPLITS] == [30, 10, 40]
    assert torch.bincount(found.splits["validation"][1]).tolist() == [1] * 10
    assert torch.equal(found.splits["test"][1], torch.arange(40) % 10)


def test_fashion_mnist_missing_says_how_to_get_it(tmp_path):
    with pytest.raises(InputError, match="apt-get install dataset-fashion-mnist"):
        data.load("fashion-mnist", root=tmp_path)


class Downloader(ModuleType):
    """Stands in for torchvision.datasets: writes the files as torchvision lays them out, or fails."""

    def __init__(self, works: bool) -> None:
        super().__init__("torchvision.datasets")
        self.works = works

    def FashionMNIST(self, root: str, train: bool, download: bool) -> None:  # noqa: N802
        if not self.works:
            raise OSError("network is unreachable")
        write_fashion(Path(root) / "FashionMNIST" / "raw")


def test_fashion_mnist_is_downloaded_through_torchvision(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_roots", lambda root, name, system: [tmp_path])
    monkeypatch.setitem(sys.modules, "torchvision.datasets", Downloader(works=False))
    with pytest.raises(InputError, match=r"network is unreachable(.|\n)*apt-get"):
        data.load("fashion-mnist")
    monkeypatch.setitem(sys.modules, "torchvision.datasets", Downloader(works=True))
    assert data.load("fashion-mnist").size("test") == 40
    monkeypatch.setitem(sys.modules, "torchvision.datasets", Downloader(works=False))
    assert data.load("fashion-mnist").size("test") == 40  # found where the download left it


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"hello world", "not an IDX file"),
        (b"", "not an IDX file"),
        (b"\0\0\x08\x03\0\0", "cut short"),
        (idx(np.zeros((2, 3)))[:-1], "header says"),
        (idx(np.zeros((2, 3))) + b"x", "header says"),
    ],
)
def test_idx_names_a_corrupt_file(tmp_path, raw, message):
    path = tmp_path / "some-idx"
    path.write_bytes(raw)
    with pytest.raises(InputError, match=message) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


def test_idx_names_a_gzip_cut_short(tmp_path):
    path = tmp_path / "some-idx.gz"
    path.write_bytes(gzip.compress(idx(np.arange(6)))[:-6])
    with pytest.raises(InputError, match=r"some-idx\.gz"):
        read_idx(path)


def test_fashion_mnist_refuses_labels_outside_its_classes(tmp_path):
    write_fashion(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.full(40, 10)))
    with pytest.raises(InputError, match="labels outside"):
        data.load("fashion-mnist", root=tmp_path)


# --- CIFAR ------------------------------------------------------------------------------------------------


def cifar_records(n: int, classes: int, coarse: bool, seed: int) -> tuple[bytes, np.ndarray, np.ndarray]:
    images = np.random.default_rng(seed).integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(n) % classes
    head = (lambda label: bytes([label // 5, label])) if coarse else (lambda label: bytes([label]))
    records = (head(y) + x.tobytes() for x, y in zip(images, labels, strict=True))
    return b"".join(records), images, labels


def test_cifar10_binary(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for k in range(1, 6):
        (folder / f"data_batch_{k}.bin").write_bytes(cifar_records(20, 10, False, k)[0])
    raw, images, labels = cifar_records(30, 10, False, 9)
    (folder / "test_batch.bin").write_bytes(raw)
    found = data.load("cifar10", root=tmp_path, validation=0.2)
    assert [found.size(split) for split in SPLITS] == [80, 20, 30] and found.input_shape == (3, 32, 32)
    x, y = next(found.batches("test", 30))
    expected = (images / 255 - np.array(found.mean)[:, None, None]) / np.array(found.std)[:, None, None]
    np.testing.assert_allclose(x.numpy(), expected, atol=1e-5)
    assert np.array_equal(y.numpy(), labels)


def test_cifar100_binary_uses_the_fine_labels(tmp_path):
    (tmp_path / "train.bin").write_bytes(cifar_records(200, 100, True, 0)[0])
    (tmp_path / "test.bin").write_bytes(cifar_records(100, 100, True, 1)[0])
    found = data.load("cifar100", root=tmp_path, validation=100)
    assert torch.equal(found.splits["test"][1], torch.arange(100))
    assert torch.equal(found.splits["validation"][1].sort().values, torch.arange(100))


def test_cifar_python_version_is_refused_with_the_way_to_the_binary_one(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"\x80")
    with pytest.raises(InputError, match=r"only the Python one(.|\n)*cifar-10-binary\.tar\.gz"):
        data.load("cifar10", root=tmp_path)


@pytest.mark.parametrize("raw", [b"", b"x" * 3072, b"x" * 3074])
def test_cifar_names_a_corrupt_file(tmp_path, raw):
    path = tmp_path / "test_batch.bin"
    path.write_bytes(raw)
    with pytest.raises(InputError, match=r"not a CIFAR binary(.|\n)*test_batch\.bin"):
        read_cifar(path, 1)


# --- single images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sneaker", "bag", "dress"])
def test_sample_images_are_the_embedded_test_images(embedded, name):
    x = data.read_image(data.ASSETS / f"sample_{name}.png", embedded)
    images, labels = next(embedded.batches("test", 1000))
    assert torch.equal(x[0], images[labels == embedded.classes.index(name)][0])


def test_image_of_another_size_needs_explicit_resizing(tmp_path, embedded):
    path = tmp_path / "x.png"
    Image.new("RGB", (56, 84), (255, 255, 255)).save(path)
    with pytest.raises(InputError, match=r"84x56(.|\n)*28x28"):
        data.read_image(path, embedded)
    x = data.read_image(path, embedded, resize=True)
    assert x.shape == (1, 1, 28, 28)
    assert torch.allclose(x, torch.full_like(x, (1 - embedded.mean[0]) / embedded.std[0]))


def test_resizing_keeps_the_centre(tmp_path):
    image = np.zeros((20, 60), dtype=np.uint8)
    image[:, 20:40] = 255
    Image.fromarray(image).save(tmp_path / "x.png")
    x = data.read_image(tmp_path / "x.png", ImageSpec((1, 20, 20), (0.0,), (1.0,)), resize=True)
    assert torch.equal(x, torch.ones(1, 1, 20, 20))


def test_transparency_lies_on_black(tmp_path):
    Image.new("RGBA", (4, 4), (255, 255, 255, 0)).save(tmp_path / "x.png")
    x = data.read_image(tmp_path / "x.png", ImageSpec((3, 4, 4), (0.0,) * 3, (1.0,) * 3))
    assert torch.equal(x, torch.zeros(1, 3, 4, 4))


def test_unreadable_images_are_named(tmp_path, embedded):
    (tmp_path / "text.png").write_text("not an image")
    whole = (data.ASSETS / "sample_bag.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.zeros((28, 28), dtype=np.uint16)).save(tmp_path / "deep.png")
    for name, message in {
        "none.png": "no such image",
        "text.png": "not an image",
        "half.png": "damaged",
        "deep.png": "more than 8 bits",
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            data.read_image(tmp_path / name, embedded)
        assert name in str(caught.value)


def test_unknown_names_get_near_ones():
    with pytest.raises(InputError, match="cifar10"):
        data.load("cifar-10")
