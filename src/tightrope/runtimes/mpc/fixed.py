"""Fixed-point arithmetic in Z_2^64 and Z_2^32: int64 or int32 tensors whose sums and products wrap.

Elements of Z_2^40 and Z_2^48 lie in int64 as well; what their upper bits are does not matter, and they never
leave.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tightrope.errors import InputError
from tightrope.program import (
    Add,
    AvgPool2d,
    Concat,
    Conv2d,
    Flatten,
    GlobalAvgPool,
    Linear,
    Op,
    Pad,
    Relu,
    Upsample,
)
from tightrope.runtimes.mpc.convolution import convolve, matmul
from tightrope.runtimes.mpc.prg import WORDS
from tightrope.runtimes.mpc.steps import Local, Multiply, RevealLabel, Step, Wire
from tightrope.runtimes.mpc.terms import Term
from tightrope.runtimes.mpc.tournament import Difference, Winners

INTEGERS = {64: np.int64, 48: np.int64, 40: np.int64, 32: np.int32}
DTYPES = {64: torch.int64, 48: torch.int64, 40: torch.int64, 32: torch.int32}


def encode(x: NDArray[Any], scale: int, ring_bits: int = 64) -> Tensor:
    """Real -> nearest multiple of 2^-scale, int64 or int32; InputError where that is 2^(ring_bits - 2)."""
    scaled = np.rint(np.asarray(x, np.float64) * 2.0**scale)
    if not (np.abs(scaled) < 2.0 ** (ring_bits - 2)).all():
        raise InputError(
            "a number does not fit the ring",
            got=f"{float(np.abs(x).max()):.4g} at {scale} fractional bits",
            allowed=f"below {2.0 ** (ring_bits - 2 - scale):.4g}",
            fix="fewer fraction_bits or weight_bits",
        )
    return torch.from_numpy(scaled.astype(INTEGERS[ring_bits]))


def decode(ring: Tensor, wire: Wire) -> NDArray[np.float64]:
    """The real value that both shares of a wire, added, stand for."""
    real: NDArray[np.float64] = signed(ring, wire).numpy().astype(np.float64) * (2.0**-wire.scale * wire.mu)
    return real


def signed(ring: Tensor, wire: Wire) -> Tensor:
    """The numbers that elements of the wire's ring stand for, whatever their upper bits are."""
    unused = 8 * ring.element_size() - wire.ring_bits
    return ring << unused >> unused if unused else ring


def in_ring(x: Tensor, wire: Wire) -> Tensor:
    """Elements of the wire's ring or a larger one, as those of the wire's."""
    return x.to(DTYPES[wire.ring_bits])


def label(step: RevealLabel, low: Tensor) -> NDArray[np.float64]:
    """(N, 1) ring values whose low bits count the classes after the label -> one-hot (N, classes)."""
    after = low.reshape(-1).numpy() & ((1 << step.bits) - 1)
    one_hot: NDArray[np.float64] = np.eye(step.classes)[step.classes - 1 - after]
    return one_hot


def words(x: Tensor) -> NDArray[Any]:
    """The same bits as unsigned numpy words, contiguous."""
    signed = np.ascontiguousarray(x.numpy())
    unsigned: NDArray[Any] = signed.view(WORDS[8 * signed.itemsize])
    return unsigned


def tensor(x: NDArray[Any], shape: tuple[int, ...]) -> Tensor:
    """The same bits as a tensor of signed integers (no copy)."""
    return torch.from_numpy(x.view(INTEGERS[8 * x.itemsize]).reshape(shape))


def encode_weights(step: Multiply, tensors: Mapping[str, NDArray[Any]]) -> tuple[Tensor, Tensor]:
    """(weight, bias) of a layer in the ring: the input's multiplier goes into the weight.

    Raises InputError, which says nothing of the value, where one does not fit.
    """
    name, ring_bits = step.kernel.name, step.output.ring_bits
    if isinstance(step.kernel, Term):
        real, added = step.kernel.tensors(tensors)
    else:
        real, added = (np.asarray(tensors[f"{name}.{part}"], np.float64) for part in ("weight", "bias"))
    try:
        weight = encode(real * step.input.mu, step.weight_bits, ring_bits)
        bias = encode(added, step.output.scale, ring_bits)
    except InputError as error:
        raise InputError(
            "a weight or bias of this layer does not fit the ring",
            where=name,
            allowed=f"{ring_bits} bits, {step.weight_bits} and {step.output.scale} of them fractional",
            fix="fewer fractional bits, or the larger ring",
        ) from error
    return weight, per_channel(bias, step.output.shape)


def check_weights(steps: Iterable[Step], tensors: Mapping[str, NDArray[Any]]) -> None:
    """Raises InputError for a layer whose weights do not fit the ring: before anybody connects."""
    for step in steps:
        if isinstance(step, Multiply):
            encode_weights(step, tensors)


def multiply(op: Conv2d | Linear | Term, weight: Tensor, x: Tensor) -> Tensor:
    """The linear layer without bias on (N, *input shape), in the ring of the weight."""
    x = x.to(weight.dtype)
    if isinstance(op, Term):
        return x * per_channel(weight, op.shape)
    if isinstance(op, Linear):
        return matmul(weight, x)
    return convolve(op, weight, x)


