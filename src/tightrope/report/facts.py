"""What a bundle knows, gathered once: the page and the model card only lay it out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from tightrope.bundle import Bundle
from tightrope.decisions import Decision, decided, decisions
from tightrope.methods import Method
from tightrope.program import Program
from tightrope.rewrite import measuring_method_of
from tightrope.types import Budget, Json, Plan, Problem

CLEAR = "plain"  # the reference runtime: reported only where nothing else was run


@dataclass(frozen=True)
class Facts:
    """Absent parts are empty: `accuracy` {}, `curve` [], `run` and `program` None."""

    bundle: Bundle
    about: Mapping[str, Json]
    plan: Plan
    accuracy: Mapping[str, Json]
    curve: list[dict[str, Json]]
    run: Mapping[str, Json] | None
    program: Program | None

    @cached_property
    def problem(self) -> Problem:
        """Raises BundleError where the plan was learned: it was chosen from no table of options."""
        return self.bundle.problem()

    @cached_property
    def sites(self) -> list[Decision]:
        """In the network's order; none where the plan was learned."""
        return [] if self.bundle.record() else decisions(self.plan, self.problem)

    @cached_property
    def method(self) -> Method:
        return measuring_method_of(self.plan)

    @property
    def metric(self) -> str:
        """The quantity that the budget limits."""
        return Budget.parse(self.plan.budget).limits[0].metric

    @property
    def decided(self) -> str:
        """The quantity that is shown site by site."""
        return decided(self.problem, self.metric)

    @property
    def secure(self) -> bool:
        return self.run is not None and self.run["runtime"] != CLEAR

    def share(self, cost: Mapping[str, float]) -> float:
        """A cost relative to the unchanged network, in the budget's quantity; 0 if that has none of it."""
        base = getattr(self.plan.baseline, self.metric)
        return max(0.0, cost.get(self.metric, 0) / base) if base > 0 else 0.0


def gather(bundle: Bundle) -> Facts:
    """Read everything there is. Raises BundleError for a damaged file, and when there is no plan yet."""
    program = (bundle.path / "program.json").exists()
    return Facts(
        bundle=bundle,
        about=bundle.about,
        plan=bundle.plan(),
        accuracy=bundle.accuracy(),
        curve=bundle.curve(),
        run=_newest(bundle.measurements()),
        program=bundle.program(weights=False) if program else None,
    )


def _newest(runs: list[dict[str, Json]]) -> dict[str, Json] | None:
    """The last run, of a runtime other than `plain` if there is one."""
    return next((r for r in reversed(runs) if r["runtime"] != CLEAR), runs[-1] if runs else None)
