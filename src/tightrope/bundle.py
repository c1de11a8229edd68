"""One directory that holds everything of one network under one budget. No pickle anywhere.

bundle.json          which network, which data, which versions
base.safetensors     the trained network as it came
problem.npz          every option, loss and cost: solves again for another budget
plan.json            the choice
model.safetensors    the rewritten network's weights
program.json, program.safetensors     the frozen network that runtimes execute
measurements.json    what runs really cost
curve.json           accuracy against budget, with the controls
accuracy.json        of the fine-tuned network, and its recipe
log.jsonl            one line per training epoch
report.html, README.md
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from safetensors.torch import load_file, save
from torch import nn

from tightrope import __version__, models
from tightrope.data import Data, load
from tightrope.errors import BundleError, InputError
from tightrope.program import Program
from tightrope.rewrite import apply
from tightrope.types import SCHEMA, Json, Measurement, Plan, Problem, atomic_write, check_schema

DISTORTION = "distortion"  # a measurement under way starts the directory, before there is a bundle
DERIVED = (
    "problem.npz",
    "plan.json",
    "model.safetensors",
    "program.json",
    "program.safetensors",
    "measurements.json",
    "curve.json",
    "accuracy.json",
    "log.jsonl",
    "report.html",
    "README.md",
    "checkpoint.safetensors",
)


def versions() -> dict[str, str]:
    return {
        "tightrope": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }


def write_json(path: Path, body: Json) -> None:
    atomic_write(path, lambda f: f.write((json.dumps(body, indent=1) + "\n").encode()))


def read_json(path: Path) -> Json:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise BundleError("the bundle lacks a file", where=str(path)) from None
    except (ValueError, OSError) as error:
        raise BundleError("a file of the bundle is damaged", where=str(path), got=str(error)) from error


def _save_weights(path: Path, model: nn.Module) -> None:
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    atomic_write(path, lambda f: f.write(save(tensors)))


def _load_weights(path: Path, model: nn.Module) -> nn.Module:
    try:
        model.load_state_dict(load_file(path), strict=True)
    except FileNotFoundError:
        raise BundleError("the bundle lacks its weights", where=str(path)) from None
    except Exception as error:  # safetensors and torch raise many kinds
        raise BundleError(
            "weights that do not fit the network, or a damaged file",
            where=str(path),
            got=str(error).split("\n\t")[0][:300],
        ) from error
    return model.eval()


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk; every method reads or writes one part of it, completely or not at all."""

    path: Path

    @classmethod
    def create(cls, path: Path, about: Mapping[str, Json], base: nn.Module) -> Bundle:
        """Start a bundle in a new or empty directory, or over a bundle or the beginnings of one."""
        cls.check_target(path)
        path.mkdir(parents=True, exist_ok=True)
        bundle = cls(path)
        for stale in DERIVED:
            (path / stale).unlink(missing_ok=True)
        _save_weights(path / "base.safetensors", base)
        write_json(path / "bundle.json", {"schema": SCHEMA, "versions": versions(), **about})
        return bundle

    @staticmethod
    def check_target(path: Path) -> None:
        """Raise InputError when writing a bundle at `path` would overwrite something else."""
        if path.is_file():
            raise InputError("the bundle must be a directory", where=str(path), fix="another --out")
        foreign = path.is_dir() and any(p.name != DISTORTION for p in path.iterdir())
        if foreign and not (path / "bundle.json").exists():
            raise InputError("not empty and not a bundle", where=str(path), fix="another --out")

    @classmethod
    def open(cls, path: Path) -> Bundle:
        if not (path / "bundle.json").is_file():
            what = "no such bundle" if not path.exists() else "not a bundle: bundle.json is missing"
            raise BundleError(what, where=str(path), fix="tightrope search --out DIRECTORY")
        bundle = cls(path)
        check_schema(bundle.about, path / "bundle.json")
        return bundle

    @property
    def about(self) -> dict[str, Json]:
        body = read_json(self.path / "bundle.json")
        if not isinstance(body, dict):
            raise BundleError("a file of the bundle is damaged", where=str(self.path / "bundle.json"))
        return body

    def base(self) -> nn.Module:
        spec, classes, channels = self._named("model", "num_classes", "in_channels")
        model = models.resolve(spec, num_classes=classes, in_channels=channels)
        return _load_weights(self.path / "base.safetensors", model)

    def data(self) -> Data:
        name, root, image_size = self._named("data", "root", "image_size")
        return load(name, root=root, image_size=image_size)

    def _named(self, *keys: str) -> tuple[Json, ...]:
        about = self.about
        try:
            return tuple(about[key] for key in keys)
        except KeyError as error:
            where = str(self.path / "bundle.json")
            raise BundleError("a file of the bundle is damaged", where=where, got=f"no {error}") from None

    def plan(self) -> Plan:
        try:
            text = (self.path / "plan.json").read_text()
        except FileNotFoundError:
            raise BundleError("no plan yet", where=str(self.path), fix="tightrope search") from None
        except (UnicodeDecodeError, OSError) as error:
            raise BundleError("the plan is damaged", where=str(self.path), got=str(error)) from error
        return Plan.from_json(text, self.path / "plan.json")

    def save_plan(self, plan: Plan) -> None:
        atomic_write(self.path / "plan.json", lambda f: f.write(plan.to_json().encode()))

    def problem(self) -> Problem:
        return Problem.load(self.path / "problem.npz")

    def model(self) -> nn.Module:
        """Rebuild the base, apply the plan, load the weights strictly."""
        model = apply(self.base(), self.plan())
        return _load_weights(self.path / "model.safetensors", model)

    def save_model(self, model: nn.Module, program: Program) -> None:
        """Keep a network; then what was measured on an earlier one goes."""
        _save_weights(self.path / "model.safetensors", model)
        program.save(self.path)
        for stale in ("accuracy.json", "measurements.json", "report.html", "README.md"):
            (self.path / stale).unlink(missing_ok=True)

    def program(self, *, weights: bool = True) -> Program:
        return Program.load(self.path, weights=weights)

    def measurements(self) -> list[dict[str, Json]]:
        path = self.path / "measurements.json"
        found = read_json(path) if path.exists() else []
        if not isinstance(found, list) or not all(isinstance(m, dict) and "runtime" in m for m in found):
            raise BundleError("a file of the bundle is damaged", where=str(path))
        return found

    def add_measurement(self, measurement: Measurement, extra: Mapping[str, Json]) -> None:
        """Keep the newest measurement of each runtime."""
        others = [m for m in self.measurements() if m["runtime"] != measurement.runtime]
        write_json(self.path / "measurements.json", [*others, measurement.to_dict() | dict(extra)])

    def log(self, record: Mapping[str, Json]) -> None:
        with (self.path / "log.jsonl").open("a") as f:
            f.write(json.dumps(record) + "\n")
