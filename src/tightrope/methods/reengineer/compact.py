"""Remove the channels that no output depends on, exactly: a smaller network with the same outputs.

A filter without weights still emits a constant through its batch-norm. Whoever reads the constant gets it as
a bias instead, or, where padding makes the borders differ, as a bias for every position.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from tightrope.errors import TraceError
from tightrope.graph import Graph, trace
from tightrope.methods.reengineer.channels import NORMS, find_channels
from tightrope.methods.reengineer.constants import Known, known_inputs
from tightrope.nn.bias_map import BiasMap
from tightrope.nn.masked import Channels

TOLERANCE = 1e-4  # largest change of an output, checked in float64 on random images
Layer = nn.Conv2d | nn.Linear


def compact(graph: Graph, *, maps: bool = False, channels: Channels | None = None) -> fx.GraphModule:
    """A copy of the network without the channels that can go exactly.

    A unit of channels (`find_channels`) goes when every layer that reads one of its channels reads it with
    weight 0, or into channels that go too, or finds it constant. With `maps`, constants may need a bias per
    position, and the result takes images of this size only, and cannot be lowered; without, such units stay.
    One channel of a tensor that would lose all stays: it is 0 and is read with weight 0, so that no gradient
    reaches it and training leaves it so, where activations take 0 to 0.

    Raises TraceError if an output would change by more than 1e-4.
    """
    module = trace(graph.module, graph.input_shape).module.double()
    found = find_channels(graph.module, graph.input_shape) if channels is None else channels
    known = known_inputs(module, graph.input_shape)
    layers = {name: m for name, m in module.named_modules() if isinstance(m, Layer)}
    alive = _alive(layers, found, known, maps)
    kept = alive | _spare(found, alive)
    example = torch.randn(4, *graph.input_shape, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        before = module(example)
        _fold(module, layers, found, known, alive, kept, maps)
        for name, m in module.named_modules():
            out, into = found.out.get(name), found.into.get(name)
            _silence(m, out, None if into is None else found.into_matrix(name, m), alive)
            _slice(m, out, into, kept)
        change = float((module(example) - before).abs().max())
    if not change <= TOLERANCE:
        raise TraceError(
            "removing dead channels would change the outputs; the network stays as it is masked",
            got=f"{change:.3g}",
            allowed=f"{TOLERANCE:g}",
        )
    return trace(module.float(), graph.input_shape).module


def _live(units: Tensor, alive: Tensor) -> Tensor:
    """Of channels: whether their unit stays; channels of no unit do."""
    return alive[units] | (units < 0)


def _alive(layers: dict[str, Layer], channels: Channels, known: dict[str, Known], maps: bool) -> Tensor:
    """The units that something depends on, from the outputs backwards until nothing changes."""
    blocked = {}
    for name, layer in layers.items():
        if name in channels.into:
            blocked[name] = _reads(layer) & ~_foldable(layer, known[name], maps)
    alive = torch.zeros(channels.count + 1, dtype=torch.bool)  # the last one is never asked for
    while True:
        needed = alive.clone()
        for name, reads in blocked.items():
            layer, units = layers[name], channels.into_matrix(name, layers[name])
            out = channels.out.get(name, torch.full((layer.weight.shape[0],), -1))
            active = reads & _live(out, alive)[:, None] & (units >= 0)
            needed[units[active]] = True
        if torch.equal(needed, alive):
            return alive
        alive = needed


def _spare(channels: Channels, alive: Tensor) -> Tensor:
    """A unit of every tensor that would be left without a channel."""
    spare = torch.zeros_like(alive)
    for chain in channels.chains:
        units = list(chain)
        if not (alive | spare)[units].any():
            spare[units[0]] = True
    return spare


def _reads(layer: Layer) -> Tensor:
    """(out, in / groups): whether any weight between the two is not 0."""
    return layer.weight.detach().reshape(*layer.weight.shape[:2], -1).ne(0).any(2)


def _foldable(layer: Layer, x: Known, maps: bool) -> Tensor:
    """(out, in / groups): whether the layer can do without this input, given what is known of it."""
    groups = getattr(layer, "groups", 1)
    value = x.value.transpose(0, 1).flatten(1)
    even = (value == value[:, :1]).all(1)
    padded = isinstance(layer, nn.Conv2d) and layer.padding not in (0, (0, 0), "valid")
    fine = x.constant & ((value == 0).all(1) if padded else even)
    if maps and isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros":
        fine = x.constant
    return fine.view(groups, -1).repeat_interleave(layer.weight.shape[0] // groups, 0)


def _fold(
    module: fx.GraphModule,
    layers: dict[str, Layer],
    channels: Channels,
    known: dict[str, Known],
    alive: Tensor,
    kept: Tensor,
    maps: bool,
) -> None:
    """What the constants that go have given to each layer becomes its bias."""
    for name, layer in layers.items():
        if name not in channels.into:
            continue
        gone = known[name].constant & ~_live(channels.into[name], alive)
        value = known[name].value
        value = torch.where(gone.view(1, -1, *[1] * (value.dim() - 2)), value, torch.zeros_like(value))
        if not value.any():
            continue
        bias, layer.bias = layer.bias, None
        given = layer(value)[0]
        layer.bias = bias
        flat = given.reshape(given.shape[0], -1)
        live = _live(channels.out[name], alive) if name in channels.out else torch.ones(len(flat)).bool()
        if torch.allclose(flat[live], flat[live][:, :1], rtol=0, atol=1e-12):
            own = torch.zeros(len(flat), dtype=flat.dtype) if bias is None else bias
            layer.bias = nn.Parameter(own + flat[:, 0])
        elif maps:
            given[~live] = 0
            _insert(module, name, given[_live(channels.out[name], kept)] if name in channels.out else given)


def _insert(module: fx.GraphModule, name: str, bias: Tensor) -> None:
    """Put the map behind every call of the layer."""
    taken = {n for n, _ in module.named_modules()}
    new = next(n for n in (f"{name}_bias_map", f"{name}_bias_map_1") if n not in taken)
    module.add_submodule(new, BiasMap(bias))
    for node in [n for n in module.graph.nodes if n.op == "call_module" and n.target == name]:
        with module.graph.inserting_after(node):
            after = module.graph.call_module(new, (node,))
        node.replace_all_uses_with(after, lambda user, after=after: user is not after)
    module.recompile()


def _silence(layer: nn.Module, out: Tensor | None, into: Tensor | None, alive: Tensor) -> None:
    """Channels that nothing depends on become 0, and what reads them reads nothing."""
    if out is not None:
        for word in ("weight", "bias"):
            if isinstance(tensor := getattr(layer, word, None), nn.Parameter):
                tensor[~_live(out, alive)] = 0
    if into is not None:
        layer.get_parameter("weight")[~_live(into, alive)] = 0


def _slice(layer: nn.Module, out: Tensor | None, into: Tensor | None, alive: Tensor) -> None:
    """Keep the channels whose unit stays."""
    if isinstance(layer, Layer) and into is not None:
        groups = getattr(layer, "groups", 1)
        keep = _live(into, alive)
        if groups > 1:  # whole groups go, whose outputs go too
            assert isinstance(layer, nn.Conv2d)
            layer.groups = int(keep.view(groups, -1).any(1).sum())
        else:
            layer.weight = nn.Parameter(layer.weight[:, keep])
        _set(layer, ("in_channels", "in_features"), int(keep.sum()))
    if out is None:
        return
    keep = _live(out, alive)
    for word in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(layer, word, None)
        if tensor is not None:
            kept = tensor[keep].clone()
            setattr(layer, word, nn.Parameter(kept) if isinstance(tensor, nn.Parameter) else kept)
    if isinstance(layer, (*NORMS, nn.Conv2d, nn.Linear)):
        _set(layer, ("out_channels", "out_features", "num_features"), int(keep.sum()))


def _set(layer: nn.Module, words: tuple[str, ...], value: int) -> None:
    for word in words:
        if hasattr(layer, word):
            setattr(layer, word, value)
