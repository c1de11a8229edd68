"""report.html: one file without scripts or network. Jinja escapes every value; charts escape their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tightrope import __version__
from tightrope.report import commands, figures, formats, words
from tightrope.report.compare import COUNTED, FLAG, Comparison, Row, compare, relative_gap, verdict
from tightrope.report.facts import Facts
from tightrope.report.templates import fill
from tightrope.types import Json

FOLD_BEYOND = 16  # sites; with more, the tiles of each unfold on a click
PRICED = ("drelus", "online_bytes", "offline_bytes")


def render(facts: Facts) -> str:
    comparison = compare(facts)
    return fill(
        "page.html",
        title=words.title(facts),
        lead=words.lead(facts),
        tiles=words.headline(facts),
        method=facts.plan.method,
        commands=commands.missing(facts),
        comparison=comparison,
        comparison_note=_comparison_note(facts, comparison) if comparison else "",
        verdict=verdict(comparison) if comparison else "",
        table=_table(comparison) if comparison else [],
        prices=_prices(facts),
        layers=_layers(facts),
        sites=_sites(facts),
        decided=formats.metric(facts.decided),
        left=formats.left(facts.decided),
        noun=facts.method.noun,
        tiled=figures.is_tiled(facts),
        areas=figures.area_legend(),
        fold=len(facts.sites) > FOLD_BEYOND,
        curve=_curve(facts),
        distortion=_distortion(facts),
        checkable="verify" in facts.plan.config,
        run_name=words.run_name(facts),
        spent=_spent(facts, comparison),
        facts=words.provenance(facts),
        reproduce=commands.reproduce(facts),
        limits=words.limits(facts),
        version=__version__,
    )


def _comparison_note(facts: Facts, comparison: Comparison) -> str:
    assert facts.run is not None
    batch = facts.run["batch"]
    images = "one image" if batch == 1 else f"a batch of {batch} images"
    note = (
        f"The {words.run_name(facts)} of {images}, all images together. Planned: the plan's choices. "
        "Predicted: what the runtime computes from the frozen network alone. Executed and counted: what the "
        "run did."
    )
    return note + (
        f" Bytes and rounds were not predicted: {comparison.missing}." if comparison.missing else ""
    )


@dataclass(frozen=True)
class Line:
    name: str
    kind: str
    style: str
    gap: str
    cells: list[str]


def _table(comparison: Comparison) -> list[Line]:
    lines = [_line(comparison.whole, "whole"), *(_line(row, "") for row in comparison.rows)]
    if comparison.local is not None:
        n = comparison.locals_count
        name = f"{n} other op{'s' if n > 1 else ''}, local"
        lines.append(Line(name, "", "", "", [*["0"] * 2 * len(COUNTED), *_times(comparison.local)]))
    return lines


def _line(row: Row, style: str) -> Line:
    cells = []
    for q in COUNTED:
        cells += [
            formats.count(row.predicted[q]) if q in row.predicted else "–",
            formats.count(getattr(row.measured, q)),
        ]
    style = f"{style} flag" if row.flagged else style
    return Line(row.op, row.kind, style, formats.gap(row.gap), [*cells, *_times(row)])


def _times(row: Row) -> list[str]:
    return [formats.milliseconds(row.measured.online_ms), formats.milliseconds(row.measured.offline_ms)]


@dataclass(frozen=True)
class Price:
    name: str
    predicted: str
    measured: str
    gap: str
    flagged: bool


def _prices(facts: Facts) -> list[Price]:
    """The plan's own prediction against the run, per image, where both are of the same runtime."""
    if facts.run is None or facts.about.get("runtime") != facts.run["runtime"]:
        return []
    rows = []
    for metric in PRICED:
        predicted = getattr(facts.plan.predicted, metric)
        measured = facts.run["total"].get(metric, 0) / facts.run["batch"]
        if predicted:
            relative = relative_gap(predicted, measured)
            believed, spent = (formats.count(round(v, 1)) for v in (predicted, measured))
            name, gap = formats.metric(metric), formats.gap(relative)
            rows.append(Price(name, believed, spent, gap, relative > FLAG))
    return rows


@dataclass(frozen=True)
class Layer:
    """Widths in percent: of the whole bar over the widest, of the kept part over the bar."""

    name: str
    shape: str
    width: float
    kept_width: float
    kept: str
    before: str
    share: str
    hover: str


def _layers(facts: Facts) -> list[Layer]:
    metric = facts.decided
    costs = [(getattr(site.before, metric), getattr(site.after, metric)) for site in facts.sites]
    widest = max((before for before, _ in costs), default=0.0)
    layers = []
    for site, (most, used) in zip(facts.sites, costs, strict=True):
        share = used / most if most else 0.0
        kept, before = formats.count(used), formats.count(most)
        layers.append(
            Layer(
                name=site.name,
                shape=formats.shape(site.shape),
                width=100 * most / widest if widest else 0.0,
                kept_width=100 * share,
                kept=kept,
                before=before,
                share=formats.percent(share),
                hover=f"{site.name}: {kept} of {before} {formats.metric(metric)} {formats.left(metric)}",
            )
        )
    return layers


def _sites(facts: Facts) -> list[dict[str, Any]]:
    return [
        {
            "name": site.name,
            "shape": f"{site.shape[0]} channels of {formats.shape(site.map)}",
            "groups": (groups := figures.groups(facts, site)),
            "distinct": formats.different(len(groups), facts.method.noun),
        }
        for site in facts.sites
    ]


