"""A Program as an ONNX model: one node or a few per op, batch-norm folded already, any batch size."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tightrope.errors import InputError, TraceError
from tightrope.program import (
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
)

OPSET = 18
IR_VERSION = 9
BATCH = "batch"
LOWEST = float(np.finfo(np.float32).min)


def to_onnx(program: Program) -> bytes:
    """The model, serialised; input `input` (batch, *input_shape), output `output`, float32.

    Raises TraceError for a ReLU whose sign is shared over a patch, which ONNX does not have, and InputError
    without the onnx package.
    """
    onnx = _onnx()
    build = _Builder(program, onnx.helper, onnx.numpy_helper)
    for op in program.ops:
        NODES[type(op)](build, op)
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    shape = next(op.shape for op in program.ops if op.name == program.output)
    build.node("Identity", [program.output], "output")
    graph = helper.make_graph(
        build.nodes,
        "tightrope",
        [helper.make_tensor_value_info(Program.INPUT, kind, [BATCH, *program.input_shape])],
        [helper.make_tensor_value_info("output", kind, [BATCH, *shape])],
        build.constants,
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="tightrope",
    )
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data


def _onnx() -> Any:
    try:
        onnx = import_module("onnx")
        for part in ("helper", "numpy_helper", "checker"):
            import_module(f"onnx.{part}")
    except ImportError as error:
        raise InputError(
            "onnx is not installed", got=str(error), fix="pip install 'tightrope[onnx]'"
        ) from error
    return onnx


class _Builder:
    def __init__(self, program: Program, helper: Any, numpy_helper: Any) -> None:
        self.program, self.helper, self.numpy_helper = program, helper, numpy_helper
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(self.helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def constant(self, name: str, value: NDArray[Any]) -> str:
        self.constants.append(self.numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def shape(self, value: str) -> tuple[int, ...]:
        return self.program.input_shape if value == Program.INPUT else self.program.op(value).shape

    def weights(self, op: Op) -> list[str]:
        names = [f"{op.name}.{part}" for part in ("weight", "bias")]
        return [self.constant(name, self.program.tensors[name].astype(np.float32)) for name in names]


def _conv(build: _Builder, op: Any) -> None:
    left, right, top, bottom = op.padding
    build.node(
        "Conv", [*op.inputs, *build.weights(op)], op.name, strides=op.stride, dilations=op.dilation,
        group=op.groups, kernel_shape=op.kernel, pads=[top, left, bottom, right],
    )  # fmt: skip


def _linear(build: _Builder, op: Any) -> None:
    build.node("Gemm", [*op.inputs, *build.weights(op)], op.name, transB=1)


def _relu(build: _Builder, op: Any) -> None:
    if any(patch != (1, 1) for patch in op.patches):
        raise TraceError(
            "ONNX has no ReLU whose sign is shared over a patch",
            where=op.name,
            got="relu with patches",
            allowed="one sign per value",
        )
    if op.upper is None:
        build.node("Relu", list(op.inputs), op.name)
    else:
        low, high = (np.array(v, dtype=np.float32) for v in (0.0, op.upper))
        bounds = [build.constant(f"{op.name}.low", low), build.constant(f"{op.name}.high", high)]
        build.node("Clip", [*op.inputs, *bounds], op.name)


def _plain(kind: str, **attributes: Any) -> Callable[[_Builder, Any], None]:
    return lambda build, op: _done(build.node(kind, list(op.inputs), op.name, **attributes))


def _done(_: str) -> None:
    return None


def _silu(build: _Builder, op: Any) -> None:
    gate = build.node("Sigmoid", list(op.inputs), f"{op.name}.gate")
    build.node("Mul", [*op.inputs, gate], op.name)


def _max_pool(build: _Builder, op: Any) -> None:
    more = {"kernel_shape": op.kernel, "strides": op.stride, "dilations": op.dilation}
    if op.ceil_mode:
        build.node("MaxPool", [_padded(build, op, op.dilation, LOWEST)], op.name, **more)
    else:
        build.node("MaxPool", list(op.inputs), op.name, pads=[*op.padding, *op.padding], **more)


def _avg_pool(build: _Builder, op: Any) -> None:
    more = {"kernel_shape": op.kernel, "strides": op.stride}
    if not op.ceil_mode:
        more |= {"pads": [*op.padding, *op.padding], "count_include_pad": int(op.count_padding)}
        build.node("AveragePool", list(op.inputs), op.name, **more)
        return
    pooled = build.node("AveragePool", [_padded(build, op, (1, 1), 0.0)], f"{op.name}.pooled", **more)
    factors = []
    sides = (build.shape(op.inputs[0])[1:], op.shape[1:], op.kernel, op.stride, op.padding)
    for n, out, k, s, p in zip(*sides, strict=True):
        starts = np.arange(out) * s - p
        low, high = (-p, n + p) if op.count_padding else (0, n)
        factors.append(k / (np.minimum(starts + k, high) - np.maximum(starts, low)))
    scale = build.constant(f"{op.name}.scale", np.outer(*factors).astype(np.float32))
    build.node("Mul", [pooled, scale], op.name)


def _padded(build: _Builder, op: Any, dilation: tuple[int, int], value: float) -> str:
    """The input with everything around it that windows touch. Engines disagree on `ceil_mode`: how many
    windows there are, and by what a partial one is divided.
    """
    sides = (build.shape(op.inputs[0])[1:], op.shape[1:], op.kernel, op.stride, op.padding, dilation)
    after = [
        max((out - 1) * s - p + d * (k - 1) + 1 - n, 0) for n, out, k, s, p, d in zip(*sides, strict=True)
    ]
    pads = build.constant(f"{op.name}.pads", np.array([0, 0, *op.padding, 0, 0, *after], dtype=np.int64))
    fill = build.constant(f"{op.name}.fill", np.array(value, dtype=np.float32))
    return build.node("Pad", [*op.inputs, pads, fill], f"{op.name}.padded")


def _pad(build: _Builder, op: Any) -> None:
    left, right, top, bottom = op.padding
    pads = build.constant(f"{op.name}.pads", np.array([0, 0, top, left, 0, 0, bottom, right], dtype=np.int64))
    build.node("Pad", [*op.inputs, pads], op.name)


def _polynomial(build: _Builder, op: Any) -> None:
    """Horner's rule, stage by stage."""
    x = op.inputs[0]
    for k in range(len(op.stages)):
        table = np.atleast_2d(build.program.tensors[f"{op.name}.stage{k}"]).astype(np.float32)
        shape = (len(table), *[1] * (len(op.shape) - 1))
        name = f"{op.name}.stage{k}"
        terms = [build.constant(f"{name}.c{d}", column.reshape(shape)) for d, column in enumerate(table.T)]
        y = terms[-1]
        for d in reversed(range(op.stages[k])):
            scaled = build.node("Mul", [y, x], f"{name}.m{d}")
            y = build.node("Add", [scaled, terms[d]], f"{name}.a{d}")
        x = y
    if op.gated:
        build.node("Mul", [x, *op.inputs], op.name)
    else:
        build.node("Identity", [x], op.name)


