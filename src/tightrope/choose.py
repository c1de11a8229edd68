"""From a measured Problem to a Plan: prices that add up where they are exact, else the exact cost as well."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from torch import nn

from tightrope.data import Data
from tightrope.errors import BudgetError, InputError, TraceError
from tightrope.graph import Graph
from tightrope.lower import lower
from tightrope.methods import Method, Progress, Trial
from tightrope.place import place
from tightrope.program import Program
from tightrope.runtimes import Pricing
from tightrope.runtimes.plain import ranges
from tightrope.solve.exact import Picked, anchored, check, fit
from tightrope.solve.select import price, quantities, select
from tightrope.types import Budget, Cost, Json, Plan, Problem

CALIBRATION = 512  # images behind the value ranges of a Program
WHO = {  # prices its options in a quantity, on the command line
    "drelus": "--method block_relu",
    "ckks_levels": "--method paf --runtime ckks",
    "online_bytes": "--runtime mpc",
    "offline_bytes": "--runtime mpc",
    "online_ms": "--runtime mpc",
    "offline_ms": "--runtime mpc",
    "weights": "--method reengineer",
    "macs": "--method reengineer",
    "rounds": "no method limits rounds, but times have them: "
    "--budget 'online_ms<=VALUE' --runtime mpc --network wan",
}


def freeze(model: nn.Module, data: Data) -> Program:
    """Lower the network and record its value ranges on training images."""
    program = lower(model, data.input_shape)
    return ranges(program, (x for x, _ in data.batches("train", 128, shuffle=True, limit=CALIBRATION)))


@dataclass(frozen=True)
class Chooser:
    """Chooses within one budget, by what a runtime charges.

    `open` gives the network and its data, of which every exact cost reads some hundred training images.
    """

    method: Method
    pricing: Pricing
    budget: Budget
    open: Callable[[], tuple[Graph, Data]]

    @cached_property
    def _opened(self) -> tuple[Graph, Data]:
        return self.open()

    @property
    def needs_exact(self) -> bool:
        """Whether the sum of prices does not say what the budget asks."""
        return any(limit.metric in self.pricing.approximate for limit in self.budget.limits)

    def unchanged(self, problem: Problem) -> Cost | None:
        """The exact cost of the network before any choice; None where prices are exact, or the runtime does
        not have an op of it."""
        if not self.pricing.approximate:
            return None
        return self._exact(self._placed(problem.meta["prepared"]))

    def anchored(self, problem: Problem, unchanged: Cost | None) -> Problem:
        """The problem whose baseline is exact."""
        return problem if unchanged is None else anchored(problem, unchanged, self.pricing.approximate)

    def priced(self, problem: Problem) -> None:
        """Raise BudgetError if the budget limits a quantity in which the options are not priced."""
        known = quantities(problem)
        for limit in self.budget.limits:
            if problem.tables and limit.metric not in known:
                raise BudgetError(
                    "no option is priced in this quantity",
                    where=f"method {self.method.name}",
                    got=str(limit),
                    allowed=", ".join(known) or "nothing",
                    fix=WHO.get(limit.metric),
                )

    def check(self, problem: Problem) -> None:
        """Raise BudgetError if no choice meets the budget, whatever the losses."""
        if self.needs_exact:
            check(problem, self.budget, lambda picked: self._cost(problem, picked))
        else:
            select(problem, self.budget)

    def plan(
        self,
        problem: Problem,
        base: str,
        base_sha256: str,
        input_shape: tuple[int, ...],
        *,
        exact: bool,
        progress: Progress = lambda *_: None,
    ) -> Plan:
        """The best plan. With `exact` its predicted costs are exact, whatever the budget limits; they always
        are in the quantity that it limits. The bound is then on the losses of the choices whose prices add up
        to no more than the limit that led to this one. A method that tries its choice (`Trial`) does so too,
        and tells `progress`.

        Raises BudgetError when no choice meets the budget, InputError when values of the rewritten network
        do not fit the runtime, TraceError when the budget needs exact costs of an op that it has not.
        """
        notes: tuple[str, ...] = ()
        tried: tuple[str, ...] = ()
        if self.needs_exact:
            found = fit(problem, self.budget, lambda picked: self._cost(problem, picked))
            selection = found.selection
            metric = self.budget.limits[0].metric
            notes = (
                f"the exact cost, {getattr(selection.cost, metric):,.6g} {metric}, meets the budget; chosen "
                f"by prices that add up, within {found.limit:,.6g}: the bound is proved for that sum, not "
                "for the exact cost",
            )
        else:
            selection = select(problem, self.budget)
            if exact and self.pricing.approximate:
                spent = self._exact(self._rewritten(problem, selection.picked))
                if spent is None:
                    notes = ("the runtime cannot execute every op: costs other than DReLUs leave those out",)
                else:
                    selection = replace(selection, cost=self._known(selection.cost, spent))
        if exact and isinstance(self.method, Trial):
            tried = self.method.trial(self._rewritten(problem, selection.picked), self._opened[1], progress)
        return Plan(
            method=self.method.name,
            config=problem.meta["config"],
            budget=str(self.budget),
            choices=self.method.choices(problem, selection.picked),
            predicted=selection.cost.only(problem.priced),
            baseline=problem.baseline.only(problem.priced),
            loss=selection.loss,
            bound=selection.bound,
            base=base,
            base_sha256=base_sha256,
            input_shape=input_shape,
            notes=(*self.method.notes(problem, selection.picked), *tried, *notes),
        )

    def _placed(self, choices: Mapping[str, Json]) -> nn.Module:
        return place(self._opened[0], choices, self.method.rewrite).module

    def _rewritten(self, problem: Problem, picked: Picked) -> nn.Module:
        return self._placed(self.method.choices(problem, picked))

    def _cost(self, problem: Problem, picked: Picked) -> Cost:
        program = freeze(self._rewritten(problem, picked), self._opened[1])
        return self._known(price(problem, picked).cost, exact_cost(self.pricing, program))

    def _exact(self, module: nn.Module) -> Cost | None:
        """None where the runtime does not have an op and the budget does not need to know."""
        try:
            return exact_cost(self.pricing, freeze(module, self._opened[1]))
        except TraceError:
            if self.needs_exact:
                raise
            return None

    def _known(self, summed: Cost, exact: Cost) -> Cost:
        return replace(summed, **{m: getattr(exact, m) for m in self.pricing.approximate})


def exact_cost(pricing: Pricing, program: Program) -> Cost:
    """See `Pricing.exact`; where values do not fit, the InputError says what a user can do about it."""
    try:
        return pricing.exact(program)
    except InputError as error:
        raise InputError(
            "the network does not fit the runtime that prices it",
            got=error,
            fix="another budget, --sites without this op, or --runtime plain if it is never to run there",
        ) from error
