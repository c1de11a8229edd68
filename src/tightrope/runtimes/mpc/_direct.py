"""Compiled loops of linear layers in the ring: see `convolution.py`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tightrope.runtimes.mpc._halftree import compiled

I64 = NDArray[np.int64]
Integers = NDArray[Any]  # int64 or int32, all of one kind
STRIP = 256  # values that are summed at a time: with what they are sums of, they stay in the first cache


@compiled
def products(x: Integers, weight: Integers, out: Integers) -> None:
    """out[n, o] = sum over k of weight[o, k] * x[n, k]."""
    for o in range(weight.shape[0]):
        row = weight[o]
        for n in range(x.shape[0]):
            values, total = x[n], 0
            for k in range(row.shape[0]):
                total += row[k] * values[k]
            out[n, o] = total


@compiled
def convolved(
    x: Integers, weight: Integers, offset: I64, pitch: int, first: int, last: int, out: Integers
) -> None:
    """out[n, g, o, h, w] = sum over k of weight[g, o, k] * x[n, g, offset[k] + h * pitch + w], for the
    outputs of all groups from `first` to `last`.

    Two outputs at a time, over strips that cross the ends of rows: what lies between the rows of `out` is
    computed and dropped.
    """
    N, G, each, H, W = out.shape
    values = (H - 1) * pitch + W
    sums = np.empty((2, STRIP), out.dtype)
    for n in range(N):
        for g in range(G):
            start, stop = max(first - g * each, 0), min(last - g * each, each)
            for begin in range(0, values, STRIP):
                count = min(STRIP, values - begin)
                source = x[n, g, begin:]
                for o in range(start, stop, 2):
                    sums[:] = 0
                    if o + 1 < stop:
                        add_two(
                            source, weight[g, o], weight[g, o + 1], offset, sums[0, :count], sums[1, :count]
                        )
                    else:
                        add_one(source, weight[g, o], offset, sums[0, :count])
                    for j in range(min(2, stop - o)):
                        h, w, i = begin // pitch, begin % pitch, 0
                        while i < count:
                            for column in range(w, min(W, w + count - i)):
                                out[n, g, o + j, h, column] = sums[j, i + column - w]
                            i += pitch - w
                            h, w = h + 1, 0


@compiled
def add_one(source: Integers, u: Integers, offset: I64, sums: Integers) -> None:
    """sums[i] += sum over k of u[k] * source[offset[k] + i], four k at a time."""
    K, count = offset.shape[0], sums.shape[0]
    for k in range(0, K - 3, 4):
        a, b = source[offset[k] :], source[offset[k + 1] :]
        c, d = source[offset[k + 2] :], source[offset[k + 3] :]
        u0, u1, u2, u3 = u[k], u[k + 1], u[k + 2], u[k + 3]
        for i in range(count):
            sums[i] += u0 * a[i] + u1 * b[i] + u2 * c[i] + u3 * d[i]
    for k in range(K - K % 4, K):
        a, u0 = source[offset[k] :], u[k]
        for i in range(count):
            sums[i] += u0 * a[i]


@compiled
def add_two(
    source: Integers, u: Integers, v: Integers, offset: I64, upper: Integers, lower: Integers
) -> None:
    """`add_one` of two outputs, which reads the source once."""
    K, count = offset.shape[0], upper.shape[0]
    for k in range(0, K - 3, 4):
        a, b = source[offset[k] :], source[offset[k + 1] :]
        c, d = source[offset[k + 2] :], source[offset[k + 3] :]
        u0, u1, u2, u3 = u[k], u[k + 1], u[k + 2], u[k + 3]
        v0, v1, v2, v3 = v[k], v[k + 1], v[k + 2], v[k + 3]
        for i in range(count):
            upper[i] += u0 * a[i] + u1 * b[i] + u2 * c[i] + u3 * d[i]
            lower[i] += v0 * a[i] + v1 * b[i] + v2 * c[i] + v3 * d[i]
    for k in range(K - K % 4, K):
        a, u0, v0 = source[offset[k] :], u[k], v[k]
        for i in range(count):
            upper[i] += u0 * a[i]
            lower[i] += v0 * a[i]
