"""More linear work for less nonlinear work (Li, Zhai, Cai, Gao, Seesaw, ICML 2024)."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from tightrope.data import Data, Task
from tightrope.errors import BudgetError, BundleError, InputError, TightropeError
from tightrope.evaluate import accuracy
from tightrope.graph import Graph, trace
from tightrope.lower import lower
from tightrope.methods import CostModel, Learned, Progress, Shown
from tightrope.methods.seesaw import relu_map
from tightrope.methods.seesaw.decide import Judge, Wanted, floor, prune, settle
from tightrope.methods.seesaw.network import assemble
from tightrope.methods.seesaw.objectives import Dual, Reference
from tightrope.methods.seesaw.operators import BORDERS, Borders, parse_operators
from tightrope.methods.seesaw.options import project
from tightrope.methods.seesaw.prices import METRICS, RATES, Prices, PublishedRates, Rates
from tightrope.methods.seesaw.recover import recover
from tightrope.methods.seesaw.search import Search, Settings, agreed
from tightrope.methods.seesaw.space import POOLS, Architecture, Space, resolve
from tightrope.methods.seesaw.supernet import Supernet
from tightrope.nn.depthwise import quicken
from tightrope.nn.strided import repair
from tightrope.place import model_sha256
from tightrope.program import base_cost
from tightrope.shard import Shard
from tightrope.types import Budget, Cost, Json, total

Mode = Literal["dual", "reference"]
MODES: tuple[Mode, ...] = ("dual", "reference")
AGGREGATES = ("searched", "published")
WHOLE = (
    "width", "stem_stride", "epochs", "batch_size", "limit", "branches", "keep", "recovery", "samples", "seed"
)  # fmt: skip
SINGLE = Shard()
FAVOURED = 2.0  # logit of a ReLU at first: a probability of 0.88
ROUNDS = 3  # of improving the options by measuring


@dataclass(frozen=True, kw_only=True)
class SeesawMethod:
    """Configuration and method in one. The network that is searched for replaces the given one, its teacher.

    `mode`: `dual` holds the expected cost by a multiplier and meets the budget for certain; `reference` is
    the release's objective, with the gradients that it meant to have; the budget is then only checked. Its
    settings: `width=32 operators=all aggregates=published borders=published lr=0.001 lr_choice=0.01`.
    `space`: blocks per stage, `2,2,2`, or a published name. `width`: channels of the stem; `stem_stride`:
    1, 2 or 4, None for the published. `operators`: `all` 27, the published `low-memory` 10, `plain`, or
    names. `aggregates`: whether their ReLU and pool are `searched`. `borders`: `mergeable` pads stacks of
    convolutions once, so that they merge; `published` pads each. `limit`: images an epoch. `branches`:
    operators of a block in one step, 0 for all; `keep`: how many are left at the end of training.
    `balance`: linear over nonlinear milliseconds at most, by `rates`, the `runtime`'s or the `published`;
    None for any. The release's rule is 0.529 by its rates. `relu_map`: a file that says which blocks have a
    ReLU. `variance`: weight of driving branch weights apart late in the search (the release's `--spatial`).
    `distill`: weight of the teacher's outputs. `recovery`: epochs after the choice. `samples`: held-out
    images behind each measured loss.
    """

    mode: Mode = "dual"
    space: str = "2,2,2"
    width: int = 8
    stem_stride: int | None = None
    operators: str = "low-memory"
    aggregates: str = "searched"
    borders: Borders = "mergeable"
    epochs: int = 12
    batch_size: int = 64
    limit: int | None = None
    lr: float = 0.05
    lr_choice: float = 0.02
    branches: int = 3
    keep: int = 4
    balance: float | None = 1.0
    rates: str = "runtime"
    relu_map: str = ""
    variance: float = 0.0
    distill: float = 0.9
    recovery: int = 1
    samples: int = 512
    precision: str = "32-true"
    seed: int = 0

    name: ClassVar[str] = "seesaw"
    runtime: ClassVar[str] = "mpc"
    tunable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        words = (
            ("mode", MODES), ("aggregates", AGGREGATES), ("borders", BORDERS), ("rates", RATES),
            ("precision", ("32-true", "bf16-mixed")),
        )  # fmt: skip
        for key, allowed in words:
            if getattr(self, key) not in allowed:
                raise InputError(f"unknown choice for {key}", got=getattr(self, key), allowed=allowed)
        for key in WHOLE:
            value = getattr(self, key)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise InputError(f"{key} must be a whole number", got=value)
        for key in ("width", "epochs", "batch_size", "keep", "samples", "lr", "lr_choice"):
            if not 0 < getattr(self, key) < math.inf:
                raise InputError(f"{key} must be positive", got=getattr(self, key))
        for key in ("branches", "variance", "distill", "recovery", "seed"):
            if not 0 <= getattr(self, key) < math.inf:
                raise InputError(f"{key} must not be negative", got=getattr(self, key))
        for key in ("limit", "balance", "stem_stride"):
            if getattr(self, key) is not None and not 0 < getattr(self, key) < math.inf:
                raise InputError(f"{key} must be positive", got=getattr(self, key))
        if self.seed >= 2**32:
            raise InputError("seed is too large", got=self.seed, allowed="a whole number from 0 to 2^32 - 1")
        parse_operators(self.operators)

    def space_for(self, input_shape: tuple[int, ...], classes: int) -> Space:
        """Raises InputError for images that the space cannot be for."""
        if len(input_shape) != 3:
            raise InputError("the space is one of networks for images", got=input_shape)
        searched = self.aggregates == "searched"
        return resolve(
            self.space,
            (input_shape[0], input_shape[1], input_shape[2]),
            classes,
            stem=self.width,
            stride=self.stem_stride,
            operators=parse_operators(self.operators),
            borders=self.borders,
            pools=POOLS if searched else ("max",),
            free=searched,
        )

    def learn(
        self,
        graph: Graph,
        data: Data,
        *,
        task: Task | None,
        budget: Budget,
        cost: CostModel,
        workdir: Path | None = None,
        progress: Progress = lambda *_: None,
        shard: Shard = SINGLE,
    ) -> Learned:
        """Train a supernet, decide, train a little more. Raises BudgetError for a budget in other quantities,
        or one that no network of the space meets; InputError for a task of its own.
        """
        if task is not None:
            raise InputError(
                "seesaw makes a network for the task of the given one, not for another",
                got="--classes, --superclasses or --new-data",
                fix="--method reengineer",
            )
        if self.batch_size < shard.world:
            raise InputError(
                "a batch has fewer images than there are processes",
                got=f"batch_size={self.batch_size} for {shard.world} processes",
                fix=f"--set batch_size={shard.world} or more, or fewer --devices",
            )
        space = self.space_for(graph.input_shape, len(data.classes))
        rates: Rates = PublishedRates() if self.rates == "published" else cost
        prices = Prices(space, cost, rates)
        baseline = _baseline(graph, prices)
        fixed = relu_map.read(Path(self.relu_map).expanduser(), space) if self.relu_map else None
        wanted = self._wanted(budget, baseline, prices, fixed)
        with torch.random.fork_rng([shard.device] if shard.device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            net = Supernet(space, FAVOURED if self.mode == "dual" else 0.0)
            net.to(shard.device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster
            quicken(net)
            repair(net)
            teacher = copy.deepcopy(graph.module).to(shard.device).eval() if self.distill else None
            if fixed is not None:
                _fix(net, fixed)
            judge = Judge(net, _held_out(data, self.samples, shard))
            identity = {"model": model_sha256(graph.module), "data": data.name, "budget": str(budget),
                        "net": model_sha256(net), "prices": _sha256(prices, net, wanted),
                        "samples": self.samples, "processes": shard.world}  # fmt: skip
            self._search(net, data, prices, wanted, teacher, judge, progress, shard).run(workdir, identity)
            network, balanced = self._decide(net, prices, wanted, judge)
            network = agreed(net, network, shard)
            found = _picked(prices.whole(network))
            for metric, limit in budget.resolve(baseline).items():
                if (reached := getattr(found, metric)) > limit:
                    raise floor(prices, metric, limit, f"{reached:,.6g} {metric}, which were reached")
            plain = net.extract(network).to(shard.device)
            recover(plain, data, teacher, self, progress, shard)
            plain = plain.cpu()
        ratio = prices.balance(network, found.drelus)
        notes = () if balanced else (
            f"even one operator a block is more linear work than the balance allows: {ratio:.3g} times the"
            " nonlinear" if found.drelus else "there is no nonlinear work that linear work could balance",
        )  # fmt: skip
        share = accuracy(plain, data, "validation")
        return Learned(
            choices=network.to_json(),
            tensors={k: v.cpu() for k, v in plain.state_dict().items()},
            predicted=found,
            baseline=_picked(baseline),
            loss=1 - share,
            accuracy=share,
            controls={"given network": accuracy(graph.module, data, "validation")},
            shown=(_shown(space, network, prices),),
            notes=notes,
        )

    def rebuild(
        self, graph: Graph, choices: Mapping[str, Json], tensors: Mapping[str, Tensor]
    ) -> fx.GraphModule:
        """The plain network with all its branches, as training continues it. Raises BundleError."""
        space = self.space_for(graph.input_shape, graph.outputs)
        plain = assemble(space, Architecture.from_json(choices, space))
        try:
            plain.load_state_dict(dict(tensors), strict=True)
        except RuntimeError as error:
            raise BundleError(
                "the weights and the plan do not belong together", got=str(error)[:200]
            ) from error
        return trace(plain.eval(), graph.input_shape).module

    def finish(self, model: nn.Module, input_shape: tuple[int, ...], cost: CostModel) -> nn.Module:
        """What is frozen in the place of a trained network: the same with its convolutions merged."""
        classes = next(p for name, p in model.named_parameters() if name == "classifier.bias").numel()
        return Prices(self.space_for(input_shape, classes), cost, cost).merged(model)

    def _wanted(
        self, budget: Budget, baseline: Cost, prices: Prices, relus: tuple[bool, ...] | None
    ) -> Wanted:
        limits = budget.resolve(baseline)
        unknown = [m for m in limits if m not in METRICS]
        macs = limits.pop("macs", math.inf)
        if unknown or len(limits) != 1:
            raise BudgetError(
                "seesaw takes one limit on nonlinear work, and beside it one on macs if you like",
                got=str(budget),
                allowed=tuple(m for m in METRICS if m != "macs"),
                fix="--budget 'drelus<=12000', or 'online_ms<=20,macs<=30e6'",
            )
        metric, limit = next(iter(limits.items()))
        one = prices.option("block1", ("", True))
        if not getattr(one, metric):
            raise BudgetError(
                f"a ReLU costs no {metric} on this runtime, so the limit would choose nothing",
                got=str(budget),
                allowed=tuple(m for m in METRICS if m != "macs" and getattr(one, m)),
                fix="--runtime mpc, or --budget 'drelus<=12000'",
            )
        wanted = Wanted(metric, limit, macs, self.balance or math.inf, relus)
        who = "its cheapest network" if relus is None else "the ReLU map with the cheapest of everything else"
        for key, most in ((metric, limit), ("macs", macs)):
            if most < math.inf and (least := wanted.least(prices, key)) > most:
                raise floor(prices, key, most, f"{key}<={least:,.15g} or more: what {who} costs")
        return wanted

    def _search(
        self,
        net: Supernet,
        data: Data,
        prices: Prices,
        wanted: Wanted,
        teacher: nn.Module | None,
        judge: Judge,
        progress: Progress,
        shard: Shard,
    ) -> Search:
        dual = self.mode == "dual"
        settings = Settings(
            epochs=self.epochs, batch_size=self.batch_size, limit=self.limit, lr=self.lr,
            lr_choice=self.lr_choice, momentum=0.9, weight_decay=1e-4 if dual else 4e-5, cosine=dual,
            choice_betas=(0.5, 0.999) if dual else (0.0, 0.999), choice_decay=0.0 if dual else 0.01,
            branches=self.branches if dual else 0, shrink=dual, keep=self.keep, distill=self.distill,
            smoothing=0.0 if dual else 0.1, variance=self.variance, precision=self.precision, seed=self.seed,
        )  # fmt: skip
        search = Search(
            net, data, settings, Reference(net), teacher, shard, progress, choose_weights=dual, judge=judge
        )
        if dual:
            expected, largest = prices.expectation(net, wanted.metric)
            search.objective = Dual(expected, largest, wanted.limit, search.per_epoch * self.epochs)
        return search

    def _decide(
        self, net: Supernet, prices: Prices, wanted: Wanted, judge: Judge
    ) -> tuple[Architecture, bool]:
        prune(net, prices, wanted, judge)
        if self.mode == "reference":
            settle(net)
            options = [int(c.logits.argmax()) for c in net.choices.values()]
        else:
            options = project(net, prices, wanted, judge, rounds=ROUNDS)
        # the DReLUs are known now, and may be fewer than the limit pays for
        balanced = prune(net, prices, wanted, judge, options)
        return net.architecture(options), balanced


def _fix(net: Supernet, on: tuple[bool, ...]) -> None:
    """Blocks as a map says: certain, and not trained."""
    for k, enabled in enumerate(on, 1):
        choice: Any = net.choices[f"block{k}"]
        choice.logits = nn.Parameter(torch.tensor([0.0, 60.0 * enabled - 30.0]).to(choice.logits), False)


def _held_out(data: Data, samples: int, shard: Shard) -> list[tuple[Tensor, Tensor]]:
    return [
        (x.to(shard.device), y.to(shard.device)) for x, y in data.batches("validation", 256, limit=samples)
    ]


def _sha256(prices: Prices, net: Supernet, wanted: Wanted) -> str:
    """Of all that training hears of costs: the limit, and the prices that the expected cost is made of."""
    priced = [prices.option(site, option) for site, c in net.choices.items() for option in c.options]
    for stage, mixture in zip(prices.space.stages(), net.mixtures, strict=True):
        priced += [prices.block(stage, [name] * (name != "none")) for name in mixture.names]
    numbers = [wanted.limit, *(float(getattr(cost, wanted.metric)) for cost in (prices.fixed, *priced))]
    return hashlib.sha256(repr(numbers).encode()).hexdigest()


def _baseline(graph: Graph, prices: Prices) -> Cost:
    """Of the given network; only counts where the runtime cannot execute it."""
    program = lower(graph.module, graph.input_shape)
    try:
        return prices.program(program)
    except TightropeError:
        return total(base_cost(op) for op in program.ops)


def _picked(cost: Cost) -> Cost:
    return replace(cost, rounds=0, ckks_levels=0)


def _shown(space: Space, network: Architecture, prices: Prices) -> Shown:
    rows = []
    for k, (stage, block) in enumerate(zip(space.stages(), network.blocks, strict=True), 1):
        macs = prices.block(stage, block.operators).macs
        relus = space.block_relus(k - 1) if block.relu else 0
        rows.append((f"block{k}", ", ".join(block.operators), f"{relus:,}", f"{macs:,.0f}"))
    for k, aggregate in enumerate(network.aggregates, 1):
        cost = prices.option(f"aggregate{k}", (aggregate.pool, aggregate.relu))
        rows.append((f"aggregate{k}", f"{aggregate.pool} pool", f"{cost.drelus:,.0f}", f"{cost.macs:,.0f}"))
    return Shown(
        title="Blocks and aggregates",
        columns=("site", "operators", "DReLUs", "multiplications"),
        rows=tuple(rows),
    )
