"""explain.html: what every decision in a search space contributes to accuracy, with confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from markupsafe import Markup

from tightrope.methods.binas.choosing import Compared
from tightrope.methods.binas.objective import Contributions, formula
from tightrope.methods.binas.space import Space
from tightrope.report.svg import Point, Series, axis, chart
from tightrope.report.templates import fill
from tightrope.types import FloatArray

SURE = 1.96  # standard errors of a two-sided 95 % interval
STYLES = (("s1", "circle"), ("s2", "square"), ("s3", "diamond"), ("s4", "triangle"), ("s5", "dot"))
Value = tuple[float, float]  # points of accuracy, and its standard error


@dataclass(frozen=True)
class Figure:
    heading: str
    note: str
    chart: Markup


def render(space: Space, means: Contributions, errors: Contributions, compared: Sequence[Compared]) -> str:
    """The page: per stage and block what was measured, then how well the estimators rank."""
    return fill(
        "explain.html",
        title=f"What counts in the space {space.name}",
        lead=f"{space.count:.3g} networks; a random one has {means.mean:.2f} % (± {SURE * errors.mean:.2f}) "
        "with the weights of the supernet, on validation images. Whiskers and ± are 95 % intervals.",
        figures=[
            _depths(space, means, errors),
            _widths(space, means, errors),
            *(_stage(space, means, errors, s) for s in range(len(space.stages))),
        ],
        head=("decision", "stage", "gain, points", "±"),
        rows=[
            (what, where, f"{v:+.3f}", f"{SURE * e:.3f}")
            for what, where, (v, e) in claims(space, means, errors)
        ],
        estimators=[
            (
                c.estimator.name,
                *(f"{v:.3f}" for v in (a.kendall, a.spearman, a.pearson, a.mse)),
                f"{c.images:,}",
            )
            for c in compared
            for a in (c.agreement,)
        ],
    )


def claims(space: Space, means: Contributions, errors: Contributions) -> list[tuple[str, str, Value]]:
    """Per stage: what its greatest depth gains over its least, and the widest expansion over the narrowest in
    its first block and in the others: BINAS says that depth and width help more in deeper stages, and width
    at the start of each resolution.
    """
    found = []
    for s in range(len(space.stages)):
        depth, error = means.depth[s], errors.depth[s]
        name = str(s + 1)
        found.append(("depth", name, (float(depth[-1] - depth[0]), float(np.hypot(error[0], error[-1])))))
        gains = [_contrast(space, means, errors, s, b, "expansion") for b in range(len(means.block[s]))]
        found.append(("width of the first block", name, gains[0]))
        if gains[1:]:
            value, squares = (np.mean([v for v, _ in gains[1:]]), sum(e**2 for _, e in gains[1:]))
            found.append(("width of the others, mean", name, (float(value), squares**0.5 / len(gains[1:]))))
    return found


def _contrast(
    space: Space, means: Contributions, errors: Contributions, stage: int, position: int, what: str
) -> Value:
    """The largest value of one property over the smallest, the others averaged."""
    values = [getattr(option, what) for option in space.options]
    high, low = (np.array([v == end for v in values]) for end in (max(values), min(values)))
    if max(values) == min(values):
        return 0.0, 0.0
    mean, error = means.block[stage][position], errors.block[stage][position]
    squares = [float((error[side] ** 2).sum()) / int(side.sum()) ** 2 for side in (high, low)]
    return float(mean[high].mean() - mean[low].mean()), sum(squares) ** 0.5


def _point(x: float, value: float, error: float, what: str) -> Point:
    span = (value - SURE * error, value + SURE * error)
    return Point(x, value, f"{what}: {value:+.3f} ± {SURE * error:.3f} points", span)


def _drawn(title: str, label: str, series: list[Series], show: Sequence[str] | None = None) -> Markup:
    points = list(chain.from_iterable(s.points for s in series))
    ends = [v for p in points for v in (p.span or (p.y,))]

    def name(v: float) -> str:
        return f"{v:g}" if show is None else show[round(v)] if 0 <= v < len(show) else ""

    x = axis(label, (p.x for p in points), name)
    return chart(title, x, axis("points of accuracy", ends, lambda v: f"{v:g}"), series)


def _depths(space: Space, means: Contributions, errors: Contributions) -> Figure:
    series = []
    for s, stage in enumerate(space.stages):
        style, mark = STYLES[s % len(STYLES)]
        rows = zip(stage.depths, means.depth[s] - means.mean, errors.depth[s], strict=True)
        points = [_point(d + 0.04 * s, v, e, f"stage {s + 1}, {d} blocks") for d, v, e in rows]
        series.append(Series(f"stage {s + 1}", style, points, mark))
    note = "Mean accuracy of networks whose stage has this depth, the rest random, less that of all."
    return Figure("Depth", note, _drawn("Contribution of depth", "blocks in the stage", series))


def _widths(space: Space, means: Contributions, errors: Contributions) -> Figure:
    names = [f"{s + 1}.{b + 1}" for s, stage in enumerate(space.stages) for b in range(stage.depths[-1])]
    places = [(s, b) for s, stage in enumerate(space.stages) for b in range(stage.depths[-1])]
    series = []
    for k, what in enumerate(("expansion", "kernel", "se")):
        style, mark = STYLES[k]
        rows = [_contrast(space, means, errors, s, b, what) for s, b in places]
        points = [_point(i + 0.08 * k, v, e, f"block {names[i]}, {what}") for i, (v, e) in enumerate(rows)]
        series.append(Series(f"largest {what} over smallest", style, points, mark, line=False))
    note = "Stage and block along the network; the other properties of the block averaged."
    return Figure(
        "Width, kernel, squeeze-and-excitation", note, _drawn("Per block", "stage.block", series, names)
    )


def _stage(space: Space, means: Contributions, errors: Contributions, stage: int) -> Figure:
    names = [str(option) for option in space.options]
    gains: FloatArray = formula(space, means, conditional=True).block[stage]
    series = []
    for b, row in enumerate(gains):
        style, mark = STYLES[b % len(STYLES)]
        values = zip(row, errors.block[stage][b], strict=True)
        points = [
            _point(k + 0.06 * b, float(v), float(e), f"block {b + 1}, {names[k]}")
            for k, (v, e) in enumerate(values)
        ]
        series.append(Series(f"block {b + 1}", style, points, mark, line=False))
    note = "Of a block with this option, less the mean over options at the least depth that has the block."
    return Figure(
        f"Stage {stage + 1}, block by block", note, _drawn(f"Stage {stage + 1}", "option", series, names)
    )
