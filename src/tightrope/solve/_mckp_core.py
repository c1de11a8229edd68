"""Step 3 of `tightrope.solve.mckp`: the dynamic programme around the break of the linear relaxation."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from tightrope.solve._mckp_kernels import Floats, Ints, Links, merge, widest_gap

MAX_STATES = 1 << 17  # of one step: bounds its memory
MAX_STORED_STATES = 1 << 23  # of all steps, 8 bytes each
MAX_MERGED_STATES = 1 << 26  # of all merges, about 10 ns each: bounds the time


class Options(NamedTuple):
    """Nondominated options of all groups, one after the other; group g owns start[g]:start[g + 1]."""

    start: Ints
    loss: Floats
    weight: Floats
    number: Links  # in the caller's list of options


class Break(NamedTuple):
    """The linear relaxation between two neighbouring prefixes of the greedy walk.

    base: chosen option of each group at the lighter prefix. lam: loss saved per weight by the break edge.
    span: weight of that edge. unit: weights are multiples of it (0: any real). quantum: losses are multiples
    of it. slack: over the rounding of all reduced costs together. least, up, down: of each group, see
    `reduced_costs`.
    """

    base: Ints
    lam: float
    span: float
    unit: float
    quantum: float
    slack: float
    least: Floats
    up: Floats
    down: Floats


class Core(NamedTuple):
    """What the dynamic programme found; weights and losses are relative to the base, rows as in `merge`."""

    found: Floats
    found_links: Links  # (index in the step's states, step), step -1: the base itself
    steps: list[tuple[int, Links]]  # (group opened, links: index in the previous step's states, option)
    open: Floats  # states that the groups not opened might still improve
    up: float  # least reduced cost per weight that those groups can add
    down: float  # ... or remove


def explore(options: Options, at: Break) -> Core:
    """Best choices for every budget from the base's weight to `span` above it, unless a cap is met first.

    A state or option is dropped when its reduced cost is at least the widest gap between the choices found
    so far and the relaxation, less one quantum: no budget of the interval could gain from it.
    """
    origin, root = np.zeros((1, 4)), np.full((1, 2), -1, np.int32)
    nothing, no_links = np.empty((0, 4)), np.empty((0, 2), np.int32)
    found, found_links, states = origin, root, origin
    steps: list[tuple[int, Links]] = []
    nearness = np.minimum(_rank(at.up), _rank(at.down))  # so that groups to add and to remove take turns
    rest = np.argsort(nearness, kind="stable")
    stored = merged = 0
    while True:
        limit = widest_gap(found, at.lam, at.span, at.unit) + at.slack - at.quantum
        rest = rest[at.least[rest] < limit]
        if not rest.size:
            return Core(found, found_links, steps, nothing, math.inf, math.inf)
        group, others = rest[0], rest[1:]
        up, down = _shift_costs(at, others)
        tags, shifts = _useful_options(options, at, group, limit)
        new, links = nothing, no_links
        for tag, shift in zip(tags, shifts, strict=True):
            merged += new.shape[0] + states.shape[0]
            new, links = merge(new, links, states, shift, tag, at.lam, at.span, up, down, limit, math.inf)
            if new.shape[0] > MAX_STATES or merged > MAX_MERGED_STATES:
                break
        stored += new.shape[0]
        if new.shape[0] > MAX_STATES or merged > MAX_MERGED_STATES or stored > MAX_STORED_STATES:
            return Core(found, found_links, steps, states, *_shift_costs(at, rest))
        found, found_links = merge(
            found, found_links, new, np.zeros(4), len(steps), at.lam, at.span, at.lam, math.inf, limit, 0.0
        )
        steps.append((int(group), links))
        states, rest = new, others


def _rank(values: Floats) -> Ints:
    """Position of each value in ascending order; the earlier of equals first."""
    rank = np.empty(values.size, np.int64)
    rank[np.argsort(values, kind="stable")] = np.arange(values.size)
    return rank


def _shift_costs(at: Break, groups: Ints) -> tuple[float, float]:
    """Least reduced cost per weight added and removed by `groups`; not adding costs lam, as loss."""
    return (
        float(at.up[groups].min(initial=at.lam)),
        float(at.down[groups].min(initial=math.inf)),
    )


def _useful_options(options: Options, at: Break, group: int, limit: float) -> tuple[Ints, Floats]:
    """Options of the group below the limit, the base first, with exact (weight, loss) minus the base's."""
    base = at.base[group]
    members = np.arange(options.start[group], options.start[group + 1])
    reduced = (options.loss[members] - options.loss[base]) + at.lam * (
        options.weight[members] - options.weight[base]
    )
    members = members[(reduced < limit) & (members != base)]
    members = np.concatenate([[base], members])
    return members, np.column_stack(
        [
            *_exact_difference(options.weight[members], options.weight[base]),
            *_exact_difference(options.loss[members], options.loss[base]),
        ]
    )


def _exact_difference(a: Floats, b: float) -> tuple[Floats, Floats]:
    """a - b as double-doubles (Knuth's two-sum)."""
    high = a - b
    t = high - a
    return high, (a - (high - t)) - (b + t)


def choice_of(core: Core, base: Ints, k: int) -> Ints:
    """Chosen option of each group for the k-th choice found."""
    position = base.copy()
    state, step = (int(v) for v in core.found_links[k])
    while step >= 0:
        group, links = core.steps[step]
        state, position[group] = int(links[state, 0]), links[state, 1]
        step -= 1
    return position


def best_within(
    core: Core, options: Options, base: Ints, budget: float, room: float, floor: float, blur: float
) -> tuple[Ints, float, float]:
    """The least loss among the base and the choices found that fit the budget and lose at least `floor`.

    room: budget minus the base's weight, rounded up. blur: below it, found losses may be out of order.
    Returns the choice, its loss relative to the base, and the least relative loss of one below `floor`
    (inf if none).
    """
    best, best_loss, relative, ignored = base, math.fsum(options.loss[base].tolist()), 0.0, math.inf
    last = int(np.searchsorted(core.found[:, 0], np.nextafter(room, math.inf), side="right")) - 1
    for k in range(last, -1, -1):
        if core.found[k, 2] > relative + blur:
            break
        position = choice_of(core, base, k)
        if math.fsum(options.weight[position].tolist()) > budget:
            continue
        loss = math.fsum(options.loss[position].tolist())
        if loss < floor:
            ignored = min(ignored, float(core.found[k, 2]))
        elif loss < best_loss or (loss == best_loss and core.found[k, 2] < relative):
            best, best_loss, relative = position, loss, float(core.found[k, 2])
    return best, relative, ignored


def open_bound(core: Core, lam: float, room: float) -> float:
    """Lower bound, relative to the base's loss, of what the open states could become (inf: none)."""
    if not core.open.shape[0]:
        return math.inf
    weight = core.open[:, 0]
    with np.errstate(invalid="ignore"):  # inf * 0 in the branch not taken
        shift = np.where(weight <= room, core.up * (room - weight), core.down * (weight - room))
    excess = core.open[:, 2] + lam * weight + shift
    return float(excess.min()) - lam * room
