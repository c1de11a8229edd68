"""A plain network from an architecture string; its tensors bear timm's names, so timm's weights fit."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tightrope.models.arch import Architecture, Block

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "re": nn.ReLU,
    "r6": nn.ReLU6,
    "hs": nn.Hardswish,
    "sw": nn.SiLU,
}


def activation(name: str) -> nn.Module:
    """The module of an activation of `arch.ACTIVATIONS`."""
    return _ACTIVATIONS[name]()


def divisible(width: float, by: int = 8) -> int:
    """The nearest multiple of `by`, at least `by`, and the next one where more than 10 % would be lost."""
    rounded = max(by, int(width + by / 2) // by * by)
    return rounded + by if rounded < 0.9 * width else rounded


def mobilenet(arch: Architecture, num_classes: int = 1000, in_channels: int = 3) -> MobileNet:
    """The network of `arch`, its weights random. Input (N, in_channels, H, W)."""
    return MobileNet(arch, num_classes, in_channels)


def from_arch(text: str, num_classes: int | None, in_channels: int | None) -> nn.Module:
    """The network of an architecture string; raises InputError where it cannot be read."""
    classes = 1000 if num_classes is None else num_classes
    return mobilenet(Architecture.parse(text), classes, 3 if in_channels is None else in_channels)


class SqueezeExcite(nn.Module):
    """A factor per channel from all means (Hu et al. 2018), hard-sigmoid as gate (MobileNetV3)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, hidden, 1)
        self.act1 = nn.ReLU()
        self.conv_expand = nn.Conv2d(hidden, channels, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.conv_reduce(x.mean((2, 3), keepdim=True)))
        gated: Tensor = x * self.gate(self.conv_expand(y))
        return gated


class _Shortcut(nn.Module):
    """What all blocks share: the shortcut, where there is one."""

    def __init__(self, block: Block, inputs: int) -> None:
        super().__init__()
        self.skip = block.skip and block.stride == 1 and inputs == block.channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.transform(x)
        return x + y if self.skip else y

    def transform(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class DepthwiseSeparable(_Shortcut):
    """ds and dsa."""

    def __init__(self, block: Block, inputs: int, act: str) -> None:
        super().__init__(block, inputs)
        self.skip = self.skip and block.kind == "ds"
        self.conv_dw = conv(inputs, inputs, block.kernel, block.stride, groups=inputs)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.act1 = activation(act)
        self.se = _excite(block, inputs)
        self.conv_pw = conv(inputs, block.channels)
        self.bn2 = nn.BatchNorm2d(block.channels)
        self.act2 = activation(act) if block.kind == "dsa" else nn.Identity()

    def transform(self, x: Tensor) -> Tensor:
        y: Tensor = self.se(self.act1(self.bn1(self.conv_dw(x))))
        return self.act2(self.bn2(self.conv_pw(y)))  # type: ignore[no-any-return]


class InvertedResidual(_Shortcut):
    """ir (Sandler et al. 2018)."""

    def __init__(self, block: Block, inputs: int, act: str) -> None:
        super().__init__(block, inputs)
        inner = divisible(inputs * block.expansion)
        self.conv_pw = conv(inputs, inner)
        self.bn1 = nn.BatchNorm2d(inner)
        self.act1 = activation(act)
        self.conv_dw = conv(inner, inner, block.kernel, block.stride, groups=inner)
        self.bn2 = nn.BatchNorm2d(inner)
        self.act2 = activation(act)
        self.se = _excite(block, inner)
        self.conv_pwl = conv(inner, block.channels)
        self.bn3 = nn.BatchNorm2d(block.channels)

    def transform(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv_pw(x)))
        y = self.se(self.act2(self.bn2(self.conv_dw(y))))
        return self.bn3(self.conv_pwl(y))  # type: ignore[no-any-return]


class EdgeResidual(_Shortcut):
    """er: the expanding convolution has the kernel."""

    def __init__(self, block: Block, inputs: int, act: str) -> None:
        super().__init__(block, inputs)
        inner = divisible(inputs * block.expansion)
        self.conv_exp = conv(inputs, inner, block.kernel, block.stride)
        self.bn1 = nn.BatchNorm2d(inner)
        self.act1 = activation(act)
        self.se = _excite(block, inner)
        self.conv_pwl = conv(inner, block.channels)
        self.bn2 = nn.BatchNorm2d(block.channels)

    def transform(self, x: Tensor) -> Tensor:
        y = self.se(self.act1(self.bn1(self.conv_exp(x))))
        return self.bn2(self.conv_pwl(y))  # type: ignore[no-any-return]


class ConvBlock(nn.Module):
    """cn."""

    def __init__(self, block: Block, inputs: int, act: str) -> None:
        super().__init__()
        self.conv = conv(inputs, block.channels, block.kernel, block.stride)
        self.bn1 = nn.BatchNorm2d(block.channels)
        self.act1 = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act1(self.bn1(self.conv(x)))
        return y


BLOCKS: dict[str, Callable[[Block, int, str], nn.Module]] = {
    "ds": DepthwiseSeparable,
    "dsa": DepthwiseSeparable,
    "ir": InvertedResidual,
    "er": EdgeResidual,
    "cn": ConvBlock,
}


class MobileNet(nn.Module):
    """Stem, stages, mean over the map, 1x1 with bias and no batch-norm, classifier (MobileNetV3's order)."""

    def __init__(self, arch: Architecture, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv_stem = conv(in_channels, arch.stem, 3, arch.stride)
        self.bn1 = nn.BatchNorm2d(arch.stem)
        self.act1 = activation(arch.act)
        stages, width = [], arch.stem
        for stage in arch.unrolled():
            blocks = []
            for block in stage:
                blocks.append(BLOCKS[block.kind](block, width, block.activation or arch.act))
                width = block.channels
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.conv_head = nn.Conv2d(width, arch.head, 1)
        self.act2 = activation(arch.act)
        self.classifier = nn.Linear(arch.head, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                initialise(module)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.act1(self.bn1(self.conv_stem(x))))
        x = self.act2(self.conv_head(self.global_pool(x)))
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits


def conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Padded to keep the size at stride 1; no bias, since batch-norm follows."""
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


def initialise(module: nn.Conv2d) -> None:
    """Normal, for outputs of equal variance on the way back (He et al. 2015); torch's own forgets groups."""
    fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
    nn.init.normal_(module.weight, 0.0, math.sqrt(2 / fan_out))
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def _excite(block: Block, inner: int) -> nn.Module:
    return SqueezeExcite(inner, divisible(block.se * inner)) if block.se else nn.Identity()
