"""Max-pooling out of ReLUs: max(a, b) = b + relu(a - b), in rounds, first over rows, then over columns."""

from __future__ import annotations

from torch import Tensor, nn

Pair = tuple[int, int]


class Round(nn.Module):
    """The larger of two neighbours: `first` and `second` pick them out of a map, `act` is a ReLU."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x), self.second(x)
        y: Tensor = b + self.act(a + b * -1.0)
        return y


class MaxTournament(nn.Module):
    """What `nn.MaxPool2d(kernel, stride, padding)` makes of (N, C, *size), in ceil(log2(side)) rounds a side.

    `out`: (H, W) of the result. A round doubles the window, the last one of a side also takes the stride.
    Padding counts as 0: right for inputs that are not negative, as after a ReLU. Picking is cropping and
    average-pooling of windows of one pixel, so that every runtime that has these has the tournament.
    """

    def __init__(self, kernel: Pair, stride: Pair, padding: Pair, size: Pair, out: Pair) -> None:
        super().__init__()
        needed = [(o - 1) * s + k for o, s, k in zip(out, stride, kernel, strict=True)]
        bottom, right = (n - h - p for n, h, p in zip(needed, size, padding, strict=True))
        self.pad = nn.ZeroPad2d((padding[1], right, padding[0], bottom))
        rounds: list[nn.Module] = []
        for axis in (0, 1):
            rounds += _rounds(kernel[axis], stride[axis], needed[axis], out[axis], axis)
        self.rounds = nn.Sequential(*rounds)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.rounds(self.pad(x))
        return y


def _rounds(kernel: int, stride: int, length: int, out: int, axis: int) -> list[nn.Module]:
    width, made = 1, list[nn.Module]()
    while width < kernel:
        step = min(width, kernel - width)
        width += step
        last = width == kernel
        kept = (out - 1) * stride + 1 if last else length - step
        every = stride if last else 1
        picks = (_pick(axis, start, length - start - kept, every) for start in (0, step))
        made.append(Round(*picks))
        length = out if last else kept
    if kernel == 1:
        made.append(_pick(axis, 0, length - ((out - 1) * stride + 1), stride))
    return made


def _pick(axis: int, before: int, after: int, every: int) -> nn.Module:
    """Crop so many rows (axis 0) or columns at both ends, then keep every so many."""
    ends = (0, 0, -before, -after) if axis == 0 else (-before, -after, 0, 0)
    parts: list[nn.Module] = [nn.ZeroPad2d(ends)] if before or after else []
    if every > 1:
        parts.append(nn.AvgPool2d(1, (every, 1) if axis == 0 else (1, every)))
    return nn.Sequential(*parts) if parts else nn.Identity()
