"""What a patch costs in accuracy: the mean squared change of the network's outputs.

Exact: change one channel at one site, run everything after it, compare. Fast: a first-order estimate
of the same number for all channels and patches at once, from one backward pass per output direction.
With J the Jacobian of the outputs in the site's value y, and delta = y_patch - y in one channel, the
change is J delta. Its sum over a tile factors, gate * sum(J z), so that one summed-area table of J z
serves every patch (z is the input of the site).

Repaired: the same after the layers that follow have rescaled the channel, which fine-tuning does at once:
the minimum over a of the mean squared J (a y_patch - y), in closed form from three sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from tightrope.graph import Graph
from tightrope.nn.block_relu import BlockReLU, Patch, tile_gate
from tightrope.types import Site


@dataclass
class Distortion:
    """Running sums for one site, over images and output directions.

    `squares` (C, K) of the changes J (y_patch - y), `powers` (C, K) of J y_patch, `products` (C, K) of
    J y_patch with J y, `power` (C, 1) of J y. `active`: whether any option changed the site's own value.
    """

    squares: Tensor
    powers: Tensor
    products: Tensor
    power: Tensor
    images: int = 0
    active: bool = False

    @classmethod
    def zeros(cls, channels: int, options: int) -> Distortion:
        wide = torch.zeros(channels, options, dtype=torch.float64)
        return cls(wide, wide.clone(), wide.clone(), torch.zeros(channels, 1, dtype=torch.float64))

    @property
    def factor(self) -> Tensor:
        """The best rescaling of each option, (C, K); 1 for one that the outputs do not hear of."""
        heard = self.powers > 0
        return torch.where(heard, self.products / torch.where(heard, self.powers, 1.0), 1.0)

    @property
    def repaired(self) -> Tensor:
        """`squares` after the best rescaling of each option, (C, K); never above `squares`."""
        best = self.power - self.products.square() / self.powers.clamp_min(1e-300)
        return torch.minimum(best.clamp_min(0), self.squares)

    def losses(self, outputs: int) -> Losses:
        """Means over images and outputs."""
        scale = 1 / (self.images * outputs)
        parts = (scale * self.squares, scale * self.repaired, self.factor, self.power[:, 0] == 0)
        return Losses(*(part.numpy() for part in parts))


@dataclass(frozen=True)
class Losses:
    """Of one site: the mean squared change of the network's outputs per channel and option (C, K), as it is
    and after rescaling by `factor`. `silent` (C,): channels whose value never reached the outputs."""

    raw: NDArray[np.float64]
    repaired: NDArray[np.float64]
    factor: NDArray[np.float64]
    silent: NDArray[np.bool_]


def _area(table: Tensor, edges: tuple[Tensor, Tensor]) -> Tensor:
    """Tile sums out of a summed-area table (..., H + 1, W + 1)."""
    return table.index_select(-2, edges[0]).index_select(-1, edges[1]).diff(dim=-1).diff(dim=-2)


def _table(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x.cumsum(-1).cumsum(-2), (1, 0, 1, 0))


def _edges(size: tuple[int, int], patch: Patch, device: torch.device) -> tuple[Tensor, Tensor]:
    rows, columns = ([*range(0, n, s), n] for n, s in zip(size, patch, strict=True))
    return torch.tensor(rows, device=device), torch.tensor(columns, device=device)


def directions(out: Tensor, most: int, generator: torch.Generator) -> Iterator[tuple[Tensor, float]]:
    """Vectors v (N, K) and weights w with sum of w (v J d)^2 = |J d|^2: all K of them, or random probes."""
    flat = out[0].numel()
    if flat <= most:
        for k in range(flat):
            v = torch.zeros(len(out), flat, dtype=out.dtype, device=out.device)
            v[:, k] = 1
            yield v.view_as(out), 1.0
    else:
        for _ in range(most):
            yield torch.randn(out.shape, generator=generator, dtype=out.dtype, device=out.device), 1.0 / most


def _map(x: Tensor) -> Tensor:
    return x[:, :, None, None] if x.dim() == 2 else x


def accumulate(
    graph: Graph,
    sites: Sequence[Site],
    options: dict[str, list[Patch]],
    x: Tensor,
    sums: dict[str, Distortion],
    *,
    most_directions: int,
    generator: torch.Generator,
    wanted: Tensor | None = None,
) -> int:
    """Add a batch x (N, C, H, W) to the running sums of `sites`. Returns the number of network passes.

    With `wanted` (N, K), outputs that the network should have, the sums are of the error that remains under
    an option instead of the change that it makes.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = []
    for site in sites:

        def keep(m: nn.Module, args: tuple[Tensor, ...], out: Tensor, name: str = site.name) -> None:
            seen[name] = (_map(args[0].detach()), out)

        hooks.append(graph.module.get_submodule(site.name).register_forward_hook(keep))
    try:
        out = graph.module(x.clone().requires_grad_())
    finally:
        for hook in hooks:
            hook.remove()
    error = torch.zeros_like(out) if wanted is None else (out - wanted).detach()
    gates = {s.name: _gates(graph, s, seen[s.name][0], options[s.name]) for s in sites}
    passes = 1
    values = [seen[s.name][1] for s in sites]
    for v, weight in directions(out, most_directions, generator):
        rows = torch.autograd.grad(out, values, v, retain_graph=True, allow_unused=True)
        passes += 1
        now = (v * error).flatten(1).sum(1).double()[:, None, None]
        for site, row in zip(sites, rows, strict=True):
            if row is not None:
                z, y = seen[site.name]
                new, old = _responses(
                    graph, site, z, _map(y.detach()), _map(row), options[site.name], gates[site.name]
                )
                old = old - now
                mine = sums[site.name]
                mine.squares += weight * (new - old).square().sum(0).cpu()
                mine.powers += weight * new.square().sum(0).cpu()
                mine.products += weight * (new * old).sum(0).cpu()
                mine.power += weight * old.square().sum(0).cpu()
    for site in sites:
        z, y = seen[site.name]
        sums[site.name].images += len(x)
        sums[site.name].active |= bool((z != _map(y)).any())
    return passes


