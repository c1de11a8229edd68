"""The linear operators of a block, as published: 27, or 10 that need less memory (Seesaw, section 3).

All keep channels and size. None has an activation inside, so a sum of them is one linear map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from tightrope.errors import InputError, near

Borders = Literal["published", "mergeable"]
BORDERS: tuple[Borders, ...] = ("mergeable", "published")
SIZES = (3, 5, 7)


@dataclass(frozen=True)
class Step:
    """One convolution of an operator. `groups` 0: one per channel. `norm`: batch-norm follows."""

    kernel: tuple[int, int]
    groups: int = 1
    dilation: int = 1
    norm: bool = True

    @property
    def radius(self) -> tuple[int, int]:
        """How far it sees to each side, in rows and columns: what padding keeps the size."""
        return (self.dilation * (self.kernel[0] // 2), self.dilation * (self.kernel[1] // 2))


def _separable(k: int, dilation: int) -> tuple[Step, ...]:
    return (Step((k, k), 0, dilation, norm=False), Step((1, 1)))


CONVOLUTIONS: dict[str, tuple[Step, ...]] = {
    **{f"conv_{k}": (Step((k, k)),) for k in (1, *SIZES)},
    **{f"sep_conv_{k}": _separable(k, 1) * 2 for k in SIZES},
    **{f"dil_conv_{k}": _separable(k, 2) for k in SIZES},
    **{f"dil_sep_conv_{k}": _separable(k, 2) * 2 for k in SIZES},
    **{f"group_8_conv_{k}": (Step((k, k), 8),) for k in SIZES},
    **{f"conv_{k}x1_1x{k}": (Step((1, k), norm=False), Step((k, 1))) for k in SIZES},
    **{f"van_conv_{k}": (Step((k, k)),) * 2 for k in SIZES},
}
POOLS = {f"avg_pool_{k}": k for k in SIZES}
ALL: tuple[str, ...] = ("none", *POOLS, "skip", *CONVOLUTIONS)  # the published order of branch weights
LOW_MEMORY: tuple[str, ...] = (
    "skip", "conv_3", "conv_1", "sep_conv_3", "sep_conv_5", "dil_conv_3", "dil_sep_conv_3",
    "conv_3x1_1x3", "conv_7x1_1x7", "van_conv_3",
)  # fmt: skip
LISTS: dict[str, tuple[str, ...]] = {"all": ALL, "low-memory": LOW_MEMORY, "plain": ("conv_3",)}


def parse_operators(text: str) -> tuple[str, ...]:
    """A list by name (`all`, `low-memory`, `plain`), or operators separated by commas.

    Raises InputError for an unknown operator, one given twice, and a list without any but `none`.
    """
    names = LISTS.get(text) or tuple(word.strip() for word in text.split(","))
    for name in names:
        if name not in ALL:
            lists = " or ".join(f"--set operators={known}" for known in LISTS)
            raise InputError(
                "unknown operator", got=name, allowed=near(name, ALL), fix=f"a whole list: {lists}"
            )
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise InputError("an operator is given twice", got=", ".join(twice))
    if set(names) == {"none"}:
        raise InputError("a block needs an operator beside none", got=text)
    return names


def check_channels(names: Sequence[str], channels: int) -> None:
    """Raise InputError where an operator's groups do not divide the channels."""
    grouped = [name for name in names if name.startswith("group_8")]
    if grouped and channels % 8:
        raise InputError(
            "these operators need a multiple of 8 channels",
            got=f"{', '.join(grouped)} on {channels} channels",
            fix="a width that is a multiple of 4, or a list without them",
        )


def build(name: str, channels: int, borders: Borders) -> nn.Module:
    """A branch on (N, channels, H, W), weights random.

    `mergeable`: a stack of convolutions is padded once, before the first, and average pools count the
    padding; then the branch equals one convolution up to the border. `published`: every convolution pads and
    pools average what is inside. Pools and `skip` end with a factor per channel, 1 at first.
    """
    if name == "skip":
        return _factor(channels)
    if name in POOLS:
        k = POOLS[name]
        pool = nn.AvgPool2d(k, 1, k // 2, count_include_pad=borders == "mergeable")
        return nn.Sequential(pool, _factor(channels))
    parts: list[nn.Module] = []
    for step, padding in zip(CONVOLUTIONS[name], paddings(name, borders), strict=True):
        groups = step.groups or channels
        parts.append(
            nn.Conv2d(channels, channels, step.kernel, 1, padding, step.dilation, groups=groups, bias=False)
        )
        if step.norm:
            parts.append(nn.BatchNorm2d(channels))
    return nn.Sequential(*parts)


def paddings(name: str, borders: Borders) -> list[tuple[int, int]]:
    """Of every step, rows and columns."""
    radii = [step.radius for step in CONVOLUTIONS[name]]
    if borders == "published":
        return radii
    whole = (sum(r[0] for r in radii), sum(r[1] for r in radii))
    return [whole] + [(0, 0)] * (len(radii) - 1)


@torch.no_grad()
def scale(branch: nn.Module, factor: float) -> None:
    """Multiply what the branch computes, by its last layer."""
    last = [m for m in branch.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)][-1]
    last.weight.mul_(factor)
    if last.bias is not None:
        last.bias.mul_(factor)


def _factor(channels: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, channels, 1, groups=channels, bias=False)
    nn.init.ones_(conv.weight)
    return conv
