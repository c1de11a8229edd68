"""lower(model, input_shape) -> Program: fold batch-norm, drop what does nothing, name every op."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tightrope.errors import TraceError
from tightrope.graph import Graph, trace
from tightrope.nn import BlockReLU, PolynomialActivation
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

Handler = Callable[["_Lowering", fx.Node, str, Any], str]


def lower(model: nn.Module, input_shape: tuple[int, ...]) -> Program:
    """Trace `model` (eval mode) and write it as a Program; weights in float32, folded in float64, and the
    coefficients of polynomials in float64.

    Raises TraceError naming the op when the network uses one that Programs do not have.
    """
    return _Lowering(trace(model, input_shape)).run()


class _Lowering:
    """Walks the nodes once; `values` maps a node to the Program value that holds its tensor."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.modules = dict(graph.module.named_modules())
        self.values: dict[str, str] = {}
        self.ops: dict[str, Op] = {}
        self.tensors: dict[str, Tensor] = {}  # float64 until the end

    def run(self) -> Program:
        output = ""
        for node in self.graph.module.graph.nodes:
            if node.op == "placeholder":
                if not node.args:
                    self.values[node.name] = Program.INPUT
            elif node.op == "output":
                output = self.value(node.args[0])
            elif node.name in self.graph.shapes:
                self.values[node.name] = self._lower(node)
        live = self._live(output)
        ops = tuple(op for op in self.ops.values() if op.name in live)
        arrays = {f"{op.name}.{part}": self._frozen(op, part) for op in ops for part in op.parts}
        return Program(ops, self.graph.input_shape, output, arrays)

    def _frozen(self, op: Op, part: str) -> Any:
        tensor = self.tensors[f"{op.name}.{part}"]
        return np.ascontiguousarray((tensor if isinstance(op, Polynomial) else tensor.float()).numpy())

    def _live(self, output: str) -> set[str]:
        live = {output}
        for op in reversed(self.ops.values()):
            if op.name in live:
                live.update(op.inputs)
        return live

    def _lower(self, node: fx.Node) -> str:
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            handler = MODULES.get(type(module))
            name = str(node.target)
        else:
            module = None
            handler = CALLS.get(node.target)
            name = node.name
        if handler is None:
            function = str(getattr(node.target, "__name__", node.target))
            raise TraceError(
                "this operation cannot be lowered",
                where=f"{name!r} (node {node.name!r})",
                got=function if module is None else type(module).__name__,
                allowed=", ".join(sorted({t.__name__ for t in MODULES})),
            )
        k, base = 0, name
        while name in self.ops or name == Program.INPUT or (module is None and name in self.modules):
            k += 1
            name = f"{base}_{k}"
        return handler(self, node, name, module)

    def value(self, arg: Any) -> str:
        if not isinstance(arg, fx.Node) or arg.name not in self.values:
            raise TraceError("an operation uses something that is not a traced tensor", got=arg)
        return self.values[arg.name]

    def shape(self, value: str) -> tuple[int, ...]:
        return self.graph.input_shape if value == Program.INPUT else self.ops[value].shape

    def emit(self, op: Op, **tensors: Tensor) -> str:
        self.ops[op.name] = op
        self.tensors |= {f"{op.name}.{k}": v for k, v in tensors.items()}
        return op.name

    def sole_use(self, value: str) -> bool:
        """Whether one node reads `value`, whatever does nothing (dropout, identity) in between."""
        holders = [n for n in self.graph.module.graph.nodes if self.values.get(n.name) == value]
        return all(len(n.users) == 1 for n in holders)


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _given(node: fx.Node, m: nn.Module | None, names: str) -> dict[str, Any]:
    """The arguments after the first tensor by name: of a function's call, or as a module keeps them."""
    keys = names.split()
    if m is not None:
        return {k: getattr(m, k) for k in keys}
    return dict(zip(keys, node.args[1:], strict=False)) | node.kwargs


def _refuse(condition: bool, what: str, name: str, got: object) -> None:
    if condition:
        raise TraceError(what, where=name, got=got)


def _double(tensor: Tensor | None, like: int) -> Tensor:
    return torch.zeros(like, dtype=torch.float64) if tensor is None else tensor.detach().double()