Gates = list[tuple[Tensor, Tensor | None]]


def upper_of(graph: Graph, site: Site) -> float | None:
    module = graph.module.get_submodule(site.name)
    if isinstance(module, BlockReLU):
        return module.upper
    return 6.0 if isinstance(module, nn.ReLU6) else None


def _gates(graph: Graph, site: Site, z: Tensor, patches: list[Patch]) -> Gates:
    upper = upper_of(graph, site)
    return [
        (tile_gate(z, p), None if upper is None else tile_gate(z - upper, p))
        if p != (0, 0)
        else (z.new_ones(1), None)
        for p in patches
    ]


def _responses(
    graph: Graph, site: Site, z: Tensor, y: Tensor, row: Tensor, patches: list[Patch], gates: Gates
) -> tuple[Tensor, Tensor]:
    """v J y_patch (N, C, K) and v J y (N, C, 1) in float64, for one direction v."""
    upper = upper_of(graph, site)
    size = (z.shape[-2], z.shape[-1])
    base = (row * y).sum((-2, -1))
    weighted = _table(row * z)
    plain = _table(row) if upper is not None else None
    columns = []
    for patch, (gate, above) in zip(patches, gates, strict=True):
        if patch == (0, 0):
            new = weighted[..., -1, -1]
        else:
            edges = _edges(size, patch, z.device)
            sums = _area(weighted, edges)
            if above is None or plain is None or upper is None:
                new = (sums * gate).sum((-2, -1))
            else:
                new = (sums * (gate & ~above) + upper * _area(plain, edges) * above).sum((-2, -1))
        columns.append(new)
    return torch.stack(columns, -1).double(), base[..., None].double()


class Suffix:
    """The part of a network after one site, run again and again on changed values of the site."""

    def __init__(self, graph: Graph, site: Site, x: Tensor) -> None:
        self.module = graph.module
        self.node = graph.node(site)
        after: set[fx.Node] = set()
        for node in graph.module.graph.nodes:
            if any(a is self.node or a in after for a in node.all_input_nodes):
                after.add(node)
        self.after = [n for n in graph.module.graph.nodes if n in after]
        needed = {a for n in self.after for a in n.all_input_nodes} - after
        recorder = _Recorder(graph.module, needed | {self.node.all_input_nodes[0], self.node})
        with torch.no_grad():
            self.output: Tensor = recorder.run(x)
        self.values = recorder.kept

    @property
    def input(self) -> Tensor:
        """What enters the site."""
        return self.values[self.node.all_input_nodes[0]]

    @property
    def value(self) -> Tensor:
        """What leaves the site in the unchanged network."""
        return self.values[self.node]

    def run(self, changed: Tensor) -> Tensor:
        interpreter = fx.Interpreter(self.module)
        env = dict(self.values) | {self.node: changed}
        interpreter.env = env
        with torch.no_grad():
            for node in self.after:
                result = interpreter.run_node(node)
                if node.op == "output":
                    return result  # type: ignore[no-any-return]
                env[node] = result
        return self.output  # nothing after the site reaches the output


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(module)
        self.wanted = wanted
        self.kept: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        if n in self.wanted:
            self.kept[n] = result
        return result


def exact(suffix: Suffix, channel: int, patch: Patch, upper: float | None, factor: float = 1.0) -> float:
    """Mean squared change of the outputs when one channel at the site takes `patch`, times `factor`."""
    changed = suffix.value.clone()
    z = suffix.input[:, channel : channel + 1]
    changed[:, channel : channel + 1] = factor * BlockReLU([patch], upper)(z)
    return float((suffix.run(changed) - suffix.output).double().square().mean())
