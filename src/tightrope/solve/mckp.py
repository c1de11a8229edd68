"""Multiple-choice knapsack: one option per group, least total loss, total weight within a budget.

Method. (1) Per group, drop dominated options and take the lower convex hull of the rest. (2) Walk the edges
of all hulls in order of loss saved per weight: this solves the linear relaxation (Sinha & Zoltners 1979). Let
S_j be the choice after j edges, W_j its weight, and j the last with W_j <= budget; the break edge j has slope
lam. (3) An exact dynamic programme over nondominated (weight, loss) states, in the spirit of Pisinger's
minimal algorithm (EJOR 83, 1995): start from S_j, open groups in order of how near their slopes are to lam,
and drop every option and state whose reduced cost shows that it cannot improve on what was found. When
nothing is left the choice is proved optimal; when a cap on the states bites first, the states left over give
the lower bound.

Monotone in the budget. The programme of step 3 looks for the best choices for *all* budgets of the interval
[W_j, W_j+1) at once: base, order, caps and pruning depend on j only, so it finds a set F_j that does not
depend on the budget. The result is the least loss of {S_j} and of the members of F_j that weigh at most the
budget and lose at least as much as S_j+1 (a better one could only come from rounding and is ignored).
Claim: budget b <= b' implies loss(b) >= loss(b').
  Same interval: the members allowed at b are allowed at b'.
  Interval j of b before interval j' of b': loss(b) >= loss(S_j+1) >= loss(S_j') >= loss(b'). The first by the
  rule above (S_j itself loses no less than S_j+1), the second because every edge lowers the loss, the third
  because S_j' is itself a candidate at b'.
None of these steps uses that the programme ran to its end, and each compares correctly rounded sums
(`math.fsum`) of real choices, so neither the caps nor rounding can break the claim.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tightrope.errors import BudgetError, InputError
from tightrope.solve._mckp_core import Break, Options, best_within, explore, open_bound
from tightrope.solve._mckp_kernels import (
    Floats,
    Ints,
    hull_segments,
    lowest_bit,
    pareto_options,
    reduced_costs,
)

_MAX_LOSS = 1e100
_MIN_WEIGHT, _MAX_WEIGHT = 1e-60, 1e60
_ROUNDING = 2.0**-46  # of the sum of |loss|: over the rounding of all reduced costs together, with a margin
_BLUR = 2.0**-90  # of the sum of |loss|: over the rounding of double-double sums
_MAX_EXACT = 2.0**53


@dataclass(frozen=True)
class Block:
    """Groups that share one list of K options, e.g. all channels of a ReLU site.

    loss: (G, K), finite, of any sign. weight: (K,) or (G, K), zero or positive.
    """

    loss: NDArray[np.float64]
    weight: NDArray[np.float64]


@dataclass(frozen=True)
class Solution:
    """One option per group.

    choices: per block, (G,) option index. loss, weight: correctly rounded sums over the chosen options.
    bound: no choice within the budget has a lower loss. optimal: proved, and then bound == loss; "proved" is
    with sums of about 106 bits, exact whenever the values that mattered span fewer than 2^50.
    """

    choices: tuple[NDArray[np.intp], ...]
    loss: float
    weight: float
    bound: float
    optimal: bool

    @property
    def gap(self) -> float:
        """(loss - bound) / max(|loss|, |bound|), and 0 when they are equal: from 0 to 2, never infinite.

        Where losses of both signs cancel to about zero it says little; compare `loss` and `bound` then.
        """
        difference = self.loss - self.bound
        return difference / max(abs(self.loss), abs(self.bound)) if difference else 0.0


def solve(blocks: Sequence[Block], budget: float) -> Solution:
    """The choice of one option per group with the least total loss whose total weight is at most `budget`.

    budget: in the unit of the weights; inf is allowed. The weight of a choice is the correctly rounded sum
    of its options' weights. Raising the budget never raises the loss. Ties are broken the same way each time.

    Raises InputError (NaN, infinite, negative or out-of-range values, wrong shapes; names the block) and
    BudgetError (no choice fits; states the smallest feasible budget).
    """
    arrays = [_checked(f"block {i}", block) for i, block in enumerate(blocks)]
    budget = float(budget)
    if math.isnan(budget):
        raise InputError("the budget is not a number", where="budget", got=budget, allowed="a number")
    options = _nondominated(arrays)
    group, end, added, slope = hull_segments(options.start, options.loss, options.weight)
    order = np.argsort(-slope, kind="stable")
    group, end, added, slope = group[order], end[order], added[order], slope[order]

    def prefix(j: int) -> Ints:
        position = options.start[:-1].copy()
        np.maximum.at(position, group[:j], end[:j])
        return position

    smallest = _sum(options.weight[prefix(0)])
    if smallest > budget:
        raise BudgetError(
            f"no choice fits the budget: the smallest feasible budget is {smallest!r}",
            where="multiple-choice knapsack",
            got=budget,
            allowed=f"at least {smallest!r}",
            fix="raise the budget, or add cheaper options",
        )
    around = np.cumsum(np.concatenate([[smallest], added]))  # weights of the prefixes, within 1e-9
    low = max(int(np.searchsorted(around, budget * (1 - 1e-8), side="right")) - 1, 0)
    high = int(np.searchsorted(around, budget * (1 + 1e-8), side="right"))
    j = low - 1 + bisect_right(range(low, high), budget, key=lambda i: _sum(options.weight[prefix(i)]))
    base = prefix(j)
    if j == end.size:  # every group has its least loss
        return _solution(arrays, options, base, math.inf)
    at = _break(options, base, int(group[j]), int(end[j]), float(slope[j]))
    room = _room(options.weight[base], budget, at.unit)
    core = explore(options, at)
    next_loss = _sum(options.loss[prefix(j + 1)])
    blur = _BLUR * _scale(options)
    chosen, relative, ignored = best_within(core, options, base, budget, room, next_loss, blur)
    remaining = min(open_bound(core, at.lam, room) - at.slack, ignored)
    if remaining > relative - at.quantum:
        return _solution(arrays, options, chosen, math.inf)
    remaining = max(remaining, -at.lam * room - at.slack)
    return _solution(arrays, options, chosen, math.fsum([*options.loss[base].tolist(), remaining]))


def _checked(where: str, block: Block) -> tuple[Floats, Floats]:
    """Loss (G, K) and weight (1 or G, K) as float64, or InputError."""
    loss, weight = np.asarray(block.loss), np.asarray(block.weight)
    for name, array in (("loss", loss), ("weight", weight)):
        if array.dtype.kind not in "uif":
            raise InputError(f"{name} is not numeric", where=where, got=array.dtype, allowed="real numbers")
        if array.dtype.kind in "ui" and array.size and max(-int(array.min()), int(array.max())) > _MAX_EXACT:
            raise InputError(f"{name} is too large to be exact in float64", where=where, allowed="up to 2^53")
    loss, weight = loss.astype(np.float64), weight.astype(np.float64)
    if loss.ndim != 2 or (loss.shape[0] and not loss.shape[1]):
        raise InputError(
            "loss has the wrong shape", where=where, got=loss.shape, allowed="(groups, options >= 1)"
        )
    if weight.shape not in (loss.shape, loss.shape[1:]):
        raise InputError(
            "weight does not match loss",
            where=where,
            got=weight.shape,
            allowed=f"{loss.shape[1:]} or {loss.shape}",
        )
    if not (np.abs(loss) <= _MAX_LOSS).all():
        bad = loss[~(np.abs(loss) <= _MAX_LOSS)][0]
        raise InputError(
            "a loss is out of range",
            where=where,
            got=bad,
            allowed=f"finite, at most {_MAX_LOSS:g} in magnitude",
        )
    usable = (weight == 0) | ((weight >= _MIN_WEIGHT) & (weight <= _MAX_WEIGHT))
    if not usable.all():
        raise InputError(
            "a weight is out of range",
            where=where,
            got=weight[~usable][0],
            allowed=f"0, or from {_MIN_WEIGHT:g} to {_MAX_WEIGHT:g}",
        )
    return loss, np.atleast_2d(weight)


def _nondominated(arrays: Sequence[tuple[Floats, Floats]]) -> Options:
    """The nondominated options of all groups."""
    total = sum(loss.size for loss, _ in arrays)
    start = np.empty(sum(loss.shape[0] for loss, _ in arrays) + 1, np.int64)
    loss_out, weight_out, number = np.empty(total), np.empty(total), np.empty(total, np.int32)
    at = first = 0
    for loss, weight in arrays:
        order = np.argsort(weight, axis=1, kind="stable")
        groups = start[first : first + loss.shape[0]]
        at = pareto_options(loss, weight, order, at, groups, loss_out, weight_out, number)
        first += loss.shape[0]
    start[first] = at
    return Options(start, loss_out[:at], weight_out[:at], number[:at])


def _break(options: Options, base: Ints, group: int, end: int, lam: float) -> Break:
    """The break edge, from the base's option of `group` to option `end`, and every group's reduced costs."""
    rounding = _ROUNDING * _scale(options)
    lost = float(options.loss[base[group]] - options.loss[end])
    least, up, down, negative = reduced_costs(
        options.start, options.loss, options.weight, base, lam, lost + rounding
    )
    return Break(
        base=base,
        lam=lam,
        span=float(options.weight[end] - options.weight[base[group]]),
        unit=_unit(options),
        quantum=math.ldexp(1.0, min(lowest_bit(options.loss.view(np.int64)), 400)),
        slack=rounding - negative,
        least=least,
        up=up,
        down=down,
    )


def _unit(options: Options) -> float:
    """A number of which all weights differ by multiples, if their sums are then exact in float64; else 0."""
    power = math.ldexp(1.0, min(lowest_bit(options.weight.view(np.int64)), 0))
    if _sum(options.weight[options.start[1:] - 1]) >= _MAX_EXACT * power:
        return 0.0
    lightest = np.repeat(options.weight[options.start[:-1]], np.diff(options.start))
    return float(np.gcd.reduce(((options.weight - lightest) / power).astype(np.int64))) * power


def _room(weight: Floats, budget: float, unit: float) -> float:
    """Budget minus the sum of `weight`: rounded up, or down to a multiple of `unit` where sums are exact."""
    if unit:
        return math.floor((budget - _sum(weight)) / unit) * unit
    return math.fsum([math.nextafter(budget, math.inf), *(-weight).tolist()])


def _scale(options: Options) -> float:
    """Sum over groups of the largest |loss|."""
    first, last = options.loss[options.start[:-1]], options.loss[options.start[1:] - 1]
    return _sum(np.maximum(np.abs(first), np.abs(last)))


def _sum(values: Floats) -> float:
    """Correctly rounded sum."""
    return math.fsum(values.tolist())


def _solution(
    arrays: Sequence[tuple[Floats, Floats]], options: Options, position: Ints, bound: float
) -> Solution:
    """The choice at `position`; `bound` inf when it is proved optimal."""
    loss, weight = _sum(options.loss[position]), _sum(options.weight[position])
    sizes = np.cumsum([loss.shape[0] for loss, _ in arrays])[:-1]
    choices = tuple(np.split(options.number[position].astype(np.intp), sizes)) if arrays else ()
    return Solution(choices, loss, weight, min(bound, loss), bound >= loss)
