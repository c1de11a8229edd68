"""What every choice of a space costs, by a runtime's prices or by the two rates of the published release."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, reduce
from typing import Protocol

import torch
from torch import Tensor, fx, nn

from tightrope.lower import lower
from tightrope.methods import CostModel
from tightrope.methods.seesaw.convolutions import Geometry, unit
from tightrope.methods.seesaw.merge import merge
from tightrope.methods.seesaw.network import Frame, Joined, assemble
from tightrope.methods.seesaw.operators import CONVOLUTIONS, POOLS, paddings
from tightrope.methods.seesaw.reduction import Link, Paths, Price, Reduction, pool, written
from tightrope.methods.seesaw.space import Aggregate, Architecture, Block, Space
from tightrope.methods.seesaw.supernet import Option, Supernet
from tightrope.program import Add, AvgPool2d, MaxPool2d, Op, Program, Relu, base_cost
from tightrope.types import ADDITIVE, Cost, total

METRICS = (*ADDITIVE, "macs")
RATES = ("runtime", "published")


class Rates(Protocol):
    """What one op costs, taken alone."""

    def price(self, op: Op) -> Cost: ...


@dataclass(frozen=True)
class PublishedRates:
    """The release's milliseconds: 0.174911 online and 0.053842398 offline a ReLU, 3.55361855670103e-6 a MAC.

    It counts the MACs as offline work, and each comparison of a max-pool as nothing; here it is one ReLU.
    """

    per_relu_online_ms: float = 0.174911
    per_relu_offline_ms: float = 0.053842398
    per_mac_ms: float = 3.55361855670103e-6

    def price(self, op: Op) -> Cost:
        counted = base_cost(op)
        online = counted.drelus * self.per_relu_online_ms
        offline = counted.drelus * self.per_relu_offline_ms + counted.macs * self.per_mac_ms
        return counted + Cost(online_ms=online, offline_ms=offline)


def burden(cost: Cost) -> float:
    """Milliseconds of both phases; multiplications for a runtime that says no times."""
    return cost.online_ms + cost.offline_ms or cost.macs


def links(name: str, space: Space, stage: int) -> list[Link]:
    """An operator as it is built, batch-norm folded: after training every one adds a constant."""
    C, H, W = space.shape(stage)
    if name in POOLS or name == "skip":
        factor = written(Geometry(C, C, (1, 1), (1, 1), (0, 0), True, False), (H, W), (1, 1), (1, 1), C)
        if name == "skip":
            return [factor]
        k = POOLS[name]
        shape = Geometry(C, C, (k, k), (1, 1), (k // 2, k // 2), True, False)
        return [Link(pool(shape, (H, W)), shape if space.borders == "mergeable" else None), factor]
    found = []
    for step, padding in zip(CONVOLUTIONS[name], paddings(name, space.borders), strict=True):
        spread = (1 + 2 * step.radius[0], 1 + 2 * step.radius[1])
        groups = step.groups or C
        shape = Geometry(C, C, spread, (1, 1), padding, groups == C, step.norm)
        H, W = shape.size((H, W))
        found.append(written(shape, (H, W), step.kernel, (step.dilation,) * 2, groups))
    return found


@dataclass(frozen=True)
class Prices:
    """`cost` prices what is chosen and merged; `rates` say when linear and nonlinear work are in balance.

    Where `rates` give no times, a runtime in the clear say, those of the release count.
    """

    space: Space
    cost: CostModel
    rates: Rates
    _wholes: dict[Architecture, Cost] = field(default_factory=dict, init=False, repr=False, compare=False)
    _sums: dict[tuple[int, tuple[str, ...]], tuple[Op, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _blocks: dict[tuple[int, tuple[str, ...]], Cost] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _options: dict[tuple[str, Option], Cost] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def exact(self, network: nn.Module) -> Cost:
        """Of a network after merging, as the runtime prices the whole program; rounds are of a path."""
        return self.program(lower(self.merged(network), self.space.input_shape))

    def merged(self, network: nn.Module) -> nn.Module:
        return merge(network, self.space.input_shape, self._price)

    def whole(self, network: Architecture) -> Cost:
        """Exact, of an architecture once it is trained, whatever its weights."""
        if network not in self._wholes:
            with torch.random.fork_rng([]):
                self._wholes[network] = self.exact(_constant(assemble(self.space, network)))
        return self._wholes[network]

    def program(self, program: Program) -> Cost:
        priced = total(self.cost.prices(program).values())
        return Cost(**{m: getattr(priced, m) for m in (*METRICS, "weights")})

    def option(self, site: str, option: Option) -> Cost:
        """Of the pool and the ReLU of a site, by its name in `Supernet.choices`, between two convolutions."""
        if (site, option) not in self._options:
            self._options[site, option] = self._amid(self._option_ops(site, option))
        return self._options[site, option]

    def time(self, stage: int, operators: Sequence[str]) -> float:
        """Milliseconds of a block; multiplications for a runtime that says no times."""
        return burden(self.block(stage, operators))

    def work(self, stage: int, operators: Sequence[str]) -> float:
        """Milliseconds of a block by `rates`, without what its layers cost whatever their size."""
        return sum(burden(self._timed.price(op)) for op in self._merged(stage, tuple(operators)))

    def balance(self, network: Architecture, drelus: float) -> float:
        """Milliseconds of the blocks' linear work over those of so many comparisons, by `rates`."""
        blocks = zip(self.space.stages(), network.blocks, strict=True)
        linear = sum(self.work(stage, block.operators) for stage, block in blocks)
        (relu,) = self._option_ops("block1", ("", True))
        nonlinear = drelus * burden(self._timed.price(relu)) / base_cost(relu).drelus
        return linear / max(nonlinear, 1e-12)

    def block(self, stage: int, operators: Sequence[str]) -> Cost:
        """The linear part of a block, merged as `merge` would merge it between two ReLUs."""
        key = (stage, tuple(operators))
        if key not in self._blocks:
            self._blocks[key] = self._between(self._merged(*key), self.space.shape(stage))
        return self._blocks[key]

    def paths(self, shape: tuple[int, ...], paths: Paths) -> float:
        """Milliseconds of paths from one value of this shape, added, the fixed costs of layers included."""
        ops: list[Op] = []
        ends = []
        for k, path in enumerate(paths):
            end = Program.INPUT
            for n, op in enumerate(path):
                ops.append(replace(op, name=f"path{k}_{n}", inputs=(end,)))
                end = ops[-1].name
            ends.append(end)
        result = ops[-1].shape if ops else shape
        for k, end in enumerate(ends[1:]):
            ops.append(Add(name=f"sum{k}", inputs=(ends[0] if k == 0 else ops[-1].name, end), shape=result))
        return burden(self._between(ops, shape))

    @cached_property
    def fixed(self) -> Cost:
        """What a network with every ReLU costs beyond its blocks and options."""
        pool = self.space.mildest
        real = [name for name in self.space.operators if name != "none"]
        dearest = max(real, key=lambda name: self.time(0, [name]))
        network = self.space.network([dearest], relu=True, pool=pool)
        parts = [self.block(stage, [dearest]) for stage in self.space.stages()]
        parts += [self.option(f"block{k}", ("", True)) for k in range(1, len(network.blocks) + 1)]
        parts += [self.option(f"aggregate{k}", (pool, True)) for k in range(1, len(network.aggregates) + 1)]
        left = self.whole(network) + total(parts).scaled(-1)
        return Cost(**{m: max(0.0, getattr(left, m)) for m in METRICS})

    @cached_property
    def frame_macs(self) -> float:
        """Of stem, transitions, joins and classifier where nothing merges with them."""
        blocks, joins = len(self.space.stages()), len(self.space.blocks) - 1
        aggregate = Aggregate(self.space.pools[0], True)
        with torch.random.fork_rng([]):
            frame = Frame(
                self.space,
                [nn.ReLU() for _ in range(blocks)],
                [Joined(self.space, stage, aggregate) for stage in range(joins)],
            )
            spent = self.exact(_constant(frame)).macs
        pools = [self.option(f"aggregate{k}", (aggregate.pool, True)).macs for k in range(1, joins + 1)]
        return spent - sum(pools)

    def cheapest(self, metric: str, relus: Sequence[bool] | None = None) -> Architecture:
        """One operator a block, and as few comparisons as the space and a ReLU map allow."""
        real = [o for o in self.space.operators if o != "none"]
        best = [min(real, key=lambda o, s=s: self._rank(metric, s, o)) for s in range(len(self.space.blocks))]  # type: ignore[misc]
        on = relus or (False,) * sum(self.space.blocks)
        blocks = tuple(Block((best[s],), relu) for s, relu in zip(self.space.stages(), on, strict=True))
        aggregate = Aggregate(self.space.mildest, not self.space.free)
        return Architecture(blocks, (aggregate,) * (len(self.space.blocks) - 1))

    def _rank(self, metric: str, stage: int, operator: str) -> tuple[float, float, int]:
        # of equal ones the one that is a single convolution can merge with what is before it
        alone = self.block(stage, [operator])
        return getattr(alone, metric), burden(alone), len(links(operator, self.space, stage))

    def least(self, metric: str, relus: Sequence[bool] | None = None) -> float:
        """Exact, of the cheapest network."""
        return float(getattr(self.whole(self.cheapest(metric, relus)), metric))

    def linear(self, operators: Sequence[Sequence[str]], metric: str, relus: Sequence[bool] | None) -> float:
        """About, of a network with these operators in its blocks and otherwise the cheapest."""
        known = zip(self.space.stages(), operators, self.cheapest(metric, relus).blocks, strict=True)
        pairs = [(self.block(s, names), self.block(s, block.operators)) for s, names, block in known]
        more = sum(getattr(one, metric) - getattr(two, metric) for one, two in pairs)
        return self.least(metric, relus) + float(more)

    def expectation(self, net: Supernet, metric: str) -> tuple[Callable[[], Tensor], float]:
        """The mean of a cost over the probabilities of the choices and the weights of the operators, and the
        most that it can be.

        Differentiable in both. Operators count alone, not merged: the gradient is to say which are dear.
        """
        fixed = torch.tensor(getattr(self.fixed, metric), dtype=torch.float32)
        choices = [
            (choice, torch.tensor([getattr(self.option(site, o), metric) for o in choice.options]))
            for site, choice in net.choices.items()
        ]
        mixtures = [
            (m, torch.tensor([getattr(self.block(stage, [o] * (o != "none")), metric) for o in m.names]))
            for stage, m in zip(self.space.stages(), net.mixtures, strict=True)
        ]

        largest = float(fixed + sum(price.max() for _, price in (*choices, *mixtures)))

        def expected() -> Tensor:
            spent = fixed
            for choice, price in choices:
                spent = spent + choice.probabilities() @ price.to(choice.logits)
            for mixture, price in mixtures:
                spent = spent + mixture.shares() @ price.to(mixture.weights)
            return spent

        return expected, largest

    def _option_ops(self, site: str, option: Option) -> list[Op]:
        pool, relu = option
        number = int(site.lstrip("abcdefghijklmnopqrstuvwxyz"))
        stage = self.space.stages()[number - 1] if site.startswith("block") else number - 1
        C, H, W = self.space.shape(stage)
        size = (H // 2, W // 2) if pool else (H, W)
        inputs, shape = ("input",), (C, *size)
        ops: list[Op] = []
        if pool == "max":
            ops.append(MaxPool2d(name=pool, inputs=inputs, shape=shape, kernel=(2, 2), stride=(2, 2)))
        elif pool == "avg":
            ops.append(AvgPool2d(name=pool, inputs=inputs, shape=shape, kernel=(2, 2), stride=(2, 2)))
        elif pool == "conv":
            ops.append(Geometry(C, C, (2, 2), (2, 2), (0, 0), False, True).op(size))
        if relu:
            ops.append(Relu(name="relu", inputs=inputs, shape=shape, patches=((1, 1),) * C))
        return ops

    def _merged(self, stage: int, operators: tuple[str, ...]) -> tuple[Op, ...]:
        """A sum of operators as `merge` would leave it."""
        key = (stage, operators)
        if key not in self._sums:
            graph = fx.Graph()
            source = graph.placeholder("input")
            sums = Reduction(graph, {source: self.space.shape(stage)}, self._price)
            ends = []
            for name in operators:
                end = source
                for link in links(name, self.space, stage):
                    end = sums.append(link, end, "convolution")
                ends.append(end)
            graph.output(reduce(sums.add, ends) if ends else source)
            sums.reduce()
            self._sums[key] = sums.ops()
        return self._sums[key]

    def _amid(self, ops: Sequence[Op]) -> Cost:
        """Of ops one after the other, between two 1x1 convolutions, which are not counted."""
        if not ops:
            return Cost()
        C, H, W = ops[0].shape
        conv = unit(C).geometry
        before = replace(conv.op(self._before(ops[0])), name="before", inputs=(Program.INPUT,))
        chain: list[Op] = [before]
        for k, op in enumerate(ops):
            chain.append(replace(op, name=f"op{k}", inputs=(chain[-1].name,)))
        chain.append(replace(conv.op((H, W)), name="after", inputs=(chain[-1].name,)))
        priced = self.cost.prices(Program(tuple(chain), before.shape, "after"))
        return total(priced[f"op{k}"] for k in range(len(ops)))

    @staticmethod
    def _before(op: Op) -> tuple[int, int]:
        """The size of the map that an option's first op reads."""
        _, H, W = op.shape
        return (H, W) if isinstance(op, Relu) else (2 * H, 2 * W)

    @cached_property
    def _price(self) -> Price:
        return cache(self.paths)

    def _between(self, ops: Sequence[Op], shape: tuple[int, ...]) -> Cost:
        """Of ops that read a value of this shape and end in a ReLU, which is not counted: it truncates."""
        if not ops:
            return Cost()
        result = ops[-1].shape
        relu = Relu(name="relu", inputs=(ops[-1].name,), shape=result, patches=((1, 1),) * result[0])
        priced = self.cost.prices(Program((*ops, relu), shape, relu.name))
        return total(priced[op.name] for op in ops)

    @cached_property
    def _timed(self) -> Rates:
        (relu,) = self._option_ops("block1", ("", True))
        return self.rates if burden(self.rates.price(relu)) else PublishedRates()


def _constant(network: nn.Module) -> nn.Module:
    """Every batch-norm adds something, as after training: what merges depends on it."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.bias)
    return network
