"""What a bundle knows, gathered once: the page and the model card only lay it out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tightrope.bundle import Bundle, read_json
from tightrope.errors import BundleError
from tightrope.methods.block_relu.patches import label
from tightrope.program import Program
from tightrope.types import Budget, Json, Plan, Problem, Table

Pair = tuple[int, int]
CURVE_KEYS = frozenset({"share", "cost", "loss", "bound", "accuracy"})
RUN_KEYS = frozenset({"runtime", "batch", "ops", "total"})
CLEAR = "plain"  # the reference runtime: reported only where nothing else was run


@dataclass(frozen=True)
class SiteFacts:
    """One site that the plan decides. DReLUs per image; `shape` (C, H, W) or (C,); a patch per channel."""

    name: str
    shape: tuple[int, ...]
    patches: tuple[Pair, ...]
    before: float
    after: float

    @property
    def map(self) -> Pair:
        return (self.shape[1], self.shape[2]) if len(self.shape) == 3 else (1, 1)


@dataclass(frozen=True)
class Facts:
    """Absent parts are empty: `accuracy` {}, `curve` [], `run` and `program` None."""

    bundle: Bundle
    about: Mapping[str, Json]
    plan: Plan
    problem: Problem
    accuracy: Mapping[str, Json]
    curve: list[dict[str, Json]]
    run: Mapping[str, Json] | None
    program: Program | None

    @cached_property
    def sites(self) -> list[SiteFacts]:
        """In the network's order; only sites with a patch per channel."""
        return [
            _site(table, self.plan.choices[table.site]["patches"], self.problem.meta.get("sites", {}))
            for table in self.problem.tables
            if "patches" in self.plan.choices.get(table.site, {})
        ]

    @property
    def metric(self) -> str:
        """The quantity that the budget limits."""
        return Budget.parse(self.plan.budget).limits[0].metric

    @property
    def secure(self) -> bool:
        return self.run is not None and self.run["runtime"] != CLEAR

    def share(self, cost: Mapping[str, float]) -> float:
        """A cost relative to the unchanged network, in the budget's quantity; 0 if that has none of it."""
        base = getattr(self.plan.baseline, self.metric)
        return cost.get(self.metric, 0) / base if base else 0.0


def gather(bundle: Bundle) -> Facts:
    """Read everything there is. Raises BundleError for a damaged file, and when there is no plan yet."""
    program = (bundle.path / "program.json").exists()
    return Facts(
        bundle=bundle,
        about=bundle.about,
        plan=bundle.plan(),
        problem=bundle.problem(),
        accuracy=_optional(bundle, "accuracy.json", dict),
        curve=_complete(_optional(bundle, "curve.json", list), CURVE_KEYS, bundle.path / "curve.json"),
        run=_newest(bundle),
        program=bundle.program(weights=False) if program else None,
    )


def _optional(bundle: Bundle, name: str, kind: type) -> Any:
    path = bundle.path / name
    body = read_json(path) if path.exists() else kind()
    if not isinstance(body, kind):
        raise BundleError("a file of the bundle is damaged", where=str(path), allowed=f"a {kind.__name__}")
    return body


def _complete(rows: list[Any], keys: frozenset[str], path: Path) -> list[dict[str, Json]]:
    for row in rows:
        lacking = keys - row.keys() if isinstance(row, dict) else keys
        if lacking:
            raise BundleError(
                "a file of the bundle lacks parts", where=str(path), got=", ".join(sorted(lacking))
            )
    return rows


def _newest(bundle: Bundle) -> dict[str, Json] | None:
    """The last run, of a runtime other than `plain` if there is one."""
    runs = _complete(bundle.measurements(), RUN_KEYS, bundle.path / "measurements.json")
    return next((r for r in reversed(runs) if r["runtime"] != CLEAR), runs[-1] if runs else None)


def _site(table: Table, patches: list[list[int]], shapes: Mapping[str, list[int]]) -> SiteFacts:
    drelus = dict(zip(table.labels, table.cost.get("drelus", ()), strict=False))
    chosen = tuple((int(p), int(q)) for p, q in patches)
    try:
        return SiteFacts(
            table.site,
            tuple(shapes[table.site]),
            chosen,
            before=float(drelus["1x1"]) * len(chosen),
            after=float(sum(drelus[label(patch)] for patch in chosen)),
        )
    except KeyError as error:
        raise BundleError(
            "the plan and the problem do not belong together", where=table.site, got=f"no {error}"
        ) from None
