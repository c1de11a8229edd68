"""Choose per activation the polynomial that stands for it (SmartPAF 2024; OLA 2023 for the choice)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tightrope import kept
from tightrope.data import Data
from tightrope.errors import InputError, TraceError
from tightrope.graph import Graph
from tightrope.lower import lower
from tightrope.methods import CostModel, Curve, Merges, Progress
from tightrope.methods.paf.controls import controls
from tightrope.methods.paf.library import paf
from tightrope.methods.paf.options import TARGETS, Fitted, fit, matching, offered, structure
from tightrope.methods.paf.scales import compare
from tightrope.methods.paf.sites import distortions, histograms
from tightrope.nn.polynomial import PolynomialActivation, composite
from tightrope.nn.tournament import MaxTournament
from tightrope.place import Rewrite, model_sha256, place
from tightrope.program import Op, Polynomial, Program
from tightrope.shard import Shard
from tightrope.solve.along import levels
from tightrope.types import (
    ADDITIVE,
    ALONG,
    Budget,
    FloatArray,
    Json,
    Merge,
    Problem,
    Site,
    Step,
    Table,
    total,
)

SINGLE = Shard()
DRAWN = 101  # points of a picture
Picked = Mapping[str, NDArray[np.intp]]


@dataclass(frozen=True, kw_only=True)
class PafMethod:
    """Configuration and method in one.

    `sites`: shell patterns of the activations to decide; the others stay as they are. `polynomials`: shell
    patterns of the library's names, separated by semicolons; `herpn` only by that name. `samples`: training
    images behind histograms and losses. `margin`: the scale of a site over the largest input seen there;
    polynomials explode beyond their scale, and among more images there are larger inputs. `max_pool`:
    "tournament" makes max-pools of ReLUs, each of which is a site then; "avg" makes average pools of them.
    """

    sites: str = "*"
    polynomials: str = "*"
    samples: int = 256
    batch_size: int = 64
    margin: float = 1.5
    max_pool: Literal["tournament", "avg", "keep"] = "tournament"
    seed: int = 0

    name: ClassVar[str] = "paf"
    noun: ClassVar[str] = "polynomial"
    runtime: ClassVar[str] = "ckks"

    def __post_init__(self) -> None:
        for key in ("samples", "batch_size"):
            if getattr(self, key) < 1:
                raise InputError(f"{key} must be positive", got=getattr(self, key))
        if self.seed < 0:
            raise InputError("seed must not be negative", got=self.seed)
        if not 0.1 <= self.margin <= 10:
            raise InputError("the margin is out of range", got=self.margin, allowed="0.1 to 10")
        if self.max_pool not in ("tournament", "avg", "keep"):
            raise InputError(
                "unknown choice for max_pool", got=self.max_pool, allowed=("tournament", "avg", "keep")
            )
        matching(self.polynomials)

    def preparation(self, graph: Graph) -> dict[str, Json]:
        """What becomes of max-pools before any polynomial is chosen. Raises InputError for one whose padding
        a tournament would take for a value."""
        pools = [site for site in graph.sites if site.kind == "max_pool" and self.max_pool != "keep"]
        replaced = {"tournament": "tournament", "avg": "avg_pool", "keep": ""}[self.max_pool]
        for site in pools if replaced == "tournament" else ():
            module = graph.module.get_submodule(site.name)
            before = graph.node(site).args[0]
            ends = any(_pair(module.padding)) or module.ceil_mode
            if ends and str(getattr(before, "target", "")) not in {
                s.name for s in graph.sites if s.kind in ("relu", "relu6")
            }:
                raise InputError(
                    "a tournament of a padded max-pool needs inputs that are not negative",
                    where=site.name,
                    fix="--max-pool avg",
                )
        return {site.name: {"replace": replaced} for site in pools}

    def measure(
        self,
        graph: Graph,
        data: Data,
        *,
        cost: CostModel,
        workdir: Path | None,
        progress: Progress,
        priced: Callable[[Problem], object] = lambda _: None,
        feasible: Callable[[Problem], object] = lambda _: None,
        shard: Shard = SINGLE,
    ) -> Problem:
        """Predicted loss and cost of every polynomial of every site.

        The loss is the mean squared change of the network's outputs with that site alone replaced.
        `priced` is called with all losses 0 at once, `feasible` when coefficients are known, which exact
        costs depend on.
        `workdir` keeps the losses of one file per site, so that an interrupted measurement goes on.
        Raises TraceError when the network cannot be priced, InputError for sites and polynomials that do not
        exist.
        """
        names = matching(self.polynomials)
        prepared = self.preparation(graph)
        graph = place(graph, prepared, self.rewrite)
        sites = graph.match(self.sites, tuple(TARGETS))
        rounds = tuple(f"{pool}." for pool, how in prepared.items() if how["replace"] == "tournament")
        labels = {s.name: offered(s.kind, names, compared=s.name.startswith(rounds)) for s in sites}
        for site in sites:
            if not labels[site.name]:
                raise InputError(
                    "no polynomial can stand for this activation",
                    where=site.name,
                    got=f"{site.kind}, {self.polynomials}",
                    fix="--set polynomials='degree *'",
                )
        labels = {s.name: _executable(cost, s, labels[s.name]) for s in sites}
        unmeasured = _priced(graph, sites, labels, cost, self.rewrite)
        priced(unmeasured)
        seen = histograms(graph, sites, self._images(data, SINGLE))
        progress("histograms", 1, 1)
        fits: dict[str, dict[str, Fitted]] = {}
        for k, site in enumerate(sites):
            here = seen[site.name]
            scale = self.margin * (here.largest or 1.0)
            fits[site.name] = {name: fit(site.kind, name, here, scale) for name in labels[site.name]}
            progress("coefficients", k + 1, len(sites))
        meta = {
            "method": self.name,
            "config": asdict(self),
            "prepared": prepared,
            "sites": {s.name: list(s.shape) for s in sites},
            "kinds": {s.name: s.kind for s in sites},
            "fits": {s: {name: f.to_json() for name, f in found.items()} for s, found in fits.items()},
        }
        unmeasured = replace(unmeasured, meta=meta)
        feasible(unmeasured)
        choices = {s: [f.choice(name) for name, f in found.items()] for s, found in fits.items()}
        losses = self._losses(graph, choices, data, workdir, progress, shard)
        tables = tuple(replace(t, loss=losses[t.site][None, :]) for t in unmeasured.tables)
        return replace(unmeasured, tables=tables)

    def _losses(
        self,
        graph: Graph,
        choices: Mapping[str, list[Json]],
        data: Data,
        workdir: Path | None,
        progress: Progress,
        shard: Shard,
    ) -> dict[str, FloatArray]:
        """By site, of every choice; those that `workdir` has are not measured again."""
        of_these = f"{model_sha256(graph.module)} {kept.digest(self._images(data, SINGLE))}"
        keys = {s: f"{of_these} {json.dumps(found)}" for s, found in choices.items()}
        saved = {s: kept.read(workdir, s, key) for s, key in keys.items()}
        shard.barrier()  # nobody writes before everybody has read
        losses = {s: arrays["loss"] for s, arrays in saved.items() if arrays is not None}
        missing = {s: found for s, found in choices.items() if s not in losses}
        images = self._images(data, shard)
        measured = distortions(graph, missing, self.rewrite, images, shard.device) if missing else ()
        for k, (site, sums, images_seen) in enumerate(measured):
            (count,) = shard.total(torch.tensor([float(images_seen)])).tolist()
            losses[site] = shard.total(torch.tensor(sums)).numpy() / count
            if shard.first:
                kept.write(workdir, site, keys[site], {"loss": losses[site]})
            progress("loss of every polynomial", k + 1, len(missing))
        return losses

    def _images(self, data: Data, shard: Shard) -> Iterator[Tensor]:
        batches = data.batches(
            "train",
            self.batch_size,
            shuffle=True,
            seed=self.seed,
            limit=self.samples,
            rank=shard.rank,
            world=shard.world,
        )
        return (x.to(shard.device) for x, _ in batches)

    def choices(self, problem: Problem, picked: Picked) -> dict[str, Json]:
        """{site: {"polynomial": name, "stages": coefficients, "gated": ..., "scale": ...}}."""
        chosen: dict[str, Json] = dict(problem.meta["prepared"])
        for table in problem.tables:
            name = table.labels[int(picked[table.site][0])]
            found = problem.meta["fits"][table.site][name]
            chosen[table.site] = {"polynomial": name} | {k: found[k] for k in ("stages", "gated", "scale")}
        return chosen

    def options(self, choice: Json) -> tuple[str, ...]:
        return (str(choice["polynomial"]),)

    def picture(self, problem: Problem, site: str, label: str) -> Curve:
        """The mean over channels where these have coefficients of their own."""
        found = problem.meta["fits"][site][label]
        x = np.linspace(-found["scale"], found["scale"], DRAWN)
        u = torch.tensor(x / found["scale"])[:, None]
        y = composite([torch.tensor(stage, dtype=u.dtype) for stage in found["stages"]], u)[-1].mean(1)
        value = y.numpy() * (x if found["gated"] else 1.0)
        exact = TARGETS[problem.meta["kinds"][site]](x)
        return Curve(*(tuple(map(float, values)) for values in (x, value, exact)))

    def notes(self, problem: Problem, picked: Picked) -> tuple[str, ...]:
        """What became of max-pools, and the levels and multiplications of ciphertexts that this takes."""
        describe = {"tournament": _tournament_note, "avg_pool": _average_note}
        prepared = problem.meta["prepared"].items()
        return tuple(f"{pool}: {describe[how['replace']](pool, problem, picked)}" for pool, how in prepared)

    def trial(self, model: nn.Module, data: Data, progress: Progress) -> tuple[str, ...]:
        """See `tightrope.methods.paf.scales`."""
        return compare(model, data, self.batch_size, progress)

    def controls(self, problem: Problem, budget: Budget) -> dict[str, Picked]:
        """See `tightrope.methods.paf.controls`."""
        return controls(problem, budget, self.seed)

    def rewrite(self, site: Site, module: nn.Module, choice: Json) -> nn.Module:
        if choice.get("replace") == "tournament" and isinstance(module, nn.MaxPool2d):
            return _tournament(site, module)
        if choice.get("replace") == "avg_pool" and isinstance(module, nn.MaxPool2d):
            return nn.AvgPool2d(module.kernel_size, module.stride, module.padding, ceil_mode=module.ceil_mode)
        if "polynomial" not in choice:
            raise InputError("paf does not know this choice", where=site.name, got=choice)
        return PolynomialActivation(choice["stages"], gated=choice["gated"], scale=float(choice["scale"]))


def _executable(cost: CostModel, site: Site, labels: Sequence[str]) -> tuple[str, ...]:
    """Those that the runtime does not refuse. Raises its TraceError where it refuses all."""
    found, refused = [], TraceError("no polynomial", where=site.name)
    for label in labels:
        degrees, gated = structure(label)
        try:
            cost.price(
                Polynomial(name=site.name, inputs=("",), shape=site.shape, stages=degrees, gated=gated)
            )
        except TraceError as error:
            refused = error
        else:
            found.append(label)
    if not found:
        raise refused
    return tuple(found)


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _tournament(site: Site, module: nn.MaxPool2d) -> MaxTournament:
    if _pair(module.dilation) != (1, 1):
        raise InputError("a dilated max-pool has no tournament", where=site.name, got=module.dilation)
    (_, h, w), (_, H, W) = site.input_shape, site.shape
    kernel, padding = _pair(module.kernel_size), _pair(module.padding)
    return MaxTournament(kernel, _pair(module.stride or kernel), padding, (h, w), (H, W))


def _tournament_note(pool: str, problem: Problem, picked: Picked) -> str:
    """A round takes a level for the difference, and those of its polynomial: as priced, else of itself."""
    tables = [t for t in problem.tables if t.site.startswith(f"{pool}.")]
    if not tables:
        return "replaced by tournament, none of whose rounds has a polynomial"
    options = [int(picked[t.site][0]) for t in tables]
    names = [t.labels[k] for t, k in zip(tables, options, strict=True)]
    alone = [
        int(t.cost["ckks_levels"][k]) if "ckks_levels" in t.cost else paf(name).levels
        for t, k, name in zip(tables, options, names, strict=True)
    ]
    return (
        f"replaced by tournament, in rounds of {', '.join(names)}: levels {len(alone) + sum(alone)}, "
        f"ciphertext multiplications {sum(paf(name).multiplications for name in names)}"
    )


def _average_note(pool: str, problem: Problem, picked: Picked) -> str:
    return "replaced by avg pool: levels 0 where it merges with a layer, else 1, ciphertext multiplications 0"


def _priced(
    graph: Graph,
    sites: Sequence[Site],
    labels: Mapping[str, Sequence[str]],
    cost: CostModel,
    rewrite: Rewrite,
) -> Problem:
    """Options and their prices. Levels follow the graph of the network with polynomials in it, along which
    ops merge where the cost model says how.

    The baseline is the unchanged network, with the levels of the dearest polynomials; where the runtime
    cannot execute that, the network with the dearest polynomials altogether.
    """
    program = _structure(graph, {name: found[-1] for name, found in labels.items()}, rewrite)
    ops = {s.name: [_as(program.op(s.name), label) for label in labels[s.name]] for s in sites}
    prices = {name: [cost.price(op) for op in offers] for name, offers in ops.items()}
    fixed_levels = {op.name: int(cost.price(op).ckks_levels) for op in program.ops if op.name not in ops}
    along = any(fixed_levels.values()) or any(c.ckks_levels for costs in prices.values() for c in costs)
    tables = []
    for name, costs in prices.items():
        priced = {m: np.array([getattr(c, m) for c in costs], np.float64) for m in (*ADDITIVE, *ALONG)}
        kept = {m: v for m, v in priced.items() if m == "drelus" or v.any() or (m in ALONG and along)}
        tables.append(Table(name, tuple(labels[name]), np.zeros((1, len(costs))), kept))
    try:
        original = lower(graph.module, graph.input_shape)
        baseline = total(cost.prices(original).values())
        fixed = baseline + total(cost.price(original.op(name)) for name in ops).scaled(-1)
    except TraceError:
        fixed = total(cost.prices(program).values()) + total(c[-1] for c in prices.values()).scaled(-1)
        baseline = fixed + total(costs[0] for costs in prices.values())
    fixed, baseline = (replace(c, ckks_levels=0) for c in (fixed, baseline))
    if not along:
        return Problem(tuple(tables), fixed, baseline)
    steps = tuple(
        Step(
            op.name,
            tuple("" if value == Program.INPUT else value for value in op.inputs),
            fixed_levels.get(op.name, 0),
            tuple(_merge(cost, offer) for offer in ops.get(op.name, (op,))),
        )
        for op in program.ops
    )
    problem = Problem(tuple(tables), fixed, baseline, {}, steps)
    deepest = levels(problem, dict.fromkeys(ops, 0))
    return replace(problem, baseline=replace(baseline, ckks_levels=deepest))


def _merge(cost: CostModel, op: Op) -> Merge:
    return cost.merge(op) if isinstance(cost, Merges) else "none"


def _structure(graph: Graph, names: Mapping[str, str], rewrite: Rewrite) -> Program:
    """The lowered network with these polynomials; their coefficients are not known yet."""
    choices = {}
    for site, name in names.items():
        degrees, gated = structure(name)
        zeros = [[0.0] * (degree + 1) for degree in degrees]
        choices[site] = {"polynomial": name, "stages": zeros, "gated": gated, "scale": 1.0}
    return lower(place(graph, choices, rewrite).module, graph.input_shape)


def _as(op: Op, name: str) -> Polynomial:
    degrees, gated = structure(name)
    return Polynomial(name=op.name, inputs=op.inputs, shape=op.shape, stages=degrees, gated=gated)
