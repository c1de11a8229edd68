"""The nouns of Tightrope. Numpy only: these travel between processes and live in bundles."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tightrope.errors import BudgetError, BundleError, near
from tightrope.forms import mismatch, parse

Json = Any  # what json.loads may return
FloatArray = NDArray[np.float64]
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one sample costs. Online unless named offline; bytes count every link together.

    `rounds` and `ckks_levels` belong to a path: `+` adds them too, so add only along one path.
    """

    drelus: float = 0
    macs: float = 0
    weights: float = 0
    online_bytes: float = 0
    offline_bytes: float = 0
    rounds: float = 0
    ckks_levels: float = 0
    online_ms: float = 0
    offline_ms: float = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(**{k: getattr(self, k) + getattr(other, k) for k in METRICS})

    def scaled(self, factor: float) -> Cost:
        return Cost(**{k: getattr(self, k) * factor for k in METRICS})

    def only(self, metrics: Collection[str]) -> Cost:
        return Cost(**{k: getattr(self, k) for k in metrics})

    def as_dict(self) -> dict[str, float]:
        """Only what is not zero; whole numbers as int."""
        values = {k: getattr(self, k) for k in METRICS}
        return {k: int(v) if float(v).is_integer() else v for k, v in values.items() if v}


METRICS: tuple[str, ...] = tuple(f.name for f in fields(Cost))
# What a budget may limit: prices that sum over the choices.
ADDITIVE = ("drelus", "online_bytes", "offline_bytes", "online_ms", "offline_ms")
# And what follows the longest path through the choices (`Problem.path`).
ALONG = ("ckks_levels",)
NAMED = {"latency_ms": "online_ms"}  # what a budget may call a quantity
COST_FORM: dict[Any, Any] = {f"{metric}?": float for metric in METRICS}


def total(costs: Iterable[Cost]) -> Cost:
    return sum(costs, Cost())


@dataclass(frozen=True)
class Limit:
    """One term of a budget: `metric <= value`, where a relative value multiplies the baseline."""

    metric: str
    value: float
    relative: bool = False

    def __str__(self) -> str:
        shown = f"{self.value * 100:.15g}%" if self.relative else f"{self.value:.15g}"
        return f"{self.metric}<={shown}"


_LIMIT = re.compile(r"^\s*([a-z_]+)\s*<=\s*([0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9.eE+_-]+)\s*(%|x)?\s*$")


