"""Weights from a safetensors file into a network, or a clear reason why not."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from tightrope.errors import InputError, near

_SHOWN = 5


def load_weights(net: nn.Module, path: Path) -> None:
    """Fill every parameter and buffer of `net` from `path`, which must hold exactly those, in those shapes.

    Raises InputError for a missing, foreign or corrupt file, keys or shapes that differ, and values that are
    not finite. `net` is changed only after all checks.
    """
    if not path.is_file():
        raise InputError("no such weights file", where=str(path))
    if path.suffix != ".safetensors":
        raise InputError(
            "weights are read from safetensors files only: a pickle can run code",
            where=str(path),
            allowed="NAME.safetensors",
            fix="safetensors.torch.save_file(model.state_dict(), 'NAME.safetensors')",
        )
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError("the weights file is corrupt", where=str(path), got=str(error)) from error
    wanted = net.state_dict()
    missing = [key for key in wanted if key not in found]
    foreign = [key for key in found if key not in wanted]
    if missing or foreign:
        close = f"near {missing[0]}: {near(missing[0], foreign)}" if missing and foreign else None
        raise InputError(
            "the weights are of another network: their names differ",
            where=str(path),
            got="; ".join(
                f"{len(keys)} {what}: {_some(keys)}"
                for what, keys in (("missing", missing), ("not in the network", foreign))
                if keys
            ),
            allowed=f"exactly the {len(wanted)} tensors of the network",
            fix=close,
        )
    shapes = [
        f"{key} {list(found[key].shape)}, network {list(value.shape)}"
        for key, value in wanted.items()
        if found[key].shape != value.shape or found[key].is_floating_point() != value.is_floating_point()
    ]
    if shapes:
        raise InputError(
            "the weights are of another network: shapes or types differ",
            where=str(path),
            got=f"{len(shapes)} tensors: {_some(shapes)}",
            fix="num_classes and in_channels must be those of the file",
        )
    broken = [
        key for key, value in found.items() if value.is_floating_point() and not torch.isfinite(value).all()
    ]
    if broken:
        raise InputError("the weights hold infinities or NaN", where=str(path), got=_some(broken))
    net.load_state_dict(found, strict=True)


def _some(words: Iterable[str]) -> str:
    words = list(words)
    return ", ".join(words[:_SHOWN]) + (", …" if len(words) > _SHOWN else "")
