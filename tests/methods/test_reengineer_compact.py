"""Compaction is exact, and removes what it should."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn

import networks
from networks import settle
from tightrope.data import load
from tightrope.finetune import Recipe, finetune
from tightrope.graph import trace
from tightrope.lower import lower
from tightrope.methods.reengineer.channels import find_channels
from tightrope.methods.reengineer.compact import compact
from tightrope.methods.reengineer.counting import published_macs, weights
from tightrope.models import resolve


def vision(library: str, name: str, **options: Any) -> nn.Module:
    module = importlib.import_module("torchvision.models" if library == "torchvision" else "timm")
    return getattr(module, name)(**options) if library == "torchvision" else module.create_model(name)


LARGE = {
    "resnet18": lambda: vision("torchvision", "resnet18"),
    "mobilenet_v2": lambda: vision("torchvision", "mobilenet_v2"),
    "regnetx_002": lambda: vision("timm", "regnetx_002"),
    "densenet": lambda: vision(
        "torchvision", "DenseNet", growth_rate=8, block_config=(2, 2), num_init_features=16, num_classes=5
    ),
}
SMALL = {**networks.NETWORKS, "vgg": lambda: resolve("vgg16_bn", num_classes=5)}


def kill(net: nn.Module, seed: int, share: float) -> nn.Module:
    """Filters without weights (their batch-norm still speaks), inputs that nobody reads, single weights."""
    generator = torch.Generator().manual_seed(seed)
    settle(net, seed=seed)
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nn.Conv2d):
                m.weight[torch.rand(m.weight.shape[0], generator=generator) < share] = 0
                m.weight[:, torch.rand(m.weight.shape[1], generator=generator) < share] = 0
                m.weight[torch.rand(m.weight.shape, generator=generator) < 0.3] = 0
    return net


def check(net: nn.Module, side: int, maps: bool) -> tuple[nn.Module, nn.Module]:
    graph = trace(net, (3, side, side))
    small = compact(graph, maps=maps)
    x = torch.randn(3, 3, side, side)
    with torch.no_grad():
        want, got = net(x), small(x)
    assert not torch.equal(want[0], want[1])  # the outputs do depend on the input
    assert float((want - got).abs().max()) < 1e-4
    assert weights(small) < weights(net)
    return net, small


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_outputs_stay_and_weights_go(name, maps):
    _, small = check(kill(SMALL[name](), 4, 0.3), 32 if name == "vgg" else 16, maps)
    if not maps:
        program = lower(small, (3, 32, 32) if name == "vgg" else (3, 16, 16))
        assert len(program.ops) > 3
    assert all(type(m).__module__.startswith(("torch", "tightrope.nn")) for m in small.modules())


@pytest.mark.vision
@pytest.mark.slow
@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("name", LARGE)
def test_large_networks_too(name, maps):
    share = 0.05 if name == "mobilenet_v2" else 0.1  # 52 layers in a row would otherwise block the input
    check(kill(LARGE[name](), 2, share), 64, maps)


def block(constant: float, padding: int) -> nn.Module:
    """Two filters, the first without weights: its batch-norm emits `constant` to a convolution."""
    net = nn.Sequential(
        nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2), nn.ReLU(),
        nn.Conv2d(2, 3, 3, padding=padding), nn.Flatten(), nn.LazyLinear(2),
    )  # fmt: skip
    net(torch.zeros(1, 1, 5, 5))
    with torch.no_grad():
        net[0].weight[0] = 0
        net[1].bias[0] = constant
    return net.eval()


@pytest.mark.parametrize(
    ("constant", "padding", "maps", "goes"),
    [
        (0.0, 1, False, True),
        (-2.0, 1, False, True),  # ReLU makes it 0
        (2.0, 0, False, True),  # a bias
        (2.0, 1, False, False),  # borders differ
        (2.0, 1, True, True),  # a bias for every position
    ],
)
def test_a_dead_filter_goes_where_that_is_exact(constant, padding, maps, goes):
    net = block(constant, padding)
    small = compact(trace(net, (1, 5, 5)), maps=maps)
    assert small.get_submodule("0").out_channels == (1 if goes else 2)
    x = torch.randn(4, 1, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(small(x), net(x), atol=1e-6, rtol=0)


def test_a_residual_channel_goes_only_when_dead_in_every_member():
    net = settle(networks.TinyResNet())
    with torch.no_grad():
        for norm, at in ((net.stem[1], [0, 1]), (net.layer1.bn2, [1, 2])):
            norm.weight[at], norm.bias[at] = 0, 0
    small = compact(trace(net, (3, 8, 8)))
    assert small.get_submodule("layer1.conv1").in_channels == 3  # the sum reads the stem too
    assert small.get_submodule("layer1.conv2").out_channels == 3  # in the sum only channel 1 is


def test_one_channel_of_every_tensor_stays():
    net = settle(networks.TinyResNet())
    with torch.no_grad():
        net.layer1.conv2.weight.zero_()
        net.layer1.bn2.bias.zero_()
    small = compact(trace(net, (3, 8, 8)))
    assert small.get_submodule("layer1.conv1").out_channels == 1
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(small(x), net(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_of_dead_networks_one_channel_of_every_tensor_stays_which_is_0(name, maps):
    side = 32 if name == "vgg" else 16
    graph = trace(settle(SMALL[name]()), (3, side, side))
    units = find_channels(graph.module, graph.input_shape)
    with torch.no_grad():
        for layer, out in units.out.items():
            for parameter in graph.module.get_submodule(layer).parameters():
                parameter[out >= 0] = 0
    small = compact(graph, maps=maps)
    x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(small(x), graph.module(x), atol=1e-5, rtol=0)
    firsts = {chain[0] for chain in units.separate}
    for layer, out in units.out.items():
        if (out >= 0).all():
            weight = small.get_submodule(layer).weight
            assert len(weight) == sum(unit in firsts for unit in out.tolist()) and not weight.any()
    assert weights(small) < weights(graph.module)


class Inner(nn.Module):
    """A branch whose inner tensor is dead."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.stem, self.a, self.b = networks.conv(1, 4), networks.conv(4, 3), networks.conv(3, 4)
        self.norm = nn.BatchNorm2d(3) if norm else nn.Identity()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 10)
        with torch.no_grad():
            for parameter in (*self.a.parameters(), *self.norm.parameters()):
                parameter.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.b(torch.relu(self.norm(self.a(x))))
        return self.fc(torch.flatten(self.pool(x), 1))


