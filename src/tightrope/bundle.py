"""One directory that holds everything of one network under one budget. No pickle anywhere.

bundle.json          which network, which data, which versions
base.safetensors     the trained network as it came
problem.npz          every option, loss and cost: solves again for another budget
plan.json            the choice
plan.safetensors     what a method learned: masks, a bit each, and a head
search.json          how good what it learned is, and what else could be done
model.safetensors    the rewritten network's weights
program.json, program.safetensors     the frozen network that runtimes execute
ring.json            what fits the small ring of mpc, where that was asked
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
from types import NoneType
from typing import Any

import numpy
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, fx, nn

from tightrope import __version__
from tightrope.data import Data, Task, load, sample_sha256, view
from tightrope.decisions import decisions
from tightrope.errors import BundleError, InputError
from tightrope.forms import Amount, mismatch, parse
from tightrope.lock import NAME as LOCK
from tightrope.lock import check_unlocked, check_writable, locked
from tightrope.nn.group_max import GroupMax
from tightrope.place import tensors_sha256
from tightrope.program import Program, base_cost
from tightrope.rewrite import apply
from tightrope.types import METRICS, Json, Measurement, Plan, Problem, atomic_write, check_schema, naming

SCHEMA = 2  # of bundle.json; bundles of schema 1 had no hashes
DISTORTION = "distortion"  # a measurement under way starts the directory, before there is a bundle
LEARNING = "learning"  # so does training under way
START = "start.safetensors"  # of a refined plan: the weights tuned under the plan before it
RESULTS = (  # cost work to make
    "search.json",
    "accuracy.json",
    "checkpoint.safetensors",
    "measurements.json",
    "curve.json",
)
DERIVED = (
    "problem.npz",
    "plan.json",
    "plan.safetensors",
    START,
    "model.safetensors",
    "program.json",
    "program.safetensors",
    "ring.json",
    "log.jsonl",
    "report.html",
    "README.md",
    *RESULTS,
)

HEAD_FORM = {
    "model?": str, "num_classes?": int, "in_channels?": int, "data?": str, "root?": (str, NoneType),
    "image_size?": (int, NoneType), "runtime?": str, "versions?": {str: str}, "task?": (dict, NoneType),
    "pricing?": {"network?": str, "profile?": {"host?": dict}},
}  # fmt: skip
_SPENT = {f"{metric}?": Amount for metric in METRICS}
MEASUREMENTS_FORM = [
    {
        "runtime": str, "batch": int, "ops": [{"op": str, "kind": str, **_SPENT}], "total": _SPENT,
        "links?": {str: int}, "offline_links?": {str: int}, "setup_links?": {str: int}, "config?": dict,
        "host?": dict, "peak_memory_bytes?": int, "same_class?": int, "max_abs_error?": Amount,
    }
]  # fmt: skip
RECORD_FORM = {
    "accuracy": Amount, "controls": {str: Amount}, "front": [{str: Amount}], "classes": [str],
    "shown": [{"title": str, "columns": [str], "rows": [[str]]}],
}  # fmt: skip
ACCURACY_FORM = {"recipe?": dict, str: Amount}
CURVE_FORM = [
    {
        "share": Amount, "cost": {str: float}, "loss": float, "bound": float, "accuracy": {str: Amount},
        str: {str: float},
    }
]  # fmt: skip


def versions() -> dict[str, str]:
    return {
        "tightrope": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }


def write_json(path: Path, body: Json) -> None:
    atomic_write(path, lambda f: f.write((json.dumps(body, indent=1) + "\n").encode()))


def read_json(path: Path, form: Any) -> Json:
    """Raises BundleError for a missing file, and for one that is not of the form (`tightrope.forms`)."""
    try:
        body = parse(path.read_bytes())
        if wrong := mismatch(body, form):
            raise ValueError(wrong)
    except FileNotFoundError:
        raise BundleError("the bundle lacks a file", where=str(path)) from None
    except (ValueError, OSError) as error:
        raise BundleError("a file of the bundle is damaged", where=str(path), got=str(error)) from error
    return body


def _save_weights(path: Path, model: nn.Module) -> None:
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    data = save(tensors, metadata={"sha256": tensors_sha256(tensors)})
    atomic_write(path, lambda f: f.write(data))


def _load_weights(path: Path, model: nn.Module | None = None) -> None:
    """Into `model`; without one they are only checked."""
    try:
        with safe_open(path, framework="pt") as file:
            sha256 = (file.metadata() or {}).get("sha256")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        if model is not None:
            model.load_state_dict(tensors, strict=True)
    except FileNotFoundError:
        raise BundleError("the bundle lacks its weights", where=str(path)) from None
    except Exception as error:  # safetensors and torch raise many kinds
        raise BundleError(
            "weights that do not fit the network, or a damaged file",
            where=str(path),
            got=str(error).split("\n\t")[0][:300],
        ) from error
    if sha256 != tensors_sha256(tensors):
        got = "no hash" if sha256 is None else f"contents unlike the hash {sha256[:12]}…"
        raise BundleError("the weights are damaged: not those that were saved", where=str(path), got=got)


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk; every method reads or writes one part of it, completely or not at all."""

    path: Path

    @classmethod
    def create(
        cls, path: Path, about: Mapping[str, Json], base: nn.Module, *, overwrite: bool = False
    ) -> Bundle:
        """Start a bundle where `check_target` allows it; what came from an old one goes."""
        cls.check_target(path, overwrite=overwrite)
        path.mkdir(parents=True, exist_ok=True)
        bundle = cls(path)
        with locked(path):
            for stale in DERIVED:
                (path / stale).unlink(missing_ok=True)
            _save_weights(path / "base.safetensors", base)
            write_json(path / "bundle.json", {"schema": SCHEMA, "versions": versions(), **about})
        return bundle

    @staticmethod
    def check_target(path: Path, *, overwrite: bool = False) -> None:
        """Raise InputError unless `path` may become a bundle: new, empty, the beginnings of a bundle, or one
        that holds nothing beyond its plan and an untrained network; with `overwrite` any bundle. And unless
        it can be written, so that no work is lost.

        Raises BundleError when another command is writing there.
        """
        if path.is_file():
            raise InputError("the bundle must be a directory", where=str(path), fix="another --out")
        beginnings = (DISTORTION, LEARNING, LOCK)
        foreign = path.is_dir() and any(p.name not in beginnings for p in path.iterdir())
        if foreign and not (path / "bundle.json").exists():
            raise InputError("not empty and not a bundle", where=str(path), fix="another --out")
        results = [name for name in RESULTS if (path / name).exists()]
        if results and not overwrite:
            raise InputError(
                "the bundle holds a fine-tuned network or measurements, which would be lost",
                where=str(path),
                got=", ".join(results),
                fix="another --out, or --overwrite",
            )
        check_unlocked(path)
        check_writable(path)

    @classmethod
    def open(cls, path: Path) -> Bundle:
        if not (path / "bundle.json").is_file():
            what = "no such bundle" if not path.exists() else "not a bundle: bundle.json is missing"
            raise BundleError(what, where=str(path), fix="tightrope search --out DIRECTORY")
        bundle = cls(path)
        check_schema(bundle.about, path / "bundle.json", SCHEMA)
        return bundle

    @property
    def about(self) -> dict[str, Json]:
        body: dict[str, Json] = read_json(self.path / "bundle.json", HEAD_FORM)
        return body

    def base(self) -> nn.Module:
        from tightrope.chain import resolve, source  # of another bundle, perhaps

        spec, classes, channels = self._named("model", "num_classes", "in_channels")
        model = resolve(spec, num_classes=classes, in_channels=channels)
        try:
            _load_weights(self.path / "base.safetensors", model)
        except BundleError as error:
            if source(spec) is None:
                raise
            raise BundleError(
                "the bundle that the base was found in has another network now, or the base is damaged",
                where=spec,
                got=error,
                fix="the same search again there, or this one on what is there now",
            ) from error
        return model.eval()

    def check(self) -> None:
        """Raise BundleError for a file with a hash of its contents that is cut or was changed."""
        for name in ("base.safetensors", "model.safetensors", START):
            if (self.path / name).exists():
                _load_weights(self.path / name)
        self.learned(self.plan())
        if all((self.path / name).exists() for name in ("program.json", "program.safetensors")):
            self.program()

    def data(self) -> Data:
        """The images of the bundle's task. Raises BundleError when they are no longer those of the search."""
        name, root, image_size = self._named("data", "root", "image_size")
        data, task = load(name, root=root, image_size=image_size), self.task()
        if task is None:
            return data
        new = None if task.new is None else load(task.new, image_size=image_size)
        if sample_sha256(new or data, task) != self.about["task"].get("sample_sha256"):
            raise BundleError(
                "the images are not those of the search", where=task.new or name, fix="tightrope search"
            )
        return view(data, task, new)

    def task(self) -> Task | None:
        """What the labels mean in the network's classes; None: they are these."""
        body = self.about.get("task")
        return None if body is None else Task.from_json(body, str(self.path / "bundle.json"))

    def donor(self) -> nn.Module | None:
        """The original network, answering within the task; None where its classes say nothing of the task."""
        task = self.task()
        if task is None:
            return self.base()
        return nn.Sequential(self.base(), GroupMax(task.groups)) if task.groups else None

    def _named(self, *keys: str) -> tuple[Json, ...]:
        about = self.about
        try:
            return tuple(about[key] for key in keys)
        except KeyError as error:
            where = str(self.path / "bundle.json")
            raise BundleError("a file of the bundle is damaged", where=where, got=f"no {error}") from None

    def plan(self) -> Plan:
        """Raises BundleError also when the saved problem, if there is one, says that it was changed."""
        try:
            text = (self.path / "plan.json").read_text()
        except FileNotFoundError:
            raise BundleError("no plan yet", where=str(self.path), fix="tightrope search") from None
        except (UnicodeDecodeError, OSError) as error:
            raise BundleError("the plan is damaged", where=str(self.path), got=str(error)) from error
        plan = Plan.from_json(text, self.path / "plan.json")
        if (self.path / "problem.npz").exists():
            decisions(plan, self.problem())
        return plan

    def save_plan(self, plan: Plan) -> None:
        atomic_write(self.path / "plan.json", lambda f: f.write(plan.to_json().encode()))

    def save_learned(
        self, tensors: Mapping[str, Tensor], base_sha256: str, record: Mapping[str, Json]
    ) -> None:
        """Keep what a method learned, with the hash of the network that it belongs to."""
        whole = {k: v.contiguous() for k, v in tensors.items()}
        data = save(whole, metadata={"sha256": tensors_sha256(whole), "base_sha256": base_sha256})
        atomic_write(self.path / "plan.safetensors", lambda f: f.write(data))
        write_json(self.path / "search.json", dict(record))

    def learned(self, plan: Plan) -> dict[str, Tensor]:
        """The tensors of a plan; {} when it has none. Raises BundleError for damage, or another network's."""
        path = self.path / "plan.safetensors"
        if not path.exists():
            return {}
        try:
            with safe_open(path, framework="pt") as file:
                found = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        except Exception as error:  # safetensors raises many kinds
            raise BundleError("the masks are damaged", where=str(path), got=str(error)[:200]) from error
        if found.get("sha256") != tensors_sha256(tensors):
            raise BundleError("the masks are damaged: not those that were saved", where=str(path))
        if found.get("base_sha256") != plan.base_sha256:
            raise BundleError(
                "the masks belong to another network than the plan",
                where=str(path),
                got=str(found.get("base_sha256"))[:12],
                allowed=plan.base_sha256[:12],
            )
        return tensors

    def record(self) -> dict[str, Json]:
        """What a search by training reports; {} of other methods."""
        path = self.path / "search.json"
        return read_json(path, RECORD_FORM) if path.exists() else {}

    def problem(self) -> Problem:
        return Problem.load(self.path / "problem.npz")

    def model(self) -> nn.Module:
        """Rebuild the base, apply the plan, load the weights strictly."""
        plan = self.plan()
        model = apply(self.base(), plan, self.learned(plan))
        _load_weights(self.path / "model.safetensors", model)
        return model.eval()

    def rewritten(self) -> fx.GraphModule:
        """The base under the plan as fine-tuning starts: with the weights of `save_start`, if any."""
        plan, start = self.plan(), self.path / START
        model = apply(self.base(), plan, self.learned(plan))
        if start.exists():
            _load_weights(start, model)
            model.eval()
        return model

    def save_start(self, tuned: nn.Module) -> None:
        """Let fine-tuning start from these weights, of the same base under another plan."""
        _save_weights(self.path / START, tuned)

    def save_model(self, model: nn.Module, program: Program) -> None:
        """Keep a network; then what was measured on an earlier one goes."""
        _save_weights(self.path / "model.safetensors", model)
        program.save(self.path)
        for stale in ("accuracy.json", "measurements.json", "report.html", "README.md"):
            (self.path / stale).unlink(missing_ok=True)

    def program(self, *, weights: bool = True) -> Program:
        """Raises BundleError also when its DReLUs are not those of the plan."""
        program, planned = Program.load(self.path, weights=weights), self.plan().predicted.drelus
        found = sum(base_cost(op).drelus for op in program.ops)
        if abs(found - planned) > 0.5:
            raise BundleError(
                "the plan and the program do not belong together: one of them was changed",
                where=str(self.path),
                got=f"{found:,.15g} DReLUs in the program, {planned:,.15g} in the plan",
                fix="make it again: tightrope apply or finetune",
            )
        return program

    def measurements(self) -> list[dict[str, Json]]:
        """The newest of each runtime; [] before any run."""
        path = self.path / "measurements.json"
        found: list[dict[str, Json]] = read_json(path, MEASUREMENTS_FORM) if path.exists() else []
        if any(m["batch"] < 1 for m in found):
            raise BundleError("a file of the bundle is damaged", where=str(path), got="an empty batch")
        return found

    def add_measurement(self, measurement: Measurement, extra: Mapping[str, Json]) -> None:
        """Keep the newest measurement of each runtime."""
        others = [m for m in self.measurements() if m["runtime"] != measurement.runtime]
        write_json(self.path / "measurements.json", [*others, measurement.to_dict() | dict(extra)])

    def accuracy(self) -> dict[str, Json]:
        """Accuracies and recipe of the fine-tuned network; {} before."""
        path = self.path / "accuracy.json"
        return read_json(path, ACCURACY_FORM) if path.exists() else {}

    def curve(self) -> list[dict[str, Json]]:
        """The rows of `budgets.curve`; [] before."""
        path = self.path / "curve.json"
        return read_json(path, CURVE_FORM) if path.exists() else []

    def log(self, record: Mapping[str, Json]) -> None:
        """Add the record of an epoch; that of the first one starts the file anew."""
        path = self.path / "log.jsonl"
        with naming(path), path.open("w" if record["epoch"] == 1 else "a") as f:
            f.write(json.dumps(record) + "\n")
