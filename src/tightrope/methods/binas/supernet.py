"""All networks of a space in one: narrower blocks use the first channels of wider ones, shallower stages stop
earlier (HardCoRe-NAS, Nayman et al. 2021, section 4; BINAS shares its training).

Every sample of a batch may take another network (multipath sampling). Channels that a sample's network does
not have are multiplied by 0 after the depthwise convolution, so that one convolution serves all widths; a
depthwise convolution runs on the samples that chose its kernel, a block on those whose depth reaches it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from tightrope.errors import InputError
from tightrope.methods.binas.paths import Paths, random_paths, same_path
from tightrope.methods.binas.space import Space
from tightrope.models.mobilenet import (
    MobileNet,
    SqueezeExcite,
    activation,
    conv,
    divisible,
    initialise,
    mobilenet,
)

Norms = Literal["shared", "path"]


class ElasticBlock(nn.Module):
    """An inverted residual of every option of a space, at one place of it.

    The norm after the projection sees features of every width: with `norms` "path" there is one for each
    (expansion, SE), fed by the samples that chose them alone; with "shared" one for all. The other norms look
    at each channel by itself, whose values do not depend on the width; after the depthwise convolution there
    is one per kernel.
    """

    inner: Tensor  # of every option, its
    hidden: Tensor
    kernel: Tensor
    path: Tensor
    inner_mask: Tensor  # (options, widest)
    hidden_mask: Tensor

    def __init__(self, space: Space, stage: int, position: int, inputs: int, norms: Norms) -> None:
        super().__init__()
        s, options = space.stages[stage], space.options
        stride = s.stride if position == 0 else 1
        self.skip = stride == 1 and inputs == s.channels
        inner = torch.tensor([divisible(inputs * o.expansion) for o in options])
        hidden = torch.tensor(
            [divisible(o.se * int(n)) if o.se else 0 for n, o in zip(inner, options, strict=True)]
        )
        pairs = [(o.expansion, o.se) for o in options]
        private = list(dict.fromkeys(pairs)) if norms == "path" else []
        path = torch.tensor([private.index(pair) if private else 0 for pair in pairs])
        kernel = torch.tensor([space.kernels.index(o.kernel) for o in options])
        widest, most = int(inner.max()), int(hidden.max())
        self.conv_pw = conv(inputs, widest)
        self.bn1 = nn.BatchNorm2d(widest)
        self.act1 = activation(s.act)
        self.conv_dw = nn.ModuleList(conv(widest, widest, k, stride, groups=widest) for k in space.kernels)
        self.bn2 = nn.ModuleList(nn.BatchNorm2d(widest) for _ in space.kernels)
        self.act2 = activation(s.act)
        self.se = SqueezeExcite(widest, most) if most else None
        self.conv_pwl = conv(widest, s.channels)
        self.bn3 = nn.ModuleList(nn.BatchNorm2d(s.channels) for _ in range(max(1, len(private))))
        tables = {
            "inner": inner, "hidden": hidden, "kernel": kernel, "path": path,
            "inner_mask": (torch.arange(widest) < inner[:, None]).float(),
            "hidden_mask": (torch.arange(most) < hidden[:, None]).float(),
        }  # fmt: skip
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def forward(self, x: Tensor, options: Tensor) -> Tensor:
        """x (N, C, H, W) under options (N,)."""
        order = self.kernel[options].argsort(stable=True)
        options = options[order]
        counts = self.kernel[options].bincount(minlength=len(self.conv_dw)).tolist()
        y = self.act1(_norm(self.bn1, self.conv_pw(x if len(self.conv_dw) == 1 else x[order])))
        done = []
        maps, groups = torch.split(y, counts), torch.split(options, counts)
        kernels = zip(self.conv_dw, self.bn2, maps, groups, strict=True)
        for conv_dw, bn2, part, chosen in kernels:
            if len(part):
                z = self.act2(_norm(bn2, conv_dw(part)))
                done.append(self.conv_pwl(z * self._factor(z, chosen)))
        y = self._project(torch.cat(done), self.path[options], order)
        return x + y if self.skip else y

    def _factor(self, z: Tensor, options: Tensor) -> Tensor:
        """(N, widest, 1, 1): 0 where the width ends, and where there is SE, its factor."""
        mask = self.inner_mask[options][:, :, None, None]
        if self.se is None:
            return mask.to(z.dtype)
        se, mean = self.se, z.mean((2, 3), keepdim=True) * mask
        inside = se.act1(se.conv_reduce(mean)) * self.hidden_mask[options][:, :, None, None]
        gate = se.gate(se.conv_expand(inside))
        excited = (self.hidden[options] > 0)[:, None, None, None]
        return torch.where(excited, gate, 1.0).to(z.dtype) * mask.to(z.dtype)

    def _project(self, y: Tensor, path: Tensor, order: Tensor) -> Tensor:
        """Normalised by the norm of each sample's path, and back in the order that the batch came in."""
        if len(self.bn3) == 1:
            return _norm(self.bn3[0], y)[order.argsort()]
        again = path.argsort(stable=True)
        counts = path.bincount(minlength=len(self.bn3)).tolist()
        parts = zip(self.bn3, torch.split(y[again], counts), strict=True)
        normed = torch.cat([_norm(norm, part) for norm, part in parts if len(part)])
        return normed[order[again].argsort()]