@pytest.mark.parametrize("norm", [False, True])
def test_training_does_not_revive_the_channel_that_stays_of_a_dead_tensor(norm):
    torch.manual_seed(0)
    data = load("embedded")
    net = Inner(norm).eval()
    small = compact(trace(net, data.input_shape))
    x = next(data.batches("validation", 8))[0]
    with torch.no_grad():
        torch.testing.assert_close(small(x), net(x), atol=1e-6, rtol=0)
    tuned = finetune(small, data, recipe=Recipe(epochs=1, limit=640))
    dead = [p for name in ("a", "norm", "b") for p in tuned.get_submodule(name).parameters() if p.dim() != 1]
    dead += [p for name in ("a", "norm") for p in tuned.get_submodule(name).parameters() if p.dim() == 1]
    assert len(dead) == (5 if norm else 3) and not any(p.any() for p in dead)
    assert tuned.get_submodule("a").out_channels == 1
    assert not torch.equal(tuned.get_submodule("b").bias, small.get_submodule("b").bias)  # it does learn


def test_published_counts_of_resnet20():
    """41.22 M multiplications and 270,906 weights: Qi et al. 2023, the CIFAR-10 donor."""
    graph = trace(resolve("resnet20", num_classes=10, in_channels=3), (3, 32, 32))
    assert round(published_macs(graph) / 1e6, 2) == 41.22
    assert weights(graph.module) == 270_906
