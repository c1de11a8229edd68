"""Convolutions and matrices times int64 or int32 tensors, exact modulo 2^64 or 2^32.

torch multiplies 64-bit integers in vectors with AVX-512 only, where a product of a large layer takes 0.04 ns;
elsewhere loops of ours that need no columns (`_direct.py`) are several times as fast. Which of both it is
follows from the machine, how long it takes from public shapes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tightrope.errors import InputError
from tightrope.ops import Conv2d
from tightrope.runtimes.mpc._direct import convolved, products
from tightrope.runtimes.mpc.chunks import over_chunks

SHARED = 1 << 22  # multiplications from which on threads share them
Pair = tuple[int, int]


def convolve(op: Conv2d, weight: Tensor, x: Tensor) -> Tensor:
    """(N, in, H, W) -> (N, *op.shape), without bias, on torch's number of threads."""
    return by_torch(op, weight, x) if _vectors() else direct(op, weight, x)


def matmul(weight: Tensor, x: Tensor) -> Tensor:
    """(..., in) -> (..., out), by a weight (out, in)."""
    return x @ weight.T if _vectors() else direct_matmul(weight, x)


def _vectors() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def by_torch(op: Conv2d, weight: Tensor, x: Tensor) -> Tensor:
    if op.dilation != (1, 1) and x.dtype != torch.int64:  # torch dilates no other integers
        return by_torch(op, weight.long(), x.long()).to(x.dtype)
    return F.conv2d(F.pad(x, op.padding), weight, None, op.stride, 0, op.dilation, op.groups)


def direct_matmul(weight: Tensor, x: Tensor) -> Tensor:
    _check(weight.dtype == x.dtype and weight.shape[1:] == x.shape[-1:], weight, x)
    rows = x.reshape(-1, weight.shape[1]).contiguous()
    out = torch.empty((len(rows), len(weight)), dtype=x.dtype)
    products(rows.numpy(), weight.contiguous().numpy(), out.numpy())
    return out.reshape(*x.shape[:-1], len(weight))


@dataclass(frozen=True, eq=False)
class Plan:
    """How `direct` reads an input. by: by stride, where the parts begin that the kernel meets, in each of
    which neighbours of the result are neighbours in memory; rows and columns: of a part; offset: of every
    weight of an output, from the first value of its group of channels."""

    by: tuple[Pair, ...]
    rows: int
    columns: int
    offset: NDArray[np.int64]


@lru_cache(maxsize=256)
def planned(channels: int, size: Pair, kernel: Pair, stride: Pair, dilation: Pair) -> Plan:
    """For a group of `channels` inputs and results of `size`."""
    (kh, kw), (sh, sw), (dh, dw) = kernel, stride, dilation
    rows, columns = (pitch(*of_axis) for of_axis in zip(size, kernel, stride, dilation, strict=True))
    i, j = np.arange(kh) * dh, np.arange(kw) * dw
    by_row, row = np.unique(i % sh, return_inverse=True)
    by_column, column = np.unique(j % sw, return_inverse=True)
    parts = len(by_row) * len(by_column)
    part = row[:, None] * len(by_column) + column
    place = part * (rows * columns) + (i // sh * columns)[:, None] + j // sw
    first = np.arange(channels) * (parts * rows * columns)
    by = tuple(product(by_row.tolist(), by_column.tolist()))
    return Plan(by, rows, columns, (first[:, None, None] + place).reshape(-1))


def pitch(size: int, kernel: int, stride: int, dilation: int) -> int:
    """Values of a part along an axis: from a row of outputs to the next one, as `direct` computes them."""
    return size + (kernel - 1) * dilation // stride


def direct(op: Conv2d, weight: Tensor, x: Tensor) -> Tensor:
    fits = weight.dtype == x.dtype and op.result(tuple(x.shape[1:])) == op.shape
    _check(fits and tuple(weight.shape) == op.weight_shape, weight, x)
    if op.groups == 1 and op.shape[1:] == op.kernel == tuple(x.shape[2:]) == (1, 1):
        return direct_matmul(weight.flatten(1), x.flatten(1)).reshape(len(x), *op.shape)
    channels, outputs = op.in_channels // op.groups, op.shape[0] // op.groups
    plan, (sh, sw) = planned(channels, op.shape[1:], op.kernel, op.stride, op.dilation), op.stride
    x = _padded(x, op.padding, plan.rows * sh, plan.columns * sw)
    parts = [x[:, :, i::sh, j::sw] for i, j in plan.by]
    x = parts[0].contiguous() if len(parts) == 1 else torch.stack(parts, 2).contiguous()

    out = torch.empty((len(x), *op.shape), dtype=x.dtype)
    grouped = out.view(len(x), op.groups, outputs, *op.shape[1:]).numpy()
    values = x.view(len(x), op.groups, channels * len(parts) * plan.rows * plan.columns).numpy()
    weights = weight.contiguous().view(op.groups, outputs, len(plan.offset)).numpy()

    def work(first: int, last: int) -> None:
        convolved(values, weights, plan.offset, plan.columns, first, last, grouped)

    threads = torch.get_num_threads()
    if threads == 1 or out.numel() * len(plan.offset) < SHARED:
        work(0, op.shape[0])
        return out
    over_chunks(work, op.shape[0], 2 * math.ceil(op.shape[0] / threads / 2), threads)  # outputs go in twos
    return out


def _padded(x: Tensor, padding: tuple[int, int, int, int], rows: int, columns: int) -> Tensor:
    """With zeros around it, of as many rows and columns: beyond these nothing is read."""
    left, right, top, bottom = padding
    height, width = x.shape[2:]
    right, bottom = max(0, columns - width - left), max(0, rows - height - top)
    if (left, right, top, bottom) != (0, 0, 0, 0):
        x = F.pad(x, (left, right, top, bottom))
    return x[:, :, :rows, :columns]


def _check(fits: bool, weight: Tensor, x: Tensor) -> None:
    if not fits:
        given = ", ".join(f"{t.dtype} {tuple(t.shape)}" for t in (weight, x))
        raise InputError("a weight and an input do not fit each other or their layer", got=given)


def beside(op: Conv2d) -> int:
    """Products that `direct` computes between the rows of one sample's outputs."""
    between = pitch(op.shape[2], op.kernel[1], op.stride[1], op.dilation[1]) - op.shape[2]
    return math.prod(op.weight_shape) * (op.shape[1] - 1) * between
