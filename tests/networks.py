"""Small networks and images that the tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tightrope.graph import trace
from tightrope.place import model_sha256
from tightrope.program import Program
from tightrope.runtimes.plain import Plain, evaluate
from tightrope.solve.select import select
from tightrope.types import Budget, Plan, Problem

Step = Callable[[Tensor], Tensor]


def settle(model: nn.Module, *, seed: int = 0, weights: bool = True) -> Any:
    """The model in eval mode; with `weights`, batch-norm as after training: random statistics and scales."""
    generator = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if weights and isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.3, generator=generator)
            m.running_var.uniform_(0.5, 2, generator=generator)
            if m.affine:
                with torch.no_grad():
                    m.weight.uniform_(0.5, 1.5, generator=generator)
                    m.bias.normal_(0, 0.3, generator=generator)
    return model.eval()


def conv(i: int, o: int, k: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


class Chain(nn.Module):
    """Steps in order: modules, or functions that are traced into."""

    def __init__(self, *steps: Step) -> None:
        super().__init__()
        self.steps = steps
        self.parts = nn.ModuleList(s for s in steps if isinstance(s, nn.Module))

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


class Block(nn.Module):
    """torchvision's BasicBlock in small: one in-place ReLU called twice, `out += identity`."""

    def __init__(self, i: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(o)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(o)
        self.down = None
        if stride > 1 or i != o:
            self.down = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.down is None else self.down(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class TinyResNet(nn.Module):
    """Stem, two residual blocks, average, linear: 5 ReLU calls from 3 modules."""

    def __init__(self, channels: int = 3, classes: int = 5, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(channels, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.layer1 = Block(width, width)
        self.layer2 = Block(width, 2 * width, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.stem(x)))
        return self.fc(torch.flatten(self.pool(x), 1))


class Concat(nn.Module):
    """DenseNet in small: batch-norm and ReLU before the convolution, outputs concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = conv(3, 4)
        self.norm1, self.conv1 = nn.BatchNorm2d(4), conv(4, 3)
        self.norm2, self.conv2 = nn.BatchNorm2d(7), conv(7, 3, dilation=1)
        self.norm3 = nn.BatchNorm2d(10)
        self.fc = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.conv0(x)]
        features.append(self.conv1(F.relu(self.norm1(features[0]))))
        features.append(self.conv2(F.relu(self.norm2(torch.cat(features, 1)), inplace=True)))
        x = F.relu(self.norm3(torch.cat(features, dim=1)), inplace=True)
        return self.fc(F.adaptive_avg_pool2d(x, (1, 1)).flatten(1))


def mobile() -> nn.Module:
    """Depthwise, grouped and dilated convolutions, ReLU6, max-pool."""
    return Chain(
        conv(3, 8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True),
        conv(8, 8, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(8, 12, 3, padding=2, dilation=2, groups=4), nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "residual": TinyResNet,
    "concat": Concat,
    "mobile": mobile,
}


@dataclass(frozen=True)
class Images:
    """A `Data` held as floating-point tensors of any precision. `reads` counts the batches given out."""

    x: Tensor
    y: Tensor
    name: str = "images"
    reads: list[int] = field(default_factory=list)

    def size(self, split: str) -> int:
        return len(self.x)

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        limit: int | None = None,
        rank: int = 0,
        world: int = 1,
        **_: Any,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = self.x[:limit][rank::world], self.y[:limit][rank::world]
        for k in range(0, len(x), batch_size):
            self.reads.append(k)
            yield x[k : k + batch_size], y[k : k + batch_size]


def images(shape: Sequence[int], count: int = 16, *, seed: int = 0, dtype: Any = torch.float32) -> Images:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, *shape, generator=generator, dtype=dtype)
    return Images(x, torch.randint(5, (count,), generator=generator))


def gap(model: nn.Module, program: Program, x: Tensor, *, least: float = 1.0) -> float:
    """Largest difference of model and program on x, both in float64, over the largest output or `least`."""
    with torch.no_grad():
        expected = model.double()(x.double())
    assert torch.isfinite(expected).all()
    got = evaluate(program, x)
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=least))


def plan_for(
    method: Any, net: nn.Module, data: Images, budget: str, *, workdir: Path | None = None
) -> tuple[Problem, Plan]:
    """What `tightrope search` does, priced by the plain runtime."""
    graph = trace(net, tuple(data.x.shape[1:]))
    problem = method.measure(graph, data, cost=Plain(), workdir=workdir, progress=lambda *_: None)
    chosen = select(problem, Budget.parse(budget))
    plan = Plan(
        method=method.name, config=problem.meta["config"], budget=budget,
        choices=method.choices(problem, chosen.picked), predicted=chosen.cost, baseline=problem.baseline,
        loss=chosen.loss, bound=chosen.bound, base="test", base_sha256=model_sha256(graph.module),
        input_shape=graph.input_shape,
    )  # fmt: skip
    return problem, plan
