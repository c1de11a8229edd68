"""Each method is a folder of the same shape: a frozen configuration that searches and rewrites."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, fx, nn

from tightrope.data import Data, Task
from tightrope.errors import InputError, near
from tightrope.forms import parse
from tightrope.graph import Graph
from tightrope.program import Op, Program
from tightrope.shard import Shard
from tightrope.types import Budget, Cost, Json, Merge, Problem, Site

Progress = Callable[[str, int, int], None]  # what, done, of


class CostModel(Protocol):
    """What a runtime charges, per sample: one op taken alone, every op of a program, and a whole program."""

    def price(self, op: Op) -> Cost: ...

    def prices(self, program: Program) -> dict[str, Cost]: ...

    def exact(self, program: Program) -> Cost:
        """What a run of one sample counts; runtimes whose engine is timed run it."""
        ...


@runtime_checkable
class Merges(Protocol):
    """A cost model whose ops share levels with those beside them."""

    def merge(self, op: Op) -> Merge:
        """How this one does; its `ckks_levels` are then those of `price`."""
        ...


@dataclass(frozen=True)
class Tiles:
    """A picture of an option: an (H, W) map cut into tiles; (0, 0) for a map that has no use for them."""

    tile: tuple[int, int]
    map: tuple[int, int]


@dataclass(frozen=True)
class Curve:
    """A picture of an option: a function that stands for another one, both at `x`."""

    x: tuple[float, ...]
    y: tuple[float, ...]
    original: tuple[float, ...]


class Method(Protocol):
    """A frozen dataclass: the configuration is the method. `runtime` prices its options by default, `noun` is
    what it calls one: patch, polynomial."""

    @property
    def name(self) -> str: ...

    @property
    def noun(self) -> str: ...

    @property
    def runtime(self) -> str: ...

    def measure(
        self,
        graph: Graph,
        data: Data,
        *,
        cost: CostModel,
        workdir: Path | None,
        progress: Progress,
        priced: Callable[[Problem], object] = ...,
        feasible: Callable[[Problem], object] = ...,
        shard: Shard = ...,
    ) -> Problem:
        """Every option of every site with its predicted loss and cost; `shard` is this process's part.

        `priced` gets the problem with all losses 0 first of all, to refuse a budget in another quantity, and
        `feasible` before the long work, to refuse one that cannot be met. Its
        `meta["prepared"]` are choices that are made beforehand, whatever the budget.
        """
        ...

    def choices(self, problem: Problem, picked: Mapping[str, Any]) -> dict[str, Json]:
        """Translate picked option indices per site, (G,) each, into what `rewrite` understands."""
        ...

    def options(self, choice: Json) -> tuple[str, ...]:
        """The labels of the options that a site's choice stands for, one per group."""
        ...

    def picture(self, problem: Problem, site: str, label: str) -> Tiles | Curve:
        """How the report draws an option of a site."""
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


