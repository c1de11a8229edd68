"""The frozen network: a closed list of typed ops with folded batch-norm. All that a runtime ever sees.

An op's `name` is also the name of the value it makes. Shapes leave out the batch: (C, H, W) or (F,).
The structure (`Program.ops`) is public; `Program.tensors` holds the secret weights and may be left out.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from tightrope.errors import BundleError, InputError
from tightrope.types import Cost, atomic_write, check_schema

SCHEMA = 1
Pair = tuple[int, int]
Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Op:
    """Abstract; the final classes below are the whole language."""

    kind: ClassVar[str]
    name: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Conv2d(Op):
    """Cross-correlation plus bias; weight (out, in / groups, kh, kw), padding (left, right, top, bottom)."""

    kind = "conv2d"
    kernel: Pair
    stride: Pair = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    in_channels: int

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.shape[0], self.in_channels // self.groups, *self.kernel)


@dataclass(frozen=True, kw_only=True)
class Linear(Op):
    """y = W x + b over the last axis; weight (out, in)."""

    kind = "linear"
    in_features: int

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.shape[-1], self.in_features)


@dataclass(frozen=True, kw_only=True)
class Add(Op):
    kind = "add"


@dataclass(frozen=True, kw_only=True)
class Mul(Op):
    """Elementwise product; the second input may be (C, 1, 1)."""

    kind = "mul"


@dataclass(frozen=True, kw_only=True)
class Concat(Op):
    """Along the channels."""

    kind = "concat"


@dataclass(frozen=True, kw_only=True)
class AvgPool2d(Op):
    """Average over windows; with `count_padding` the divisor is the window, else its part inside."""

    kind = "avg_pool"
    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    ceil_mode: bool = False
    count_padding: bool = True


@dataclass(frozen=True, kw_only=True)
class GlobalAvgPool(Op):
    """(C, H, W) -> (C, 1, 1)."""

    kind = "global_avg_pool"


@dataclass(frozen=True, kw_only=True)
class MaxPool2d(Op):
    kind = "max_pool"
    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    ceil_mode: bool = False


@dataclass(frozen=True, kw_only=True)
class Relu(Op):
    """One sign per tile of each channel (`tightrope.nn.BlockReLU`): (0, 0) identity, (1, 1) plain ReLU.

    `upper` clips from above with a second DReLU per tile (ReLU6: 6.0).
    """

    kind = "relu"
    patches: tuple[Pair, ...]
    upper: float | None = None

    @property
    def tiles(self) -> tuple[int, ...]:
        """Tiles per channel; 0 for an identity channel."""
        H, W = self.shape[1:] if len(self.shape) == 3 else (1, 1)
        return tuple(-(-H // p) * -(-W // q) if p else 0 for p, q in self.patches)

    @property
    def drelus(self) -> int:
        return sum(self.tiles) * (1 if self.upper is None else 2)


@dataclass(frozen=True, kw_only=True)
class Sigmoid(Op):
    kind = "sigmoid"


@dataclass(frozen=True, kw_only=True)
class HardSigmoid(Op):
    """clip(x + 3, 0, 6) / 6."""

    kind = "hard_sigmoid"


@dataclass(frozen=True, kw_only=True)
class Silu(Op):
    kind = "silu"


@dataclass(frozen=True, kw_only=True)
class HardSwish(Op):
    kind = "hard_swish"


@dataclass(frozen=True, kw_only=True)
class Pad(Op):
    """Zeros around the map: (left, right, top, bottom)."""

    kind = "pad"
    padding: tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class Upsample(Op):
    kind = "upsample"
    factor: Pair
    mode: str


@dataclass(frozen=True, kw_only=True)
class Flatten(Op):
    kind = "flatten"


OPS: dict[str, type[Op]] = {
    cls.kind: cls
    for cls in (
        Conv2d, Linear, Add, Mul, Concat, AvgPool2d, GlobalAvgPool, MaxPool2d, Relu, Sigmoid,
        HardSigmoid, Silu, HardSwish, Pad, Upsample, Flatten,
    )
}  # fmt: skip
WEIGHTED = (Conv2d, Linear)


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
        """The tensors as safetensors; empty when there are none."""
        return save({k: np.ascontiguousarray(v) for k, v in self.tensors.items()}) if self.tensors else b""

    def save(self, directory: Path) -> None:
        """Write `program.json` (public) and, when there are any, `program.safetensors` (weights)."""
        directory.mkdir(parents=True, exist_ok=True)
        atomic_write(directory / "program.json", lambda f: f.write(self.structure().encode()))
        if self.tensors:
            atomic_write(directory / "program.safetensors", lambda f: f.write(self.weights()))

    @classmethod
    def load(cls, directory: Path, *, weights: bool = True) -> Program:
        """Read what `save` wrote. Raises BundleError when anything is missing, unknown or inconsistent."""
        try:
            structure = (directory / "program.json").read_text()
            tensors = (directory / "program.safetensors").read_bytes() if weights else None
        except FileNotFoundError as error:
            raise BundleError(
                "no program", where=str(error.filename or directory), fix="tightrope finetune"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError("the program is damaged", where=str(directory), got=str(error)) from error
        return cls.decode(structure, tensors, directory)

    @classmethod
    def decode(cls, structure: str, weights: bytes | None, where: Path) -> Program:
        """The program from what `structure` and `weights` gave; None leaves the weights out.

        Raises BundleError, naming `where`, when anything is missing, unknown or inconsistent.
        """
        try:
            body = json.loads(structure)
            check_schema(body, where / "program.json")
            ops = tuple(_op(entry) for entry in body["ops"])
            tensors = {} if weights is None else load(weights)
            program = cls(ops, tuple(body["input_shape"]), body["output"], tensors, body["ranges"])
            if weights is not None:
                program._check_tensors(where)
        except BundleError:
            raise
        except Exception as error:  # any shape of wrong JSON or safetensors
            raise BundleError("the program is damaged", where=str(where), got=str(error)) from error
        return program

    def _check_tensors(self, where: Path) -> None:
        for op in self.ops:
            if isinstance(op, WEIGHTED):
                for suffix, shape in (("weight", op.weight_shape), ("bias", op.weight_shape[:1])):
                    tensor = self.tensors.get(f"{op.name}.{suffix}")
                    if tensor is None or tensor.shape != shape or not np.isfinite(tensor).all():
                        raise BundleError(
                            f"a weight is missing, not finite or of the wrong shape: {op.name}.{suffix}",
                            where=str(where),
                            got=None if tensor is None else tensor.shape,
                            allowed=shape,
                        )


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


def base_cost(op: Op) -> Cost:
    """DReLUs, MACs and weights of one op per sample: the part of a cost that every runtime shares.

    A max-pool compares k - 1 times per output; ReLU6, hard-sigmoid and hard-swish compare twice.
    """
    size = math.prod(op.shape)
    if isinstance(op, WEIGHTED):
        weights = math.prod(op.weight_shape)
        positions = size // op.weight_shape[0]
        return Cost(macs=weights * positions, weights=weights + op.weight_shape[0])
    if isinstance(op, Relu):
        return Cost(drelus=op.drelus)
    if isinstance(op, MaxPool2d):
        return Cost(drelus=size * (math.prod(op.kernel) - 1))
    if isinstance(op, HardSigmoid | HardSwish):
        return Cost(drelus=2 * size)
    return Cost()
