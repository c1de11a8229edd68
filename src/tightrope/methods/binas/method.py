"""binas as a method of a plan: how a found network is built again from what a bundle keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor, fx

from tightrope.data import Data, Task
from tightrope.errors import BundleError, InputError, TightropeError, near
from tightrope.graph import Graph, trace
from tightrope.methods import CostModel, Learned, Progress
from tightrope.models.arch import Architecture
from tightrope.models.mobilenet import mobilenet
from tightrope.shard import Shard
from tightrope.types import Budget, Json

SOLVERS = ("pareto", "milp", "bcfw", "iqcp", "evo")
FORMULAS = ("released", "conditional", "regression", "pooled", "linear", "bilinear")  # for the solvers
AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class BinasMethod:
    """`solver`: `pareto` (exact, one limit), `milp` (exact, several limits), `iqcp` (the same on the bilinear
    predictor, whose products make it the published quadratic programme), `bcfw` and `evo` (nothing proved).
    `estimator`: of accuracy; `auto` takes the one that ranks held-out networks best. `candidates`: how many
    networks are validated before one is taken. `passes`: over the validation images, to measure contributions
    and, from as many images again, the networks that estimators are fitted to; `held_out`: further ones.
    """

    solver: str = "pareto"
    estimator: str = AUTO
    candidates: int = 10
    passes: int = 60
    held_out: int = 100
    seed: int = 0

    name: ClassVar[str] = "binas"
    runtime: ClassVar[str] = "plain"
    tunable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for key, allowed in (("solver", SOLVERS), ("estimator", (AUTO, *FORMULAS))):
            value = getattr(self, key)
            if value not in allowed:
                raise InputError(f"unknown {key}", got=value, allowed=near(str(value), allowed))
        if self.solver == "iqcp" and self.estimator not in (AUTO, "bilinear"):
            raise InputError(
                "iqcp is for the bilinear predictor", got=f"estimator {self.estimator}", fix="milp"
            )
        for key, least in (("candidates", 1), ("passes", 2), ("held_out", 2), ("seed", 0)):
            if getattr(self, key) < least:
                raise InputError(f"{key} is too small", got=getattr(self, key), allowed=f"{least} or more")

    def learn(
        self,
        graph: Graph,
        data: Data,
        *,
        task: Task | None,
        budget: Budget,
        cost: CostModel,
        workdir: Path | None,
        progress: Progress,
        shard: Shard,
    ) -> Learned:
        """Raises InputError: the command `binas` starts from a space, not from a network."""
        raise InputError(
            "binas finds a network in a search space, and changes none that is given",
            fix="tightrope binas --space",
        )

    def rebuild(
        self, graph: Graph, choices: Mapping[str, Json], tensors: Mapping[str, Tensor]
    ) -> fx.GraphModule:
        """The found network with its inherited weights."""
        try:
            (choice,) = choices.values()
            arch, classes = Architecture.parse(choice["architecture"]), choice["classes"]
            net = mobilenet(arch, classes, graph.input_shape[0])
            net.load_state_dict(dict(tensors), strict=True)
        except (TightropeError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise BundleError("the plan and its weights are no network", got=str(error)[:200]) from error
        return trace(net.eval(), graph.input_shape).module


def chosen(architecture: Architecture, classes: int) -> dict[str, Json]:
    """What `rebuild` reads."""
    return {"network": {"architecture": str(architecture), "classes": classes}}
