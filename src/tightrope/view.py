"""What the command line shows: tables and progress for people, or a JSON object for programs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from tightrope.bundle import Bundle
    from tightrope.runtimes import Estimate
    from tightrope.types import Cost, Measurement, Plan

PARTS = 4  # lines per stage where there is no terminal
LATE = 1.5  # measured over predicted time, from which on the reason is said


class View:
    """Says nothing when the result is to be JSON; warnings always go to stderr."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.out = Console(highlight=False, width=None if sys.stdout.isatty() else 120)

    def say(self, text: str) -> None:
        if not self.as_json:
            self.out.print(text, soft_wrap=True, markup=False)

    def warn(self, text: str) -> None:
        print(f"warning: {text}", file=sys.stderr)

    def table(self, table: Table) -> None:
        if not self.as_json:
            self.out.print(table)

    def stage(self, text: str) -> None:
        """A plain line to stderr, where a bar would not move."""
        if not self.as_json and not sys.stderr.isatty():
            print(text, file=sys.stderr, flush=True)

    @contextmanager
    def progress(self) -> Iterator[Callable[[str, int, int], None]]:
        """A bar with an estimate on a terminal; elsewhere a few lines per stage."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        start = time.monotonic()
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
            tasks: dict[str, Any] = {}
            shown: dict[str, int] = {}

            def update(what: str, done: int, of: int) -> None:
                if what not in tasks:
                    tasks[what] = bars.add_task(what, total=of)
                bars.update(tasks[what], completed=done, total=of)
                part = done * PARTS // of if of else PARTS
                if part > shown.get(what, -1):
                    shown[what] = part
                    self.stage(f"{what}: {done} of {of} ({time.monotonic() - start:.0f} s)")

            yield update


def percent(x: float) -> str:
    return f"{x * 100:.2f} %"


def grid(title: str, *columns: str) -> Table:
    table = Table(
        title=title,
        min_width=len(title),
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        header_style="dim",
    )
    for k, name in enumerate(columns):
        table.add_column(name, justify="left" if k == 0 else "right", no_wrap=True)
    return table


def plan_summary(view: View, bundle: Bundle) -> dict[str, Any]:
    """Show a bundle's plan; what it says as JSON."""
    from tightrope.decisions import decided, decisions
    from tightrope.report import formats
    from tightrope.rewrite import measuring_method_of
    from tightrope.types import Budget

    plan = bundle.plan()
    if record := bundle.record():
        return _learned_summary(view, bundle, plan, record)
    problem = bundle.problem()
    metric, method = Budget.parse(plan.budget).limits[0].metric, measuring_method_of(plan)
    shown = decided(problem, metric)
    what = formats.metric(shown)
    heads = ("site", "shape", what, formats.left(shown), "share", f"distinct {formats.plural(method.noun)}")
    table = grid("Plan", *heads)
    for site in decisions(plan, problem):
        before, after = getattr(site.before, shown), getattr(site.after, shown)
        shape, share = "x".join(map(str, site.shape)), after / before if before else 0.0
        distinct = set(site.labels)
        name = str(len(distinct)) if len(site.labels) > 1 else site.labels[0]
        table.add_row(site.name, shape, f"{before:,.0f}", f"{after:,.0f}", f"{share:.1%}", name)
    view.table(table)
    for note in plan.notes:
        view.say(f"  {note}")
    if metric != shown:
        spent, before = getattr(plan.predicted, metric), getattr(plan.baseline, metric)
        view.say(f"predicted {metric.replace('_', ' ')}: {spent:,.6g} of {before:,.6g}")
    spent, before = getattr(plan.predicted, shown), getattr(plan.baseline, shown)
    view.say(
        f"budget {plan.budget}: {spent:,.0f} of {before:,.0f} {what}; "
        f"predicted loss {plan.loss:.4g}, proved within {plan.gap:.3%} of the optimum"
        + ("" if metric == shown else " of what the prices of its options allow")
    )
    if "spearman" in problem.meta:
        meta = problem.meta
        view.say(
            f"fast against exact distortion: Spearman {meta['spearman']:.4f}, after rescaling "
            f"{meta['spearman_repaired']:.4f}, over {meta['verified']} random options; {meta['passes']} "
            f"network passes instead of {meta['exact_passes']:,}"
        )
    return {
        "bundle": str(bundle.path),
        "budget": plan.budget,
        "predicted": plan.predicted.as_dict(),
        "baseline": plan.baseline.as_dict(),
        "loss": plan.loss,
        "bound": plan.bound,
        "gap": plan.gap,
        "spearman": problem.meta.get("spearman"),
        "spearman_repaired": problem.meta.get("spearman_repaired"),
        "notes": list(plan.notes),
    }


def control(row: Mapping[str, Any], name: str, metric: str) -> str:
    """A cell of the curve: accuracy and what is really used; nothing where it was not measured."""
    if name not in row["accuracy"]:
        return ""
    cost = row["cost"] if name == "tightrope" else row[name]
    return f"{percent(row['accuracy'][name])} {cost.get(metric, 0):>9,.0f}"


def predicted(view: View, found: Estimate, settings: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """Show what a run will cost, op by op; the same as JSON."""
    network = settings.get("network", "none")
    table = _costs(f"Predicted: batch of {batch}, network {network}", found.ops.items(), found.total)
    view.table(table)
    view.say(found.about or f"offline phase: {found.total.offline_ms:,.0f} ms")
    if host := settings.get("profile", {}).get("host"):
        view.say("times measured on: " + ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in host.items()))
    ops = [{"op": name} | cost.as_dict() for name, cost in found.ops.items()]
    return {
        "batch": batch,
        "network": network,
        "ops": ops,
        "total": found.total.as_dict(),
        "about": found.about,
    }


