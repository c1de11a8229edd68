"""Networks from elsewhere: torchvision, timm, and a function in a Python file of the user's."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from tightrope.errors import InputError, near

_FIX = "make vision; or pip install 'tightrope[vision]', which may replace torch by a newer one"


def from_torchvision(name: str, num_classes: int | None, in_channels: int | None) -> nn.Module:
    """`torchvision.models.NAME`, randomly initialised. Its networks read 3 channels."""
    models = vision("torchvision.models")
    known = models.list_models(module=models)
    if name not in known:
        raise InputError(
            "torchvision has no such classification network", got=name, fix=f"near: {near(name, known)}"
        )
    if in_channels not in (None, 3):
        raise InputError(
            "torchvision's networks read 3 channels",
            where=f"torchvision:{name}",
            got=f"in_channels={in_channels}",
            fix=f"timm:{name} where timm has it (it takes any number), or a function of your own",
        )
    classes = {} if num_classes is None else {"num_classes": num_classes}
    net: nn.Module = models.get_model(name, weights=None, **classes)
    return net


def from_timm(name: str, num_classes: int | None, in_channels: int | None) -> nn.Module:
    """timm's `NAME`, randomly initialised; the tag of pre-trained weights in `NAME.TAG` loads none."""
    timm = vision("timm")
    known = timm.list_models()
    if name.split(".")[0] not in known:
        raise InputError("timm has no such network", got=name, fix=f"near: {near(name, known)}")
    given = {"num_classes": num_classes, "in_chans": in_channels}
    given = {key: value for key, value in given.items() if value is not None}
    try:
        net: nn.Module = timm.create_model(name, pretrained=False, **given)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError("timm cannot build this network", where=f"timm:{name}", got=str(error)) from error
    return net


def from_file(spec: str, num_classes: int | None, in_channels: int | None) -> nn.Module:
    """The module that FUNCTION in PATH returns, for the spec `PATH.py:FUNCTION`.

    The file is run. The function takes no arguments, or `num_classes` and `in_channels` or one of them.
    """
    file, _, function = spec.rpartition(":")
    path = Path(file).expanduser()
    if not path.is_file():
        raise InputError("no such Python file", where=str(path), got=spec)
    module = _run(path)
    build = getattr(module, function, None)
    if not callable(build):
        named = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise InputError(
            "the file has no such function",
            where=str(path),
            got=function,
            fix=f"near: {near(function, named)}",
        )
    parameters = inspect.signature(build).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    given = {"num_classes": num_classes, "in_channels": in_channels}
    given = {k: v for k, v in given.items() if v is not None and (k in parameters or takes_any)}
    try:
        net = build(**given)
    except Exception as error:
        raise InputError("the function failed", where=spec, got=f"{type(error).__name__}: {error}") from error
    if not isinstance(net, nn.Module):
        raise InputError("the function returned no torch.nn.Module", where=spec, got=type(net).__name__)
    return net


def _run(path: Path) -> ModuleType:
    """Execute `path` as a module under its own name in `sys.modules`, where dataclasses look for it."""
    name = f"tightrope_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError("not a Python file", where=str(path), allowed="NAME.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise InputError(
            "the file fails when run", where=str(path), got=f"{type(error).__name__}: {error}"
        ) from error
    return module


@cache
def _detection_operators() -> torch.library.Library:
    """Schemas of two operators without which torchvision cannot be imported; no classifier calls them.

    PyPI's torchvision is built for PyPI's torch with CUDA: its compiled part does not load beside a CPU one.
    A definition lives as long as its Library.
    """
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        schema = f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        library.define(schema)  # type: ignore[no-untyped-call]
    return library


def vision(name: str) -> ModuleType:
    """Import an optional package; torchvision, which timm imports too, may be built for another torch."""
    package = name.split(".")[0]
    try:
        try:
            return importlib.import_module(name)
        except RuntimeError:
            _detection_operators()
            for half in [m for m in sys.modules if m.split(".")[0] in ("torchvision", package)]:
                del sys.modules[half]
            return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{package} is not installed", got=str(error), fix=_FIX) from error
    except RuntimeError as error:
        raise InputError(
            f"{package} does not load beside this torch",
            got=str(error),
            fix=f"install a torchvision built for this torch: {_FIX}",
        ) from error