def _conv(low: _Lowering, node: fx.Node, name: str, m: nn.Conv2d) -> str:
    source = low.value(node.args[0])
    _refuse(m.padding_mode != "zeros", "only zero padding can be lowered", name, m.padding_mode)
    if isinstance(m.padding, str):
        total = [d * (k - 1) for d, k in zip(m.dilation, m.kernel_size, strict=True)]
        same = m.padding == "same"
        (t, left) = (total[0] // 2, total[1] // 2) if same else (0, 0)
        (b, right) = (total[0] - t, total[1] - left) if same else (0, 0)
    else:
        (t, left) = (b, right) = _pair(m.padding)
    op = Conv2d(
        name=name,
        inputs=(source,),
        shape=low.graph.shapes[node.name],
        kernel=_pair(m.kernel_size),
        stride=_pair(m.stride),
        padding=(left, right, t, b),
        dilation=_pair(m.dilation),
        groups=m.groups,
        in_channels=m.in_channels,
    )
    return low.emit(op, weight=m.weight.detach().double(), bias=_double(m.bias, m.out_channels))


def _linear(low: _Lowering, node: fx.Node, name: str, m: nn.Linear) -> str:
    source = low.value(node.args[0])
    _refuse(len(low.shape(source)) != 1, "a linear layer needs a flat input", name, low.shape(source))
    op = Linear(name=name, inputs=(source,), shape=low.graph.shapes[node.name], in_features=m.in_features)
    return low.emit(op, weight=m.weight.detach().double(), bias=_double(m.bias, m.out_features))


def _batch_norm(low: _Lowering, node: fx.Node, name: str, m: nn.BatchNorm2d) -> str:
    """Fold into the convolution before it when nothing else reads that; else a 1x1 depthwise convolution."""
    if m.running_mean is None or m.running_var is None:
        raise TraceError("batch-norm without running statistics cannot be frozen", where=name)
    scale = (m.running_var.double() + m.eps).rsqrt()
    if m.weight is not None:
        scale = scale * m.weight.detach().double()
    shift = _double(m.bias, m.num_features) - m.running_mean.double() * scale
    source = low.value(node.args[0])
    before = low.ops.get(source)
    if isinstance(before, Conv2d) and low.sole_use(source):
        low.tensors[f"{source}.weight"] = low.tensors[f"{source}.weight"] * scale[:, None, None, None]
        low.tensors[f"{source}.bias"] = low.tensors[f"{source}.bias"] * scale + shift
        return source
    C = m.num_features
    shape = low.shape(source)
    _refuse(len(shape) != 3, "batch-norm needs (C, H, W)", name, shape)
    op = Conv2d(name=name, inputs=(source,), shape=shape, kernel=(1, 1), groups=C, in_channels=C)
    return low.emit(op, weight=scale[:, None, None, None], bias=shift)


def _relu(low: _Lowering, node: fx.Node, name: str, m: nn.Module) -> str:
    source = low.value(node.args[0])
    shape = low.shape(source)
    if isinstance(m, BlockReLU):
        patches, upper = m.patches, m.upper
    else:
        patches, upper = ((1, 1),) * shape[0], 6.0 if isinstance(m, nn.ReLU6) else None
    return low.emit(Relu(name=name, inputs=(source,), shape=shape, patches=patches, upper=upper))


def _unary(cls: type[Op]) -> Handler:
    def handler(low: _Lowering, node: fx.Node, name: str, m: Any) -> str:
        source = low.value(node.args[0])
        return low.emit(cls(name=name, inputs=(source,), shape=low.shape(source)))

    return handler


def _polynomial(low: _Lowering, node: fx.Node, name: str, m: PolynomialActivation) -> str:
    _refuse(
        m.dynamic, "a polynomial scaled by its batch cannot be frozen: freeze() its scale", name, "dynamic"
    )
    source = low.value(node.args[0])
    degrees = tuple(stage.shape[-1] - 1 for stage in m.stages)
    op = Polynomial(name=name, inputs=(source,), shape=low.shape(source), stages=degrees, gated=m.gated)
    return low.emit(op, **{f"stage{k}": stage for k, stage in enumerate(m.folded())})


def _max_pool(low: _Lowering, node: fx.Node, name: str, m: nn.MaxPool2d) -> str:
    op = MaxPool2d(
        name=name,
        inputs=(low.value(node.args[0]),),
        shape=low.graph.shapes[node.name],
        kernel=_pair(m.kernel_size),
        stride=_pair(m.stride),
        padding=_pair(m.padding),
        dilation=_pair(m.dilation),
        ceil_mode=m.ceil_mode,
    )
    return low.emit(op)


def _avg_pool(low: _Lowering, node: fx.Node, name: str, m: nn.AvgPool2d | None) -> str:
    names = "kernel_size stride padding ceil_mode count_include_pad divisor_override"
    given = _given(node, m, names)
    _refuse(given.get("divisor_override") is not None, "divisor_override cannot be lowered", name, given)
    kernel = _pair(given["kernel_size"])
    op = AvgPool2d(
        name=name,
        inputs=(low.value(node.args[0]),),
        shape=low.graph.shapes[node.name],
        kernel=kernel,
        stride=_pair(given.get("stride") or kernel),
        padding=_pair(given.get("padding", 0)),
        ceil_mode=bool(given.get("ceil_mode", False)),
        count_padding=bool(given.get("count_include_pad", True)),
    )
    return low.emit(op)


def _adaptive(low: _Lowering, node: fx.Node, name: str, m: nn.AdaptiveAvgPool2d | None) -> str:
    source = low.value(node.args[0])
    before, after = low.shape(source), low.graph.shapes[node.name]
    if before == after:
        return source
    if after[1:] == (1, 1):
        return low.emit(GlobalAvgPool(name=name, inputs=(source,), shape=after))
    (H, W), (h, w) = before[1:], after[1:]
    if H % h or W % w:  # unequal windows: small maps enlarged (VGG at 32x32) or ragged ones
        if h % H or w % W:
            raise TraceError("adaptive pooling with unequal windows", where=name, got=f"{H}x{W} -> {h}x{w}")
        factor = (h // H, w // W)
        return low.emit(Upsample(name=name, inputs=(source,), shape=after, factor=factor, mode="nearest"))
    kernel = (H // h, W // w)
    return low.emit(AvgPool2d(name=name, inputs=(source,), shape=after, kernel=kernel, stride=kernel))


def _mean(low: _Lowering, node: fx.Node, name: str, m: None) -> str:
    source = low.value(node.args[0])
    dims = _given(node, m, "dim").get("dim")
    given = {d % 4 for d in dims} if isinstance(dims, list | tuple) else None
    _refuse(
        given != {2, 3} or len(low.shape(source)) != 3, "only a mean over (H, W) can be lowered", name, dims
    )
    C = low.shape(source)[0]
    pooled = low.emit(GlobalAvgPool(name=name, inputs=(source,), shape=(C, 1, 1)))
    if low.graph.shapes[node.name] == (C, 1, 1):
        return pooled
    return low.emit(Flatten(name=f"{name}.flatten", inputs=(pooled,), shape=(C,)))


def _reshape(low: _Lowering, node: fx.Node, name: str, m: Any) -> str:
    """Any reshape whose effect is to flatten, or nothing."""
    source = low.value(node.args[0])
    before, after = low.shape(source), low.graph.shapes[node.name]
    if before == after:
        return source
    flattens = len(after) == 1 and math.prod(before) == after[0]
    _refuse(not flattens, "only flattening reshapes can be lowered", name, after)
    return low.emit(Flatten(name=name, inputs=(source,), shape=after))


def _same(low: _Lowering, node: fx.Node, name: str, m: Any) -> str:
    return low.value(node.args[0])


def _affine(low: _Lowering, source: str, name: str, scale: float, shift: float) -> str:
    shape = low.shape(source)
    _refuse(len(shape) != 3, "a constant can be folded into (C, H, W) values only", name, shape)
    C = shape[0]
    op = Conv2d(name=name, inputs=(source,), shape=shape, kernel=(1, 1), groups=C, in_channels=C)
    weight = torch.full((C, 1, 1, 1), scale, dtype=torch.float64)
    return low.emit(op, weight=weight, bias=torch.full((C,), shift, dtype=torch.float64))


def _binary(cls: type[Op]) -> Handler:
    def handler(low: _Lowering, node: fx.Node, name: str, m: Any) -> str:
        _refuse(bool(node.kwargs), "named arguments cannot be lowered", name, dict(node.kwargs))
        a, b = node.args
        if isinstance(a, int | float):
            a, b = b, a
        if isinstance(b, int | float):
            scale, shift = (1.0, float(b)) if cls is Add else (float(b), 0.0)
            return _affine(low, low.value(a), name, scale, shift)
        left, right = low.value(a), low.value(b)
        if math.prod(low.shape(left)) < math.prod(low.shape(right)):
            left, right = right, left
        big, small = low.shape(left), low.shape(right)
        per_channel = cls is Mul and small == (big[0], 1, 1)
        _refuse(big != small and not per_channel, "operands of different shapes", name, (big, small))
        return low.emit(cls(name=name, inputs=(left, right), shape=big))

    return handler


def _concat(low: _Lowering, node: fx.Node, name: str, m: None) -> str:
    parts: Any = node.args[0]
    dim = _given(node, m, "dim").get("dim", 0)
    values = tuple(low.value(p) for p in parts)
    shape = low.graph.shapes[node.name]
    _refuse(dim not in (1, -len(shape)), "only concatenation of channels can be lowered", name, f"dim={dim}")
    return values[0] if len(values) == 1 else low.emit(Concat(name=name, inputs=values, shape=shape))


def _pad(low: _Lowering, node: fx.Node, name: str, m: Any) -> str:
    given = _given(node, m, "padding" if m is not None else "pad mode value")
    pads = given.pop("padding" if m is not None else "pad")
    bad = len(pads) != 4 or not all(isinstance(p, int) for p in pads)
    bad |= any(v not in ("constant", 0, None) for v in given.values())
    _refuse(bad, "only zero padding of (H, W) can be lowered", name, (pads, given))
    source, shape = low.value(node.args[0]), low.graph.shapes[node.name]
    return low.emit(Pad(name=name, inputs=(source,), shape=shape, padding=tuple(pads)))


def _upsample(low: _Lowering, node: fx.Node, name: str, m: nn.Upsample | None) -> str:
    source = low.value(node.args[0])
    given = _given(node, m, "mode align_corners" if m is not None else "size scale_factor mode align_corners")
    mode = str(given.get("mode", "nearest"))
    (H, W), (h, w) = low.shape(source)[1:], low.graph.shapes[node.name][1:]
    bad = bool(h % H or w % W or given.get("align_corners") or given.get("antialias"))
    bad |= mode not in ("nearest", "bilinear")
    what = "only nearest or bilinear (align_corners=False) by whole factors"
    _refuse(bad, what, name, (H, W, h, w, mode))
    shape = low.graph.shapes[node.name]
    return low.emit(Upsample(name=name, inputs=(source,), shape=shape, factor=(h // H, w // W), mode=mode))


MODULES: dict[type[nn.Module], Handler] = {
    nn.Conv2d: _conv,
    nn.Linear: _linear,
    nn.BatchNorm2d: _batch_norm,
    **dict.fromkeys((nn.ReLU, nn.ReLU6, BlockReLU), _relu),
    PolynomialActivation: _polynomial,
    nn.Sigmoid: _unary(Sigmoid),
    nn.Hardsigmoid: _unary(HardSigmoid),
    nn.SiLU: _unary(Silu),
    nn.Hardswish: _unary(HardSwish),
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _avg_pool,
    nn.AdaptiveAvgPool2d: _adaptive,
    nn.Flatten: _reshape,
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout2d), _same),
    nn.ZeroPad2d: _pad,
    nn.Upsample: _upsample,
}
CALLS: dict[Any, Handler] = {
    **dict.fromkeys((operator.add, torch.add, "add"), _binary(Add)),
    **dict.fromkeys((operator.mul, torch.mul, "mul"), _binary(Mul)),
    **dict.fromkeys((torch.cat, torch.concat), _concat),
    **dict.fromkeys((torch.flatten, torch.reshape, "flatten", "view", "reshape", "squeeze"), _reshape),
    **dict.fromkeys((F.dropout, "contiguous"), _same),
    F.adaptive_avg_pool2d: _adaptive,
    F.avg_pool2d: _avg_pool,
    **dict.fromkeys((torch.mean, "mean"), _mean),
    F.pad: _pad,
    F.interpolate: _upsample,
}
