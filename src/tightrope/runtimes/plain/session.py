"""Execute a Program in the clear. Every other runtime is compared with this one, op by op."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, ClassVar, Literal, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tightrope.errors import InputError
from tightrope.nn.block_relu import BlockReLU
from tightrope.nn.polynomial import composite
from tightrope.program import (
    OPS,
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
    Polynomial,
    Program,
    Relu,
    Sigmoid,
    Silu,
    Upsample,
    base_cost,
    beyond_range,
    deepest,
)  # fmt: skip
from tightrope.types import Cost, Json, Measurement, OpTrace, total

Weights = list[Tensor]
EDGE = 1e-9  # of a calibrated range, which other batches reach but for rounding
NO_TIME = "the plain runtime sends nothing and predicts no time"


def _conv(op: Any, w: Weights, x: Tensor) -> Tensor:
    x = F.pad(x, op.padding)
    if op.groups == op.in_channels == op.shape[0]:
        return _depthwise(op, w, x)
    return F.conv2d(x, w[0], w[1], op.stride, 0, op.dilation, op.groups)


def _depthwise(op: Any, w: Weights, x: Tensor) -> Tensor:
    """Tap by tap: torch's float64 convolution takes one group at a time."""
    (H, W), (sh, sw), (dh, dw) = op.shape[1:], op.stride, op.dilation
    y = w[1][:, None, None].expand(len(x), *op.shape).clone()
    for i in range(op.kernel[0]):
        for j in range(op.kernel[1]):
            rows, columns = (
                slice(i * dh, i * dh + sh * (H - 1) + 1, sh),
                slice(j * dw, j * dw + sw * (W - 1) + 1, sw),
            )
            y.addcmul_(x[:, :, rows, columns], w[0][:, :, i, j, None])
    return y


def _relu(op: Any, w: Weights, x: Tensor) -> Tensor:
    if all(patch == (1, 1) for patch in op.patches):
        return x.clamp(min=0, max=op.upper)
    result: Tensor = BlockReLU(op.patches, op.upper)(x)
    return result


def _polynomial(op: Any, w: Weights, x: Tensor) -> Tensor:
    y = composite(w, x)[-1]
    return x * y if op.gated else y


def _grows(op: Op) -> bool:
    """Faster than its inputs."""
    return isinstance(op, Mul) or (isinstance(op, Polynomial) and (op.gated or op.stages != (1,)))


def _avg_pool(op: Any, w: Weights, x: Tensor) -> Tensor:
    return F.avg_pool2d(x, op.kernel, op.stride, op.padding, op.ceil_mode, op.count_padding)


def _upsample(op: Any, w: Weights, x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=op.factor, mode=op.mode)


EXECUTE: dict[type[Op], Callable[..., Tensor]] = {
    Conv2d: _conv,
    Linear: lambda op, w, x: F.linear(x, w[0], w[1]),
    Add: lambda op, w, x, y: x + y,
    Mul: lambda op, w, x, y: x * y,
    Concat: lambda op, w, *xs: torch.cat(xs, 1),
    AvgPool2d: _avg_pool,
    GlobalAvgPool: lambda op, w, x: x.mean((2, 3), keepdim=True),
    MaxPool2d: lambda op, w, x: F.max_pool2d(x, op.kernel, op.stride, op.padding, op.dilation, op.ceil_mode),
    Relu: _relu,
    Sigmoid: lambda op, w, x: x.sigmoid(),
    HardSigmoid: lambda op, w, x: F.hardsigmoid(x),
    Silu: lambda op, w, x: F.silu(x),
    HardSwish: lambda op, w, x: F.hardswish(x),
    Polynomial: _polynomial,
    Pad: lambda op, w, x: F.pad(x, op.padding),
    Upsample: _upsample,
    Flatten: lambda op, w, x: x.flatten(1),
}


def evaluate(
    program: Program, x: Tensor, seen: Callable[[Op, Tensor, float], object] = lambda *_: None
) -> Tensor:
    """Run on (N, *input_shape) in float64; `seen(op, value, ms)` is called after each op.

    Values are freed as soon as no later op reads them.
    """
    last_use = {value: k for k, op in enumerate(program.ops) for value in op.inputs}
    values = {Program.INPUT: x.double()}
    with torch.no_grad():
        for k, op in enumerate(program.ops):
            start = time.perf_counter()
            values[op.name] = EXECUTE[type(op)](op, _weights(program, op), *(values[i] for i in op.inputs))
            seen(op, values[op.name], (time.perf_counter() - start) * 1e3)
            for value in op.inputs:
                if last_use[value] == k and value != program.output:
                    values.pop(value, None)
    return values[program.output]


def _weights(program: Program, op: Op) -> Weights:
    tensors = (program.tensors[f"{op.name}.{part}"] for part in op.parts)
    return [torch.from_numpy(np.asarray(t)).double() for t in tensors]