def per_channel(bias: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A bias as it adds to a (N, *shape) result."""
    return bias.reshape(-1, *(1,) * (len(shape) - 1))


def window_counts(op: AvgPool2d, size: tuple[int, int]) -> NDArray[np.int64]:
    """What each output of an average pool is divided by (torch's rule), shape of the output map."""
    axes = []
    for length, out, k, s, p in zip(size, op.shape[1:], op.kernel, op.stride, op.padding, strict=True):
        starts = np.arange(out) * s - p
        if op.count_padding:
            axes.append(np.minimum(starts + k, length + p) - starts)
        else:
            axes.append(np.minimum(starts + k, length) - np.maximum(starts, 0))
    return np.outer(axes[0], axes[1]).astype(np.int64)


def pool_divisor(op: AvgPool2d | GlobalAvgPool, shape: tuple[int, ...]) -> int:
    """The number L that every window count divides: an average is a window sum times L / count, over L."""
    if isinstance(op, GlobalAvgPool):
        return math.prod(shape[1:])
    return math.lcm(*(int(v) for v in np.unique(window_counts(op, (shape[1], shape[2])))))


def _window_sums(op: AvgPool2d, x: Tensor) -> Tensor:
    """Sums over the windows, tap by tap, each times the divisor over its own count."""
    (H, W), (kh, kw), (sh, sw), (ph, pw) = op.shape[1:], op.kernel, op.stride, op.padding
    size = (x.shape[-2], x.shape[-1])
    bottom = max(0, (H - 1) * sh + kh - ph - size[0])
    right = max(0, (W - 1) * sw + kw - pw - size[1])
    padded = F.pad(x, (pw, right, ph, bottom))
    total = x.new_zeros((len(x), *op.shape))
    for i, j in product(range(kh), range(kw)):
        total += padded[..., i : i + sh * (H - 1) + 1 : sh, j : j + sw * (W - 1) + 1 : sw]
    counts = window_counts(op, size)
    if counts.min() < counts.max():
        total *= torch.from_numpy(pool_divisor(op, (op.shape[0], *size)) // counts)
    return total


def _repeated(x: Tensor, dim: int, factor: int) -> Tensor:
    return x.repeat_interleave(factor, dim)


def _interpolated(x: Tensor, dim: int, factor: int) -> Tensor:
    """Bilinear along one axis (torch's align_corners=False), times `_resolution(factor)`.

    Output o lies at (o + 1/2) / factor - 1/2, but not before 0: between two neighbours, at a whole number of
    steps of 1 / (2 * factor), or 1 / factor if that is odd.
    """
    length, parts = x.shape[dim], _resolution(factor)
    place = (2 * torch.arange(length * factor) + 1 - factor).clamp(min=0) * parts // (2 * factor)
    low, weight = place // parts, (place % parts).reshape(-1, *(1,) * (-1 - dim)).to(x.dtype)
    high = (low + 1).clamp(max=length - 1)
    return x.index_select(dim, low) * (parts - weight) + x.index_select(dim, high) * weight


def _resolution(factor: int) -> int:
    return factor if factor % 2 else 2 * factor


def bilinear_divisor(factor: tuple[int, int]) -> int:
    """What a bilinear upsampling of integers is to be divided by."""
    return _resolution(factor[0]) * _resolution(factor[1])


ENLARGE: Mapping[str, Callable[[Tensor, int, int], Tensor]] = {
    "nearest": _repeated,
    "bilinear": _interpolated,
}


def _upsample(op: Upsample, x: Tensor) -> Tensor:
    enlarge = ENLARGE[op.mode]
    return enlarge(enlarge(x, -2, op.factor[0]), -1, op.factor[1])


def _taken(x: Tensor, axis: int, places: tuple[int, ...]) -> Tensor:
    return x.index_select(axis, torch.tensor(places))


def _winners(op: Winners, x: Tensor, *lead: Tensor) -> Tensor:
    return _taken(
        torch.cat([x, *(_taken(x, op.axis, op.earlier) + v for v in lead)], op.axis), op.axis, op.take
    )


LOCAL: dict[type[Op], Callable[..., Tensor]] = {
    Add: lambda op, x, y: x + y,
    Concat: lambda op, *xs: torch.cat(xs, 1),
    AvgPool2d: _window_sums,
    GlobalAvgPool: lambda op, x: x.sum((2, 3), keepdim=True, dtype=x.dtype),
    Flatten: lambda op, x: x.flatten(1),
    Pad: lambda op, x: F.pad(x, op.padding),
    Upsample: _upsample,
    Difference: lambda op, x: _taken(x, op.axis, op.later) - _taken(x, op.axis, op.earlier),
    Winners: _winners,
    Relu: lambda op, x: x,  # of identity channels only
}


def local(step: Local, *inputs: Tensor) -> Tensor:
    """The linear part of a step, on shares, masks or ring values, (N, *shape) each."""
    read = (in_ring(x, step.output) for x in inputs)
    scaled = (x if k == 1 else x * k for x, k in zip(read, step.factors, strict=True))
    result: Tensor = LOCAL[type(step.kernel)](step.kernel, *scaled)
    return result