@dataclass(frozen=True)
class Budget:
    """Named limits in physical units, e.g. `drelus<=33000`, `drelus<=12%`, `weights<=0.1x`."""

    limits: tuple[Limit, ...]

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read limits separated by commas. `%` and `x` are relative to the unchanged network: 12% is 0.12x.
        `latency_ms` is `online_ms`. Digits may be grouped: 6,480.

        Raises BudgetError for anything that is not `METRIC<=NUMBER[%|x]`.
        """
        limits = []
        for part in re.split(r",(?=\s*[a-z_]|\s*$)", text):
            match = _LIMIT.match(part)
            if match is None:
                raise BudgetError(
                    "cannot read the budget",
                    got=repr(part),
                    allowed="METRIC<=NUMBER, METRIC<=NUMBER% or METRIC<=NUMBERx, joined by commas",
                    fix="--budget 'drelus<=12%'",
                )
            word, number, unit = match.groups()
            metric = NAMED.get(word, word)
            if metric not in METRICS:
                raise BudgetError(
                    "unknown quantity in the budget", got=metric, allowed=near(metric, (*ADDITIVE, *ALONG))
                )
            try:
                value = float(re.sub("[,_]", "", number))
            except ValueError:
                raise BudgetError("not a number in the budget", got=number) from None
            value *= 0.01 if unit == "%" else 1.0
            if not math.isfinite(value) or value < 0:
                raise BudgetError("a limit must be finite and not negative", got=part.strip())
            limits.append(Limit(metric, value, relative=unit is not None))
        if len({limit.metric for limit in limits}) != len(limits):
            raise BudgetError("a quantity is limited twice", got=text)
        return cls(tuple(limits))

    def __str__(self) -> str:
        return ",".join(str(limit) for limit in self.limits)

    def resolve(self, baseline: Cost) -> dict[str, float]:
        """Absolute limits; a relative one multiplies `baseline`, which must then not be zero."""
        resolved = {}
        for limit in self.limits:
            base = getattr(baseline, limit.metric)
            if limit.relative and base == 0:
                raise BudgetError(
                    "a relative limit on a quantity the network does not have",
                    got=str(limit),
                    allowed=", ".join(baseline.as_dict()) or "nothing: the network has no cost at all",
                )
            resolved[limit.metric] = limit.value * base if limit.relative else limit.value
        return resolved


@dataclass(frozen=True)
class Site:
    """A call in the traced graph where a choice exists. Shapes are (C, H, W), or (C,) after flattening."""

    name: str
    kind: str
    input_shape: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Option:
    """One candidate for one group, as read out of a Table."""

    label: str
    loss: float
    cost: Cost


@dataclass(frozen=True)
class Table:
    """The options of one site: G groups (channels, or one) share K labelled options."""

    site: str
    labels: tuple[str, ...]
    loss: FloatArray  # (G, K)
    cost: Mapping[str, FloatArray]  # metric -> (K,), per group

    def option(self, group: int, k: int) -> Option:
        cost = Cost(**{m: float(v[k]) for m, v in self.cost.items()})
        return Option(self.labels[k], float(self.loss[group, k]), cost)

    def cost_of(self, choice: NDArray[np.intp]) -> Cost:
        return Cost(**{m: float(v[choice].sum()) for m, v in self.cost.items()})


# How an op of a ciphertext shares levels with those beside it; what each does: `solve.levels.Action`.
Merge = Literal["none", "layer", "sum", "same", "square", "product"]


@dataclass(frozen=True)
class Step:
    """One value on the way from the input to the output: it is made of the `inputs`, "" being the network's,
    and takes `levels` of a ciphertext besides what an option at its site takes. `merge`: one for each of
    these options, or one for all."""

    name: str
    inputs: tuple[str, ...]
    levels: int
    merge: tuple[Merge, ...] = ("none",)


@dataclass(frozen=True)
class Problem:
    """Every site, option, loss and cost. Solving it for another budget never touches the model.

    `path` is the graph along which levels add up, in order and the output last; () where none are priced.
    """

    tables: tuple[Table, ...]
    fixed: Cost  # what no choice changes
    baseline: Cost  # the unchanged network, `fixed` included
    meta: Mapping[str, Json] = field(default_factory=dict)
    path: tuple[Step, ...] = ()

    @property
    def priced(self) -> frozenset[str]:
        """The quantities in which options have prices: others, as rounds, say nothing of a choice."""
        return frozenset(metric for table in self.tables for metric in table.cost)

    def save(self, path: Path) -> None:
        arrays: dict[str, NDArray[Any]] = {}
        for i, table in enumerate(self.tables):
            arrays[f"{i}/loss"] = table.loss
            arrays |= {f"{i}/cost/{m}": v for m, v in table.cost.items()}
        head = {
            "schema": SCHEMA,
            "sites": [{"site": t.site, "labels": t.labels, "metrics": sorted(t.cost)} for t in self.tables],
            "fixed": asdict(self.fixed),
            "baseline": asdict(self.baseline),
            "meta": dict(self.meta),
            "path": [[step.name, step.inputs, step.levels, step.merge] for step in self.path],
        }
        arrays["head"] = np.frombuffer(json.dumps(head).encode(), dtype=np.uint8)
        atomic_write(path, lambda f: np.savez_compressed(f, **arrays))  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Problem:
        try:
            with path.open("rb") as f, np.load(f, allow_pickle=False) as data:
                head = parse(bytes(data["head"]))
                check_schema(head, path)
                tables = tuple(
                    Table(
                        s["site"],
                        tuple(s["labels"]),
                        data[f"{i}/loss"],
                        {m: data[f"{i}/cost/{m}"] for m in s["metrics"]},
                    )
                    for i, s in enumerate(head["sites"])
                )
                steps = tuple(_step(*parts) for parts in head.get("path", ()))
                return cls(tables, Cost(**head["fixed"]), Cost(**head["baseline"]), head["meta"], steps)
        except FileNotFoundError:
            raise BundleError("no saved problem", where=str(path), fix="tightrope search") from None
        except BundleError:
            raise
        except Exception as error:  # a damaged zip raises almost anything
            raise BundleError("the saved problem is damaged", where=str(path), got=str(error)) from error


def _step(name: str, inputs: Sequence[str], levels: int, merge: Sequence[Any] = ("none",)) -> Step:
    """From JSON; what was saved before ops merged has no `merge`."""
    if not set(merge) <= set(get_args(Merge)):
        raise ValueError(f"{name} merges as {merge}")
    return Step(name, tuple(inputs), levels, tuple(merge))


@dataclass(frozen=True, kw_only=True)
class Link:
    """An earlier search, whose network became the base of the next one: the last of `Plan.chain` made
    `Plan.base`. The hash is of the network that it started from."""

    bundle: str
    method: str
    budget: str
    base: str
    base_sha256: str


@dataclass(frozen=True)
class Plan:
    """The chosen options, what they should cost, and how far from the optimum they can be.

    `choices` maps a site to what its method understands. `loss` is the predicted sum of the chosen
    losses, `bound` a proved lower bound on that sum over every plan that meets the budget.
    """

    method: str
    config: Mapping[str, Json]
    budget: str
    choices: Mapping[str, Json]
    predicted: Cost
    baseline: Cost
    loss: float
    bound: float
    base: str
    base_sha256: str
    input_shape: tuple[int, ...]
    notes: tuple[str, ...] = ()
    chain: tuple[Link, ...] = ()

    @property
    def gap(self) -> float:
        """(loss - bound) / loss: 0 when proved optimal."""
        return 0.0 if self.loss <= self.bound else (self.loss - self.bound) / abs(self.loss)

    def to_json(self) -> str:
        body = asdict(self) | {"predicted": self.predicted.as_dict(), "baseline": self.baseline.as_dict()}
        return json.dumps({"schema": SCHEMA} | body, indent=1)

    @classmethod
    def from_json(cls, text: str, where: Path) -> Plan:
        try:
            body = parse(text)
            check_schema(body, where)
            del body["schema"]
            if wrong := mismatch(body, PLAN_FORM):
                raise ValueError(wrong)
            Budget.parse(body["budget"])
            body["predicted"] = Cost(**body["predicted"])
            body["baseline"] = Cost(**body["baseline"])
            body["input_shape"] = tuple(body["input_shape"])
            body["notes"] = tuple(body["notes"])
            body["chain"] = tuple(Link(**link) for link in body.get("chain", ()))
            return cls(**body)
        except BundleError:
            raise
        except Exception as error:  # any shape of wrong JSON
            raise BundleError("the plan is damaged", where=str(where), got=str(error)) from error


PLAN_FORM = {
    "method": str, "config": dict, "budget": str, "choices": {str: dict}, "predicted": COST_FORM,
    "baseline": COST_FORM, "loss": float, "bound": float, "base": str, "base_sha256": str,
    "input_shape": [int], "notes": [str],
    "chain?": [{"bundle": str, "method": str, "budget": str, "base": str, "base_sha256": str}],
}  # fmt: skip


@dataclass(frozen=True)
class OpTrace:
    """What one op of a Program really cost in a run, the whole batch together."""

    op: str
    kind: str
    cost: Cost


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a runtime really spent on one batch. `links` maps `sender->receiver` to online bytes.

    `setup_links` is paid once per session, not per batch; `config` are the runtime's settings.
    """

    runtime: str
    batch: int
    ops: tuple[OpTrace, ...]
    total: Cost
    links: Mapping[str, int] = field(default_factory=dict)
    offline_links: Mapping[str, int] = field(default_factory=dict)
    setup_links: Mapping[str, int] = field(default_factory=dict)
    config: Mapping[str, Json] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    host: Mapping[str, Json] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Json]:
        ops = [{"op": t.op, "kind": t.kind} | t.cost.as_dict() for t in self.ops]
        return asdict(self) | {"ops": ops, "total": self.total.as_dict()}


def check_schema(body: Mapping[str, Json], where: Path, schema: int = SCHEMA) -> None:
    if body.get("schema") != schema:
        raise BundleError(
            "written by another version", where=str(where), got=f"schema {body.get('schema')}", allowed=schema
        )


def atomic_write(path: Path, write: Callable[[Any], object]) -> None:
    """Write a file completely or not at all: `write` gets a binary handle beside the target, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with naming(path), os.fdopen(handle, "wb") as f:
            write(f)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError within that does not say its file, as of a full disk, is about `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
