"""From measured contributions to a staged problem: the bilinear accuracy formula of BINAS.

Let A0 be the mean accuracy of random networks, m(.) the same with one decision fixed. The released formula
(accuracy_contribution.py) adds m - A0 over all decisions; a block counts when its stage's depth reaches it:

    A0 + sum_s (m[s, d_s] - A0) + sum_s sum_{b < d_s} (m[s, b, c_sb] - A0)

m[s, b, c] is measured at the least depth that has block b (for the first block at any), so that A0 subtracted
there counts the depth twice. The conditional variant subtracts the mean over c of what was measured at that
depth instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tightrope.errors import BudgetError, InputError, near
from tightrope.methods.binas.counts import METRICS, count_tables, fixed_counts
from tightrope.methods.binas.space import Space
from tightrope.solve.staged import Choice, Stage, Staged
from tightrope.types import FloatArray

Priced = Mapping[str, tuple[float, Mapping[tuple[int, int], FloatArray]]]


@dataclass(frozen=True)
class Contributions:
    """Accuracies in one unit. depth: per stage (D,); block: per stage (B, K), see the module."""

    mean: float
    depth: tuple[FloatArray, ...]
    block: tuple[FloatArray, ...]


@dataclass(frozen=True)
class Formula:
    """base + depth[s][d_s] + block[s][b, c_sb] summed over stages and present blocks, + z' pair beta.

    depth: per stage (D,); block: per stage (B, K); pair: (all blocks x K, all depths), None for 0.
    """

    base: float
    depth: tuple[FloatArray, ...]
    block: tuple[FloatArray, ...]
    pair: FloatArray | None = None

    def predict(self, space: Space, choices: Sequence[Choice]) -> FloatArray:
        """(n,) accuracies."""
        options, depths = encode(space, choices)
        block = np.concatenate([b.ravel() for b in self.block])
        found: FloatArray = self.base + options @ block + depths @ np.concatenate(self.depth)
        if self.pair is not None:
            found = found + ((options @ self.pair) * depths).sum(1)
        return found


def encode(space: Space, choices: Sequence[Choice]) -> tuple[FloatArray, FloatArray]:
    """One-hot z (n, all blocks x options), 0 where a block is absent, and beta (n, all depths)."""
    K = len(space.options)
    blocks = np.cumsum([0, *(stage.depths[-1] for stage in space.stages)])
    depths = np.cumsum([0, *(len(stage.depths) for stage in space.stages)])
    z, beta = np.zeros((len(choices), int(blocks[-1]) * K)), np.zeros((len(choices), int(depths[-1])))
    for i, choice in enumerate(choices):
        for s, options in enumerate(choice):
            z[i, (blocks[s] + np.arange(len(options))) * K + np.array(options)] = 1
            beta[i, depths[s] + space.stages[s].depths.index(len(options))] = 1
    return z, beta


def split(space: Space, weights: FloatArray) -> tuple[tuple[FloatArray, ...], tuple[FloatArray, ...]]:
    """(block, depth) of a `Formula` from weights of [z, beta]."""
    K, at = len(space.options), 0
    blocks, depths = [], []
    for stage in space.stages:
        size = stage.depths[-1] * K
        blocks.append(weights[at : at + size].reshape(-1, K))
        at += size
    for stage in space.stages:
        depths.append(weights[at : at + len(stage.depths)])
        at += len(stage.depths)
    return tuple(blocks), tuple(depths)


def formula(space: Space, contributions: Contributions, *, conditional: bool = False) -> Formula:
    """The released formula, or the conditional variant. Raises InputError for contributions of another
    space."""
    depths, options = [stage.depths for stage in space.stages], len(space.options)
    shapes = [a.shape for a in (*contributions.depth, *contributions.block)]
    wanted = [(len(d),) for d in depths] + [(d[-1], options) for d in depths]
    if shapes != wanted:
        raise InputError("the contributions are of another space", got=shapes, allowed=wanted)
    blocks = []
    for block in contributions.block:
        before = np.full((len(block), 1), contributions.mean)
        if conditional:
            before[1:] = block[1:].mean(1, keepdims=True)
        blocks.append(block - before)
    return Formula(
        contributions.mean, tuple(d - contributions.mean for d in contributions.depth), tuple(blocks)
    )


def problem(
    space: Space, gain: Formula, limits: Mapping[str, float], *, priced: Priced | None = None
) -> Staged:
    """The problem of choosing a network of `space` within `limits`, e.g. {"macs": 250e6, "weights": 6e6}.

    `priced`: further metrics, as (fixed cost, a price per option for every (stage, position)), e.g. latency.
    Raises BudgetError for a metric that is not priced.
    """
    tables = dict(
        zip(METRICS, zip(fixed_counts(space), count_tables(space).values(), strict=True), strict=True)
    )
    prices = {**tables, **(priced or {})}
    unknown = sorted(limits.keys() - prices.keys())
    if unknown or not limits:
        got = ", ".join(unknown) or "no limit"
        raise BudgetError("no option is priced in this quantity", got=got, allowed=near(got, prices))
    stages = []
    for s, stage in enumerate(space.stages):
        cost = np.array([[prices[m][1][s, b] for b in range(stage.depths[-1])] for m in limits])
        stages.append(Stage(stage.depths, gain.block[s], gain.depth[s], cost))
    base = tuple(float(prices[m][0]) for m in limits)
    return Staged(tuple(stages), tuple(limits), tuple(limits.values()), base, gain.base, gain.pair)


def staged(
    space: Space,
    contributions: Contributions,
    limits: Mapping[str, float],
    *,
    conditional: bool = False,
    priced: Priced | None = None,
) -> Staged:
    """`problem` of the `formula` of measured contributions."""
    return problem(space, formula(space, contributions, conditional=conditional), limits, priced=priced)
