"""Random small networks for property tests: every layer that a Program knows, with random parameters."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from networks import Chain, Step, settle

Draw = Any
Shape = tuple[int, ...]


class Sum(nn.Module):
    """`branch(x) + x`, or the two concatenated."""

    def __init__(self, branch: nn.Module, how: str) -> None:
        super().__init__()
        self.branch, self.how = branch, how

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        if self.how == "cat":
            return torch.cat([y, x], 1)
        y += x
        return y


class Gate(nn.Module):
    """Squeeze-and-excitation: the map times one factor per channel."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__()
        self.fc, self.act = nn.Conv2d(channels, channels, 1), act

    def forward(self, x: Tensor) -> Tensor:
        return x * self.act(self.fc(F.adaptive_avg_pool2d(x, 1)))


def _convolution(draw: Draw, channels: int, out: int | None = None) -> nn.Module:
    groups = draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0]))
    small = partial(st.integers, 1)
    kernel, dilation = (draw(small(3)), draw(small(3))), (draw(small(2)), draw(small(2)))
    stride: tuple[int, int] = (draw(small(2)), draw(small(2)))
    padding: Any = (draw(st.integers(0, 2)), draw(st.integers(0, 2)))
    if out is not None or draw(st.booleans()):
        stride = (1, 1)
        padding = "same" if out is not None else draw(st.sampled_from(["same", "valid"]))
        if padding == "same":  # torch warns of even kernels there; they have a test of their own
            kernel = (kernel[0] | 1, kernel[1] | 1)
    out = groups * draw(small(2)) if out is None else out
    groups = groups if out % groups == 0 else 1
    return nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups, bias=draw(st.booleans()))


def _max_pool(draw: Draw, channels: int) -> Step:
    k = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    options = {"ceil_mode": draw(st.booleans()), "dilation": draw(st.integers(1, 2))}
    padding = draw(st.integers(0, min(k) // 2))
    if draw(st.booleans()):
        return nn.MaxPool2d(k, draw(st.integers(1, 2)), padding, **options)
    return partial(F.max_pool2d, kernel_size=k, padding=padding, **options)


def _avg_pool(draw: Draw, channels: int) -> Step:
    k = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    options = {"ceil_mode": draw(st.booleans()), "count_include_pad": draw(st.booleans())}
    padding = draw(st.integers(0, min(k) // 2))
    if draw(st.booleans()):
        return nn.AvgPool2d(k, draw(st.integers(1, 3)), padding, **options)
    return partial(F.avg_pool2d, kernel_size=k, padding=padding, **options)


def _residual(draw: Draw, channels: int) -> nn.Module:
    branch = [_convolution(draw, channels, channels)]
    if draw(st.booleans()):
        branch.append(nn.BatchNorm2d(channels))
    return Sum(nn.Sequential(*branch), draw(st.sampled_from(["sum", "cat"])))


def _constant(draw: Draw, channels: int) -> Step:
    value = draw(st.sampled_from([-1.5, 0.25, 3]))
    return draw(
        st.sampled_from(
            [lambda x: x + value, lambda x: value + x, lambda x: x * value, lambda x: torch.mul(x, value)]
        )
    )


def _pad(draw: Draw, channels: int) -> Step:
    pads = tuple(draw(st.integers(0, 2)) for _ in range(4))
    functions = [partial(F.pad, pad=pads), partial(F.pad, pad=pads, mode="constant", value=0.0)]
    return draw(st.sampled_from([nn.ZeroPad2d(pads), *functions]))


def _upsample(draw: Draw, channels: int) -> Step:
    mode = draw(st.sampled_from(["nearest", "bilinear"]))
    return draw(
        st.sampled_from([nn.Upsample(scale_factor=2, mode=mode), lambda x: F.interpolate(x, None, 2, mode)])
    )


def _activation(draw: Draw, channels: int) -> Step:
    modules = (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.Sigmoid, nn.Hardsigmoid, nn.Identity, nn.Dropout)
    functions = (F.relu, F.relu6, lambda x: x.relu_(), torch.sigmoid)
    return draw(st.one_of(st.sampled_from(modules).map(lambda m: m()), st.sampled_from(functions)))


BODY = (
    _convolution, _convolution, _activation, _activation, _activation, _max_pool, _avg_pool, _residual,
    _residual, _constant, _pad, _upsample,
    lambda draw, c: nn.BatchNorm2d(c, affine=draw(st.booleans())),
    lambda draw, c: Gate(c, draw(st.sampled_from([nn.Sigmoid(), nn.Hardsigmoid()]))),
)  # fmt: skip
POOL = (
    nn.AdaptiveAvgPool2d(1),
    nn.Identity(),
    lambda x: F.adaptive_avg_pool2d(x, (1, None)),
    lambda x: x.mean((2, 3), keepdim=True),
    lambda x: torch.mean(x, [-1, -2], True),
    lambda x: x.mean(dim=(-2, -1)),
    nn.AdaptiveAvgPool2d((2, 3)),
)
FLATTEN = (
    nn.Flatten(),
    lambda x: torch.flatten(x, 1),
    lambda x: x.view(x.size(0), -1),
    lambda x: x.reshape(x.shape[0], -1),
    lambda x: torch.flatten(input=x, start_dim=1),
)


def _lowers(step: Step, before: Tensor, after: Tensor) -> bool:
    """Adaptive pools are in the language only where all windows are equal."""
    if step not in POOL or after.dim() != 4:
        return True
    sides = list(zip(before.shape[2:], after.shape[2:], strict=True))
    return all(n % m == 0 for n, m in sides) or all(m % n == 0 for n, m in sides)


@st.composite
def cnns(draw: Draw) -> tuple[nn.Module, Shape]:
    """A random network, settled, and its input shape. A layer that does not fit the map is left out."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    shape = (draw(st.integers(1, 4)), draw(st.integers(3, 9)), draw(st.integers(3, 9)))
    x = torch.randn(2, *shape)
    steps: list[Step] = []
    makers = draw(st.lists(st.sampled_from(BODY), min_size=3, max_size=10))
    tail = [lambda d, c, parts=parts: d(st.sampled_from(parts)) for parts in (POOL, FLATTEN)]
    for maker in (*makers, *tail):
        step = maker(draw, x.shape[1])
        try:
            y = _apply(step, x)
        except RuntimeError:
            continue
        if y.numel() and y.numel() < 20_000 and torch.isfinite(y).all() and _lowers(step, x, y):
            steps.append(step)
            x = y
    if x.dim() == 2 and draw(st.booleans()):
        steps.append(nn.Linear(x.shape[1], 3, bias=draw(st.booleans())))
    return settle(Chain(*steps), seed=draw(st.integers(0, 99))), shape


def _apply(step: Step, x: Tensor) -> Tensor:
    with torch.no_grad():
        return (step.eval() if isinstance(step, nn.Module) else step)(x.clone())
