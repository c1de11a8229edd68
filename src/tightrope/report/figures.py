"""The figures of the report, each from facts to markup. The chart engine is `tightrope.report.svg`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from tightrope.decisions import Decision
from tightrope.methods import Curve, Tiles
from tightrope.nn.block_relu import tiles
from tightrope.report import formats
from tightrope.report.facts import Facts
from tightrope.report.svg import Point, Series, axis, chart, function, tiled_map
from tightrope.types import Json

OURS = "tightrope"
CONTROLS: dict[str, tuple[str, str, str]] = {  # key in curve.json: legend, style, mark
    "uniform": ("control: one {noun} for all", "s2", "square"),
    "random": ("control: a random choice", "s3", "diamond"),
    "per_layer": ("control: one {noun} per layer", "s5", "dot"),
    "layers": ("control: whole activations removed", "s4", "triangle"),
}
OTHER_CONTROL = ("s5", "dot")
AREAS: tuple[tuple[int, str], ...] = ((1, "1×1"), (4, "2–4"), (16, "5–16"), (64, "17–64"))  # up to, shown
IDENTITY_STYLE, LARGE_STYLE = "a-none", f"a{len(AREAS)}"


def area_style(patch: tuple[int, int]) -> str:
    """Darker for smaller patches, hollow for the identity."""
    if patch == (0, 0):
        return IDENTITY_STYLE
    area = patch[0] * patch[1]
    return next((f"a{k}" for k, (most, _) in enumerate(AREAS) if area <= most), LARGE_STYLE)


def area_legend() -> list[tuple[str, str]]:
    """(style, name) of every class of patch area."""
    classes = [(f"a{k}", name) for k, (_, name) in enumerate(AREAS)]
    return [*classes, (LARGE_STYLE, f"over {AREAS[-1][0]}"), (IDENTITY_STYLE, "identity, no sign")]


@dataclass(frozen=True)
class Group:
    """All groups (channels) of a site with the same option."""

    label: str
    channels: int
    style: str
    hover: str
    picture: Markup


def groups(facts: Facts, site: Decision) -> list[Group]:
    """One per option in use; patches the smallest first, the identity last."""
    counts = Counter(site.labels)
    pictures = {label: facts.method.picture(facts.problem, site.name, label) for label in counts}
    found = []
    for label in sorted(counts, key=lambda label: _order(pictures[label])):
        channels, picture = counts[label], pictures[label]
        if isinstance(picture, Tiles):
            found.append(_tiled(picture, channels, len(site.labels)))
        else:
            drawn = function(picture, f"{label}: {site.name}")
            found.append(Group(label, site.shape[0], "a0", f"{label}: every channel", drawn))
    return found


def is_tiled(facts: Facts) -> bool:
    """Whether options are patches, whose area has a colour."""
    first = facts.problem.tables[0]
    return isinstance(facts.method.picture(facts.problem, first.site, first.labels[0]), Tiles)


def _order(picture: Tiles | Curve) -> tuple[object, ...]:
    if isinstance(picture, Curve):
        return ()
    return (picture.tile == (0, 0), picture.tile[0] * picture.tile[1], picture.tile)


def _tiled(picture: Tiles, channels: int, of: int) -> Group:
    patch, (H, W) = picture.tile, picture.map
    name = formats.patch(patch)
    each = f"{tiles(patch, picture.map)} tiles of the {H}×{W} map each"
    hover = f"{name}: {channels} of {of} channels, {each}"
    return Group(
        name, channels, area_style(patch), hover, tiled_map(patch, picture.map, area_style(patch), hover)
    )


def accuracy_chart(facts: Facts) -> Markup | None:
    """Validation accuracy before fine-tuning at every budget, the controls, and the fine-tuned network.

    None when there is nothing to draw.
    """
    ours, controls = _curves(facts.curve, facts)
    series = [_reference("original network", "s-base", facts.accuracy.get("validation_base"), ours)]
    names = [n for n in CONTROLS if n in controls] + sorted(controls.keys() - CONTROLS.keys())
    for name in names:
        legend, style, mark = CONTROLS.get(name, (f"control: {name}", *OTHER_CONTROL))
        series.append(Series(legend.replace("{noun}", facts.method.noun), style, controls[name], mark))
    series.append(Series("tightrope, before fine-tuning", "s1", ours))
    tuned, at = facts.accuracy.get("validation"), facts.share(facts.plan.predicted.as_dict())
    if tuned is not None and at:
        text = f"fine-tuned: {formats.percent(tuned, 2)} at {formats.percent(at)}"
        series.append(Series(text, "s-star", [Point(at, tuned, text)], "star", line=False))
    series = [s for s in series if s.points]
    if not series:
        return None
    x = axis(_budget_label(facts), (p.x for s in series for p in s.points), _whole_percent, log=True)
    y = axis("validation accuracy", (p.y for s in series for p in s.points), _whole_percent)
    return chart("Validation accuracy against budget", x, y, series)


def _curves(rows: Sequence[Mapping[str, Json]], facts: Facts) -> tuple[list[Point], dict[str, list[Point]]]:
    """Each point lies at what the assignment really uses, not at what it was allowed."""
    ours: list[Point] = []
    controls: dict[str, list[Point]] = {}
    for row in rows:
        for name, accuracy in row["accuracy"].items():
            cost = row["cost"] if name == OURS else row.get(name, {})
            used = facts.share(cost)
            if used == 0:  # no place on a logarithmic axis
                continue
            hover = f"{name}: {formats.percent(accuracy, 2)} at {formats.percent(used)}"
            (ours if name == OURS else controls.setdefault(name, [])).append(Point(used, accuracy, hover))
    return ours, {name: sorted(points, key=lambda p: p.x) for name, points in controls.items()}


def using_nothing(facts: Facts) -> int:
    """How many assignments of the curve cost nothing in the budget's quantity."""
    return sum(
        facts.share(row["cost"] if name == OURS else row.get(name, {})) == 0
        for row in facts.curve
        for name in row["accuracy"]
    )


