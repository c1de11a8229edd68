"""Maxima over windows in few comparisons and levels: max(a, b) = b + relu(a - b), all of a level in parallel.

Windows go along one axis at a time (the maximum over a rectangle is that over rows of maxima over columns).
A window is a run of taps; a longer one is split into two shorter ones that other windows may need as well.
Two ways are tried: runs of a power of two from both ends, which may overlap (the maximum does not mind), or a
power of two and the rest. Both need ceil(log2 taps) levels, the fewest possible for that axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from tightrope.program import MaxPool2d, Op

Run = tuple[int, ...]  # the positions of a window's taps, ascending
Split = Callable[[Run], tuple[Run, Run]]


@dataclass(frozen=True, kw_only=True)
class Difference(Op):
    """x[later] - x[earlier] along `axis` (the batch counts)."""

    kind: ClassVar[str] = "difference"
    axis: int
    later: tuple[int, ...]
    earlier: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Winners(Op):
    """(x, relu of the differences) -> what `take` names of x and x[earlier] + relu, one after the other."""

    kind: ClassVar[str] = "winners"
    axis: int
    earlier: tuple[int, ...]
    take: tuple[int, ...]


@dataclass(frozen=True)
class Level:
    """Positions among the values so far; `take`: positions among those and the level's new ones."""

    later: tuple[int, ...]
    earlier: tuple[int, ...]
    take: tuple[int, ...]


@dataclass(frozen=True)
class Axis:
    """Maxima along one axis of `length` positions: one run of positions per output, in order."""

    length: int
    runs: tuple[Run, ...]

    def levels(self) -> tuple[Level, ...]:
        """The cheapest tournament, one level at least, which may be empty; the last one takes the outputs."""
        return min((self._levels(split) for split in (_disjoint, _overlapping)), key=comparisons)

    def _levels(self, split: Split) -> tuple[Level, ...]:
        by_depth: dict[int, set[Run]] = {}
        todo = list(self.runs)
        while todo:
            run = todo.pop()
            made = by_depth.setdefault((len(run) - 1).bit_length(), set())
            if len(run) > 1 and run not in made:
                made.add(run)
                todo += split(run)
        held: list[Run] = [(position,) for position in range(self.length)]
        levels = []
        for depth in range(1, max(1, *by_depth) + 1):
            made_here = sorted(by_depth.get(depth, ()))
            parts = [split(run) for run in made_here]
            at = {run: k for k, run in enumerate(held + made_here)}
            later = {part for d, runs in by_depth.items() if d > depth for run in runs for part in split(run)}
            last = depth >= max(by_depth)
            later |= set(self.runs)
            held = list(self.runs) if last else [run for run in at if run in later]
            levels.append(
                Level(
                    later=tuple(at[second] for _, second in parts),
                    earlier=tuple(at[first] for first, _ in parts),
                    take=tuple(at[run] for run in held),
                )
            )
        return tuple(levels)

    def compact(self) -> tuple[Axis, tuple[int, ...]]:
        """The same without the positions that no run reads, and those that are left."""
        left = tuple(sorted({position for run in self.runs for position in run}))
        at = {position: k for k, position in enumerate(left)}
        return Axis(len(left), tuple(tuple(at[position] for position in run) for run in self.runs)), left


def _disjoint(run: Run) -> tuple[Run, Run]:
    half = 1 << ((len(run) - 1).bit_length() - 1)
    return run[:half], run[half:]


def _overlapping(run: Run) -> tuple[Run, Run]:
    half = 1 << ((len(run) - 1).bit_length() - 1)
    return run[:half], run[-half:]


def comparisons(levels: Sequence[Level]) -> int:
    return sum(len(level.later) for level in levels)


def window_axes(op: MaxPool2d, size: tuple[int, int]) -> tuple[Axis, Axis]:
    """Rows and columns of a max-pool on (H, W) = `size`. Taps outside count as minus infinity: not at all.

    A run without positions stands for a window that lies outside.
    """
    axes = []
    for n, out, k, s, p, d in zip(
        size, op.shape[1:], op.kernel, op.stride, op.padding, op.dilation, strict=True
    ):
        starts = range(-p, out * s - p, s)
        runs = tuple(tuple(t for t in range(start, start + k * d, d) if 0 <= t < n) for start in starts)
        axes.append(Axis(n, runs))
    return axes[0], axes[1]


Stage = tuple[int, Level]  # along this axis of the tensor, the batch being 0


def max_pool_stages(op: MaxPool2d, size: tuple[int, int]) -> list[Stage]:
    """The whole pool, first along the axis that makes it cheaper; without positions that no window reads."""
    rows, columns = window_axes(op, size)
    orders = (((2, rows), (3, columns)), ((3, columns), (2, rows)))
    return min((_in_order(*order) for order in orders), key=lambda plan: plan[0])[1]


def _in_order(first: tuple[int, Axis], second: tuple[int, Axis]) -> tuple[int, list[Stage]]:
    """(comparisons, stages)."""
    compact, left = second[1].compact()
    before, after = first[1].levels(), compact.levels()
    count = comparisons(before) * len(left) + comparisons(after) * len(first[1].runs)
    stages = [(second[0], Level((), (), left)), *((first[0], v) for v in before)]
    return count, stages + [(second[0], level) for level in after]