def ranges(program: Program, batches: Iterable[Tensor]) -> Program:
    """The program with, per value, the largest magnitude over `batches` (calibration data).

    For a ReLU with patches the largest tile sum counts too, recorded as `NAME:tiles`, and for a polynomial
    the value of every stage, `NAME:stageI`.
    """
    largest: dict[str, float] = {}

    def note(name: str, value: Tensor) -> None:
        largest[name] = max(largest.get(name, 0.0), float(value.abs().max()))

    for x in batches:
        values: dict[str, Tensor] = {}

        def seen(op: Op, value: Tensor, ms: float, values: dict[str, Tensor] = values) -> None:
            note(op.name, value)
            if isinstance(op, Relu):
                note(f"{op.name}:tiles", _tile_sums(op, values[op.inputs[0]]))
            if isinstance(op, Polynomial):
                for k, stage in enumerate(composite(_weights(program, op), values[op.inputs[0]])):
                    note(f"{op.name}:stage{k}", stage)
            values[op.name] = value

        values[Program.INPUT] = x.double()
        note(Program.INPUT, x)
        evaluate(program, x, seen)
    return replace(program, ranges=largest)


def _tile_sums(op: Relu, x: Tensor) -> Tensor:
    x = x[:, :, None, None] if x.dim() == 2 else x
    largest = torch.zeros((), dtype=x.dtype)
    for patch in sorted(set(op.patches) - {(0, 0)}):
        part = x[:, [c for c, p in enumerate(op.patches) if p == patch]]
        H, W = part.shape[-2:]
        padded = F.pad(part, (0, -W % patch[1], 0, -H % patch[0]))
        sums = F.avg_pool2d(padded, patch, divisor_override=1)
        largest = torch.maximum(largest, sums.abs().max())
        if op.upper is not None:
            shifted = F.pad(part - op.upper, (0, -W % patch[1], 0, -H % patch[0]))
            largest = torch.maximum(largest, F.avg_pool2d(shifted, patch, divisor_override=1).abs().max())
    return largest


@dataclass(frozen=True)
class Plain:
    """Float64 in the clear. `simulate` and `execute` are the same thing here."""

    name: ClassVar[str] = "plain"
    ops: ClassVar[frozenset[str]] = frozenset(OPS)
    approximate: ClassVar[frozenset[str]] = frozenset()
    settings: ClassVar[Mapping[str, Json]] = {}

    def pricing(self, **settings: Json) -> Plain:
        """Its own. Raises InputError for any setting: nothing is sent and no time is predicted."""
        if settings:
            raise InputError(NO_TIME, got=", ".join(settings))
        return self

    def calibrate(self, progress: Callable[[str, int, int], None]) -> Mapping[str, Json]:
        raise InputError(NO_TIME)

    def price(self, op: Op) -> Cost:
        return base_cost(op)

    def prices(self, program: Program) -> dict[str, Cost]:
        return {op.name: base_cost(op) for op in program.ops}

    def exact(self, program: Program) -> Cost:
        return total(self.prices(program).values())

    def estimate(self, program: Program, batch: int = 1) -> NoReturn:
        raise InputError(NO_TIME)

    def open(self, program: Program, mode: Literal["simulate", "execute"] = "execute") -> PlainSession:
        return PlainSession(program)


@dataclass(frozen=True)
class PlainSession:
    program: Program

    def run(self, x: NDArray[Any]) -> tuple[NDArray[np.float64], Measurement]:
        """(N, *input_shape) -> (N, *output shape) and what each op took. The measurement's config holds
        `beyond_range`, per product and polynomial that is not linear the number of its inputs outside their
        calibrated range (of products only where nothing compares: scales are fixed there); a warning tells.
        """
        self.program.check_input(x)
        traces: list[OpTrace] = []
        scaled = not any(base_cost(op).drelus for op in self.program.ops)
        found = {
            op.name: 0 for op in self.program.ops if _grows(op) and (scaled or isinstance(op, Polynomial))
        }

        def count(name: str, value: Tensor) -> None:
            readers = [op.name for op in self.program.ops if op.name in found and name in op.inputs]
            if readers and name in self.program.ranges:
                inside = value.abs() <= self.program.ranges[name] * (1 + EDGE)
                for reader in readers:
                    found[reader] += int((~inside).sum())

        def seen(op: Op, value: Tensor, ms: float) -> None:
            base = base_cost(op)
            cost = replace(base.scaled(len(x)), weights=base.weights, ckks_levels=base.ckks_levels)
            traces.append(OpTrace(op.name, op.kind, cost + Cost(online_ms=ms)))
            count(op.name, value)

        inputs = torch.from_numpy(np.array(x, dtype=np.float64, order="C"))
        count(Program.INPUT, inputs)
        y = evaluate(self.program, inputs, seen)
        beyond = {name: number for name, number in found.items() if number}
        if beyond:
            warnings.warn(beyond_range(beyond), stacklevel=2)
        levels = deepest(self.program, {t.op: t.cost.ckks_levels for t in traces})
        cost = replace(total(t.cost for t in traces), ckks_levels=levels)
        return y.numpy(), Measurement(
            runtime="plain", batch=len(x), ops=tuple(traces), total=cost, config={"beyond_range": beyond}
        )

    def __enter__(self) -> PlainSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        return None
