"""Binary masks on a frozen network: learnable scores, the weights that they leave, and what these cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

Granularity = Literal["weight", "channel", "hybrid"]
GRANULARITIES: tuple[Granularity, ...] = ("weight", "channel", "hybrid")
CHANNELS = "channels"  # the name of the scores of whole channels
Bits = dict[str, Tensor]


class _Binarise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, score: Tensor) -> Tensor:
        return (score > 0).to(score.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].clamp(-1, 1)


def binarise(score: Tensor) -> Tensor:
    """1 where score > 0, else 0 (0 is off). Straight through: its gradient is the incoming one, every element
    clipped to [-1, 1], whatever the score.
    """
    result: Tensor = _Binarise.apply(score)  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True)
class Channels:
    """Which channels live and die together: unit numbers, `count` of them; -1 is a channel of no unit.

    `out` holds a unit for every output channel of a convolution, linear layer or batch-norm, `into` one for
    every input channel of a convolution or linear layer. `chains`: units of one tensor, of which one stays.
    """

    count: int = 0
    out: Mapping[str, Tensor] = field(default_factory=dict)
    into: Mapping[str, Tensor] = field(default_factory=dict)
    chains: tuple[tuple[int, ...], ...] = ()

    @cached_property
    def separate(self) -> tuple[tuple[int, ...], ...]:
        """The chains that contain no other one: of a concatenation its parts."""
        return tuple(c for c in self.chains if not any(set(other) < set(c) for other in self.chains))

    def to(self, device: torch.device) -> Channels:
        """The same, its tensors on a device."""
        out, into = ({k: v.to(device) for k, v in units.items()} for units in (self.out, self.into))
        return replace(self, out=out, into=into)

    def into_matrix(self, name: str, module: nn.Module) -> Tensor:
        """The unit that each weight of a layer reads, (out, in / groups)."""
        groups = getattr(module, "groups", 1)
        units = self.into[name].view(groups, -1)
        return units.repeat_interleave(module.get_parameter("weight").shape[0] // groups, 0)


@dataclass(frozen=True)
class Masked:
    """A frozen network with scores: 1 at first, so that nothing is masked.

    `names`: the parameters that are masked and counted, weights and biases of convolutions and linear layers
    outside the head. `positions`: how often each layer's weights are used per image.
    """

    model: nn.Module
    names: tuple[str, ...]
    channels: Channels
    granularity: Granularity
    positions: Mapping[str, int]
    scores: Mapping[str, Tensor]

    @classmethod
    def start(
        cls,
        model: nn.Module,
        names: tuple[str, ...],
        channels: Channels,
        granularity: Granularity,
        positions: Mapping[str, int],
    ) -> Masked:
        parameters = dict(model.named_parameters())
        scores = {}
        if granularity != "channel":
            scores = {name: torch.ones_like(parameters[name]).requires_grad_() for name in names}
        if granularity != "weight":
            device = parameters[names[0]].device
            channels = channels.to(device)
            scores[CHANNELS] = torch.ones(channels.count, device=device).requires_grad_()
        return cls(model, names, channels, granularity, positions, scores)

    @property
    def device(self) -> torch.device:
        """Where the network and the scores are; masks may be elsewhere."""
        return next(iter(self.scores.values())).device

    @property
    def total(self) -> int:
        """How many weights can be masked."""
        parameters = dict(self.model.named_parameters())
        return sum(parameters[name].numel() for name in self.names)

    def bits(self) -> Bits:
        """Differentiable masks of 0 and 1."""
        return {name: binarise(score) for name, score in self.scores.items()}

    def snapshot(self) -> Bits:
        """Masks that later steps do not change."""
        return {name: (score.detach() > 0).clone() for name, score in self.scores.items()}

    def effective(self, bits: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters that masks leave: weights, and of masked channels batch-norm's scale and shift too,
        so that a masked channel is 0.
        """
        gates = self._gates(bits)
        result = {}
        for name, parameter in self.model.named_parameters():
            module, _, _ = name.rpartition(".")
            value = parameter.detach() if name in self.names else parameter
            if name in bits:
                value = value * bits[name].to(value)
            if gates is not None and module in self.channels.out:
                gate = gates[self.channels.out[module]]
                value = value * gate.view(-1, *[1] * (value.dim() - 1))
            result[name] = value
        return result

    def __call__(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """The network's outputs with the parameters that `effective` gave."""
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        outputs: Tensor = functional_call(self.model, parameters, (x,))
        return outputs

    def kept(self, bits: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(weights, multiplications per image) that masks leave, differentiable; the head is not counted.

        Only whole channels save multiplications: dense kernels multiply with zeros too. In float64: single
        precision counts to 16.8 million.
        """
        gates = self._gates(bits)
        weights = torch.zeros((), dtype=torch.float64, device=self.device)
        macs = torch.zeros_like(weights)
        for name in self.names:
            module, _, part = name.rpartition(".")
            kept, through = self._kept(name, bits, gates)
            weights = weights + kept
            if part == "weight":
                per_pair = self.model.get_parameter(name).numel() / through.numel()
                macs = macs + through.double().sum() * (per_pair * self.positions[module])
        return weights, macs

    def by_layer(self, bits: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
        """Of every masked layer: weights kept, weights."""
        gates = self._gates(bits)
        found: dict[str, tuple[int, int]] = {}
        for name in self.names:
            module, _, _ = name.rpartition(".")
            kept, of = found.get(module, (0, 0))
            more = int(self._kept(name, bits, gates)[0])
            found[module] = (kept + more, of + self.model.get_parameter(name).numel())
        return found

    def _kept(self, name: str, bits: Mapping[str, Tensor], gates: Tensor | None) -> tuple[Tensor, Tensor]:
        """(weights of one parameter that are kept, `_open` of it)."""
        module, _, part = name.rpartition(".")
        layer = self.model.get_submodule(module)
        through = self._open(module, layer, part, gates)
        parameter = layer.get_parameter(part)
        single = bits[name].to(parameter) if name in bits else torch.ones_like(parameter)
        return (through * single.reshape(*through.shape, -1).sum(-1)).double().sum(), through

    def _open(self, module: str, layer: nn.Module, part: str, gates: Tensor | None) -> Tensor:
        """Whether both ends of a weight live: (out, in / groups), or (out,) for a bias."""
        shape = layer.get_parameter(part).shape[:2]
        if gates is None:
            return torch.ones(shape, device=self.device)
        out = torch.ones(shape[0], device=self.device)
        if module in self.channels.out:
            out = gates[self.channels.out[module]]
        if part == "bias":
            return out
        into = torch.ones(shape, device=self.device)
        if module in self.channels.into:
            into = gates[self.channels.into_matrix(module, layer)]
        return out[:, None] * into

    def _gates(self, bits: Mapping[str, Tensor]) -> Tensor | None:
        """A factor per unit; the last one, 1, is for channels of no unit."""
        if CHANNELS not in bits:
            return None
        living = bits[CHANNELS].to(self.device).float()
        return torch.cat([living, living.new_ones(1)])