def _upsample(build: _Builder, op: Any) -> None:
    scales = build.constant(f"{op.name}.scales", np.array([1, 1, *op.factor], dtype=np.float32))
    how = {"nearest": ("nearest", "asymmetric"), "bilinear": ("linear", "half_pixel")}
    mode, places = how[op.mode]
    build.node(
        "Resize", [*op.inputs, "", scales], op.name, mode=mode, coordinate_transformation_mode=places,
        nearest_mode="floor",
    )  # fmt: skip


NODES: dict[type[Op], Callable[[_Builder, Any], None]] = {
    Conv2d: _conv,
    Linear: _linear,
    Add: _plain("Add"),
    Mul: _plain("Mul"),
    Concat: _plain("Concat", axis=1),
    AvgPool2d: _avg_pool,
    GlobalAvgPool: _plain("GlobalAveragePool"),
    MaxPool2d: _max_pool,
    Relu: _relu,
    Sigmoid: _plain("Sigmoid"),
    HardSigmoid: _plain("HardSigmoid", alpha=1 / 6, beta=0.5),
    Silu: _silu,
    HardSwish: _plain("HardSwish"),
    Polynomial: _polynomial,
    Pad: _pad,
    Upsample: _upsample,
    Flatten: _plain("Flatten", axis=1),
}
