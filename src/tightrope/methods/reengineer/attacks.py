"""Attacks by projected gradient descent, in units of pixels: eps and bounds hold in every channel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tightrope.errors import InputError
from tightrope.graph import Graph, trace
from tightrope.methods.reengineer.heads import last_linear

FAR = 1000.0  # where the attack pulls the first feature
OTHERS = 0.1  # weight of the others, which it pulls to 0


@dataclass(frozen=True, kw_only=True)
class Attack:
    """`eps` and `step` in pixels of [0, 1]; `mean` and `std` per channel of the network's inputs."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    eps: float
    step: float
    iterations: int = 40
    seed: int = 0

    def run(self, x: Tensor, objective: Callable[[Tensor], Tensor]) -> Tensor:
        """Images within `eps` of x (normalised, (N, C, H, W)) and within [0, 1] that make `objective` large.

        Starts at random within eps; Madry et al. 2018, arXiv 1706.06083.
        """
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        low = torch.maximum(x - self.eps / std, (0 - mean) / std)
        high = torch.minimum(x + self.eps / std, (1 - mean) / std)
        generator = torch.Generator().manual_seed(self.seed)
        found = torch.rand(x.shape, generator=generator) * 2 - 1
        found = torch.clamp(x + found * self.eps / std, low, high)
        for _ in range(self.iterations):
            found.requires_grad_()
            (gradient,) = torch.autograd.grad(objective(found), found)
            found = torch.clamp(found.detach() + gradient.sign() * self.step / std, low, high)
        return found


def features(graph: Graph) -> fx.GraphModule:
    """The network without its last layer. Raises InputError where that is not linear."""
    module = trace(graph.module, graph.input_shape).module
    name = last_linear(module)
    if name is None:
        raise InputError("the donor must end in a linear layer, before which its features are")
    module.set_submodule(name, nn.Identity())
    return module.requires_grad_(False)


def feature_attack(donor: fx.GraphModule, x: Tensor, attack: Attack) -> Tensor:
    """Images made on a public donor's features alone (Qi et al. 2023, after Zhang et al. 2022, ReMoS): the
    first feature is pulled to 1000, the others to 0.
    """

    def objective(images: Tensor) -> Tensor:
        value = donor(images)
        first, others = value[:, 0], value[:, 1:]
        far: Tensor = (first - FAR).square() + OTHERS * others.square().mean(1)
        return -far.sum()

    return attack.run(x, objective)


def label_attack(model: nn.Module, x: Tensor, y: Tensor, attack: Attack) -> Tensor:
    """The standard attack, on the network itself and its labels."""
    return attack.run(x, lambda images: F.cross_entropy(model(images), y, reduction="sum"))
