"""Evaluating many networks of a supernet fast: every block of every option as a plain one, batch-norm folded.

A batch whose samples go through different networks is grouped by option, so that each sample costs what its
own network costs, and not what the widest one does.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from tightrope.methods.binas.extract import extract, plain_block
from tightrope.methods.binas.paths import Paths
from tightrope.methods.binas.supernet import Supernet
from tightrope.solve.staged import Choice

M = TypeVar("M", bound=nn.Module)


class Bank:
    """The blocks of `supernet`, which must not change meanwhile; made when first used, on its device."""

    def __init__(self, supernet: Supernet) -> None:
        self.supernet, self.space = supernet, supernet.space
        self.ends = folded(extract(supernet, self.space.smallest()))
        self.made: dict[tuple[int, int, int], nn.Module] = {}

    def block(self, stage: int, position: int, option: int) -> nn.Module:
        key = stage, position, option
        if key not in self.made:
            self.made[key] = folded(plain_block(self.supernet, *key))
        return self.made[key]

    @torch.inference_mode()
    def one(self, choice: Choice, x: Tensor) -> Tensor:
        """Logits (N, classes) of all of `x` (N, C, H, W) through the network of `choice`."""
        x = self._before(x)
        for s, options in enumerate(choice):
            for b, option in enumerate(options):
                x = self.block(s, b, option)(x)
        return self._after(x)

    @torch.inference_mode()
    def mixed(self, paths: Paths, x: Tensor) -> Tensor:
        """Logits (N, classes), every sample of `x` through its own network."""
        x, paths = self._before(x), paths.to(x.device)
        place = 0
        for s, stage in enumerate(self.space.stages):
            for b in range(stage.depths[-1]):
                reached = paths.depths[:, s] > b
                chosen = torch.where(reached, paths.options[:, place], -1)
                groups = [(k, (chosen == k).nonzero()[:, 0]) for k in sorted(set(chosen.tolist()))]
                parts = [self.block(s, b, k)(x[group]) if k >= 0 else x[group] for k, group in groups]
                x = torch.cat(parts)[torch.cat([group for _, group in groups]).argsort()]
                place += 1
        return self._after(x)

    def _before(self, x: Tensor) -> Tensor:
        x = x.to(memory_format=torch.channels_last)
        y: Tensor = self.ends.blocks[0](self.ends.act1(self.ends.conv_stem(x)))
        return y

    def _after(self, x: Tensor) -> Tensor:
        net = self.ends
        x = net.act2(net.conv_head(net.global_pool(net.blocks[-1](x))))
        logits: Tensor = net.classifier(torch.flatten(x, 1))
        return logits


def folded(module: M) -> M:
    """A copy in evaluation mode, every batch-norm that follows a convolution folded into it."""
    module = copy.deepcopy(module).eval()
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for parent in module.modules():
        for (name, conv), (after, norm) in pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, after, nn.Identity())
    return module
