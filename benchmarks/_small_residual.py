"""The network of the encrypted benchmarks: 8 to 16 channels, two residual blocks, five activations."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn

from tightrope.data import Data
from tightrope.finetune import Recipe, finetune
from tightrope.models.resnet import ResNet

SPEC = f"{Path(__file__).resolve()}:small"
RECIPE = Recipe(epochs=7, lr=0.2, batch_size=128, ema=0.995, hints=0)


def small(num_classes: int, in_channels: int) -> ResNet:
    """16 levels with polynomials of degree 2 or 3 everywhere, in the ring of degree 2^15."""
    return ResNet(8, ((8, 1, 2), (16, 1, 2)), num_classes, in_channels)


def trained(net: nn.Module, data: Data, weights: Path, recipe: Recipe = RECIPE) -> nn.Module:
    """The network with ReLUs, from `weights`, or else trained (`small`: 1.5 minutes of a core) and kept."""
    if weights.exists():
        net.load_state_dict(load_file(weights))
        return net.eval()
    tuned = finetune(net, data, recipe=recipe)
    weights.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tuned.state_dict().items()}, weights)
    return tuned
