"""Which channels of a wide block a narrower one should keep: those that matter most come first.

The importance of a channel is the sum of |weight * gradient| over its weights (Molchanov et al. 2017, Taylor
expansion of the loss), here of the expansion, the depthwise convolution and the expansion of the SE; for the
hidden channels of the SE, of its reduction.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tightrope.evaluate import evaluating
from tightrope.models.mobilenet import InvertedResidual, SqueezeExcite

M = TypeVar("M", bound=nn.Module)
Scores = dict[str, Tensor]  # by the name of the weight


def importance(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Scores:
    """Per convolution of the inverted residuals, |weight * gradient| summed over `batches` and over all of
    its weights but those of an output channel: (output channels,), float64 on the CPU.

    The network runs in evaluation mode and is not changed.
    """
    model = copy.deepcopy(model)
    convs = {
        f"{name}.{inside}": conv
        for name, block in model.named_modules()
        if isinstance(block, InvertedResidual)
        for inside, conv in block.named_modules()
        if isinstance(conv, nn.Conv2d) and inside != "conv_pwl"
    }
    weights = [conv.weight for conv in convs.values()]
    found = {name: torch.zeros(len(conv.weight), dtype=torch.float64) for name, conv in convs.items()}
    device = weights[0].device
    with evaluating(model), torch.enable_grad():
        for x, y in batches:
            loss = F.cross_entropy(model(x.to(device)), y.to(device))
            gradients = torch.autograd.grad(loss, weights)
            for score, weight, gradient in zip(found.values(), weights, gradients, strict=True):
                score += (weight * gradient).detach().abs().sum((1, 2, 3)).double().cpu()
    return found


def reorder(model: M, scores: Scores) -> M:
    """A copy with the inner channels of every inverted residual sorted, the most important first: the same
    function, up to the order in which sums round.
    """
    model = copy.deepcopy(model)
    for name, block in model.named_modules():
        if isinstance(block, InvertedResidual):
            _sort(
                block, {k.removeprefix(f"{name}."): v for k, v in scores.items() if k.startswith(f"{name}.")}
            )
    return model


@torch.no_grad()
def _sort(block: InvertedResidual, scores: Scores) -> None:
    inner = scores["conv_pw"] + scores["conv_dw"]
    if isinstance(block.se, SqueezeExcite):
        inner = inner + scores["se.conv_expand"]
        hidden = scores["se.conv_reduce"].argsort(descending=True, stable=True)
        _take(block.se.conv_reduce, 0, hidden)
        _take(block.se.conv_expand, 1, hidden)
    order = inner.argsort(descending=True, stable=True)
    for module in (block.conv_pw, block.bn1, block.conv_dw, block.bn2):
        _take(module, 0, order)
    _take(block.conv_pwl, 1, order)
    if isinstance(block.se, SqueezeExcite):
        _take(block.se.conv_reduce, 1, order)
        _take(block.se.conv_expand, 0, order)


def _take(module: nn.Module, dimension: int, order: Tensor) -> None:
    """Reorder weights along a dimension; what belongs to output channels, a bias say, with dimension 0."""
    for tensor in module.state_dict().values():
        if tensor.dim() > dimension:
            tensor.copy_(tensor.index_select(dimension, order.to(tensor.device)))
