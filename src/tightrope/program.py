"""The frozen network: ops in execution order (`tightrope.ops`) and their weights. All that a runtime sees.

The structure (`Program.ops`) is public; `Program.tensors` holds the secret weights and may be left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from tightrope.errors import BundleError, InputError
from tightrope.forms import Amount, mismatch, parse
from tightrope.ops import (
    OPS,
    WEIGHTED,
    Add,
    AvgPool2d,
    Concat,
    Conv2d,
    Flatten,
    GlobalAvgPool,
    HardSigmoid,
    HardSwish,
    Linear,
    MaxPool2d,
    Mul,
    Op,
    Pad,
    Pair,
    Polynomial,
    Relu,
    Shape,
    Sigmoid,
    Silu,
    Upsample,
    base_cost,
)
from tightrope.types import SCHEMA, atomic_write, check_schema

__all__ = [
    "OPS", "WEIGHTED", "Add", "AvgPool2d", "Concat", "Conv2d", "Flatten", "GlobalAvgPool", "HardSigmoid",
    "HardSwish", "Linear", "MaxPool2d", "Mul", "Op", "Pad", "Pair", "Polynomial", "Program", "Relu",
    "Sigmoid", "Silu", "Upsample", "base_cost", "deepest",
]  # fmt: skip

Array = NDArray[Any]
FORM = {
    "input_shape": [int], "output": str, "ranges": {str: Amount},
    "ops": [{"kind": str, "name": str, "inputs": [str], "shape": [int]}],
}  # fmt: skip


@dataclass(frozen=True)
class Program:
    """Ops in execution order. `ranges` maps a value to the largest magnitude seen in calibration."""

    ops: tuple[Op, ...]
    input_shape: tuple[int, ...]
    output: str
    tensors: Mapping[str, Array] = field(default_factory=dict)
    ranges: Mapping[str, float] = field(default_factory=dict)

    INPUT: ClassVar[str] = "input"

    def __post_init__(self) -> None:
        known = {self.INPUT}
        for op in self.ops:
            missing = [i for i in op.inputs if i not in known]
            if missing or op.name in known:
                raise BundleError(
                    "the program is not a sequence of ops", where=op.name, got=missing or "twice"
                )
            known.add(op.name)
        if self.output not in known:
            raise BundleError("the program's output is not one of its values", got=self.output)

    def shape(self, value: str) -> tuple[int, ...]:
        return self.input_shape if value == self.INPUT else self.op(value).shape

    def op(self, name: str) -> Op:
        return next(op for op in self.ops if op.name == name)

    def public(self) -> Program:
        """The same program without its weights: what the client and the dealer may know."""
        return replace(self, tensors={})

    def check_input(self, x: Array) -> None:
        """Raise InputError unless x is a finite (N, *input_shape) batch."""
        if x.ndim != 1 + len(self.input_shape) or x.shape[1:] != self.input_shape or not len(x):
            raise InputError(
                "wrong input shape",
                got=tuple(x.shape),
                allowed=f"(N, {', '.join(map(str, self.input_shape))})",
            )
        if not np.isfinite(x).all():
            raise InputError("the input holds NaN or infinity")

    def structure(self) -> str:
        """Canonical JSON of everything public."""
        body = {
            "schema": SCHEMA,
            "input_shape": self.input_shape,
            "output": self.output,
            "ranges": dict(self.ranges),
            "ops": [{"kind": op.kind} | asdict(op) for op in self.ops],
        }
        return json.dumps(body, separators=(",", ":"), sort_keys=True)

    def sha256(self) -> str:
        """Of the public structure: what two parties compare."""
        return hashlib.sha256(self.structure().encode()).hexdigest()

    def weights(self) -> bytes:
        """The tensors, which may be none, and their seal as safetensors."""
        arrays = {k: np.ascontiguousarray(v) for k, v in self.tensors.items()}
        data: bytes = save(arrays, metadata={"sha256": self._seal()})
        return data

    def save(self, directory: Path) -> None:
        """Write `program.json` (public) and, when there are any, `program.safetensors` (weights)."""
        directory.mkdir(parents=True, exist_ok=True)
        atomic_write(directory / "program.json", lambda f: f.write(self.structure().encode()))
        if self.tensors:
            atomic_write(directory / "program.safetensors", lambda f: f.write(self.weights()))

    @classmethod
    def load(cls, directory: Path, *, weights: bool = True) -> Program:
        """Read what `save` wrote; see `decode`."""
        try:
            structure = (directory / "program.json").read_bytes()
            tensors = (directory / "program.safetensors").read_bytes() if weights else None
        except FileNotFoundError as error:
            raise BundleError(
                "no program",
                where=str(error.filename or directory),
                fix="tightrope finetune or apply, or for client and dealer tightrope export-public",
            ) from None
        except OSError as error:
            raise BundleError("the program is damaged", where=str(directory), got=str(error)) from error
        return cls.decode(structure, tensors, directory)

    @classmethod
    def decode(cls, structure: str | bytes, weights: bytes | None, where: Path) -> Program:
        """The program from what `structure` and `weights` gave; None leaves the weights out.

        Raises BundleError, naming `where`, when anything is missing, unknown or inconsistent: ops that do not
        fit their inputs, and weights, or with weights any part at all, that are not those saved.
        """
        try:
            body = parse(structure)
            check_schema(body, where / "program.json")
            if wrong := mismatch(body, FORM):
                raise ValueError(wrong)
            ops = tuple(_op(entry) for entry in body["ops"])
            tensors = {} if weights is None else load(weights)
            seal = None if weights is None else _metadata(weights).get("sha256")
            program = cls(ops, tuple(body["input_shape"]), body["output"], tensors, body["ranges"])
            program._check_shapes(where / "program.json")
        except BundleError:
            raise
        except Exception as error:  # any shape of wrong JSON or safetensors
            raise BundleError("the program is damaged", where=str(where), got=str(error)) from error
        if weights is not None:
            program._check_tensors(where)
            if seal != program._seal():
                raise BundleError(
                    "the program is damaged: not the structure and weights that were saved",
                    where=str(where),
                    got="no hash" if seal is None else f"contents unlike the hash {seal[:12]}…",
                    fix="make it again: tightrope apply or finetune",
                )
        return program

    def _seal(self) -> str:
        """Hash of structure and weights together; kept with the weights, since the structure is public."""
        digest = hashlib.sha256(self.structure().encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name}{tensor.shape}{tensor.dtype}".encode())
            digest.update(np.ascontiguousarray(tensor).tobytes())
        return digest.hexdigest()

    def _check_shapes(self, where: Path) -> None:
        """Every op gets as many inputs as it takes, and makes of their shapes the one that it claims."""
        shapes: dict[str, Shape] = {self.INPUT: self.input_shape}
        for op in self.ops:
            try:
                made: object = op.result(*(shapes[value] for value in op.inputs))
            except (ArithmeticError, TypeError, ValueError) as error:
                made = str(error)
            if made != op.shape or min(op.shape, default=0) < 1:
                raise BundleError(
                    f"the op {op.name} ({op.kind}) does not fit its inputs",
                    where=str(where),
                    got=made,
                    allowed=op.shape,
                )
            shapes[op.name] = op.shape

    def _check_tensors(self, where: Path) -> None:
        for op in self.ops:
            for part, shapes in op.parts.items():
                tensor = self.tensors.get(f"{op.name}.{part}")
                if tensor is None or tensor.shape not in shapes or not np.isfinite(tensor).all():
                    raise BundleError(
                        f"a weight is missing, not finite or of the wrong shape: {op.name}.{part}",
                        where=str(where),
                        got=None if tensor is None else tensor.shape,
                        allowed=" or ".join(map(str, shapes)),
                    )


def deepest(program: Program, levels: Mapping[str, float]) -> float:
    """The largest sum of `levels` (per op) along any path to the output: that is how levels add up."""
    depth = {Program.INPUT: 0.0}
    for op in program.ops:
        depth[op.name] = max(depth[value] for value in op.inputs) + levels[op.name]
    return depth[program.output]


def beyond_range(counts: Mapping[str, int]) -> str:
    """The warning of a run in which so many inputs of these ops were outside their calibrated range."""
    where = ", ".join(f"{name} ({count:,})" for name, count in counts.items())
    return f"values outside the calibrated range, where polynomials may explode and products grow: {where}"


def _metadata(data: bytes) -> dict[str, str]:
    """The strings in the header of safetensors, whose length its first 8 bytes give."""
    found: dict[str, str] = parse(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    return found


def _op(entry: dict[str, Any]) -> Op:
    entry = dict(entry)
    kind = entry.pop("kind")
    cls = OPS.get(kind)
    if cls is None:
        raise BundleError("unknown op in the program", got=kind, allowed=", ".join(OPS))
    names = {f.name for f in fields(cls)}
    unknown = entry.keys() - names
    if unknown:
        raise BundleError("unknown keys in the program", where=entry.get("name"), got=sorted(unknown))
    return cls(**{k: _tuples(v) for k, v in entry.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
