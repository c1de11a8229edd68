"""The search space of Seesaw: how many blocks, how wide, and what every choice counts.

A stem; stages of blocks, each a sum of linear operators and a ReLU or none; between stages an aggregate,
which sums 1x1 convolutions of the stem, of all earlier aggregates and of the stage, pools and rectifies.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tightrope.errors import BundleError, InputError, near
from tightrope.forms import mismatch
from tightrope.methods.seesaw.operators import ALL, Borders, check_channels
from tightrope.types import Json

Pool = Literal["max", "avg", "conv"]
POOLS: tuple[Pool, ...] = ("max", "avg", "conv")
COMPARISONS = 3  # of one value out of a window of 2x2
SMALL = 64  # pixels: up to here the stem keeps the size as published, beyond it divides it by 4
STEMS = {1: 3, 2: 5, 4: 7}  # the kernel of a stem, by its stride


@dataclass(frozen=True)
class Block:
    """Which operators are summed, in the order of the space, and whether a ReLU follows."""

    operators: tuple[str, ...]
    relu: bool


@dataclass(frozen=True)
class Aggregate:
    pool: Pool
    relu: bool


@dataclass(frozen=True)
class Architecture:
    """A network of a space: one choice per block and per aggregate, in order."""

    blocks: tuple[Block, ...]
    aggregates: tuple[Aggregate, ...]

    def to_json(self) -> dict[str, Json]:
        """{`block1`: ..., `aggregate1`: ...}, counted from 1 as published."""
        blocks = {
            f"block{k}": {"operators": list(b.operators), "relu": b.relu}
            for k, b in enumerate(self.blocks, 1)
        }
        return blocks | {
            f"aggregate{k}": {"pool": a.pool, "relu": a.relu} for k, a in enumerate(self.aggregates, 1)
        }

    @classmethod
    def from_json(cls, body: Mapping[str, Json], space: Space) -> Architecture:
        """Raises BundleError for anything that is no choice out of `space`."""
        blocks = [f"block{k}" for k in range(1, sum(space.blocks) + 1)]
        aggregates = [f"aggregate{k}" for k in range(1, len(space.blocks))]
        form: dict[str, Json] = {key: {"operators": [str], "relu": bool} for key in blocks}
        form |= {key: {"pool": str, "relu": bool} for key in aggregates}
        wrong = mismatch(body, form) or ", ".join(sorted(body.keys() - form.keys()))
        for name in () if wrong else blocks:
            known = [o for o in space.operators if o in body[name]["operators"] and o != "none"]
            if known != body[name]["operators"] or not known:
                wrong = f"{name}: {body[name]['operators']}"
        for name in () if wrong else aggregates:
            if body[name]["pool"] not in POOLS:
                wrong = f"{name}: {body[name]['pool']}"
        if wrong:
            raise BundleError("the plan is no network of its space", where=space.name, got=wrong[:200])
        return cls(
            tuple(Block(tuple(body[name]["operators"]), body[name]["relu"]) for name in blocks),
            tuple(Aggregate(body[name]["pool"], body[name]["relu"]) for name in aggregates),
        )


@dataclass(frozen=True)
class Space:
    """`blocks` per stage; stage s has 2^(s+1) times the channels of the stem.

    `pools`: what aggregates may pool with; `free`: whether their ReLU is a choice. As published a max-pool,
    and always a ReLU. `stride`: the stem's; None for the published one, 1 up to 64 pixels and 4 beyond.
    Raises InputError for a space that has no networks for this input.
    """

    name: str
    input_shape: tuple[int, int, int]
    classes: int
    blocks: tuple[int, ...]
    stem: int = 32
    operators: tuple[str, ...] = ALL
    pools: tuple[Pool, ...] = ("max",)
    free: bool = False
    borders: Borders = "published"
    stride: int | None = None

    def __post_init__(self) -> None:
        channels, *size = self.input_shape
        if not self.blocks or min(*self.blocks, self.stem, self.classes, channels) < 1:
            raise InputError("a space needs at least one of everything", got=self)
        if not self.pools or not set(self.pools) <= set(POOLS):
            raise InputError("an aggregate pools with", got=self.pools, allowed=POOLS)
        check_channels(self.operators, 2 * self.stem)
        if self.stem_stride not in STEMS:
            raise InputError("unknown stride of the stem", got=self.stride, allowed=tuple(STEMS))
        unit = self.stem_stride * 2 ** max(0, len(self.blocks) - 2)
        if any(n % unit or n // self.stem_stride < 2 ** (len(self.blocks) - 1) for n in size):
            raise InputError(
                "stages halve the image, and later ones reuse the earlier at their size",
                got=f"{size[0]}x{size[1]} with {len(self.blocks)} stages",
                allowed=f"sides divisible by {unit}",
                fix="fewer stages, images of another size, or a smaller stride of the stem",
            )
        if math.prod(self.shape(len(self.blocks) - 1)[1:]) == 1:
            raise InputError(
                "the last stage has maps of one pixel, and batch-norm needs two values",
                got=f"{size[0]}x{size[1]} with {len(self.blocks)} stages",
                fix="fewer stages, or larger images",
            )

    @property
    def stem_stride(self) -> int:
        if self.stride is not None:
            return self.stride
        return 1 if max(self.input_shape[1:]) <= SMALL else 4

    def shape(self, stage: int) -> tuple[int, int, int]:
        """(C, H, W) within the stage, counted from 0; stage -1 is the stem."""
        H, W = (n // self.stem_stride // 2 ** max(stage, 0) for n in self.input_shape[1:])
        return (self.stem * 2 ** (stage + 1), H, W)

    def stages(self) -> list[int]:
        """The stage of every block, in order."""
        return [stage for stage, count in enumerate(self.blocks) for _ in range(count)]

    def block_relus(self, block: int) -> int:
        """Of one image; blocks are counted from 0."""
        return math.prod(self.shape(self.stages()[block]))

    def aggregate_relus(self, stage: int) -> int:
        """Of the aggregate after a stage: the stage's channels on the map of the next one."""
        C, H, W = self.shape(stage)
        return C * (H // 2) * (W // 2)

    def pool_comparisons(self, stage: int) -> int:
        return COMPARISONS * self.aggregate_relus(stage)

    @property
    def floor(self) -> int:
        """ReLUs of all aggregates: what no choice of a published space can go below."""
        return sum(self.aggregate_relus(stage) for stage in range(len(self.blocks) - 1))

    @property
    def maximum(self) -> int:
        return self.relus([True] * sum(self.blocks))

    def relus(self, on: Sequence[bool]) -> int:
        """The published count of a ReLU map: aggregates and enabled blocks, max-pools left out."""
        return self.floor + sum(self.block_relus(k) for k, enabled in enumerate(on) if enabled)

    def drelus(self, network: Architecture) -> int:
        """All comparisons of one image, max-pools included: what a runtime executes."""
        count = sum(self.block_relus(k) for k, block in enumerate(network.blocks) if block.relu)
        for stage, aggregate in enumerate(network.aggregates):
            count += self.aggregate_relus(stage) * aggregate.relu
            count += self.pool_comparisons(stage) * (aggregate.pool == "max")
        return count

    @property
    def least(self) -> int:
        """The fewest comparisons that a choice leaves."""
        relus = 0 if self.free else self.floor
        return relus + (COMPARISONS * self.floor if self.pools == ("max",) else 0)

    @property
    def most(self) -> int:
        """The comparisons of a network with every ReLU, and a max-pool wherever it may be."""
        return self.maximum + (COMPARISONS * self.floor if "max" in self.pools else 0)

    @property
    def mildest(self) -> Pool:
        """A pool without comparisons, where the space has one."""
        return "avg" if "avg" in self.pools else self.pools[0]

    def network(self, operators: Sequence[str], *, relu: bool, pool: Pool | None = None) -> Architecture:
        """The same choice everywhere."""
        block = Block(tuple(o for o in self.operators if o in operators and o != "none"), relu)
        aggregate = Aggregate(pool or self.pools[0], relu or not self.free)
        return Architecture((block,) * sum(self.blocks), (aggregate,) * (len(self.blocks) - 1))


_CIFAR = {
    "16": (2, 2, 2, 2), "22": (2, 2, 2), "26": (2, 2), "50": (3, 4, 6, 3), "80": (3, 4, 16, 3),
    "101": (3, 4, 23, 3), "152": (3, 8, 36, 3),
}  # fmt: skip
_IMAGENET = {"50": (3, 4, 6, 3), "101": (3, 4, 23, 3), "8": (2, 2, 2), "16": (2, 4)}

PRESETS: dict[str, Space] = {
    **{f"cifarsupermodel{n}": Space(f"cifarsupermodel{n}", (3, 32, 32), 100, b) for n, b in _CIFAR.items()},
    **{f"supermodel{n}": Space(f"supermodel{n}", (3, 224, 224), 1000, b) for n, b in _IMAGENET.items()},
}


def resolve(text: str, input_shape: tuple[int, int, int], classes: int, **settings: Any) -> Space:
    """A published space by name, or blocks per stage such as `2,2,2` or `4`, for these images.

    `settings`: other fields of `Space`, as published where not given. Raises InputError for what is neither.
    """
    words = [word.strip() for word in text.split(",")]
    if text in PRESETS:
        blocks = PRESETS[text].blocks
    elif all(re.fullmatch("[1-9][0-9]{0,2}", word) for word in words):
        blocks = tuple(int(word) for word in words)
    elif any(re.fullmatch("[-+]?[0-9]+", word) for word in words):
        raise InputError(
            "unknown search space", got=text, allowed="blocks per stage, each from 1 to 999, as 2,2,2 or 4"
        )
    else:
        raise InputError(
            "unknown search space", got=text, allowed=near(text, PRESETS), fix="or blocks per stage: 2,2,2"
        )
    return Space(text, input_shape, classes, blocks, **settings)