def _learned_summary(view: View, bundle: Bundle, plan: Plan, record: Mapping[str, Any]) -> dict[str, Any]:
    """A plan that was learned: what was chosen, and what else could have been done."""
    from tightrope.report import formats

    for shown in record["shown"]:
        table = grid(shown["title"], *shown["columns"])
        for row in shown["rows"]:
            table.add_row(*row)
        view.table(table)
    table = grid("Validation accuracy", "network", "accuracy")
    table.add_row("this one", percent(record["accuracy"]))
    for name, found in record["controls"].items():
        table.add_row(name.replace("_", " "), percent(found))
    view.table(table)
    for note in plan.notes:
        view.say(f"  {note}")
    after, before = plan.predicted.as_dict(), plan.baseline.as_dict()
    counts = ", ".join(
        f"{formats.amount(after.get(m, 0))} of {formats.amount(of)} {formats.metric(m)}"
        for m, of in before.items()
    )
    view.say(f"budget {plan.budget}: {counts}")
    return {
        "bundle": str(bundle.path),
        "budget": plan.budget,
        "predicted": plan.predicted.as_dict(),
        "baseline": plan.baseline.as_dict(),
        "loss": plan.loss,
        "notes": list(plan.notes),
        **record,
    }


def tasks(view: View, bundles: Sequence[Bundle]) -> dict[str, Any]:
    """Show what was learned for each of several tasks of one network; the same as JSON."""
    table = grid("Tasks", "bundle", "accuracy", "restricted donor", "weights", "multiplications")
    found = []
    for bundle in bundles:
        plan, record = bundle.plan(), bundle.record()
        spent, whole = plan.predicted, plan.baseline
        donor = record["controls"].get("restricted")
        table.add_row(
            bundle.path.name,
            percent(record["accuracy"]),
            "" if donor is None else percent(donor),
            f"{spent.weights / whole.weights:.1%}",
            f"{spent.macs / whole.macs:.1%}",
        )
        found.append(
            {
                "bundle": str(bundle.path),
                "accuracy": record["accuracy"],
                "controls": record["controls"],
                "predicted": spent.as_dict(),
                "baseline": whole.as_dict(),
            }
        )
    view.table(table)
    return {"tasks": found}


def accuracies(view: View, result: Mapping[str, float]) -> None:
    """Show what `finetune` reached: validation and test; a column for what was read."""
    names = {"original": "_base", "after the plan": "_untuned", "final": ""}
    read = {
        name: end for name, end in names.items() if f"validation{end}" in result or f"test{end}" in result
    }
    table = grid("Accuracy", "split", *read)
    for split in ("validation", "test"):
        if split in result:
            table.add_row(
                split, *(percent(result[k]) if (k := split + end) in result else "" for end in read.values())
            )
    view.table(table)


def measurement(view: View, measured: Measurement) -> None:
    """Show what a run cost, op by op."""
    simulated, t = "predicted_error" in measured.config, measured.total
    title = f"{'Simulated' if simulated else 'Measured'}: {measured.runtime}, batch of {measured.batch}"
    view.table(_costs(title, ((trace.op, trace.cost) for trace in measured.ops), t))
    if measured.runtime != "ckks" and t.ckks_levels:
        view.say(
            "levels: of the polynomials alone; --runtime ckks --estimate has those of layers too, merged"
        )
    if "bootstraps_planned" in measured.config:
        planned, done = measured.config["bootstraps_planned"], measured.config["bootstraps"]
        view.say(f"bootstraps of ciphertexts, per image: {planned:,} planned, {done:,.6g} executed")
    for title, links in (("online", measured.links), ("offline", measured.offline_links)):
        if links:
            view.say(f"{title}: " + ", ".join(f"{link} {n:,} bytes" for link, n in links.items()))
    if t.offline_ms:
        view.say(f"offline phase: {t.offline_ms:,.0f} ms")
    if simulated:
        view.say(
            "times are predicted, and values have no noise: that of a real run is estimated at "
            f"{measured.config['predicted_error']:.2g}"
        )


def times(view: View, expected: Cost, spent: Cost) -> None:
    """Predicted times beside measured ones, and what a prediction takes for granted where it is far below."""
    both = [
        (phase, getattr(expected, m), getattr(spent, m))
        for phase, m in (("online", "online_ms"), ("offline", "offline_ms"))
    ]
    shown = (f"{phase} {a:,.1f} ms predicted, {b:,.1f} measured" for phase, a, b in both if a or b)
    view.say("; ".join(shown))
    if any(0 < a * LATE < b for _, a, b in both):
        view.say(
            "  predictions are for a machine that does nothing else, with the times of its profile: "
            "`tightrope calibrate` measures those of this one"
        )


COLUMNS = {  # of a Cost; one that is zero everywhere is left out, unless it is the milliseconds
    "DReLUs": "drelus",
    "online bytes": "online_bytes",
    "offline bytes": "offline_bytes",
    "rounds": "rounds",
    "levels": "ckks_levels",
}


def _costs(title: str, ops: Iterable[tuple[str, Cost]], whole: Cost) -> Table:
    columns = {name: metric for name, metric in COLUMNS.items() if getattr(whole, metric)}
    table = grid(title, "op", *columns, "online ms")
    for op, c in ops:
        numbers = [getattr(c, metric) for metric in columns.values()]
        if any(numbers) or c.online_ms >= 0.05:
            spent = f"{c.online_ms:,.1f}" if c.online_ms else ""  # not measured op by op
            table.add_row(op, *("" if not v else f"{v:,.0f}" for v in numbers), spent)
    totals = (f"{getattr(whole, metric):,.0f}" for metric in columns.values())
    table.add_row("total", *totals, f"{whole.online_ms:,.1f}", style="bold")
    return table
