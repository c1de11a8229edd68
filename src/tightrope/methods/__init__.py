"""Each method is a folder of the same shape: a frozen configuration that searches and rewrites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import nn

from tightrope.data import Data
from tightrope.errors import InputError, near
from tightrope.graph import Graph
from tightrope.program import Op, Program
from tightrope.shard import Shard
from tightrope.types import Budget, Cost, Json, Problem, Site

Progress = Callable[[str, int, int], None]  # what, done, of


class CostModel(Protocol):
    """What a runtime charges, per sample: one op taken alone, and every op of a program."""

    def price(self, op: Op) -> Cost: ...

    def prices(self, program: Program) -> dict[str, Cost]: ...


class Method(Protocol):
    """A frozen dataclass: the configuration is the method."""

    @property
    def name(self) -> str: ...

    def measure(
        self,
        graph: Graph,
        data: Data,
        *,
        cost: CostModel,
        workdir: Path | None,
        progress: Progress,
        feasible: Callable[[Problem], object] = ...,
        shard: Shard = ...,
    ) -> Problem:
        """Every option of every site with its predicted loss and cost; `shard` is this process's part.

        `feasible` gets the problem with all losses 0 before the long work, to refuse a budget early. Its
        `meta["prepared"]` are choices that are made beforehand, whatever the budget.
        """
        ...

    def choices(self, problem: Problem, picked: Mapping[str, Any]) -> dict[str, Json]:
        """Translate picked option indices per site, (G,) each, into what `rewrite` understands."""
        ...

    def controls(self, problem: Problem, budget: Budget) -> dict[str, Mapping[str, Any]]:
        """Named assignments a user would try without a solver, each within the budget."""
        ...

    def notes(self, problem: Problem, picked: Mapping[str, Any]) -> tuple[str, ...]:
        """What a reader of the plan should know beyond its choices."""
        ...

    def rewrite(self, site: Site, module: nn.Module, choice: Json) -> nn.Module:
        """The module that stands at `site` under `choice`; `module` itself is not changed."""
        ...


@runtime_checkable
class Remeasures(Protocol):
    """A method that can measure its options again where a first plan has led."""

    def remeasure(
        self,
        problem: Problem,
        graph: Graph,
        tuned: nn.Module,
        data: Data,
        *,
        progress: Progress = ...,
        shard: Shard = ...,
    ) -> Problem:
        """`problem` with losses measured in `tuned`, `graph`'s network rewritten and fine-tuned."""
        ...


METHODS: dict[str, str] = {
    "block_relu": "tightrope.methods.block_relu:BlockReluMethod",
}


def method_type(name: str) -> Any:
    """The configuration class of a method. Raises InputError naming the known ones."""
    if name not in METHODS:
        raise InputError("unknown method", got=name, allowed=near(name, METHODS))
    module, _, attribute = METHODS[name].partition(":")
    return getattr(import_module(module), attribute)
