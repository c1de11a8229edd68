"""All networks of a space at once: every operator of every block, and the choices under training."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from tightrope.methods.seesaw.network import Frame, Join, assemble, pooling
from tightrope.methods.seesaw.operators import build, scale
from tightrope.methods.seesaw.space import Aggregate, Architecture, Block, Space

Option = tuple[str, bool]  # how to pool, "" in a block; whether a ReLU follows


class Choice(nn.Module):
    """One of several options, by logits. `bits` (K,) weigh the options in the next forward pass.

    A drawn bit is 0 or 1 with the gradient of its probability: then d loss / d logit_i is
    sum_j <out_j, d loss / d out> p_j (1[i = j] - p_i), ProxylessNAS's (Cai et al. 2019, equation 4).
    """

    bits: Tensor

    def __init__(self, options: Sequence[Option], favoured: float = 0.0) -> None:
        super().__init__()
        self.options = tuple(options)
        start = torch.randn(len(options)) * 1e-3
        start += torch.tensor([favoured * relu for _, relu in options])
        self.logits = nn.Parameter(start)
        self.register_buffer("bits", torch.ones(len(options)) / len(options), persistent=False)

    def probabilities(self) -> Tensor:
        return self.logits.softmax(0)

    def draw(self, generator: torch.Generator, *, learn: bool) -> None:
        p = self.probabilities()
        k = int(torch.multinomial(p.detach().cpu(), 1, generator=generator))
        self.fix(k)
        if learn:
            self.bits = self.bits + p - p.detach()

    def fix(self, k: int) -> None:
        self.bits = torch.zeros_like(self.logits, requires_grad=False)
        self.bits[k] = 1.0

    def used(self) -> list[int]:
        """The options whose outputs the forward pass needs."""
        live = self.bits.requires_grad
        return [k for k in range(len(self.options)) if live or bool(self.bits[k] != 0)]


class Mixture(nn.Module):
    """Branches of one input, added with softmax weights over those that are `picked` out of the `alive`.

    `gates` (N, picked), where there are any, multiply the weights of every image before they add up to 1.
    """

    def __init__(self, branches: dict[str, nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleDict(branches)
        self.weights = nn.Parameter(torch.rand(len(branches)) * 1e-3)
        self.alive = list(range(len(branches)))
        self.picked = self.alive
        self.gates: Tensor | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.branches)

    def shares(self) -> Tensor:
        """The weights of all branches, 0 of those that are gone."""
        shares = torch.zeros_like(self.weights)
        return shares.index_put((torch.tensor(self.alive),), self.weights[self.alive].softmax(0))

    def draw(self, count: int, generator: torch.Generator) -> None:
        """Pick `count` of the branches that are left, every one as likely; all of them if there are fewer."""
        order = torch.randperm(len(self.alive), generator=generator)[:count].tolist()
        self.picked = sorted(self.alive[k] for k in order)

    def drop(self, k: int) -> None:
        self.alive = self.picked = [j for j in self.alive if j != k]

    def coefficients(self) -> Tensor:
        return self.weights[self.picked].softmax(0)

    def forward(self, x: Tensor) -> Tensor:
        coefficients, branches = self.coefficients(), list(self.branches.values())
        if self.gates is not None:
            coefficients = coefficients * self.gates
            coefficients = coefficients / coefficients.sum(1, keepdim=True)
        y: Tensor | None = None
        for weight, k in zip(coefficients.unbind(-1), self.picked, strict=True):
            if not isinstance(branches[k], Nothing):
                part = weight.view(-1, 1, 1, 1) * branches[k](x)
                y = part if y is None else y + part
        return torch.zeros_like(x) if y is None else y


class Nothing(nn.Module):
    """The operator `none`: it only takes weight from the others."""


class MixedBlock(nn.Module):
    def __init__(self, space: Space, stage: int, favoured: float) -> None:
        super().__init__()
        channels = space.shape(stage)[0]
        self.mixture = Mixture(
            {o: Nothing() if o == "none" else _branch(o, channels, space) for o in space.operators}
        )
        self.choice = Choice([("", False), ("", True)], favoured)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mixture(x)
        used, bits = self.choice.used(), self.choice.bits
        if len(used) == 1:
            return y.relu() if used[0] else y
        return torch.add(bits[0] * y, bits[1] * y.relu())


class MixedJoin(nn.Module):
    def __init__(self, space: Space, stage: int, favoured: float) -> None:
        super().__init__()
        self.join = Join(space, stage)
        self.weights = nn.Parameter(torch.rand(len(self.join.parts)) * 1e-3)
        self.pools = nn.ModuleDict({pool: pooling(pool, space.shape(stage)[0]) for pool in space.pools})
        rectify = (False, True) if space.free else (True,)
        self.choice = Choice(list(product(space.pools, rectify)), favoured)

    def forward(self, values: Sequence[Tensor]) -> Tensor:
        shares = self.weights.softmax(0)
        parts = zip(shares, self.join.parts, values, strict=True)
        y = sum(share * part(value) for share, part, value in parts)
        used = self.choice.used()
        pooled = {pool: self.pools[pool](y) for pool in {self.choice.options[k][0] for k in used}}
        outputs = []
        for k in used:
            pool, relu = self.choice.options[k]
            outputs.append(self.choice.bits[k] * (pooled[pool].relu() if relu else pooled[pool]))
        return torch.stack(outputs).sum(0)


class Supernet(Frame):
    """The frame with all operators and options. `favoured`: by how much the logits of ReLUs start ahead."""

    def __init__(self, space: Space, favoured: float = 0.0) -> None:
        blocks = [MixedBlock(space, stage, favoured) for stage in space.stages()]
        joins = [MixedJoin(space, stage, favoured) for stage in range(len(space.blocks) - 1)]
        super().__init__(space, blocks, joins)
        self.space = space

    @property
    def mixtures(self) -> list[Mixture]:
        return [m for m in self.modules() if isinstance(m, Mixture)]

    @property
    def choices(self) -> dict[str, Choice]:
        """By the names of `Architecture.to_json`: those of blocks, then those of aggregates."""
        named = {f"block{k}": block.choice for k, block in enumerate(self.blocks, 1)}
        return named | {f"aggregate{k}": join.choice for k, join in enumerate(self.joins, 1)}  # type: ignore[return-value]

    def architecture(self, options: Sequence[int]) -> Architecture:
        """The operators that are left, and these options in the order of `choices`."""
        picked = [c.options[k] for c, k in zip(self.choices.values(), options, strict=True)]
        count = len(self.blocks)
        blocks = [
            Block(tuple(m.names[k] for k in m.alive if m.names[k] != "none"), relu)
            for m, (_, relu) in zip(self.mixtures, picked[:count], strict=True)
        ]
        return Architecture(tuple(blocks), tuple(Aggregate(p, r) for p, r in picked[count:]))  # type: ignore[arg-type]

    @torch.no_grad()
    def extract(self, network: Architecture) -> Frame:
        """A plain copy of one architecture with the weights that it has here."""
        plain = assemble(self.space, network)
        for name in ("stem", "transitions", "classifier"):
            plain.get_submodule(name).load_state_dict(self.get_submodule(name).state_dict())
        summed: list[Any] = [block[0] for block in plain.blocks]  # type: ignore[index]
        for mixture, block, choice in zip(self.mixtures, summed, network.blocks, strict=True):
            shares = mixture.shares()
            for name in choice.operators:
                branch = block.branches[name]
                branch.load_state_dict(mixture.branches[name].state_dict())
                scale(branch, float(shares[mixture.names.index(name)]))
        joins: list[Any] = list(zip(self.joins, plain.joins, strict=True))
        for (mixed, joined), aggregate in zip(joins, network.aggregates, strict=True):
            joined.join.load_state_dict(mixed.join.state_dict())
            for share, part in zip(mixed.weights.softmax(0), joined.join.parts, strict=True):
                scale(part, float(share))
            joined.pool.load_state_dict(mixed.pools[aggregate.pool].state_dict())
        return plain


def _branch(name: str, channels: int, space: Space) -> nn.Module:
    """As in a plain network; its factor per channel, if it has one, is not trained beside the weight."""
    branch = build(name, channels, space.borders)
    if not any(isinstance(m, nn.BatchNorm2d) for m in branch.modules()):
        branch.requires_grad_(False)
    return branch
