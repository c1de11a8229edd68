"""Cut the embedded data set out of Fashion-MNIST and write it, with three sample images, into the package.

    python benchmarks/make_assets.py           # 10 seconds; the same bytes every time

Train and validation images come from the training and the validation part of the full set's default split,
both cut from the official training file; the test images come from the official test file.
"""

from __future__ import annotations

import lzma
from io import BytesIO

import numpy as np
from PIL import Image

from tightrope.data.arrays import Arrays
from tightrope.data.base import Split
from tightrope.data.sources import ASSETS, fashion_mnist

PER_CLASS: dict[Split, int] = {"train": 800, "validation": 100, "test": 100}
SAMPLES = ("sneaker", "bag", "dress")


def subset(data: Arrays, split: Split, per_class: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `per_class` images of each class in `split`, in its order: uint8 (N, H, W) and uint8 (N,)."""
    images, labels = (values.numpy() for values in data.splits[split])
    chosen = np.sort(
        np.concatenate([np.flatnonzero(labels == k)[:per_class] for k in range(len(data.classes))])
    )
    return images[chosen, 0], labels[chosen].astype(np.uint8)


def main() -> None:
    data = fashion_mnist(None, None, 0)
    parts = {split: subset(data, split, n) for split, n in PER_CLASS.items()}
    buffer = BytesIO()
    np.savez(
        buffer,
        **{f"{split}_images": images for split, (images, _) in parts.items()},
        **{f"{split}_labels": labels for split, (_, labels) in parts.items()},
    )
    packed = lzma.compress(buffer.getvalue(), preset=9)
    (ASSETS / "embedded.npz.xz").write_bytes(packed)
    images, labels = parts["test"]
    for name in SAMPLES:
        first = int(np.argmax(labels == data.classes.index(name)))
        Image.fromarray(images[first]).save(ASSETS / f"sample_{name}.png", optimize=True)
    print(f"embedded.npz.xz: {len(packed):,} bytes")


if __name__ == "__main__":
    main()
