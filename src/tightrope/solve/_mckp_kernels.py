"""Compiled kernels of the multiple-choice knapsack solver (`tightrope.solve.mckp`).

Sums of the dynamic programme are double-double numbers: an unevaluated `high + low` of two float64, about 106
bits. They are exact whenever the summed values span fewer than 2^50, so that two choices whose weights or
losses differ in the last bit are never confused.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Links = NDArray[np.int32]


@njit(cache=True)  # type: ignore[untyped-decorator]
def pareto_options(
    loss: Floats,
    weight: Floats,
    order: Ints,
    at: int,
    start: Ints,
    out_loss: Floats,
    out_weight: Floats,
    out_option: Links,
) -> int:
    """Write each group's nondominated options from index `at`: weight ascending, loss strictly descending.

    `loss` is (G, K); `weight` and `order` (options by ascending weight) are (1, K) or (G, K). `start` (G,)
    receives the first index of each group. Returns the index after the last option written.
    """
    for g in range(loss.shape[0]):
        row = g if weight.shape[0] > 1 else 0
        start[g] = at
        best = np.inf
        for i in range(loss.shape[1]):
            k = order[row, i]
            if loss[g, k] < best:
                best = loss[g, k]
                if at > start[g] and out_weight[at - 1] == weight[row, k]:
                    at -= 1
                out_loss[at] = best
                out_weight[at] = weight[row, k]
                out_option[at] = k
                at += 1
    return at


@njit(cache=True)  # type: ignore[untyped-decorator]
def hull_segments(start: Ints, loss: Floats, weight: Floats) -> tuple[Ints, Ints, Floats, Floats]:
    """Edges of every group's lower convex hull: group, option led to, weight added, slope.

    The slope is the loss saved per weight added. Within a group the edges follow each other and their slopes
    strictly decrease *as computed*, so a stable sort by slope keeps them in order whatever the rounding.
    """
    total = start[-1]
    group = np.empty(total, np.int64)
    end = np.empty(total, np.int64)
    added = np.empty(total, np.float64)
    slope = np.empty(total, np.float64)
    n = 0
    for g in range(start.size - 1):
        first = n
        for p in range(start[g] + 1, start[g + 1]):
            previous = end[n - 1] if n > first else start[g]
            s = (loss[previous] - loss[p]) / (weight[p] - weight[previous])
            while n > first and s >= slope[n - 1]:
                n -= 1
                previous = end[n - 1] if n > first else start[g]
                s = (loss[previous] - loss[p]) / (weight[p] - weight[previous])
            group[n] = g
            end[n] = p
            added[n] = weight[p] - weight[previous]
            slope[n] = s
            n += 1
    return group[:n].copy(), end[:n].copy(), added[:n].copy(), slope[:n].copy()


@njit(cache=True)  # type: ignore[untyped-decorator]
def reduced_costs(
    start: Ints, loss: Floats, weight: Floats, base: Ints, lam: float, limit: float
) -> tuple[Floats, Floats, Floats, float]:
    """Per group, over the options other than `base` whose reduced cost is below `limit`.

    The reduced cost is r = (loss - loss of base) + lam * (weight - weight of base). Returns the least r, the
    least r per unit of added weight, the least r per unit of removed weight (inf where there is none), and
    the sum over groups of min(r, 0): nonzero only by rounding, as `base` minimises loss + lam * weight.
    """
    groups = start.size - 1
    least = np.full(groups, np.inf)
    up = np.full(groups, np.inf)
    down = np.full(groups, np.inf)
    negative = 0.0
    for g in range(groups):
        b = base[g]
        for p in range(start[g], start[g + 1]):
            if p == b:
                continue
            dw = weight[p] - weight[b]
            r = (loss[p] - loss[b]) + lam * dw
            if r >= limit:
                continue
            least[g] = min(least[g], r)
            if dw > 0:
                up[g] = min(up[g], max(r, 0.0) / dw)
            else:
                down[g] = min(down[g], max(r, 0.0) / -dw)
        negative += min(least[g], 0.0)
    return least, up, down, negative


@njit(cache=True)  # type: ignore[untyped-decorator]
def _add(ah: float, al: float, bh: float, bl: float) -> tuple[float, float]:
    """Sum of two double-doubles (Joldes, Muller, Popescu 2017, AccurateDWPlusDW)."""
    sh = ah + bh
    t = sh - ah
    sl = (ah - (sh - t)) + (bh - t)
    th = al + bl
    t = th - al
    tl = (al - (th - t)) + (bl - t)
    c = sl + th
    vh = sh + c
    w = tl + (c - (vh - sh))
    high = vh + w
    return high, w - (high - vh)


@njit(cache=True)  # type: ignore[untyped-decorator]
def merge(
    a: Floats,
    a_link: Links,
    b: Floats,
    shift: Floats,
    tag: int,
    lam: float,
    span: float,
    up: float,
    down: float,
    limit: float,
    loss_cap: float,
) -> tuple[Floats, Links]:
    """Nondominated union of the states `a` and of those of `b` moved by `shift`; the best of equals is a's.

    A state is a row (weight high, weight low, loss high, loss low) relative to the base choice; rows come and
    go in order of weight, losses strictly falling. A row taken from b gets the link (its index in b, tag).
    Rows of b are left out when their excess loss + lam * weight, raised by `up` for each unit of weight below
    0 and by `down` for each above `span`, is at least `limit`, or when their loss is at least `loss_cap`.
    """
    n, m = a.shape[0], b.shape[0]
    out = np.empty((n + m, 4), np.float64)
    link = np.empty((n + m, 2), np.int32)
    size = i = j = 0
    fresh = False
    wh = wl = lh = ll = 0.0
    while True:
        while not fresh and j < m:
            wh, wl = _add(b[j, 0], b[j, 1], shift[0], shift[1])
            lh, ll = _add(b[j, 2], b[j, 3], shift[2], shift[3])
            excess = lh + lam * wh
            if wh < 0:
                excess -= up * wh
            elif wh > span:
                excess += down * (wh - span)
            fresh = excess < limit and lh < loss_cap
            if not fresh:
                j += 1
        if i < n and (
            not fresh
            or a[i, 0] < wh
            or (
                a[i, 0] == wh
                and (a[i, 1] < wl or (a[i, 1] == wl and (a[i, 2] < lh or (a[i, 2] == lh and a[i, 3] <= ll))))
            )
        ):
            better = size == 0 or (
                a[i, 2] < out[size - 1, 2] or (a[i, 2] == out[size - 1, 2] and a[i, 3] < out[size - 1, 3])
            )
            if better:
                out[size] = a[i]
                link[size] = a_link[i]
                size += 1
            i += 1
        elif fresh:
            if size == 0 or (lh < out[size - 1, 2] or (lh == out[size - 1, 2] and ll < out[size - 1, 3])):
                out[size, 0] = wh
                out[size, 1] = wl
                out[size, 2] = lh
                out[size, 3] = ll
                link[size, 0] = j
                link[size, 1] = tag
                size += 1
            j += 1
            fresh = False
        else:
            return out[:size].copy(), link[:size].copy()


@njit(cache=True)  # type: ignore[untyped-decorator]
def widest_gap(found: Floats, lam: float, span: float, unit: float) -> float:
    """Largest distance of the staircase `found` above the relaxation's line -lam * weight on [0, span).

    Weights are multiples of `unit` (0: any real), so the foot of each stair ends `unit` before the next one.
    """
    gap = 0.0
    for i in range(found.shape[0]):
        foot = found[i + 1, 0] if i + 1 < found.shape[0] else span
        gap = max(gap, found[i, 2] + lam * (min(foot, span) - unit))
    return gap


@njit(cache=True)  # type: ignore[untyped-decorator]
def lowest_bit(bits: Ints) -> int:
    """Exponent e of the largest 2^e dividing every value, given the values' float64 bit patterns.

    1024 when all are zero.
    """
    least = 1024
    for pattern in bits:
        fraction = pattern & ((1 << 52) - 1)
        exponent = (pattern >> 52) & 2047
        if exponent > 0:
            fraction |= 1 << 52
        e = max(exponent, 1) - 1075
        if fraction == 0 or e >= least:
            continue
        while fraction & 1 == 0 and e < least:
            fraction >>= 1
            e += 1
        least = min(least, e)
    return least