def _reference(name: str, style: str, value: float | None, over: Sequence[Point]) -> Series:
    if value is None or not over:
        return Series(name, style, [], None)
    text = f"{name}: {formats.percent(value, 2)}"
    ends = (min(p.x for p in over), max(p.x for p in over))
    return Series(text, style, [Point(x, value, text) for x in ends], None)


def _budget_label(facts: Facts) -> str:
    return f"{formats.metric(facts.metric)}, share of the unchanged network"


def _whole_percent(x: float) -> str:
    return f"{x * 100:.3g} %"


def pareto_chart(facts: Facts) -> Markup | None:
    """Predicted loss and its proved lower bound at every budget, log-log; None when no loss is positive."""
    least = least_drawn(facts.curve)
    rows = [(at, r) for r in facts.curve if r["loss"] > least and (at := facts.share(r["cost"]))]
    if not rows:
        return None

    def points(key: str) -> list[Point]:
        return [
            Point(at, r[key], f"{key} {formats.significant(r[key], 5)} at {formats.percent(at)}")
            for at, r in rows
            if r[key] > least
        ]

    series = [
        Series("predicted loss of the best plan found", "s1 wide", points("loss")),
        Series("proved: no plan can be below", "s-bound", points("bound"), None),
    ]
    at = facts.share(facts.plan.predicted.as_dict())
    if facts.plan.loss > least and at:
        text = f"this bundle: {formats.significant(facts.plan.loss, 4)} at {formats.percent(at)}"
        series.append(Series(text, "s-star", [Point(at, facts.plan.loss, text)], "star", line=False))
    series = [s for s in series if s.points]
    x = axis(_budget_label(facts), (p.x for s in series for p in s.points), _whole_percent, log=True)
    y = axis("predicted loss", (p.y for s in series for p in s.points), formats.significant, log=True)
    return chart("Predicted loss against budget", x, y, series)


