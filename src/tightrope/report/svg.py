"""A small chart engine: two axes, lines and markers, as inline SVG styled by the page's own colours.

Hand-made rather than plotly: the report needs six kinds of marks, and plotly's smallest bundle (about 4.5 MB
of JavaScript) would be a hundred times the rest of the page, would not follow its dark and light colours,
and would need scripts to be allowed. An SVG `<title>` gives every mark its numbers on hover. Every text goes
through `Markup.format`, which escapes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from tightrope.methods import Curve

WIDTH, HEIGHT = 480.0, 330.0  # user units; small, so that text stays legible on a phone
LEFT, RIGHT, TOP, BOTTOM = 62.0, 18.0, 30.0, 48.0
MOST_TICKS = 7
MARKS = {  # outlines around (0, 0), about 8 units wide
    "circle": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z",
    "dot": "M-2.5 0a2.5 2.5 0 1 0 5 0a2.5 2.5 0 1 0 -5 0Z",
    "square": "M-3.6 -3.6H3.6V3.6H-3.6Z",
    "diamond": "M0 -5L5 0L0 5L-5 0Z",
    "triangle": "M0 -4.8L4.8 3.6H-4.8Z",
    "star": "M0 -8L2.1 -2.6L7.6 -2.5L3.3 1L4.7 6.5L0 3.4L-4.7 6.5L-3.3 1L-7.6 -2.5L-2.1 -2.6Z",
}


@dataclass(frozen=True)
class Axis:
    label: str
    low: float
    high: float
    log: bool
    show: Callable[[float], str]

    def place(self, value: float) -> float:
        """0 at `low`, 1 at `high`."""
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return (value - low) / (high - low)

    def ticks(self) -> list[float]:
        found = _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high)
        return [t for t in found if -1e-9 <= self.place(t) <= 1 + 1e-9]


def axis(label: str, values: Iterable[float], show: Callable[[float], str], *, log: bool = False) -> Axis:
    """An axis that holds all `values` (positive ones if `log`) with a little room; never of no length."""
    values = list(values)
    low, high = min(values), max(values)
    if log:
        low, high = low / 1.15, high * 1.15
    else:
        same = high - low <= 1e-6 * max(abs(low), abs(high))
        step = _step((abs(high) or 1.0) if same else high - low)
        low, high = math.floor(low / step) * step, math.ceil(high / step) * step
        high = high if high > low else low + step
    return Axis(label, low, high, log, show)


def _step(span: float) -> float:
    """The round step that divides a span into three to six."""
    power = 10.0 ** math.floor(math.log10(span))
    return next(power * k for k in (0.2, 0.5, 1.0, 2.0) if span / (power * k) <= 6)


def _linear_ticks(low: float, high: float) -> list[float]:
    step = _step(high - low)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [k * 10.0**d for d in decades for k in (1, 2, 5) if low <= k * 10.0**d <= high]
    if len(fine) <= MOST_TICKS:
        return fine
    powers = [10.0**d for d in decades if low <= 10.0**d <= high]
    return powers[:: -(-len(powers) // MOST_TICKS)]


@dataclass(frozen=True)
class Point:
    """`span`: an interval of y around the point, drawn as a whisker."""

    x: float
    y: float
    hover: str
    span: tuple[float, float] | None = None


@dataclass(frozen=True)
class Series:
    """`style` is a class of the page's style sheet: colour and dash. `mark` names an outline, or none."""

    name: str
    style: str
    points: Sequence[Point]
    mark: str | None = "circle"
    line: bool = True


def chart(title: str, x: Axis, y: Axis, series: Sequence[Series]) -> Markup:
    """A legend and a plot. Series are drawn in order, the last on top."""
    drawn = Markup("").join(_series(x, y, s) for s in series)
    return Markup(
        '{}<svg class="chart" viewBox="0 0 {:g} {:g}" role="img" aria-label="{}">{}{}{}</svg>'
    ).format(_legend(series), WIDTH, HEIGHT, title, _x_axis(x), _y_axis(y), drawn)


def _at(x: Axis, y: Axis, px: float, py: float) -> tuple[float, float]:
    return (
        LEFT + x.place(px) * (WIDTH - LEFT - RIGHT),
        HEIGHT - BOTTOM - y.place(py) * (HEIGHT - TOP - BOTTOM),
    )


def _x_axis(axis: Axis) -> Markup:
    bottom = HEIGHT - BOTTOM
    parts = []
    for tick in axis.ticks():
        at = LEFT + axis.place(tick) * (WIDTH - LEFT - RIGHT)
        parts.append(
            Markup(
                '<path class="grid" d="M{0:.1f} {1:g}V{2:g}"/>'
                '<text x="{0:.1f}" y="{3:g}" class="mid">{4}</text>'
            ).format(at, TOP, bottom, bottom + 18, axis.show(tick))
        )
    centre = LEFT + (WIDTH - LEFT - RIGHT) / 2
    label = Markup('<text x="{:g}" y="{:g}" class="mid label">{}</text>').format(
        centre, HEIGHT - 6, axis.label
    )
    return Markup("").join(parts) + label


