"""Which channels of a network do not depend on its input, and what they are: one walk over the graph."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tightrope.nn.polynomial import weights_dtype

CHANNELWISE = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Hardsigmoid, nn.SiLU, nn.Sigmoid,
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Identity, nn.Dropout, nn.Dropout2d, nn.ZeroPad2d,
    nn.Upsample,
)  # fmt: skip
CHANNELWISE_CALLS = (
    F.adaptive_avg_pool2d, F.avg_pool2d, F.max_pool2d, F.dropout, F.pad, F.interpolate, torch.mean, "mean",
    "contiguous",
)  # fmt: skip
ADDS = (operator.add, torch.add, "add")
PRODUCTS = (operator.mul, torch.mul, "mul")
CONCATS = (torch.cat, torch.concat)


@dataclass(frozen=True)
class Known:
    """A value of one image (1, C, …), right in the channels where `constant` (C,) holds, 0 elsewhere."""

    value: Tensor
    constant: Tensor

    @classmethod
    def of(cls, value: Tensor, constant: Tensor) -> Known:
        shape = (1, -1, *[1] * (value.dim() - 2))
        return cls(torch.where(constant.view(shape), value, torch.zeros_like(value)), constant)


class _Walk(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.inputs: dict[str, Known] = {}

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.op in ("placeholder", "get_attr", "output"):
            return super().run_node(n)
        found = [a for a in _flat(args) if isinstance(a, Known)]
        if not found:
            return super().run_node(n)
        plain_args, plain_kwargs = (fx.node.map_aggregate(a, _value) for a in (args, kwargs))
        layer = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        if isinstance(layer, nn.Conv2d | nn.Linear):
            self.inputs[str(n.target)] = found[0]
            return _weighted(layer, found[0])
        value = getattr(self, n.op)(n.target, plain_args, plain_kwargs)
        return Known.of(value, _constant(n, layer, found, value, args))


def known_inputs(module: fx.GraphModule, input_shape: tuple[int, ...]) -> dict[str, Known]:
    """For every convolution and linear layer that is called, what is known of its input.

    A channel is constant when it is the same for every image, at every position whatever it is there. What
    an operation does that is not in the lists above counts as depending on the input.
    """
    walk = _Walk(module)
    with torch.no_grad():
        start = torch.zeros(1, *input_shape, dtype=weights_dtype(module))
        walk.run(Known(start, torch.zeros(input_shape[0], dtype=torch.bool)))
    return walk.inputs


def _flat(args: Any) -> list[Any]:
    if isinstance(args, tuple | list):
        return [leaf for a in args for leaf in _flat(a)]
    return [args]


def _value(a: Any) -> Any:
    return a.value if isinstance(a, Known) else a


def _weighted(layer: nn.Conv2d | nn.Linear, x: Known) -> Known:
    """An output is constant when all that its weights read is, or is read with weight 0."""
    groups = getattr(layer, "groups", 1)
    reads = (layer.weight.flatten(2) if layer.weight.dim() > 2 else layer.weight[..., None]).ne(0).any(2)
    constant = x.constant
    if constant.shape[0] != layer.weight.shape[1] * groups:
        constant = torch.zeros(layer.weight.shape[1] * groups, dtype=torch.bool)
    own = constant.view(groups, -1).repeat_interleave(layer.weight.shape[0] // groups, 0)
    return Known.of(layer(x.value), (~reads | own).all(1))


def _constant(n: fx.Node, layer: nn.Module | None, found: list[Known], value: Tensor, args: Any) -> Tensor:
    unknown = torch.zeros(value.shape[1] if value.dim() > 1 else 1, dtype=torch.bool)
    first = found[0]
    if len(found) == 1:
        if isinstance(layer, nn.BatchNorm2d) and layer.weight is not None:
            return first.constant | layer.weight.eq(0)
        if isinstance(layer, CHANNELWISE) or n.target in CHANNELWISE_CALLS:
            return first.constant if first.constant.shape == unknown.shape else unknown
        if n.target in (*ADDS, *PRODUCTS) and all(isinstance(a, Known | int | float) for a in args):
            return first.constant
        return _reshaped(first, value)
    if n.target in CONCATS:
        whole = torch.cat([k.constant for k in found])
        return whole if whole.shape == unknown.shape else unknown
    both: Callable[[Tensor, Tensor], Tensor] = torch.logical_and
    if len(found) == 2 and all(k.constant.shape == unknown.shape for k in found):
        a, b = found
        if n.target in ADDS:
            return both(a.constant, b.constant)
        if n.target in PRODUCTS:  # 0 times anything is 0
            zero = (_zero(a) & a.constant) | (_zero(b) & b.constant)
            return both(a.constant, b.constant) | zero
    return unknown


def _reshaped(x: Known, value: Tensor) -> Tensor:
    """Flattening gives every position of a channel a channel of its own; other reshapes are not followed."""
    before, after = x.value.shape, value.shape
    if before == after:
        return x.constant if torch.equal(x.value, value) else torch.zeros_like(x.constant)
    if len(after) == 2 and x.value.numel() == value.numel():
        return x.constant.repeat_interleave(value.shape[1] // before[1])
    return torch.zeros(after[1] if len(after) > 1 else 1, dtype=torch.bool)


def _zero(x: Known) -> Tensor:
    return x.value.transpose(0, 1).flatten(1).eq(0).all(1)
