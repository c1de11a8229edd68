"""A search space: stages whose depth is free, of inverted residuals whose expansion, kernel and SE are free.

The published space (HardCoRe-NAS, BINAS) is the preset `imagenet`; one's own is a TOML file, see `read`.
"""

from __future__ import annotations

import hashlib
import json
import math
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from tightrope.errors import InputError, near
from tightrope.forms import mismatch
from tightrope.models.arch import ACTIVATIONS, Architecture, Block
from tightrope.solve.staged import Choice


@dataclass(frozen=True)
class Option:
    """What is chosen for one block. se 0: no squeeze-and-excitation."""

    expansion: float
    kernel: int
    se: float

    def __str__(self) -> str:
        return f"e{self.expansion:g} k{self.kernel}" + (f" se{self.se:g}" if self.se else "")


@dataclass(frozen=True)
class Stage:
    """The stride belongs to the first block; `depths` are the allowed numbers of blocks, rising."""

    channels: int
    stride: int
    depths: tuple[int, ...]
    act: str


@dataclass(frozen=True)
class Space:
    """`stem`, `first`, `last`, `head`: channels of the fixed parts; `stride`: of the first convolution."""

    name: str
    input_shape: tuple[int, int, int]
    classes: int
    stem: int
    stride: int
    first: int
    stages: tuple[Stage, ...]
    last: int
    head: int
    expansions: tuple[float, ...] = (3, 4, 6)
    kernels: tuple[int, ...] = (3, 5)
    ses: tuple[float, ...] = (0, 0.25)

    @cached_property
    def options(self) -> tuple[Option, ...]:
        """In the published order: expansion slowest, squeeze-and-excitation fastest."""
        return tuple(Option(*one) for one in product(self.expansions, self.kernels, self.ses))

    @property
    def count(self) -> int:
        """How many networks there are."""
        return math.prod(sum(len(self.options) ** d for d in stage.depths) for stage in self.stages)

    def sha256(self) -> str:
        """Of what determines the networks: not of the name."""
        body = {k: v for k, v in asdict(self).items() if k != "name"}
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

    def block(self, stage: int, position: int, option: int) -> Block:
        """The block at `position` of a stage under an option."""
        s, o = self.stages[stage], self.options[option]
        stride = s.stride if position == 0 else 1
        act = None if s.act == "hs" else s.act
        return Block("ir", o.kernel, stride, s.channels, o.expansion, o.se, act)

    def frame(self) -> Architecture:
        """The fixed parts alone: first stage and last, nothing between."""
        before = Block("ds", 3, 1, self.first, activation="re")
        after = Block("cn", 1, 1, self.last)
        return Architecture(((before,), (after,)), self.stem, self.stride, self.head)

    def architecture(self, choice: Choice) -> Architecture:
        """The network of a choice. Raises InputError for one that is not of this space."""
        self.check(choice)
        frame = self.frame()
        stages = tuple(
            tuple(self.block(s, b, option) for b, option in enumerate(options))
            for s, options in enumerate(choice)
        )
        return replace(frame, stages=(frame.stages[0], *stages, frame.stages[1]))

    def choice(self, arch: Architecture) -> Choice:
        """The choice that makes `arch`. Raises InputError naming the first part that this space lacks."""
        index = {(o.expansion, o.kernel, o.se): k for k, o in enumerate(self.options)}
        found = []
        for s, blocks in enumerate(list(arch.unrolled())[1:-1]):
            options = [index.get((block.expansion, block.kernel, block.se)) for block in blocks]
            if None in options:
                raise InputError(
                    f"no network of the space {self.name}",
                    where=f"stage {s + 1}, block {options.index(None) + 1}",
                    got=blocks[options.index(None)],
                    allowed=", ".join(map(str, self.options)),
                )
            found.append(tuple(k for k in options if k is not None))
        self.check(tuple(found))
        wanted, given = _explicit(self.architecture(tuple(found))), _explicit(arch)
        if wanted != given:
            parts = zip(wanted.stages, given.stages, strict=True)
            apart = next((stage for stage, got in parts if stage != got), "stem, stride, head or activation")
            raise InputError(f"no network of the space {self.name}", got=arch, allowed=f"here {apart}")
        return tuple(found)

    def check(self, choice: Choice) -> None:
        """Raise InputError unless the choice has an allowed depth and known options everywhere."""
        if len(choice) != len(self.stages):
            raise InputError("wrong number of stages", got=len(choice), allowed=len(self.stages))
        for s, (stage, options) in enumerate(zip(self.stages, choice, strict=True)):
            if len(options) not in stage.depths:
                raise InputError(
                    "no such depth", where=f"stage {s + 1}", got=len(options), allowed=f"{stage.depths}"
                )
            if not all(0 <= option < len(self.options) for option in options):
                raise InputError("no such option", where=f"stage {s + 1}", got=options)

    def smallest(self) -> Choice:
        """The least expansion, kernel and SE everywhere, least depth: where the published search starts."""
        least = min(range(len(self.options)), key=lambda k: astuple(self.options[k]))
        return tuple((least,) * stage.depths[0] for stage in self.stages)

    def largest(self) -> Choice:
        """The greatest expansion, kernel, SE and depth everywhere: the network that is trained first."""
        most = max(range(len(self.options)), key=lambda k: astuple(self.options[k]))
        return tuple((most,) * stage.depths[-1] for stage in self.stages)

    def random(self, generator: np.random.Generator) -> Choice:
        """Each decision uniform by itself, as published: not uniform over the networks."""
        depths = [int(generator.choice(stage.depths)) for stage in self.stages]
        return tuple(tuple(map(int, generator.integers(len(self.options), size=d))) for d in depths)

    def places(self) -> Iterator[tuple[int, int, int, int]]:
        """(stage, position, input channels, input side) of every block that can be there."""
        width, side = self.first, -(-self.input_shape[1] // self.stride)
        for s, stage in enumerate(self.stages):
            for b in range(stage.depths[-1]):
                yield s, b, width, side
                width = stage.channels
                if b == 0:
                    side = -(-side // stage.stride)


def _explicit(arch: Architecture) -> Architecture:
    """Every block written out, its activation too: two architectures are one network if these are equal."""
    stages = tuple(
        tuple(replace(block, activation=block.activation or arch.act) for block in blocks)
        for blocks in arch.unrolled()
    )
    return replace(arch, stages=stages)


def _published(name: str, side: int, classes: int) -> Space:
    """The space of HardCoRe-NAS and BINAS for images of `side`."""
    rows = ((24, 2, "re"), (40, 2, "re"), (80, 2, "hs"), (112, 1, "hs"), (192, 2, "hs"))
    stages = tuple(Stage(channels, stride, (2, 3, 4), act) for channels, stride, act in rows)
    return Space(name, (3, side, side), classes, 32, 2, 16, stages, last=960, head=1280)


def _stages(*rows: tuple[int, int, str]) -> tuple[Stage, ...]:
    return tuple(Stage(channels, stride, (1, 2, 3), act) for channels, stride, act in rows)


_CIFAR = _stages((16, 1, "re"), (24, 2, "re"), (48, 2, "hs"), (64, 1, "hs"))
_FASHION = _stages((8, 1, "re"), (12, 2, "hs"), (24, 2, "hs"))
PRESETS = {
    space.name: space
    for space in (
        _published("imagenet", 224, 1000),
        Space("cifar", (3, 32, 32), 10, 16, 1, 8, _CIFAR, last=192, head=256),
        # Narrow, so that what is chosen matters: networks of twice the channels hardly differ.
        Space("fashion", (1, 28, 28), 10, 8, 2, 4, _FASHION, last=96, head=128, expansions=(1, 3, 6)),
    )
}

FORM = {
    "input_shape": [int], "classes": int, "stem": int, "stride": int, "first": int, "last": int, "head": int,
    "expansions?": [float], "kernels?": [int], "ses?": [float],
    "stages": [{"channels": int, "stride": int, "depths": [int], "act?": str}],
}  # fmt: skip
_EXAMPLE = "stages = [{channels = 24, stride = 2, depths = [2, 3, 4], act = 're'}]"


def resolve(name: str) -> Space:
    """A preset, or the space of a TOML file. Raises InputError for what is neither."""
    if name in PRESETS:
        return PRESETS[name]
    if name.endswith(".toml"):
        return read(Path(name).expanduser())
    raise InputError("unknown search space", got=name, allowed=f"{near(name, PRESETS)}, or FILE.toml")


def read(path: Path) -> Space:
    """A space from TOML: the fields of `Space` and, as `stages`, those of `Stage`; the file's stem names it.

    Raises InputError naming what is missing, unknown or out of range.
    """
    try:
        body = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise InputError("no such file", where=str(path)) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError("cannot read the search space", where=str(path), got=str(error)) from None
    wrong = mismatch(body, FORM)
    known = {key.removesuffix("?") for key in FORM}
    unknown = sorted(body.keys() - known)
    if wrong or unknown:
        raise InputError(
            "the search space has not the form it needs",
            where=str(path),
            got=wrong or f"unknown: {', '.join(unknown)}",
            allowed=", ".join(known),
            fix=_EXAMPLE,
        )
    lists: dict[str, Any] = {key: tuple(body[key]) for key in ("expansions", "kernels", "ses") if key in body}
    try:
        stages = tuple(
            Stage(**({"act": "hs"} | stage | {"depths": tuple(stage["depths"])})) for stage in body["stages"]
        )
    except TypeError as error:
        raise InputError("unknown key of a stage", where=str(path), got=str(error), fix=_EXAMPLE) from None
    fixed = {key: body[key] for key in ("classes", "stem", "stride", "first", "last", "head")}
    shape = tuple(body["input_shape"])
    if len(shape) != 3:
        raise InputError("input_shape is [channels, height, width]", where=str(path), got=list(shape))
    space = Space(name=path.stem, input_shape=shape, stages=stages, **fixed, **lists)
    _check(space, path)
    return space


def _check(space: Space, path: Path) -> None:
    """Every value in its range, by the rules of the strings that its networks are written in."""
    fixed = (*space.input_shape, space.classes, space.stem, space.first, space.last, space.head)
    rising = all(
        s.depths and list(s.depths) == sorted(set(s.depths)) and s.depths[0] > 0 for s in space.stages
    )
    rules = {
        "sizes are 1 or more": min(fixed) >= 1,
        "images are square": space.input_shape[1] == space.input_shape[2],
        "there is at least one stage": bool(space.stages),
        "depths rise from 1 or more, up to 16": rising and all(s.depths[-1] <= 16 for s in space.stages),
        f"an activation is one of {', '.join(ACTIVATIONS)}": all(s.act in ACTIVATIONS for s in space.stages),
    }
    lists = (space.expansions, space.kernels, space.ses)
    rules["expansions, kernels and ses differ, up to 64 options"] = (
        all(values and len(set(values)) == len(values) for values in lists) and len(space.options) <= 64
    )
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise InputError("the search space breaks a rule", where=str(path), got="; ".join(broken))
    for option in range(len(space.options)):
        choice = tuple((option,) * stage.depths[-1] for stage in space.stages)
        arch = space.architecture(choice)
        try:
            same = Architecture.parse(str(arch)) == arch
        except InputError as error:
            raise InputError("the search space breaks a rule", where=str(path), got=str(error)) from None
        if not same:
            raise InputError("numbers have up to 6 decimals", where=str(path), got=space.options[option])
