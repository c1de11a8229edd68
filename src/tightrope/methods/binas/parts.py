"""What networks of a space are made of, as modules to be timed: two fixed ends and the distinct blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from tightrope.methods.binas.space import Space
from tightrope.models.mobilenet import BLOCKS, mobilenet
from tightrope.solve.staged import Choice

FIXED = ("stem", "head")


@dataclass(frozen=True)
class Part:
    """A block at every place where the same one may stand, or a fixed end. `input_shape`: (C, H, W)."""

    key: str
    input_shape: tuple[int, int, int]
    space: Space
    place: tuple[int, int, int] | None = None  # stage, position, option

    def module(self) -> nn.Module:
        """In evaluation mode, its weights random."""
        if self.place is not None:
            stage, position, option = self.place
            block = self.space.block(stage, position, option)
            return BLOCKS[block.kind](block, self.input_shape[0], block.activation or "hs").eval()
        space = self.space
        net = mobilenet(space.architecture(space.smallest()), space.classes, space.input_shape[0])
        if self.key == "stem":
            return nn.Sequential(net.conv_stem, net.bn1, net.act1, net.blocks[0]).eval()
        last = (net.blocks[-1], net.global_pool, net.conv_head, net.act2)
        return nn.Sequential(*last, nn.Flatten(1), net.classifier).eval()


def keys(space: Space) -> dict[tuple[int, int], list[str]]:
    """Per (stage, position), the key of the part of every option."""
    return {
        (s, b): [f"{inputs}x{side}x{side} {space.block(s, b, k)}" for k in range(len(space.options))]
        for s, b, inputs, side in space.places()
    }


def parts(space: Space) -> Mapping[str, Part]:
    """By key: the fixed ends, then every distinct block (120 in the published space)."""
    side = -(-space.input_shape[1] // space.stride)
    for stage in space.stages:
        side = -(-side // stage.stride)
    end = (space.stages[-1].channels, side, side)
    found = {"stem": Part("stem", space.input_shape, space), "head": Part("head", end, space)}
    named = keys(space)
    for s, b, inputs, side in space.places():
        for k, key in enumerate(named[s, b]):
            found.setdefault(key, Part(key, (inputs, side, side), space, (s, b, k)))
    return found


def of_choice(space: Space, choice: Choice) -> list[str]:
    """The keys of the parts that a network is made of, the ends among them."""
    named = keys(space)
    blocks = [named[s, b][k] for s, stage in enumerate(choice) for b, k in enumerate(stage)]
    return [*FIXED, *blocks]
