"""The compiled inner loop of convolutions in the ring: see `convolution.py`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tightrope.runtimes.mpc._halftree import compiled

I64 = NDArray[np.int64]
Integers = NDArray[Any]  # int64 or int32, all of one kind
STRIP = 256  # values that are summed at a time: with what they are sums of, they stay in the first cache


@compiled
def convolved(
    x: Integers, weight: Integers, offset: I64, pitch: int, first: int, last: int, out: Integers
) -> None:
    """out[n, g, o, h, w] = sum over k of weight[g, o, k] * x[n, g, offset[k] + h * pitch + w], for the
    outputs of all groups from `first` to `last`.

    Two outputs and four k at a time, over strips that cross the ends of rows: what lies between the rows of
    `out` is computed and dropped.
    """
    N, G, each, H, W = out.shape
    K, values = offset.shape[0], (H - 1) * pitch + W
    sums = np.empty((2, STRIP), out.dtype)
    upper, lower = sums[0], sums[1]
    for n in range(N):
        for g in range(G):
            source = x[n, g]
            start, stop = max(first - g * each, 0), min(last - g * each, each)
            for begin in range(0, values, STRIP):
                count = min(STRIP, values - begin)
                for o in range(start, stop, 2):
                    u = weight[g, o]
                    v = weight[g, min(o + 1, stop - 1)]
                    sums[:] = 0
                    for k in range(0, K - 3, 4):
                        a = source[begin + offset[k] : begin + offset[k] + count]
                        b = source[begin + offset[k + 1] : begin + offset[k + 1] + count]
                        c = source[begin + offset[k + 2] : begin + offset[k + 2] + count]
                        d = source[begin + offset[k + 3] : begin + offset[k + 3] + count]
                        u0, u1, u2, u3 = u[k], u[k + 1], u[k + 2], u[k + 3]
                        v0, v1, v2, v3 = v[k], v[k + 1], v[k + 2], v[k + 3]
                        for i in range(count):
                            upper[i] += u0 * a[i] + u1 * b[i] + u2 * c[i] + u3 * d[i]
                            lower[i] += v0 * a[i] + v1 * b[i] + v2 * c[i] + v3 * d[i]
                    for k in range(K - K % 4, K):
                        a = source[begin + offset[k] : begin + offset[k] + count]
                        for i in range(count):
                            upper[i] += u[k] * a[i]
                            lower[i] += v[k] * a[i]
                    for j in range(min(2, stop - o)):
                        h, w, i = begin // pitch, begin % pitch, 0
                        while i < count:
                            for column in range(w, min(W, w + count - i)):
                                out[n, g, o + j, h, column] = sums[j, i + column - w]
                            i += pitch - w
                            h, w = h + 1, 0
