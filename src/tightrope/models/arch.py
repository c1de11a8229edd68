"""Strings for networks of MobileNetV3's family: `[['ds_r1_k3_s1_e1_c16_nre'], ['ir_r1_k5_s2_e3_c24']]`.

The grammar is the one that HardCoRe-NAS and BINAS publish their networks in: a list of stages, each a list of
blocks `TYPE_OPTION_OPTION...`, options in any order.

    ds   depthwise convolution, then 1x1             r repeats   k kernel   s stride   c channels
    dsa  the same with an activation at the end      e expansion (of ir, er)
    ir   1x1 that expands, depthwise, 1x1            n activation: re, r6, hs, sw (else the network's)
    er   convolution that expands, then 1x1          se squeeze-and-excitation, as a share of the inner width
    cn   convolution                                 noskip  no shortcut

What the string leaves out may follow it: ` stem=16 stride=1 head=256 act=hs` are the channels and stride of
the first convolution, the channels before the classifier, and the activation of blocks without `n`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from tightrope.errors import InputError, near

TYPES = ("ds", "dsa", "ir", "er", "cn")
EXPANDING = ("ir", "er")
ACTIVATIONS = ("re", "r6", "hs", "sw")
_MOST = 2**16  # channels, and so no overflow further on

_QUOTED = r"(?:'[^'\"\[\]]*'|\"[^'\"\[\]]*\")"
_STAGE = rf"\[\s*{_QUOTED}(?:\s*,\s*{_QUOTED})*\s*,?\s*\]"
_WHOLE = re.compile(rf"\s*\[\s*({_STAGE}(?:\s*,\s*{_STAGE})*)\s*,?\s*\]\s*(.*)", re.DOTALL)
_OPTION = re.compile(r"(se|[rksecn])(.*)", re.DOTALL)
_NUMBER = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")


@dataclass(frozen=True)
class Block:
    """`repeats` equal blocks, of which only the first has the stride. se 0: no squeeze-and-excitation."""

    kind: str
    kernel: int
    stride: int
    channels: int
    expansion: float = 1.0
    se: float = 0.0
    activation: str | None = None
    skip: bool = True
    repeats: int = 1

    def __str__(self) -> str:
        parts = [self.kind, f"r{self.repeats}", f"k{self.kernel}", f"s{self.stride}"]
        if self.kind != "cn":
            parts.append(f"e{self.expansion:.9g}")
        parts.append(f"c{self.channels}")
        if self.activation is not None:
            parts.append(f"n{self.activation}")
        if self.se:
            parts.append(f"se{self.se:.9g}")
        return "_".join(parts if self.skip else [*parts, "noskip"])


@dataclass(frozen=True)
class Architecture:
    """Stages of blocks between a convolution (3x3) and a head (1x1 with bias, no batch-norm; classifier)."""

    stages: tuple[tuple[Block, ...], ...]
    stem: int = 32
    stride: int = 2
    head: int = 1280
    act: str = "hs"

    def __str__(self) -> str:
        stages = ", ".join("[" + ", ".join(f"'{block}'" for block in stage) + "]" for stage in self.stages)
        rest = [
            f" {f.name}={getattr(self, f.name)}"
            for f in fields(self)[1:]
            if getattr(self, f.name) != f.default
        ]
        return f"[{stages}]" + "".join(rest)

    def unrolled(self) -> Iterator[list[Block]]:
        """The stages with every block written out: `repeats` 1, and the stride where it is meant."""
        for stage in self.stages:
            blocks = []
            for block in stage:
                for k in range(block.repeats):
                    stride = block.stride if k == 0 else 1
                    one = Block(
                        block.kind, block.kernel, stride, block.channels, block.expansion, block.se,
                        block.activation, block.skip,
                    )  # fmt: skip
                    blocks.append(one)
            yield blocks

    @classmethod
    def parse(cls, text: str) -> Architecture:
        """Read what `str` writes, and any string of the published grammar.

        Raises InputError naming the stage, the block and the option.
        """
        match = _WHOLE.fullmatch(text)
        if match is None:
            raise InputError(
                "cannot read the architecture",
                got=repr(text[:60]) + ("…" if len(text) > 60 else ""),
                allowed="a list of stages, each a list of quoted blocks",
                fix="[['ds_r1_k3_s1_e1_c16_nre'], ['ir_r1_k5_s2_e3_c24_nre_se0.25'], ['cn_r1_k1_s1_c960']]",
            )
        stages = tuple(
            tuple(
                _block(quoted[1:-1], f"stage {i}, block {k}", first=k == 0)
                for k, quoted in enumerate(re.findall(_QUOTED, stage))
            )
            for i, stage in enumerate(re.findall(_STAGE, match.group(1)))
        )
        return cls(stages, **_rest(match.group(2)))


def _block(text: str, where: str, *, first: bool) -> Block:
    kind, *options = text.split("_")
    where = f"{where}: {text[:60]!r}"
    if kind not in TYPES:
        raise InputError("unknown type of block", where=where, got=repr(kind[:20]), allowed=TYPES)
    found: dict[str, str] = {}
    for option in options:
        match = _OPTION.fullmatch(option)
        key, value = ("noskip", "") if option == "noskip" else match.groups() if match else ("", option)
        if not key:
            raise InputError(
                "unknown option of a block",
                where=where,
                got=repr(option[:20]),
                allowed="r, k, s, e, c, n, se with a value, or noskip",
            )
        if key in found:
            raise InputError("an option is given twice", where=where, got=f"{key}{found[key]} and {option}")
        found[key] = value
    lacking = [key for key in ("r", "k", "s", "c") if key not in found]
    if kind in EXPANDING and "e" not in found:
        lacking.append("e")
    if lacking:
        raise InputError(f"a block of type {kind} needs more options", where=where, got=f"no {lacking}")
    activation = found.get("n")
    if activation is not None and activation not in ACTIVATIONS:
        raise InputError(
            "unknown activation",
            where=where,
            got=f"n{activation}"[:20],
            allowed=tuple(f"n{name}" for name in ACTIVATIONS),
        )
    kernel, stride = _whole(found["k"], "kernel k", where, 99), _whole(found["s"], "stride s", where, 99)
    if kernel % 2 == 0:
        raise InputError("a kernel has an odd size", where=where, got=f"k{kernel}")
    if stride > 2 or (stride == 2 and not first):
        raise InputError(
            "only the first block of a stage has a stride" if stride == 2 else "a stride is 1 or 2",
            where=where,
            got=f"s{stride}",
            fix="s1, or a stage of its own",
        )
    expansion = _real(found.get("e", "1"), "expansion e", where, 64)
    if kind not in EXPANDING and expansion != 1:
        raise InputError(f"a block of type {kind} does not expand", where=where, got=f"e{found['e']}"[:20])
    if kind == "cn" and "se" in found:
        raise InputError("a plain convolution has no squeeze-and-excitation", where=where)
    return Block(
        kind, kernel, stride, _whole(found["c"], "channels c", where, _MOST), expansion,
        se=_real(found["se"], "ratio se", where, 1) if "se" in found else 0.0,
        activation=activation,
        skip="noskip" not in found,
        repeats=_whole(found["r"], "repeats r", where, 99),
    )  # fmt: skip


def _rest(text: str) -> dict[str, Any]:
    """The words `NAME=VALUE` after the list."""
    allowed = {f.name for f in fields(Architecture)[1:]}
    found: dict[str, Any] = {}
    for word in text.split():
        name, _, value = word.partition("=")
        where = f"after the list: {word[:40]!r}"
        if name not in allowed or name in found:
            raise InputError(
                "unknown or repeated setting of an architecture", where=where, allowed=near(name, allowed)
            )
        if name == "act":
            if value not in ACTIVATIONS:
                raise InputError("unknown activation", where=where, allowed=ACTIVATIONS)
            found[name] = value
        else:
            found[name] = _whole(value, name, where, 2 if name == "stride" else _MOST)
    return found


def _whole(text: str, what: str, where: str, most: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 7 and 1 <= int(text) <= most):
        raise InputError(f"{what} is no whole number", where=where, got=text[:20], allowed=f"1 to {most}")
    return int(text)


def _real(text: str, what: str, where: str, most: float) -> float:
    if not (_NUMBER.fullmatch(text) and 0 < float(text) <= most):
        raise InputError(f"{what} is no number", where=where, got=text[:20], allowed=f"above 0, up to {most}")
    return float(text)
