"""One image file as a network wants it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from tightrope.data.arrays import normalise
from tightrope.errors import InputError

MODES = {1: "L", 3: "RGB"}
MARGIN = 256 / 224  # the usual ImageNet evaluation: shorter side to 256, then the central 224


class Pixels(Protocol):
    """What reading an image needs to know; every `Data` is one."""

    @property
    def input_shape(self) -> tuple[int, int, int]: ...
    @property
    def mean(self) -> tuple[float, ...]: ...
    @property
    def std(self) -> tuple[float, ...]: ...
    @property
    def any_size(self) -> bool: ...


@dataclass(frozen=True)
class ImageSpec:
    """A `Pixels` on its own, for when the data set is not at hand (an image and a saved network)."""

    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    any_size: bool = False


def read_image(path: str | Path, spec: Pixels, *, resize: bool = False) -> Tensor:
    """The image at `path`, normalised float32 (1, C, H, W) for `spec` (a `Data` or an `ImageSpec`).

    Colour is converted to what the network has (grey or RGB), and transparency is laid on black. The image
    must have the network's height and width unless the data has `any_size` or `resize` is set: then its
    shorter side is resized and the centre cut out.

    Raises InputError if the file is missing, not an image, damaged, deeper than 8 bits, or of another size.
    """
    channels, height, width = spec.input_shape
    image = open_image(Path(path), channels)
    if image.size != (width, height):
        if not (resize or spec.any_size):
            raise InputError(
                "the image has another size than the network's input",
                where=str(path),
                got=f"{image.height}x{image.width} (height x width)",
                allowed=f"{height}x{width}",
                fix="--resize (in Python resize=True): the shorter side is scaled, the centre cut out",
            )
        image = resize_and_crop(image, height, width, MARGIN if spec.any_size else 1.0)
    return normalise(to_tensor(image)[None], spec.mean, spec.std)


def open_image(path: Path, channels: int) -> Image.Image:
    """Decode `path` to 8-bit grey (`channels` 1) or RGB (3), upright according to its EXIF orientation."""
    if channels not in MODES:
        raise InputError("image files have 1 or 3 channels", got=f"a network with {channels}")
    if not path.is_file():
        raise InputError("no such image file", where=str(path))
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(
            "not an image, or a damaged one",
            where=str(path),
            got=str(error),
            allowed="PNG, JPEG, BMP, WebP, ...",
        ) from error
    if image.mode.startswith(("I", "F")):
        raise InputError(
            "the image has more than 8 bits per pixel",
            where=str(path),
            got=f"mode {image.mode}",
            fix="save it with 8 bits per channel; how to scale its range is for you to say",
        )
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    return image.convert(MODES[channels])


def resize_and_crop(image: Image.Image, height: int, width: int, margin: float) -> Image.Image:
    """Scale so that the image covers `margin` times (height, width), then cut out the centre."""
    scale = max(margin * height / image.height, margin * width / image.width)
    across, down = width / scale, height / scale  # the part of the original that is kept
    left, top = (image.width - across) / 2, (image.height - down) / 2
    box = (max(left, 0), max(top, 0), min(left + across, image.width), min(top + down, image.height))
    return image.resize((width, height), Image.Resampling.BILINEAR, box=box)


def to_tensor(image: Image.Image) -> Tensor:
    """uint8 (C, H, W) from an 8-bit grey or RGB image."""
    values = np.array(image)
    return torch.from_numpy(
        values[None] if values.ndim == 2 else np.ascontiguousarray(values.transpose(2, 0, 1))
    )
