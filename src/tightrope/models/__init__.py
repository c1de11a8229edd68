"""Networks by name: `resolve(spec)` gives a plain `nn.Module` in evaluation mode."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn

from tightrope.errors import InputError, meant
from tightrope.models.external import from_file, from_timm, from_torchvision
from tightrope.models.mobilenet import from_arch
from tightrope.models.resnet import cifar_resnet, demo_shape, resnet18
from tightrope.models.vgg import VGG
from tightrope.models.weights import load_weights

__all__ = ["NAMES", "load_weights", "located", "resolve"]

DEMO_WEIGHTS = Path(__file__).parent.parent / "assets" / "demo.safetensors"
DEMO_CLASSES, DEMO_CHANNELS = 10, 1

_BUILDERS: dict[str, Callable[[int, int], nn.Module]] = {
    "resnet8": partial(cifar_resnet, 1),
    "resnet14": partial(cifar_resnet, 2),
    "resnet18": resnet18,
    "resnet20": partial(cifar_resnet, 3),
    "resnet32": partial(cifar_resnet, 5),
    "vgg16_bn": partial(VGG, 16),
    "vgg19_bn": partial(VGG, 19),
}
_LIBRARIES: dict[str, Callable[[str, int | None, int | None], nn.Module]] = {
    "torchvision": from_torchvision,
    "timm": from_timm,
    "arch": from_arch,
}
NAMES = ("demo", *_BUILDERS)


def located(spec: str) -> str:
    """`spec` as it means the same from every directory: the path of a Python file becomes absolute."""
    file, _, function = spec.rpartition(":")
    if spec in NAMES or spec.partition(":")[0] in _LIBRARIES or not file.endswith(".py"):
        return spec
    return f"{os.path.abspath(Path(file).expanduser())}:{function}"


def resolve(
    spec: str,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    weights: str | Path | None = None,
) -> nn.Module:
    """The network that `spec` names, in evaluation mode.

    `demo` (trained, 1x28x28, 10 classes); `resnet8`, `resnet14`, `resnet18`, `resnet20`, `resnet32`,
    `vgg16_bn`, `vgg19_bn` (CIFAR shapes; 10 classes and 3 channels unless given); `torchvision:NAME`;
    `timm:NAME`; `arch:STRING`, an architecture string (`tightrope.models.arch`); `path/to/file.py:function`,
    whose file is run. All but `demo` start from torch's random
    generator unless `weights`, a safetensors file with exactly the network's tensors, is given; nothing is
    downloaded.

    Raises InputError for an unknown name, a number of classes or channels that the network cannot have, a
    missing library, or weights that do not fit.
    """
    for name, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if value is not None and value < 1:
            raise InputError(f"{name} must be positive", got=value)
    net = _build(spec, num_classes, in_channels)
    if weights is not None:
        load_weights(net, Path(weights).expanduser())
    return net.eval()


def _build(spec: str, num_classes: int | None, in_channels: int | None) -> nn.Module:
    if spec == "demo":
        return _demo(num_classes, in_channels)
    if spec in _BUILDERS:
        return _BUILDERS[spec](
            10 if num_classes is None else num_classes, 3 if in_channels is None else in_channels
        )
    library, _, name = spec.partition(":")
    if library in _LIBRARIES:
        return _LIBRARIES[library](name, num_classes, in_channels)
    if spec.rpartition(":")[0].endswith(".py"):
        return from_file(spec, num_classes, in_channels)
    if spec.endswith(".py"):
        raise InputError(
            "which function of the file builds the network?", got=spec, allowed=f"{spec}:FUNCTION"
        )
    raise InputError(
        "unknown network",
        got=spec,
        allowed=", ".join(NAMES) + ", torchvision:NAME, timm:NAME, arch:STRING, path/to/file.py:FUNCTION",
        fix=meant(spec, NAMES) or "--model demo",
    )


def _demo(num_classes: int | None, in_channels: int | None) -> nn.Module:
    if num_classes not in (None, DEMO_CLASSES) or in_channels not in (None, DEMO_CHANNELS):
        raise InputError(
            "the demo network is trained for 10 classes of grey images",
            got=f"num_classes={num_classes}, in_channels={in_channels}",
            fix="resnet8 with these numbers",
        )
    net = demo_shape(DEMO_CLASSES, DEMO_CHANNELS)
    load_weights(net, DEMO_WEIGHTS)
    return net
