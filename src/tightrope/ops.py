"""The language of Programs: a closed list of typed ops with folded batch-norm, and what shape each makes.

An op's `name` is also the name of the value it makes. Shapes leave out the batch: (C, H, W) or (F,).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from tightrope.types import Cost

Pair = tuple[int, int]
Shape = tuple[int, ...]
MAX_DEGREE = 63  # of one stage of a polynomial: more is numerically hopeless in powers of x


@dataclass(frozen=True, kw_only=True)
class Op:
    """Abstract; the final classes below are the whole language."""

    kind: ClassVar[str]
    name: str
    inputs: tuple[str, ...]
    shape: Shape

    @property
    def parts(self) -> dict[str, tuple[Shape, ...]]:
        """The secret tensors, `NAME.part` in the Program, and the shapes that each may have."""
        return {}

    def result(self, *inputs: Shape) -> Shape:
        """The shape that this op makes of inputs of these shapes. Raises ValueError when it cannot."""
        (x,) = inputs
        return x


@dataclass(frozen=True, kw_only=True)
class Conv2d(Op):
    """Cross-correlation plus bias; weight (out, in / groups, kh, kw), padding (left, right, top, bottom)."""

    kind = "conv2d"
    kernel: Pair
    stride: Pair = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    in_channels: int

    @property
    def weight_shape(self) -> Shape:
        return (self.shape[0], self.in_channels // self.groups, *self.kernel)

    @property
    def parts(self) -> dict[str, tuple[Shape, ...]]:
        return {"weight": (self.weight_shape,), "bias": (self.weight_shape[:1],)}

    def result(self, *inputs: Shape) -> Shape:
        ((C, H, W),) = inputs
        _require(self.in_channels == C, f"{self.in_channels} channels, got {C}")
        _require(self.groups > 0, "groups to be positive")
        _require(C % self.groups == self.shape[0] % self.groups == 0, f"channels in {self.groups} groups")
        left, right, top, bottom = self.padding
        _require(min(self.padding) >= 0, "no negative padding")
        size = (H + top + bottom, W + left + right)
        return (self.shape[0], *_windows(size, self.kernel, self.stride, self.dilation))


@dataclass(frozen=True, kw_only=True)
class Linear(Op):
    """y = W x + b over the last axis; weight (out, in)."""

    kind = "linear"
    in_features: int

    @property
    def weight_shape(self) -> Shape:
        return (self.shape[-1], self.in_features)

    @property
    def parts(self) -> dict[str, tuple[Shape, ...]]:
        return {"weight": (self.weight_shape,), "bias": (self.weight_shape[:1],)}

    def result(self, *inputs: Shape) -> Shape:
        (x,) = inputs
        _require(x[-1] == self.in_features, f"{self.in_features} features, got {x[-1]}")
        return (*x[:-1], self.shape[-1])


@dataclass(frozen=True, kw_only=True)
class Add(Op):
    kind = "add"

    def result(self, *inputs: Shape) -> Shape:
        x, y = inputs
        _require(x == y, f"two equal shapes, got {x} and {y}")
        return x


@dataclass(frozen=True, kw_only=True)
class Mul(Op):
    """Elementwise product; the second input may be (C, 1, 1)."""

    kind = "mul"

    def result(self, *inputs: Shape) -> Shape:
        x, y = inputs
        _require(y in (x, (x[0], 1, 1)), f"{x} or one factor a channel, got {y}")
        return x


@dataclass(frozen=True, kw_only=True)
class Concat(Op):
    """Along the channels."""

    kind = "concat"

    def result(self, *inputs: Shape) -> Shape:
        rest = {x[1:] for x in inputs}
        _require(len(rest) == 1, f"maps of one size, got {inputs}")
        return (sum(x[0] for x in inputs), *rest.pop())


@dataclass(frozen=True, kw_only=True)
class AvgPool2d(Op):
    """Average over windows; with `count_padding` the divisor is the window, else its part inside."""

    kind = "avg_pool"
    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    ceil_mode: bool = False
    count_padding: bool = True

    def result(self, *inputs: Shape) -> Shape:
        ((C, H, W),) = inputs
        return (C, *_pooled((H, W), self.kernel, self.stride, (1, 1), self.padding, self.ceil_mode))


@dataclass(frozen=True, kw_only=True)
class GlobalAvgPool(Op):
    """(C, H, W) -> (C, 1, 1)."""

    kind = "global_avg_pool"

    def result(self, *inputs: Shape) -> Shape:
        ((C, _, _),) = inputs
        return (C, 1, 1)


@dataclass(frozen=True, kw_only=True)
class MaxPool2d(Op):
    kind = "max_pool"
    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    ceil_mode: bool = False

    def result(self, *inputs: Shape) -> Shape:
        ((C, H, W),) = inputs
        return (C, *_pooled((H, W), self.kernel, self.stride, self.dilation, self.padding, self.ceil_mode))


@dataclass(frozen=True, kw_only=True)
class Relu(Op):
    """One sign per tile of each channel (`tightrope.nn.BlockReLU`): (0, 0) identity, (1, 1) plain ReLU.

    `upper` clips from above with a second DReLU per tile (ReLU6: 6.0).
    """

    kind = "relu"
    patches: tuple[Pair, ...]
    upper: float | None = None

    @property
    def tiles(self) -> tuple[int, ...]:
        """Tiles per channel; 0 for an identity channel."""
        H, W = self.shape[1:] if len(self.shape) == 3 else (1, 1)
        return tuple(-(-H // p) * -(-W // q) if p else 0 for p, q in self.patches)

    @property
    def drelus(self) -> int:
        return sum(self.tiles) * (1 if self.upper is None else 2)

    def result(self, *inputs: Shape) -> Shape:
        (x,) = inputs
        _require(len(self.patches) == x[0], f"a patch for each of {x[0]} channels, got {len(self.patches)}")
        for p, q in self.patches:
            _require((p, q) == (0, 0) or min(p, q) > 0, f"patches 0x0 or positive, got {p}x{q}")
            _require(len(x) == 3 or max(p, q) < 2, f"a map for patches, got {x}")
        _require(self.upper is None or 0 < self.upper < math.inf, f"a bound above 0, got {self.upper}")
        return x


@dataclass(frozen=True, kw_only=True)
class Sigmoid(Op):
    kind = "sigmoid"


@dataclass(frozen=True, kw_only=True)
class HardSigmoid(Op):
    """clip(x + 3, 0, 6) / 6."""

    kind = "hard_sigmoid"


@dataclass(frozen=True, kw_only=True)
class Silu(Op):
    kind = "silu"


@dataclass(frozen=True, kw_only=True)
class HardSwish(Op):
    kind = "hard_swish"


@dataclass(frozen=True, kw_only=True)
class Polynomial(Op):
    """A polynomial activation: y = p_k(...p_1(x)), or x times that if `gated` (ReLU: p near 0 and 1).

    `stages` are the degrees of p_1 (applied first) to p_k, scales folded in. The secret tensor `stageI` holds
    the float64 coefficients of p_(I+1) in ascending order, (degree + 1,) or per channel (C, degree + 1).
    """

    kind = "polynomial"
    stages: tuple[int, ...]
    gated: bool = False

    @property
    def levels(self) -> int:
        """Multiplicative depth: ceil(log2(degree + 1)) a stage, and one for the gate."""
        return sum(degree.bit_length() for degree in self.stages) + self.gated

    @property
    def parts(self) -> dict[str, tuple[Shape, ...]]:
        return {
            f"stage{k}": ((degree + 1,), (self.shape[0], degree + 1)) for k, degree in enumerate(self.stages)
        }

    def result(self, *inputs: Shape) -> Shape:
        (x,) = inputs
        _require(len(self.stages) > 0, "at least one stage")
        _require(
            all(type(d) is int and 1 <= d <= MAX_DEGREE for d in self.stages), f"degrees 1..{MAX_DEGREE}"
        )
        _require(len(x) in (1, 3), f"(C, H, W) or (C,), got {x}")
        return x


@dataclass(frozen=True, kw_only=True)
class Pad(Op):
    """Zeros around the map: (left, right, top, bottom)."""

    kind = "pad"
    padding: tuple[int, int, int, int]

    def result(self, *inputs: Shape) -> Shape:
        ((C, H, W),) = inputs
        left, right, top, bottom = self.padding
        return (C, H + top + bottom, W + left + right)


@dataclass(frozen=True, kw_only=True)
class Upsample(Op):
    kind = "upsample"
    factor: Pair
    mode: str

    def result(self, *inputs: Shape) -> Shape:
        ((C, H, W),) = inputs
        _require(self.mode in ("nearest", "bilinear"), f"nearest or bilinear, got {self.mode}")
        return (C, H * self.factor[0], W * self.factor[1])


@dataclass(frozen=True, kw_only=True)
class Flatten(Op):
    kind = "flatten"

    def result(self, *inputs: Shape) -> Shape:
        (x,) = inputs
        return (math.prod(x),)


OPS: dict[str, type[Op]] = {
    cls.kind: cls
    for cls in (
        Conv2d, Linear, Add, Mul, Concat, AvgPool2d, GlobalAvgPool, MaxPool2d, Relu, Sigmoid,
        HardSigmoid, Silu, HardSwish, Polynomial, Pad, Upsample, Flatten,
    )
}  # fmt: skip
WEIGHTED = (Conv2d, Linear)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"needs {what}")


def _windows(size: Pair, kernel: Pair, stride: Pair, dilation: Pair) -> Shape:
    """How many windows fit into each side."""
    _require(min(*kernel, *stride, *dilation) > 0, "positive kernel, stride and dilation")
    return tuple(
        (n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(size, kernel, stride, dilation, strict=True)
    )


def _pooled(size: Pair, kernel: Pair, stride: Pair, dilation: Pair, padding: Pair, ceil_mode: bool) -> Shape:
    """As torch pools: with `ceil_mode` a partial last window counts if it starts before the right padding."""
    _require(min(padding) >= 0, "no negative padding")
    more = tuple(s - 1 if ceil_mode else 0 for s in stride)
    padded = (size[0] + 2 * padding[0] + more[0], size[1] + 2 * padding[1] + more[1])
    counts = _windows(padded, kernel, stride, dilation)
    starts = zip(counts, size, stride, padding, strict=True)
    return tuple(m - (ceil_mode and (m - 1) * s >= n + p) for m, n, s, p in starts)


def base_cost(op: Op) -> Cost:
    """DReLUs, MACs, weights and polynomial levels of one op per sample: what every runtime shares.

    A max-pool compares k - 1 times per output; ReLU6, hard-sigmoid and hard-swish compare twice. What levels
    linear maps take depends on how a CKKS runtime packs and merges them, so that is its own to say.
    """
    size = math.prod(op.shape)
    if isinstance(op, WEIGHTED):
        weights = math.prod(op.weight_shape)
        positions = size // op.weight_shape[0]
        return Cost(macs=weights * positions, weights=weights + op.weight_shape[0])
    if isinstance(op, Relu):
        return Cost(drelus=op.drelus)
    if isinstance(op, MaxPool2d):
        return Cost(drelus=size * (math.prod(op.kernel) - 1))
    if isinstance(op, HardSigmoid | HardSwish):
        return Cost(drelus=2 * size)
    if isinstance(op, Polynomial):
        return Cost(ckks_levels=op.levels)
    return Cost()
