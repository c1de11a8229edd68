"""Choose per channel the patch over which one ReLU sign is shared (Gorski & Avidan, arXiv 2304.10442)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tightrope import kept
from tightrope.data import Data
from tightrope.errors import InputError, TraceError
from tightrope.graph import Graph, trace
from tightrope.lower import lower
from tightrope.methods import CostModel, Progress, Tiles
from tightrope.methods.block_relu.check import check, probes
from tightrope.methods.block_relu.controls import Picked, controls
from tightrope.methods.block_relu.distortion import Distortion, Losses, accumulate
from tightrope.methods.block_relu.patches import label, parse, patches
from tightrope.nn.block_relu import BlockReLU, Patch
from tightrope.place import model_sha256, place
from tightrope.program import Program, Relu
from tightrope.shard import Shard
from tightrope.types import ADDITIVE, Budget, Cost, Json, Problem, Site, Table, total

Options = dict[str, list[Patch]]
SINGLE = Shard()
CHUNK = 4  # sites measured by the same passes: bounds memory, and is the unit of resuming after the first
NOTHING = 1e-9  # of a site's largest loss: less is rounding
SHOWN = 12  # channels that a note lists


@dataclass(frozen=True, kw_only=True)
class BlockReluMethod:
    """Configuration and method in one.

    `sites`: shell patterns of the activations to decide; the others stay as they are.
    `samples`: training images behind every predicted loss. `directions`: output directions measured at
    most; with more outputs, random probes. `verify`: options measured exactly for the rank correlation.
    `repair`: charge an option only for what remains after the next layers have rescaled its channel.
    `max_pool`: "avg" turns max-pools into average pools first; `relu6`: "relu" turns ReLU6 into ReLU.
    """

    sites: str = "*"
    samples: int = 256
    batch_size: int = 64
    directions: int = 16
    verify: int = 100
    repair: bool = True
    max_pool: Literal["keep", "avg"] = "keep"
    relu6: Literal["keep", "relu"] = "keep"
    seed: int = 0

    name: ClassVar[str] = "block_relu"
    noun: ClassVar[str] = "patch"
    runtime: ClassVar[str] = "mpc"
    kinds: ClassVar[tuple[str, ...]] = ("relu", "relu6")

    def __post_init__(self) -> None:
        for key in ("samples", "batch_size", "directions"):
            if getattr(self, key) < 1:
                raise InputError(f"{key} must be positive", got=getattr(self, key))
        for key in ("verify", "seed"):
            if getattr(self, key) < 0:
                raise InputError(f"{key} must not be negative", got=getattr(self, key))
        for key, allowed in (("max_pool", ("keep", "avg")), ("relu6", ("keep", "relu"))):
            if getattr(self, key) not in allowed:
                raise InputError(f"unknown choice for {key}", got=getattr(self, key), allowed=allowed)

    def preparation(self, graph: Graph) -> dict[str, Json]:
        """The replacements asked for before any patch is chosen; part of the plan, listed in the report."""
        wanted = {"max_pool": ("max_pool", "avg_pool"), "relu6": ("relu6", "relu")}
        return {
            site.name: {"replace": new}
            for key, (kind, new) in wanted.items()
            if getattr(self, key) != "keep"
            for site in graph.sites
            if site.kind == kind
        }

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
        """Predicted loss and cost of every patch of every channel.

        `workdir` keeps one file per site, so that an interrupted measurement goes on where it stopped.
        `priced` and `feasible` are called with all losses 0 before anything is measured.
        Raises TraceError when a site has no influence on the outputs (its options would look free).
        """
        prepared = self.preparation(graph)
        ready = place(graph, prepared, self.rewrite)
        sites = ready.match(self.sites, self.kinds)
        options = {s.name: patches(_size(s)) for s in sites}
        program = lower(ready.module, ready.input_shape)
        for site in sites:
            if site.name not in {op.name for op in program.ops}:
                raise _no_influence(site, "no output depends on it")
        unknown = {s.name: np.zeros((s.shape[0], len(options[s.name]))) for s in sites}
        unmeasured = Problem(*self._priced(program, sites, options, unknown, cost), {"prepared": prepared})
        priced(unmeasured)
        feasible(unmeasured)
        key = self._key(ready, program, data)
        keys = {s.name: f"{key} {options[s.name]}" for s in sites}
        saved = {s.name: kept.read(workdir, s.name, keys[s.name]) for s in sites}
        shard.barrier()  # nobody writes before everybody has read
        losses = {name: Losses(**arrays) for name, arrays in saved.items() if arrays is not None}
        ready.module.to(shard.device)  # a copy: the caller's stays
        passes = 0
        missing = [s for s in sites if s.name not in losses]
        # one site alone first, so that an early interrupt keeps something
        edges = sorted({0, *range(CHUNK if losses else 1, len(missing), CHUNK), len(missing)})
        for start, stop in pairwise(edges):
            chunk = missing[start:stop]
            fresh, used = self._fast(ready, chunk, options, data, shard)
            passes += used
            losses |= fresh
            if shard.first:
                for site in chunk:
                    kept.write(workdir, site.name, keys[site.name], vars(fresh[site.name]))
            progress("distortion", stop, len(missing))
        checked = check(
            ready,
            probes(sites, options, self.verify, self.seed),
            options,
            losses,
            lambda: list(self._images(data, shard)),
            workdir=workdir,
            key=key,
            progress=progress,
            shard=shard,
        )
        chosen = {name: loss.repaired if self.repair else loss.raw for name, loss in losses.items()}
        tables, fixed, baseline = self._priced(program, sites, options, chosen, cost)
        meta = {
            "method": self.name,
            "config": asdict(self),
            "prepared": prepared,
            "sites": {s.name: list(s.shape) for s in sites},
            "silent": {name: np.flatnonzero(loss.silent).tolist() for name, loss in losses.items()},
            "passes": passes,
            "exact_passes": sum(len(o) * s.shape[0] for s, o in zip(sites, options.values(), strict=True)),
            **checked,
        }
        return Problem(tables, fixed, baseline, meta)

    def _key(self, graph: Graph, program: Program, data: Data) -> str:
        """What saved losses depend on: weights, structure (`max_pool`, `relu6`), images and directions."""
        images = kept.digest(self._images(data, SINGLE))
        parts = (self.samples, self.directions, self.seed, data.name, images)
        return f"{model_sha256(graph.module)} {program.sha256()} {parts}"

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

    def remeasure(
        self,
        problem: Problem,
        graph: Graph,
        tuned: nn.Module,
        data: Data,
        *,
        progress: Progress = lambda *_: None,
        shard: Shard = SINGLE,
    ) -> Problem:
        """`problem` with its losses measured in `tuned`: `graph`'s network, rewritten and fine-tuned.

        The loss of an option is the mean squared difference to the original network's outputs that remains
        when its channel alone changes to it. Prices and the check of the first losses stay.
        """
        original = place(graph, problem.meta["prepared"], self.rewrite)
        rewritten = trace(tuned, graph.input_shape)
        named = {t.site: t for t in problem.tables}
        sites = [s for s in original.sites if s.name in named]
        options = {name: [parse(text) for text in table.labels] for name, table in named.items()}
        for network in (original.module, rewritten.module):
            network.to(shard.device)
        losses: dict[str, Losses] = {}
        for start in range(0, len(sites), CHUNK):
            chunk = sites[start : start + CHUNK]
            losses |= self._fast(rewritten, chunk, options, data, shard, original.module)[0]
            progress("distortion", start + len(chunk), len(sites))
        chosen = {name: loss.repaired if self.repair else loss.raw for name, loss in losses.items()}
        tables = tuple(replace(table, loss=chosen[table.site]) for table in problem.tables)
        rounds = problem.meta.get("remeasured", 0) + 1
        return replace(problem, tables=tables, meta={**problem.meta, "remeasured": rounds})

    def _fast(
        self,
        graph: Graph,
        sites: Sequence[Site],
        options: Options,
        data: Data,
        shard: Shard,
        original: nn.Module | None = None,
    ) -> tuple[dict[str, Losses], int]:
        """Losses in `graph`'s network; against the outputs of `original`, or else against its own."""
        sums = {s.name: Distortion.zeros(s.shape[0], len(options[s.name])) for s in sites}
        generator = torch.Generator(shard.device).manual_seed(self.seed + shard.rank)
        passes = 0
        for x in self._images(data, shard):
            with torch.no_grad():
                wanted = None if original is None else original(x)
            passes += accumulate(
                graph,
                sites,
                options,
                x,
                sums,
                most_directions=self.directions,
                generator=generator,
                wanted=wanted,
            )
        outputs = graph.outputs
        result = {}
        for site in sites:
            mine = sums[site.name]
            images, active = shard.total(torch.tensor([mine.images, int(mine.active)])).tolist()
            whole = Distortion(
                squares=shard.total(mine.squares),
                powers=shard.total(mine.powers),
                products=shard.total(mine.products),
                power=shard.total(mine.power),
                images=images,
            )
            if active and not whole.squares.any():
                raise _no_influence(site, "distortion exactly 0 for every option")
            result[site.name] = whole.losses(outputs)
        return result, passes

    def _priced(
        self,
        program: Program,
        sites: Sequence[Site],
        options: Options,
        losses: dict[str, NDArray[np.float64]],
        cost: CostModel,
    ) -> tuple[tuple[Table, ...], Cost, Cost]:
        chosen = {s.name for s in sites}
        baseline = total(cost.prices(program).values())
        fixed = baseline + total(cost.price(op) for op in program.ops if op.name in chosen).scaled(-1)
        tables = []
        for site in sites:
            op = program.op(site.name)
            assert isinstance(op, Relu)
            C = site.shape[0]
            costs = [cost.price(replace(op, patches=(patch,) * C)) for patch in options[site.name]]
            priced = {m: np.array([getattr(c, m) / C for c in costs]) for m in ADDITIVE}
            tables.append(
                Table(
                    site.name,
                    tuple(label(p) for p in options[site.name]),
                    losses[site.name],
                    {m: v for m, v in priced.items() if v.any()},
                )
            )
        return tuple(tables), fixed, baseline

    def choices(self, problem: Problem, picked: Mapping[str, NDArray[np.intp]]) -> dict[str, Json]:
        """{site: {"patches": [[rows, columns] per channel]}}, and the preparation."""
        result: dict[str, Json] = dict(problem.meta["prepared"])
        for table in problem.tables:
            shapes = [list(parse(table.labels[k])) for k in picked[table.site]]
            upper = result.pop(table.site, {}).get("replace") != "relu"
            result[table.site] = {"patches": shapes} if upper else {"patches": shapes, "replace": "relu"}
        return result

    def options(self, choice: Json) -> tuple[str, ...]:
        return tuple(label((int(p), int(q))) for p, q in choice["patches"])

    def picture(self, problem: Problem, site: str, text: str) -> Tiles:
        shape = problem.meta["sites"][site]
        return Tiles(parse(text), (shape[1], shape[2]) if len(shape) == 3 else (1, 1))

    def notes(self, problem: Problem, picked: Picked) -> tuple[str, ...]:
        """What was replaced beforehand, and which ReLUs went for nothing."""
        found = [f"{site}: replaced by {how['replace']}" for site, how in problem.meta["prepared"].items()]
        for site, channels in problem.meta.get("silent", {}).items():
            if channels:
                shown = ", ".join(map(str, channels[:SHOWN])) + (", …" if len(channels) > SHOWN else "")
                found.append(
                    f"{site}: nothing of channel{'s' * (len(channels) > 1)} {shown} reached the outputs on "
                    "the measured images (never active, or not used): their ReLUs cost no accuracy"
                )
        dropped = 0.0
        for table in problem.tables:
            k, drelus = picked[table.site], table.cost["drelus"]
            free = table.loss[np.arange(len(k)), k] <= NOTHING * table.loss.max()
            dropped += float((drelus[0] - drelus[k])[free].sum())
        if dropped:
            found.append(
                f"{dropped:,.0f} of the DReLUs that go have no predicted loss: a larger budget keeps "
                "none of them"
            )
        return tuple(found)

    def controls(self, problem: Problem, budget: Budget) -> dict[str, Picked]:
        """See `tightrope.methods.block_relu.controls`."""
        return controls(problem, budget, self.seed)

    def rewrite(self, site: Site, module: nn.Module, choice: Json) -> nn.Module:
        if "patches" in choice:
            keeps_upper = site.kind == "relu6" and choice.get("replace") != "relu"
            if len(choice["patches"]) != site.shape[0]:
                raise InputError(
                    "one patch per channel",
                    where=site.name,
                    got=len(choice["patches"]),
                    allowed=site.shape[0],
                )
            return BlockReLU(choice["patches"], 6.0 if keeps_upper else None)
        if choice.get("replace") == "avg_pool" and isinstance(module, nn.MaxPool2d):
            if module.dilation not in (1, (1, 1)):
                raise InputError(
                    "a dilated max-pool has no average pool", where=site.name, got=module.dilation
                )
            return nn.AvgPool2d(module.kernel_size, module.stride, module.padding, ceil_mode=module.ceil_mode)
        if choice.get("replace") == "relu":
            return nn.ReLU()
        raise InputError("block_relu does not know this choice", where=site.name, got=choice)


def _no_influence(site: Site, got: str) -> TraceError:
    return TraceError(
        "this site has no influence on the outputs: its ReLUs would be removed for free",
        where=site.name,
        got=got,
        fix="give trained weights with --weights (untrained ones may scale residual branches by 0, "
        "as timm's zero_init_last does), or leave the site out with --sites",
    )


def _size(site: Site) -> tuple[int, int]:
    return (site.shape[1], site.shape[2]) if len(site.shape) == 3 else (1, 1)