def _curve(facts: Facts) -> dict[str, Any] | None:
    if not facts.curve:
        return None
    names = list(dict.fromkeys(name for row in facts.curve for name in row["accuracy"]))
    rows = []
    for row in facts.curve:
        shown = [_at_cost(row, n, facts) if n in row["accuracy"] else "–" for n in names]
        loss, bound = (formats.significant(row[key], 5) for key in ("loss", "bound"))
        gap = formats.percent(_relative(row), 4) if _relative(row) else "0 %"
        cost = row["cost"].get(facts.metric, 0)
        rows.append([formats.percent(row["share"]), formats.count(cost), loss, bound, gap, *shown])
    metric = formats.metric(facts.metric)
    return {
        "accuracy": figures.accuracy_chart(facts),
        "accuracy_note": _accuracy_note(facts),
        "pareto": figures.pareto_chart(facts),
        "pareto_note": _pareto_note(facts),
        "head": ["budget", f"{metric} used", "predicted loss", "bound", "proved gap", *names],
        "rows": rows,
    }


def _at_cost(row: dict[str, Json], name: str, facts: Facts) -> str:
    """An accuracy, and what the assignment really uses: a control need not use what it is allowed."""
    cost = row["cost"] if name == figures.OURS else row.get(name, {})
    return f"{formats.percent(row['accuracy'][name])} at {formats.count(cost.get(facts.metric, 0))}"


def _accuracy_note(facts: Facts) -> str:
    classes = facts.about.get("num_classes")
    chance = f" Guessing would reach {formats.percent(1 / classes)}." if classes else ""
    nothing = figures.using_nothing(facts)
    if nothing:
        chance += f" {nothing} assignments that keep nothing at all have no place on the logarithmic axis."
    return (
        "Each point is the original network with one assignment put in and no training at all, at what "
        "that assignment really uses. The points come from the first validation images (curve --limit), the "
        "line of the original and the fine-tuned point from all of them. The plans are the best for the sum "
        "of the predicted losses, not for this accuracy: before training a control may lie above them."
        + chance
    )


def _pareto_note(facts: Facts) -> str:
    gaps = [_relative(row) for row in facts.curve]
    least = figures.least_drawn(facts.curve)
    zero = sum(row["loss"] <= least for row in facts.curve)
    note = (
        f"The saved problem, solved for {len(gaps)} budgets. Largest proved gap: "
        f"{formats.percent(max(gaps), 4) if max(gaps) else '0 %'}."
    )
    note += " The bound is on the sum of predicted losses, which is no accuracy."
    return note + (f" {zero} of loss 0 cannot be drawn on the logarithmic axis." if zero else "")


def _relative(row: dict[str, Json]) -> float:
    loss, bound = float(row["loss"]), float(row["bound"])
    return (loss - bound) / abs(loss) if loss > bound else 0.0


def _distortion(facts: Facts) -> dict[str, Any] | None:
    meta = facts.problem.meta
    pairs: Sequence[Sequence[float]] = meta.get("check", ())
    drawn = figures.distortion_chart(pairs)
    if drawn is None:
        return None
    fast, exact = meta.get("passes", 0), meta.get("exact_passes", 0)
    left_out = len(pairs) - sum(a > 0 and b > 0 for a, b in pairs)
    rows = [
        ("Spearman", f"{meta['spearman']:.4f}" if "spearman" in meta else formats.ABSENT),
        (
            "Spearman, after rescaling",
            f"{meta['spearman_repaired']:.4f}" if "spearman_repaired" in meta else formats.ABSENT,
        ),
        ("options compared", formats.count(len(pairs))),
        ("images behind each", str(facts.plan.config.get("samples", "not recorded"))),
        ("options in all", formats.count(exact) if exact else "not recorded"),
        ("network passes, fast", formats.count(fast) if fast else "not recorded: resumed from saved files"),
        ("network passes, exact", f"{formats.count(exact)}, one per option" if exact else "not recorded"),
    ]
    rows += [("passes saved", f"{exact / fast:,.0f} times fewer")] if fast and exact else []
    rows += [("not drawn", f"{left_out} with a distortion of 0")] if left_out else []
    return {"chart": drawn, "facts": rows}


def _spent(facts: Facts, comparison: Comparison | None) -> dict[str, Any] | None:
    run = facts.run
    if run is None:
        return None
    total, batch = run["total"], run["batch"]

    def both(key: str, show: Any) -> str:
        if key not in total:
            return formats.ABSENT
        return f"{show(total[key])}, {show(total[key] / batch)} per image"

    setup = run.get("setup_links", {})
    memory = run.get("peak_memory_bytes")
    totals = [
        ("batch", f"{batch} images"),
        ("online bytes", both("online_bytes", formats.size)),
        ("offline bytes", both("offline_bytes", formats.size)),
        (
            "set-up bytes",
            formats.size(sum(setup.values())) + ", once per session" if setup else formats.ABSENT,
        ),
        ("rounds", formats.count(total["rounds"]) if "rounds" in total else formats.ABSENT),
        ("online time", both("online_ms", formats.duration)),
        ("online time, predicted", _predicted_time(total, comparison)),
        ("offline time", both("offline_ms", formats.duration)),
        ("peak memory, all processes", formats.size(memory) if memory else formats.ABSENT),
    ]
    return {
        "note": words.TIME_NOTES.get(run["runtime"], "The whole batch together."),
        "bytes": figures.phase_bars(run["ops"], "bytes"),
        "ms": figures.phase_bars(run["ops"], "ms"),
        "links": figures.link_bars(run),
        "setup": bool(setup),
        "totals": totals,
    }


def _predicted_time(total: Mapping[str, float], comparison: Comparison | None) -> str:
    if comparison is None or not comparison.online_ms:
        return "not predicted"
    shown = f"{formats.duration(comparison.online_ms)}, by the profile of the plan's prices"
    if "online_ms" not in total:
        return shown
    return f"{shown}; {formats.gap(relative_gap(comparison.online_ms, total['online_ms']))} off"