@runtime_checkable
class Trial(Protocol):
    """A method that tries what it chose on validation images, before any training."""

    def trial(self, model: nn.Module, data: Data, progress: Progress) -> tuple[str, ...]:
        """What a reader of the plan should know of `model`, the rewritten network, which may be changed."""
        ...


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A table for people: what the method chose, in words of its own."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What a method found by training: `choices` and `tensors` rebuild the network; the rest is for people.

    `predicted` and `baseline` count DReLUs too, which the bundle compares with the frozen network. `loss` is
    what the method minimised and `accuracy` a share, both on validation images; nothing is proved about them.
    `controls`: accuracies of what a user could do instead. `front`: other networks on the way, their costs
    and `accuracy`, none beaten by another.
    """

    choices: Mapping[str, Json]
    tensors: Mapping[str, Tensor]
    predicted: Cost
    baseline: Cost
    loss: float
    accuracy: float
    controls: Mapping[str, float] = field(default_factory=dict)
    front: Sequence[Mapping[str, float]] = ()
    shown: tuple[Shown, ...] = ()
    notes: tuple[str, ...] = ()


@runtime_checkable
class Learner(Protocol):
    """A method that finds its plan by training within the budget (masks, gates, a supernet) instead of
    measuring a Problem. A frozen dataclass too.

    `tunable`: whether `finetune` may train the rebuilt network further, or would undo what was learned.
    """

    @property
    def name(self) -> str: ...

    @property
    def runtime(self) -> str:
        """The runtime whose costs count when a user names none."""
        ...

    @property
    def tunable(self) -> bool: ...

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
        """Train on `data`, whose labels `task` explains in the network's classes (None: they are these).

        `workdir` is for files from which an interrupted call goes on; they are removed when it has finished.
        Every process of `shard` returns the same. Raises BudgetError for a budget that cannot be met, before
        any training where that can be known.
        """
        ...

    def rebuild(
        self, graph: Graph, choices: Mapping[str, Json], tensors: Mapping[str, Tensor]
    ) -> fx.GraphModule:
        """The network that `learn` found, from what it returned; `graph` is not changed.

        Raises BundleError for choices or tensors that do not fit the network or each other.
        """
        ...


@runtime_checkable
class Finishes(Protocol):
    """A method whose networks are trained in one form and frozen in another that computes the same."""

    def finish(self, model: nn.Module, input_shape: tuple[int, ...], cost: CostModel) -> nn.Module:
        """What is lowered in the place of `model`; `cost` says what it should be cheap in."""
        ...


METHODS: dict[str, str] = {
    "block_relu": "tightrope.methods.block_relu:BlockReluMethod",
    "paf": "tightrope.methods.paf:PafMethod",
    "reengineer": "tightrope.methods.reengineer:ReengineerMethod",
    "binas": "tightrope.methods.binas.method:BinasMethod",
    "seesaw": "tightrope.methods.seesaw:SeesawMethod",
}


def parse_settings(words: Sequence[str], cls: Any) -> dict[str, Json]:
    """NAME=VALUE, for fields of the dataclass `cls`: numbers, true, false and null as in JSON, but in a field
    that is a text; any other value is a text. The last one of a name counts.
    """
    found: dict[str, Json] = {}
    texts = {f.name for f in fields(cls) if isinstance(f.default, str)}
    for word in words:
        name, equals, text = word.partition("=")
        if not (name and equals):
            raise InputError("a setting is NAME=VALUE", got=word)
        try:
            value = parse(text)
        except ValueError:
            value = text
        found[name] = text if name in texts and not isinstance(value, str) else value
    return found


def configure(name: str, given: Mapping[str, Json]) -> Any:
    """The method `name` with these settings. Raises InputError for an unknown one, or a value of its kind."""
    cls = method_type(name)
    check_settings(name, cls, given)
    return cls(**given)


def check_settings(name: str, cls: Any, given: Mapping[str, Json]) -> None:
    """Raise InputError for a setting that the dataclass does not have, or of another kind."""
    known = {f.name: f.default for f in fields(cls)}
    optional = {f.name for f in fields(cls) if "None" in str(f.type)}
    for key, value in given.items():
        if key not in known:
            raise InputError(f"{name} has no such setting", got=key, allowed=near(key, known))
        default = known[key]
        numbers = int if type(default) is int else (int, float)
        kind = type(default) if isinstance(default, str | bool) else numbers
        fits = isinstance(value, kind) and isinstance(value, bool) == isinstance(default, bool)
        if not fits and not (value is None and key in optional):
            words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
            kind_of = words.get(type(default), "a number")
            raise InputError(
                f"{key} of {name} is of another kind",
                got=repr(value),
                allowed=f"{kind_of}, as {default!r}",
            )


def method_type(name: str) -> Any:
    """The configuration class of a method. Raises InputError naming the known ones."""
    if name not in METHODS:
        raise InputError("unknown method", got=name, allowed=near(name, METHODS))
    module, _, attribute = METHODS[name].partition(":")
    return getattr(import_module(module), attribute)
