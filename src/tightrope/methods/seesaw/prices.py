"""What every choice of a space costs, by a runtime's prices or by the two rates of the published release."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from tightrope.lower import lower
from tightrope.methods import CostModel
from tightrope.methods.seesaw.merge import merge
from tightrope.methods.seesaw.network import assemble
from tightrope.methods.seesaw.operators import CONVOLUTIONS, POOLS, extent, paddings
from tightrope.methods.seesaw.space import Architecture, Space
from tightrope.methods.seesaw.supernet import Option, Supernet
from tightrope.program import AvgPool2d, Conv2d, MaxPool2d, Op, Program, Relu, base_cost
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


def operator_ops(name: str, space: Space, stage: int) -> list[Op]:
    """An operator as it is written, its average pool or convolutions."""
    C, H, W = space.shape(stage)
    if name in POOLS:
        k = POOLS[name]
        pool = AvgPool2d(
            name=name, inputs=("input",), shape=(C, H, W), kernel=(k, k), stride=(1, 1), padding=(k // 2,) * 2
        )
        return [pool, _conv("factor", C, (H, W), (1, 1), C)]
    if name == "skip":
        return [_conv("factor", C, (H, W), (1, 1), C)]
    ops: list[Op] = []
    for step, (rows, columns) in zip(CONVOLUTIONS[name], paddings(name, space.borders), strict=True):
        H, W = H + 2 * (rows - step.radius[0]), W + 2 * (columns - step.radius[1])
        ops.append(_conv(name, C, (H, W), step.kernel, step.groups or C))
    return ops


def _conv(name: str, C: int, size: tuple[int, int], kernel: tuple[int, int], groups: int) -> Conv2d:
    return Conv2d(name=name, inputs=("input",), shape=(C, *size), kernel=kernel, groups=groups, in_channels=C)


@dataclass(frozen=True)
class Prices:
    """`cost` prices what is chosen and merged; `rates` say when linear and nonlinear work are in balance.

    Where `rates` give no times, a runtime in the clear say, those of the release count.
    """

    space: Space
    cost: CostModel
    rates: Rates
    _known: dict[tuple[bool, int, tuple[str, ...]], Cost] = field(
        default_factory=dict, repr=False, compare=False
    )

    def exact(self, network: nn.Module) -> Cost:
        """Of a network after merging, as the runtime prices the whole program; rounds are of a path."""
        return self.program(lower(self.merged(network), self.space.input_shape))

    def merged(self, network: nn.Module) -> nn.Module:
        return merge(network, self.space.input_shape, lambda op: burden(self.cost.price(op)))

    def program(self, program: Program) -> Cost:
        priced = total(self.cost.prices(program).values())
        return Cost(**{m: getattr(priced, m) for m in (*METRICS, "weights")})

    def option(self, site: str, option: Option) -> Cost:
        """Of the pool and the ReLU of a site, by its name in `Supernet.choices`."""
        return total(self.cost.price(op) for op in self._option_ops(site, option))

    def balance(self, network: Architecture, drelus: float) -> float:
        """Milliseconds of the blocks' linear work over those of so many comparisons, by `rates`."""
        blocks = zip(self.space.stages(), network.blocks, strict=True)
        linear = sum(burden(self._priced(self._timed, stage, block.operators)) for stage, block in blocks)
        (relu,) = self._option_ops("block1", ("", True))
        nonlinear = drelus * burden(self._timed.price(relu)) / base_cost(relu).drelus
        return linear / max(nonlinear, 1e-12)

    def block(self, stage: int, operators: Sequence[str]) -> Cost:
        """The linear part of a block, merged where that is cheaper."""
        return self._priced(self.cost, stage, tuple(operators))

    @cached_property
    def fixed(self) -> Cost:
        """Of stem, transitions, joins and classifier where nothing merges with them: exact in MACs only."""
        known = [o for o in self.space.operators if o != "none"]
        # a kernel and a ReLU everywhere: nothing is merged from one block to the next
        network = self.space.network(known[-1:], relu=True)
        spent = self.exact(assemble(self.space, network))
        for stage, block in zip(self.space.stages(), network.blocks, strict=True):
            spent = spent + self.block(stage, block.operators).scaled(-1)
        for k, block in enumerate(network.blocks, 1):
            spent = spent + self.option(f"block{k}", ("", block.relu)).scaled(-1)
        for k, aggregate in enumerate(network.aggregates, 1):
            spent = spent + self.option(f"aggregate{k}", (aggregate.pool, aggregate.relu)).scaled(-1)
        return Cost(**{m: max(0.0, getattr(spent, m)) for m in METRICS})

    @cached_property
    def cheapest(self) -> Architecture:
        """One operator a block, and as few comparisons as the space allows."""
        real = [o for o in self.space.operators if o != "none"]
        operator = min(real, key=lambda o: burden(self.block(0, [o])))
        return self.space.network([operator], relu=False, pool="avg" if "avg" in self.space.pools else None)

    @cached_property
    def least(self) -> Cost:
        """Exact, of the cheapest network."""
        return self.exact(assemble(self.space, self.cheapest))

    @property
    def fewest_macs(self) -> float:
        """Of a network with one operator a block, where nothing merges across blocks."""
        real = [o for o in self.space.operators if o != "none"]
        return self.fixed.macs + sum(
            min(self.block(stage, [o]).macs for o in real) for stage in self.space.stages()
        )

    def linear(self, operators: Sequence[Sequence[str]]) -> Cost:
        """Of a network with these operators in its blocks and the fewest comparisons, about."""
        spent = self.least
        for stage, names, block in zip(self.space.stages(), operators, self.cheapest.blocks, strict=True):
            spent = spent + self.block(stage, names) + self.block(stage, block.operators).scaled(-1)
        return spent

    def expectation(self, net: Supernet, metric: str) -> Callable[[], Tensor]:
        """The mean of a cost over the probabilities of the choices and the weights of the operators.

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

        def expected() -> Tensor:
            spent = fixed
            for choice, price in choices:
                spent = spent + choice.probabilities() @ price.to(choice.logits)
            for mixture, price in mixtures:
                spent = spent + mixture.shares() @ price.to(mixture.weights)
            return spent

        return expected

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
            ops.append(replace(_conv(pool, C, size, (2, 2), 1), stride=(2, 2)))
        if relu:
            ops.append(Relu(name="relu", inputs=inputs, shape=shape, patches=((1, 1),) * C))
        return ops

    def _priced(self, cost: Rates, stage: int, operators: tuple[str, ...]) -> Cost:
        """The cheapest way to write a sum: the operators with the smallest kernels as one convolution."""
        key = (cost is self.cost, stage, operators)
        if key not in self._known:
            self._known[key] = self._cheapest(cost, stage, operators)
        return self._known[key]

    def _cheapest(self, cost: Rates, stage: int, operators: tuple[str, ...]) -> Cost:
        C, H, W = self.space.shape(stage)
        foldable: list[tuple[tuple[int, int], Cost]] = []
        apart = Cost()
        for name in operators:
            alone = total(cost.price(op) for op in operator_ops(name, self.space, stage))
            kernel = extent(name, self.space.borders)
            if kernel is None:
                apart = apart + alone
            else:
                foldable.append((kernel, alone))
        foldable.sort(key=lambda pair: math.prod(pair[0]))
        best = apart + total(alone for _, alone in foldable)
        for count in range(1, len(foldable) + 1):
            rows, columns = (max(k[axis] for k, _ in foldable[:count]) for axis in (0, 1))
            one = cost.price(_conv("merged", C, (H, W), (rows, columns), 1))
            best = min(best, apart + one + total(alone for _, alone in foldable[count:]), key=burden)
        return best

    @cached_property
    def _timed(self) -> Rates:
        (relu,) = self._option_ops("block1", ("", True))
        return self.rates if burden(self.rates.price(relu)) else PublishedRates()
