"""Convolutions of int64 or int32 tensors, exact modulo 2^64 or 2^32.

torch multiplies 64-bit integers in vectors with AVX-512 only: elsewhere a loop of ours that needs no columns
(`_direct.py`) is 3 to 10 times as fast. With AVX-512 torch's is as fast or faster.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tightrope.program import Conv2d
from tightrope.runtimes.mpc._direct import convolved

SHARED = 1 << 22  # multiplications from which on threads share them


def convolve(op: Conv2d, weight: Tensor, x: Tensor) -> Tensor:
    """(N, in, H, W) -> (N, *op.shape), without bias, on torch's number of threads."""
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        return by_torch(op, weight, x)
    return direct(op, weight, x)


def by_torch(op: Conv2d, weight: Tensor, x: Tensor) -> Tensor:
    if op.dilation != (1, 1) and x.dtype != torch.int64:  # torch dilates no other integers
        return by_torch(op, weight.long(), x.long()).to(x.dtype)
    return F.conv2d(F.pad(x, op.padding), weight, None, op.stride, 0, op.dilation, op.groups)


def pitch(op: Conv2d) -> int:
    """From a row of outputs to the next one, in values, as `direct` computes them."""
    return op.shape[2] + (op.kernel[1] - 1) * op.dilation[1] // op.stride[1]


@dataclass(frozen=True)
class Plan:
    """How `direct` reads an input. by: by stride, where the parts begin that the kernel meets, in each of
    which neighbours of the result are neighbours in memory; rows and columns: of a part; offset: of every
    weight of an output, from the first value of its group of channels."""

    by: tuple[tuple[int, int], ...]
    rows: int
    columns: int
    offset: NDArray[np.int64]


@lru_cache(maxsize=1024)
def planned(op: Conv2d) -> Plan:
    (kh, kw), (sh, sw), (dh, dw) = op.kernel, op.stride, op.dilation
    rows, columns = op.shape[1] + (kh - 1) * dh // sh, pitch(op)
    i, j = np.arange(kh) * dh, np.arange(kw) * dw
    by_row, row = np.unique(i % sh, return_inverse=True)
    by_column, column = np.unique(j % sw, return_inverse=True)
    parts = len(by_row) * len(by_column)
    part = row[:, None] * len(by_column) + column
    place = part * (rows * columns) + (i // sh * columns)[:, None] + j // sw
    channels = np.arange(op.in_channels // op.groups) * (parts * rows * columns)
    by = tuple(product(by_row.tolist(), by_column.tolist()))
    return Plan(by, rows, columns, (channels[:, None, None] + place).reshape(-1))


def direct(op: Conv2d, weight: Tensor, x: Tensor) -> Tensor:
    plan, (sh, sw), (left, _, top, _) = planned(op), op.stride, op.padding
    height, width = x.shape[2:]
    right, bottom = plan.columns * sw - width - left, plan.rows * sh - height - top
    if (left, right, top, bottom) != (0, 0, 0, 0):
        x = F.pad(x, (left, right, top, bottom))
    parts = [x[:, :, i::sh, j::sw] for i, j in plan.by]
    x = parts[0].contiguous() if len(parts) == 1 else torch.stack(parts, 2)

    out = torch.empty((len(x), *op.shape), dtype=x.dtype)
    grouped = out.view(len(x), op.groups, -1, *op.shape[1:]).numpy()
    values = x.view(len(x), op.groups, -1).numpy()
    weights = weight.contiguous().view(op.groups, -1, len(plan.offset)).numpy()

    def work(first: int, last: int) -> None:
        convolved(values, weights, plan.offset, plan.columns, first, last, grouped)

    outputs, threads = op.shape[0], torch.get_num_threads()
    if threads == 1 or out.numel() * len(plan.offset) < SHARED:
        work(0, outputs)
        return out
    each = -(-outputs // threads)
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, k, min(k + each, outputs)) for k in range(0, outputs, each)]:
            done.result()
    return out


def beside(op: Conv2d) -> int:
    """Products that `direct` computes between the rows of one sample's outputs."""
    weights = math.prod(op.weight_shape)
    return weights * (op.shape[1] - 1) * (pitch(op) - op.shape[2])


def load(dtypes: Iterable[torch.dtype]) -> None:
    """Run the compiled loop once with each, so that no batch waits for the compiler."""
    op = Conv2d(name="", inputs=("",), shape=(1, 1, 1), kernel=(1, 1), in_channels=1)
    for dtype in dtypes:
        one = torch.ones(op.weight_shape, dtype=dtype)
        convolve(op, one, one)
