"""What the command line shows: tables and progress for people, or a JSON object for programs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from tightrope.bundle import Bundle
    from tightrope.types import Measurement

PARTS = 4  # lines per stage where there is no terminal


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
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim"
    )
    for k, name in enumerate(columns):
        table.add_column(name, justify="left" if k == 0 else "right", no_wrap=True)
    return table


def plan_summary(view: View, bundle: Bundle) -> dict[str, Any]:
    """Show a bundle's plan; what it says as JSON."""
    from tightrope.decisions import decisions

    plan, problem = bundle.plan(), bundle.problem()
    table = grid("Plan", "site", "shape", "DReLUs", "kept", "share", "distinct patches")
    for site in decisions(plan, problem):
        shape, share = "x".join(map(str, site.shape)), site.after / site.before if site.before else 0.0
        distinct = str(len(set(site.patches)))
        table.add_row(site.name, shape, f"{site.before:,.0f}", f"{site.after:,.0f}", f"{share:.1%}", distinct)
    view.table(table)
    for note in plan.notes:
        view.say(f"  {note}")
    view.say(
        f"budget {plan.budget}: {plan.predicted.drelus:,.0f} of {plan.baseline.drelus:,.0f} DReLUs; "
        f"predicted loss {plan.loss:.4g}, proved within {plan.gap:.3%} of the optimum"
    )
    if "spearman" in problem.meta:
        view.say(
            f"fast against exact distortion: Spearman {problem.meta['spearman']:.4f} over "
            f"{problem.meta['verified']} random options; {problem.meta['passes']} network passes "
            f"instead of {problem.meta['exact_passes']:,}"
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
        "notes": list(plan.notes),
    }


def accuracies(view: View, result: Mapping[str, float]) -> None:
    """Show what `finetune` reached: validation, and test where it was read."""
    table = grid("Accuracy of the final networks", "split", "original", "after the plan", "fine-tuned")
    for split in ("validation", "test"):
        if split in result:
            untuned = percent(result[f"{split}_untuned"]) if f"{split}_untuned" in result else ""
            table.add_row(split, percent(result[f"{split}_base"]), untuned, percent(result[split]))
    view.table(table)


def measurement(view: View, measured: Measurement) -> None:
    """Show what a run cost, op by op."""
    table = grid(
        f"Measured: {measured.runtime}, batch of {measured.batch}",
        "op", "DReLUs", "online bytes", "offline bytes", "rounds", "online ms",
    )  # fmt: skip
    for trace in measured.ops:
        c = trace.cost
        numbers = (c.drelus, c.online_bytes, c.offline_bytes, c.rounds)
        if any(numbers) or c.online_ms >= 0.05:
            shown = ("" if not v else f"{v:,.0f}" for v in numbers)
            table.add_row(trace.op, *shown, f"{c.online_ms:,.1f}")
    t = measured.total
    totals = (t.drelus, t.online_bytes, t.offline_bytes, t.rounds)
    table.add_row("total", *(f"{v:,.0f}" for v in totals), f"{t.online_ms:,.1f}", style="bold")
    view.table(table)
    for title, links in (("online", measured.links), ("offline", measured.offline_links)):
        if links:
            view.say(f"{title}: " + ", ".join(f"{link} {n:,} bytes" for link, n in links.items()))
    if t.offline_ms:
        view.say(f"offline phase: {t.offline_ms:,.0f} ms")
