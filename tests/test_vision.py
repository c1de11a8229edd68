"""Networks that people use, unmodified: torchvision's and timm's, from trace to the reference runtime."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from networks import gap, images, settle
from tightrope.graph import Graph, trace
from tightrope.lower import lower
from tightrope.methods.block_relu import BlockReluMethod
from tightrope.methods.block_relu.patches import patches
from tightrope.models import resolve
from tightrope.nn import BlockReLU
from tightrope.place import place
from tightrope.program import Relu, base_cost
from tightrope.runtimes.plain import Plain

pytestmark = pytest.mark.vision

# side of the input, and how many calls of an activation the published architecture makes
NETWORKS = {
    "torchvision:resnet18": (64, 17),
    "torchvision:mobilenet_v2": (32, 35),
    "torchvision:densenet121": (32, 121),
    "timm:regnetx_002": (32, 40),
}
METHOD = BlockReluMethod(samples=2, batch_size=2, directions=2, verify=0, repair=False)


def network(spec: str) -> tuple[nn.Module, tuple[int, int, int]]:
    torch.manual_seed(0)
    side = NETWORKS[spec][0]
    return settle(resolve(spec, num_classes=10)), (3, side, side)


def exact_in_float32(model: nn.Module) -> nn.Module:
    """Batch-norm statistics for which folding needs no rounding: powers of two, and short binary fractions.

    A Program holds float32 weights. Were they rounded, a tile whose sum is almost 0 could get the other
    sign, and unlike a plain ReLU's, that changes the outputs by a finite amount.
    """
    generator = torch.Generator().manual_seed(1)

    def fractions(like: torch.Tensor) -> torch.Tensor:
        return torch.randint(-64, 65, like.shape, generator=generator) / 128

    model.double()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            powers = torch.randint(0, 2, m.running_var.shape, generator=generator)
            m.running_var.copy_(4.0 ** powers.double()).sub_(m.eps)
            m.running_mean.copy_(fractions(m.running_mean))
            with torch.no_grad():
                m.weight.copy_(2.0 ** torch.randint(-1, 2, m.weight.shape, generator=generator))
                m.bias.copy_(fractions(m.bias))
    return model


def random_choices(graph: Graph) -> dict[str, dict[str, list[list[int]]]]:
    """A random patch for every channel of every site."""
    generator = torch.Generator().manual_seed(2)
    choices = {}
    for site in graph.match("*", METHOD.kinds):
        options = patches(site.shape[1:])
        picked = torch.randint(len(options), site.shape[:1], generator=generator)
        choices[site.name] = {"patches": [list(options[k]) for k in picked]}
    return choices


@pytest.mark.parametrize("spec", NETWORKS)
def test_lowered_networks_equal_torch(spec):
    model, shape = network(spec)
    program = lower(model, shape)
    assert gap(model, program, torch.randn(2, *shape), least=1e-3) < 1e-4
    assert sum(isinstance(op, Relu) for op in program.ops) == NETWORKS[spec][1]


@pytest.mark.parametrize("spec", NETWORKS)
def test_random_patches_at_every_site(spec):
    """Placed, lowered and run: equal to torch in float64, and the DReLUs are those of the patches."""
    model, shape = network(spec)
    model = exact_in_float32(model)
    graph = trace(model, shape)
    choices = random_choices(graph)
    assert len(choices) == NETWORKS[spec][1]
    placed = place(graph, choices, METHOD.rewrite)
    assert sum(isinstance(m, BlockReLU) for m in placed.module.modules()) == len(choices)
    program = lower(placed.module, shape)
    x = torch.randn(2, *shape)
    assert gap(placed.module, program, x, least=1e-3) < 1e-4
    with torch.no_grad():
        assert not torch.allclose(placed.module(x.double()), model(x.double()), rtol=0.1)
    lowered = {op.name: [list(p) for p in op.patches] for op in program.ops if isinstance(op, Relu)}
    assert lowered == {site: choice["patches"] for site, choice in choices.items()}
    _, measured = Plain().open(program).run(x.numpy())
    assert measured.total.drelus == 2 * sum(base_cost(op).drelus for op in program.ops)


@pytest.mark.parametrize("spec", ["torchvision:resnet18", "torchvision:mobilenet_v2"])
def test_every_option_is_measured(spec):
    model, shape = network(spec)
    problem = METHOD.measure(
        trace(model, shape), images(shape, 2), cost=Plain(), workdir=None, progress=lambda *_: None
    )
    assert len(problem.tables) == NETWORKS[spec][1]
    assert all((t.loss[:, -1] > 0).any() for t in problem.tables)
