"""An unfinished training run on disk: tensors as safetensors, everything else as JSON in its header."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from tightrope.errors import BundleError, InputError
from tightrope.forms import parse
from tightrope.types import SCHEMA, Json, atomic_write, check_schema

KEY = "tightrope"  # of the one entry in the safetensors header


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors on the CPU, and JSON saying how far the run is."""

    tensors: Mapping[str, Tensor]
    progress: Mapping[str, Json]


def save(path: Path, run: Mapping[str, Json], checkpoint: Checkpoint) -> None:
    """Write the file completely or not at all. `run` says which run it belongs to: nested dicts of JSON.

    Raises InputError when the place cannot be written.
    """
    tensors = {k: v.detach().cpu().contiguous() for k, v in checkpoint.tensors.items()}
    body = {"schema": SCHEMA, "run": run, "progress": dict(checkpoint.progress)}
    text = json.dumps(body | {"sha256": _digest(tensors, body)})
    try:
        atomic_write(path, lambda f: f.write(to_bytes(tensors, metadata={KEY: text})))
    except OSError as error:
        raise InputError("cannot write the checkpoint", where=str(path), got=str(error)) from error


def load(path: Path, run: Mapping[str, Json], anew: str = "--restart, or delete it") -> Checkpoint | None:
    """The checkpoint at `path`, or None where there is no file. `anew`: how a user starts anew.

    Raises BundleError when the file is damaged, or written by another run; nothing is changed.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            body = parse((file.metadata() or {})[KEY])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        sha256 = body.pop("sha256")
        check_schema(body, path)
        found, progress = body["run"], body["progress"]
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise BundleError(
            "the checkpoint is damaged, or no checkpoint", where=str(path), got=str(error), fix=anew
        ) from error
    if sha256 != _digest(tensors, body):
        raise BundleError(
            "the checkpoint is damaged",
            where=str(path),
            got="contents unlike their hash",
            fix=anew,
        )
    other = list(differences(found, run))
    if other:
        raise BundleError(
            "the checkpoint belongs to another run", where=str(path), got="; ".join(other), fix=anew
        )
    return Checkpoint(tensors, progress)


@contextmanager
def deferred_interrupt(active: bool) -> Iterator[Callable[[], bool]]:
    """Within, the first Ctrl-C only makes the given function answer True; a second one acts at once.

    So work can stop between two steps, where its state is whole. Outside the main thread, where no signal
    arrives, and where Ctrl-C does not raise KeyboardInterrupt, nothing changes.
    """
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not active or not usual or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = False

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _digest(tensors: Mapping[str, Tensor], body: Json) -> str:
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def differences(found: Json, wanted: Json) -> Iterator[str]:
    """What differs from what was found in JSON, leaf by leaf; hashes are cut short."""
    yield from _differences(found, json.loads(json.dumps(wanted)))


def _differences(found: Json, wanted: Json, where: str = "") -> Iterator[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            yield from _differences(found.get(key), wanted.get(key), f"{where}.{key}".lstrip("."))
    elif found != wanted:
        yield f"{where} {_short(found)}, now {_short(wanted)}"


def _short(value: Json) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 16 else str(value)
