"""Predicted against measured, op by op: the first question to any cost model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tightrope.errors import TightropeError
from tightrope.program import base_cost
from tightrope.report import formats
from tightrope.report.facts import Facts
from tightrope.runtimes import runtime_type
from tightrope.types import METRICS, Cost, Json, total

COUNTED = ("drelus", "online_bytes", "offline_bytes", "rounds")
FLAG = 0.10  # a larger gap is flagged


@dataclass(frozen=True)
class Row:
    """One op, the whole batch together. A quantity that nobody predicted is missing in `predicted`."""

    op: str
    kind: str
    predicted: Mapping[str, float]
    measured: Cost

    @property
    def gap(self) -> float | None:
        """The largest relative gap over what was predicted; None if nothing was."""
        gaps = [
            relative_gap(self.predicted[q], getattr(self.measured, q)) for q in COUNTED if q in self.predicted
        ]
        return max(gaps, default=None)

    @property
    def flagged(self) -> bool:
        return self.gap is not None and self.gap > FLAG

    @property
    def spends(self) -> bool:
        """False for an op that neither compares nor communicates."""
        return any(self.predicted.get(q) or getattr(self.measured, q) for q in COUNTED)


@dataclass(frozen=True)
class Comparison:
    """`rows` spend something, `local` is the sum of the others, `whole` of all; `missing` says why bytes and
    rounds have no prediction. `online_ms`: predicted for the network it ran on, None where it was not;
    only in all, as a clock per party does not say whose time an op is."""

    rows: list[Row]
    local: Row | None
    locals_count: int
    whole: Row
    missing: str | None
    online_ms: float | None = None

    @property
    def flagged(self) -> list[Row]:
        return [row for row in self.rows if row.flagged]


def relative_gap(predicted: float, measured: float) -> float:
    if predicted == measured:
        return 0.0
    return abs(measured - predicted) / abs(predicted) if predicted else math.inf


def compare(facts: Facts) -> Comparison | None:
    """None without a run. DReLUs: the plan's patches; bytes and rounds: the runtime's own `cost`."""
    if facts.run is None:
        return None
    batch = facts.run["batch"]
    analytic, online_ms, missing = _analytic(facts, facts.run)
    planned = _planned(facts)
    rows = []
    for entry in facts.run["ops"]:
        predicted: dict[str, float] = {}
        if entry["op"] in analytic:
            predicted = {q: getattr(analytic[entry["op"]], q) for q in COUNTED if q != "drelus"}
        if entry["op"] in planned:
            predicted["drelus"] = planned[entry["op"]] * batch
        rows.append(Row(entry["op"], entry["kind"], predicted, _cost(entry)))
    spending = [row for row in rows if row.spends]
    idle = [row for row in rows if not row.spends]
    return Comparison(
        rows=spending,
        local=_sum("local", idle) if idle else None,
        locals_count=len(idle),
        whole=Row("total", "", _sum("total", rows).predicted, _cost(facts.run["total"])),
        missing=missing,
        online_ms=online_ms,
    )


def verdict(comparison: Comparison) -> str:
    """One sentence on the gaps."""
    off, rows = len(comparison.flagged), comparison.rows
    if off:
        return f"{off} of {len(rows)} ops are off by more than {FLAG:.0%}."
    known = [row for row in (*rows, comparison.whole) if row.gap is not None]
    if not known:
        return "Nothing was predicted."
    predicted = {q for row in known for q in row.predicted}
    what = ", ".join(formats.metric(q) for q in COUNTED if q in predicted)
    worst = max(known, key=lambda row: row.gap or 0.0)
    if worst.gap:
        return f"Largest gap: {formats.gap(worst.gap)}, at {worst.op} ({what})."
    return f"Every count equals its prediction: {what}."


def _cost(entry: Mapping[str, Json]) -> Cost:
    return Cost(**{metric: entry[metric] for metric in METRICS if metric in entry})


def _sum(name: str, rows: list[Row]) -> Row:
    """Predicted only where every row is."""
    shared = [q for q in COUNTED if rows and all(q in row.predicted for row in rows)]
    predicted = {q: sum(row.predicted[q] for row in rows) for q in shared}
    return Row(name, "", predicted, total(row.measured for row in rows))


def _planned(facts: Facts) -> dict[str, float]:
    """DReLUs per image: of the plan at its sites, of the op itself everywhere else."""
    ops = facts.program.ops if facts.program is not None else ()
    return {op.name: base_cost(op).drelus for op in ops} | {
        site.name: site.after.drelus for site in facts.sites
    }


def _analytic(facts: Facts, run: Mapping[str, Json]) -> tuple[Mapping[str, Cost], float | None, str | None]:
    """What the runtime says the batch costs, by op, and how long it takes, anew from the public program.

    Times by the profile of the plan's prices; the network is the one that the parties ran on.
    """
    if facts.program is None:
        return {}, None, "the bundle has no program"
    try:
        runtime = runtime_type(run["runtime"])(**run.get("config", {}))
        profile = {k: v for k, v in facts.about.get("pricing", {}).items() if k == "profile"}
        same = facts.about.get("runtime") == run["runtime"]
        predicted = runtime.pricing(**(profile if same else {})).estimate(facts.program, run["batch"])
        return predicted.ops, predicted.total.online_ms, None
    except TightropeError as error:
        return {}, None, error.what
    except TypeError:
        return {}, None, "its recorded settings are not those of the runtime"