def _y_axis(axis: Axis) -> Markup:
    """Its label lies flat above the plot: no turned text."""
    parts = []
    for tick in axis.ticks():
        at = HEIGHT - BOTTOM - axis.place(tick) * (HEIGHT - TOP - BOTTOM)
        parts.append(
            Markup(
                '<path class="grid" d="M{:g} {:.1f}H{:g}"/><text x="{:g}" y="{:.1f}" class="end">{}</text>'
            ).format(LEFT, at, WIDTH - RIGHT, LEFT - 8, at + 4.5, axis.show(tick))
        )
    return Markup("").join(parts) + Markup('<text x="0" y="14" class="label">{}</text>').format(axis.label)


def _series(x: Axis, y: Axis, series: Series) -> Markup:
    placed = [(*_at(x, y, p.x, p.y), p.hover) for p in series.points]
    line = Markup("")
    if series.line and len(placed) > 1:
        path = "L".join(f"{a:.1f} {b:.1f}" for a, b, _ in placed)
        hover = Markup("<title>{}</title>").format(placed[0][2]) if series.mark is None else Markup("")
        line = Markup('<path class="line" d="M{}">{}</path>').format(path, hover)
    marks = Markup("").join(
        Markup(
            '<path class="mark" d="{}" transform="translate({:.1f} {:.1f})"><title>{}</title></path>'
        ).format(MARKS[series.mark], a, b, hover)
        for a, b, hover in placed
        if series.mark is not None
    )
    whiskers = Markup("").join(
        Markup('<path class="line" d="M{:.1f} {:.1f}V{:.1f}"/>').format(
            *_at(x, y, p.x, p.span[0]), _at(x, y, p.x, p.span[1])[1]
        )
        for p in series.points
        if p.span is not None
    )
    return Markup('<g class="{}">{}{}{}</g>').format(series.style, line, whiskers, marks)


def _legend(series: Sequence[Series]) -> Markup:
    items = []
    for s in series:
        line = Markup('<path class="line" d="M1 8H27"/>') if s.line else Markup("")
        mark = (
            Markup('<path class="mark" d="{}" transform="translate(14 8)"/>').format(MARKS[s.mark])
            if s.mark is not None
            else Markup("")
        )
        items.append(
            Markup('<li><svg class="key {}" viewBox="0 0 28 16" aria-hidden="true">{}{}</svg>{}</li>').format(
                s.style, line, mark, s.name
            )
        )
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(items))


def tiled_map(patch: tuple[int, int], size: tuple[int, int], style: str, hover: str) -> Markup:
    """A channel's H x W map with the tiles of one sign each; partial tiles at the right and the bottom.

    A diagonal marks the identity, which has no sign at all; 1x1 is a solid square.
    """
    (p, q), (H, W) = patch, size
    if (p, q) == (0, 0):
        inner = Markup('<path class="none" d="M0 {}L{} 0"/>').format(H, W)
    elif (p, q) == (1, 1):
        inner = Markup("")
    else:
        rows = "".join(f"M0 {y}H{W}" for y in range(p, H, p))
        columns = "".join(f"M{x} 0V{H}" for x in range(q, W, q))
        thin = max(0.12 * min(p, q), max(H, W) / 60)
        inner = Markup('<path class="cut" stroke-width="{:.2g}" d="{}"/>').format(thin, rows + columns)
    return Markup(
        '<svg class="map {0}" viewBox="0 0 {2} {1}"><title>{3}</title>'
        '<rect width="{2}" height="{1}"/>{4}</svg>'
    ).format(style, H, W, hover, inner)


def function(picture: Curve, hover: str) -> Markup:
    """A small plot of a function (line) over the one that it stands for (thin line), both axes to scale."""
    low, high = min(*picture.y, *picture.original), max(*picture.y, *picture.original)
    left, width = picture.x[0], picture.x[-1] - picture.x[0]
    height = (high - low) or 1.0

    def path(values: Sequence[float]) -> str:
        pairs = zip(picture.x, values, strict=True)
        return "M" + "L".join(
            f"{(x - left) / width * 60:.2f} {(high - y) / height * 36:.2f}" for x, y in pairs
        )

    return Markup(
        '<svg class="map plot" viewBox="-2 -2 64 40"><title>{}</title>'
        '<path class="thin" d="{}"/><path class="thick" d="{}"/></svg>'
    ).format(hover, path(picture.original), path(picture.y))