def least_drawn(rows: Sequence[Mapping[str, Json]]) -> float:
    """Losses up to here are 0 but for rounding, and have no place on a logarithmic axis."""
    return max((float(r["loss"]) for r in rows), default=0.0) * 1e-9


def distortion_chart(pairs: Sequence[Sequence[float]]) -> Markup | None:
    """Fast against exact distortion of random options, log-log; None when no pair is positive."""
    shown = [(fast, exact) for fast, exact in pairs if fast > 0 and exact > 0]
    if not shown:
        return None
    values = [v for pair in shown for v in pair]
    ends = (min(values), max(values))
    series = [
        Series("fast = exact", "s-base", [Point(v, v, "fast = exact") for v in ends], None),
        Series(
            "one option of one channel",
            "s1 faint",
            [Point(b, a, f"fast {formats.significant(a)}, exact {formats.significant(b)}") for a, b in shown],
            "dot",
            line=False,
        ),
    ]
    x = axis("exact distortion: the network run with this one change", values, formats.significant, log=True)
    y = axis("fast distortion: from vector-Jacobian products", values, formats.significant, log=True)
    return chart("Fast against exact distortion", x, y, series)


@dataclass(frozen=True)
class Part:
    """One stretch of a bar: percent of the widest bar."""

    style: str
    width: float
    hover: str


@dataclass(frozen=True)
class Bar:
    name: str
    parts: list[Part]
    text: str


PHASES: dict[str, tuple[tuple[str, str], ...]] = {  # unit: (phase, field of a Cost)
    "bytes": (("offline", "offline_bytes"), ("online", "online_bytes")),
    "ms": (("offline", "offline_ms"), ("online", "online_ms")),
}


def phase_bars(ops: Sequence[Mapping[str, Json]], unit: str) -> list[Bar]:
    """What each op spent, by phase, on one scale; ops that spent nothing are left out."""
    show = formats.size if unit == "bytes" else formats.duration
    spent = [(op["op"], [(phase, op.get(field, 0)) for phase, field in PHASES[unit]]) for op in _joined(ops)]
    spent = [(name, values) for name, values in spent if any(v for _, v in values)]
    widest = max((sum(v for _, v in values) for _, values in spent), default=0)
    return [
        Bar(
            name,
            [Part(f"p-{phase}", 100 * v / widest, f"{name}, {phase}: {show(v)}") for phase, v in values if v],
            show(sum(v for _, v in values)),
        )
        for name, values in spent
    ]


def _joined(ops: Sequence[Mapping[str, Json]]) -> list[Mapping[str, Json]]:
    """The ops that communicate, and the sum of the others as one; as they are if none communicates."""
    sends = [bool(op.get("online_bytes") or op.get("offline_bytes")) for op in ops]
    if not any(sends) or all(sends):
        return list(ops)
    rest = [op for op, sent in zip(ops, sends, strict=True) if not sent]
    times = {field: sum(op.get(field, 0) for op in rest) for _, field in PHASES["ms"]}
    name = f"{len(rest)} other op{'s' if len(rest) > 1 else ''}, local"
    return [*(op for op, sent in zip(ops, sends, strict=True) if sent), {"op": name} | times]


def link_bars(run: Mapping[str, Json]) -> list[Bar]:
    """Bytes of each directed link, by phase."""
    phases = {"setup": "setup_links", "offline": "offline_links", "online": "links"}
    links: dict[str, dict[str, int]] = {}
    for phase, key in phases.items():
        for link, n in run.get(key, {}).items():
            links.setdefault(link, {})[phase] = n
    widest = max((sum(v.values()) for v in links.values()), default=0)
    return [
        Bar(
            link.replace("->", " → "),
            [
                Part(f"p-{phase}", 100 * n / widest, f"{link}, {phase}: {formats.count(n)} bytes")
                for phase, n in spent.items()
                if n
            ],
            formats.size(sum(spent.values())),
        )
        for link, spent in links.items()
        if widest
    ]