class ElasticStage(nn.Module):
    """Blocks of which every sample goes through as many as its depth says."""

    def __init__(self, space: Space, stage: int, inputs: int, norms: Norms) -> None:
        super().__init__()
        s = space.stages[stage]
        self.always = s.depths[0]
        for b in range(s.depths[-1]):
            width = inputs if b == 0 else s.channels
            self.add_module(str(b), ElasticBlock(space, stage, b, width, norms))

    def forward(self, x: Tensor, depths: Tensor, options: Tensor) -> Tensor:
        """x (N, C, H, W), depths (N,), options (N, blocks)."""
        for b, block in enumerate(self.children()):
            if b < self.always:
                x = block(x, options[:, b])
                continue
            on = (depths > b).nonzero()[:, 0]
            if len(on):
                x = x.index_copy(0, on, block(x[on], options[on, b]).to(x.dtype))
        return x


class WithLargest(nn.Module):
    """Random paths but for a share, which is the largest network's: one half of the sandwich rule (Yu and
    Huang, ICCV 2019), by samples. The share is rounded to samples of a batch, of each device's.
    """

    def __init__(self, space: Space, share: float) -> None:
        super().__init__()
        self.space, self.share = space, share

    def forward(self, samples: int) -> Paths:
        fixed = round(self.share * samples)
        most = same_path(self.space, self.space.largest(), fixed)
        others = random_paths(self.space, samples - fixed)
        return Paths(torch.cat([most.depths, others.depths]), torch.cat([most.options, others.options]))

    def extra_repr(self) -> str:
        return f"share={self.share}"


class Supernet(nn.Module):
    """Its modules bear the names of those of a `MobileNet` of the space, block by block.

    `drawn` may be set: what draws the paths of a training batch, instead of `random_paths`. It is a module so
    that whoever keeps the state of a training knows it.
    """

    def __init__(self, space: Space, norms: Norms = "path") -> None:
        super().__init__()
        self.drawn: WithLargest | None = None
        if norms not in ("shared", "path"):
            raise InputError("unknown batch-norm treatment", got=norms, allowed="shared, path")
        self.space, self.norms = space, norms
        smallest = space.architecture(space.smallest())
        frame: MobileNet = mobilenet(smallest, space.classes, space.input_shape[0])
        self.conv_stem, self.bn1, self.act1 = frame.conv_stem, frame.bn1, frame.act1
        widths = (space.first, *(stage.channels for stage in space.stages))
        stages = (ElasticStage(space, s, widths[s], norms) for s in range(len(space.stages)))
        self.blocks = nn.ModuleList([frame.blocks[0], *stages, frame.blocks[-1]])
        self.global_pool, self.conv_head, self.act2 = frame.global_pool, frame.conv_head, frame.act2
        self.classifier = frame.classifier
        for module in self.blocks[1:-1].modules():
            if isinstance(module, nn.Conv2d):
                initialise(module)

    def forward(self, x: Tensor, paths: Paths | None = None) -> Tensor:
        """Logits (N, classes) of images (N, C, H, W); without `paths` every sample's network is random."""
        if paths is None:
            draw = self.drawn if self.training else None
            paths = random_paths(self.space, len(x)) if draw is None else draw(len(x))
        paths = paths.to(x.device)
        x = self.blocks[0](self.act1(self.bn1(self.conv_stem(x))))
        start = 0
        for s, stage in enumerate(self.space.stages):
            stop = start + stage.depths[-1]
            x = self.blocks[1 + s](x, paths.depths[:, s], paths.options[:, start:stop])
            start = stop
        x = self.act2(self.conv_head(self.global_pool(self.blocks[-1](x))))
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        if self.training and torch.distributed.is_available() and torch.distributed.is_initialized():
            # Processes add up gradients of all parameters, also of a norm that no sample here went through.
            logits = logits + 0 * sum(p.sum() for p in self.parameters())
        return logits


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    """By running statistics where the batch has a single value per channel, which has no variance."""
    if norm.training and x.numel() == x.shape[1]:
        norm.eval()
        y: Tensor = norm(x)
        norm.train()
        return y
    y = norm(x)
    return y
