"""trace: every activation becomes one site per call, and the network stays what it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from networks import NETWORKS, Block, Chain, TinyResNet, conv, settle
from tightrope.errors import InputError, TraceError
from tightrope.graph import Graph, trace

SHAPE = (3, 8, 8)


def same(model: nn.Module, traced: nn.Module, count: int = 3) -> bool:
    """Equal on another batch than the one `trace` looked at."""
    x = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return torch.allclose(model(x.clone()), traced(x.clone()), atol=1e-5)


def kinds(model: nn.Module, shape: tuple[int, ...] = SHAPE) -> list[tuple[str, str]]:
    return [(s.name, s.kind) for s in trace(model, shape).sites]


@pytest.mark.parametrize(
    ("activation", "kind"),
    [
        (F.relu, "relu"),
        (torch.relu, "relu"),
        (lambda x: x.relu(), "relu"),
        (lambda x: x.relu_(), "relu"),
        (F.relu_, "relu"),
        (torch.relu_, "relu"),
        (lambda x: F.relu(x, inplace=True), "relu"),
        (lambda x: F.relu(x, True), "relu"),
        (lambda x: F.relu(input=x), "relu"),
        (lambda x: x.clamp(min=0), "relu"),
        (lambda x: torch.clamp(x, 0), "relu"),
        (nn.ReLU(inplace=True), "relu"),
        (F.relu6, "relu6"),
        (lambda x: F.relu6(x, inplace=True), "relu6"),
        (lambda x: F.hardtanh(x, 0, 6), "relu6"),
        (lambda x: F.hardtanh(x, min_val=0.0, max_val=6.0), "relu6"),
        (lambda x: x.clamp(0, 6), "relu6"),
        (lambda x: x.clamp_(0, 6), "relu6"),
        (lambda x: torch.clamp(x, min=0, max=6), "relu6"),
        (nn.Hardtanh(0, 6), "relu6"),
        (F.hardswish, "hard_swish"),
        (F.hardsigmoid, "hard_sigmoid"),
        (F.silu, "silu"),
        (torch.sigmoid, "sigmoid"),
        (lambda x: x.sigmoid(), "sigmoid"),
        (lambda x: F.max_pool2d(x, 3, stride=1, padding=1), "max_pool"),
        (lambda x: torch.max_pool2d(x, 2), "max_pool"),
    ],
)
def test_functional_activations_become_sites(activation, kind):
    model = Chain(conv(3, 4), lambda x: 5 * x, activation, conv(4, 2)).eval()
    graph = trace(model, SHAPE)
    assert [s.kind for s in graph.sites] == [kind]
    assert same(model, graph.module)
    assert isinstance(graph.module.get_submodule(graph.sites[0].name), nn.Module)


@pytest.mark.parametrize(
    "activation",
    [lambda x: x.clamp(-1, 1), lambda x: x.clamp(max=6), F.hardtanh, nn.Hardtanh(), torch.tanh, F.elu],
)
def test_other_functions_are_no_sites(activation):
    model = Chain(conv(3, 4), activation, conv(4, 2)).eval()
    graph = trace(model, SHAPE)
    assert graph.sites == ()
    assert same(model, graph.module)


class Scoped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = Chain(conv(3, 3), F.relu, F.relu6, F.relu)
        self.relu_1 = nn.ReLU()
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.relu_1(self.relu(self.head(x))) - 1)


def test_names_follow_the_module_and_are_unique():
    model = Scoped().eval()
    assert kinds(model) == [
        ("head.relu", "relu"),
        ("head.relu6", "relu6"),
        ("head.relu_1", "relu"),
        ("relu", "relu"),
        ("relu_1", "relu"),
        ("relu_2", "relu"),
    ]


def test_a_module_called_twice_gives_two_sites():
    model = settle(TinyResNet())
    graph = trace(model, SHAPE)
    assert [s.name for s in graph.sites] == [
        "stem.2", "layer1.relu", "layer1.relu_1", "layer2.relu", "layer2.relu_1"
    ]  # fmt: skip
    modules = [graph.module.get_submodule(s.name) for s in graph.sites]
    assert len({id(m) for m in modules}) == 5
    assert [graph.node(s).target for s in graph.sites] == [s.name for s in graph.sites]


def test_one_object_under_two_names_gives_two_sites():
    relu = nn.ReLU()
    model = nn.Sequential(conv(3, 3), relu, conv(3, 3), relu)
    graph = trace(model, SHAPE)
    assert len(graph.sites) == 2
    a, b = (graph.module.get_submodule(s.name) for s in graph.sites)
    assert a is not b


def test_a_hook_on_one_site_does_not_fire_for_another():
    graph = trace(TinyResNet(), SHAPE)
    for watched in graph.sites:
        fired: list[int] = []
        hook = graph.module.get_submodule(watched.name).register_forward_hook(lambda *_, f=fired: f.append(1))
        graph.module(torch.randn(2, *SHAPE))
        hook.remove()
        assert fired == [1], watched.name


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_stay_what_they_are(name):
    model = settle(NETWORKS[name]())
    graph = trace(model, SHAPE)
    assert same(model, graph.module)
    assert same(model, trace(graph.module, SHAPE).module)
    assert trace(graph.module, SHAPE).sites == graph.sites


def test_shapes_are_those_of_the_running_network():
    model = settle(NETWORKS["mobile"]())
    seen: list[tuple[tuple[int, ...], ...]] = []
    for m in model.modules():
        if isinstance(m, nn.ReLU6 | nn.MaxPool2d):
            m.register_forward_hook(lambda _, args, out: seen.append((args[0].shape[1:], out.shape[1:])))
    with torch.no_grad():
        model(torch.randn(1, *SHAPE))
    for m in model.modules():
        m._forward_hooks.clear()
    graph = trace(model, SHAPE)
    assert [(s.input_shape, s.shape) for s in graph.sites] == seen
    assert graph.input_shape == SHAPE


def keeps_values(model: nn.Module, graph: Graph) -> bool:
    """Whether what the layer `first` returned is still that after the whole network has run."""
    x = torch.randn(2, *SHAPE)
    seen: list[torch.Tensor] = []
    graph.module.get_submodule("first").register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad():
        graph.module(x)
        return torch.equal(seen[0], model.first(x))


class Activated(nn.Module):
    """Pre-activation residual: what an in-place activation does to `x` reaches the sum."""

    def __init__(self, activation) -> None:
        super().__init__()
        self.first, self.last = conv(3, 3), conv(3, 3)
        self.activation = activation

    def forward(self, x):
        x = self.first(x)
        before = x * 2
        self.activation(x)
        return self.last(x) + x - before


@pytest.mark.parametrize(
    "activation",
    [
        nn.ReLU(inplace=True),
        F.relu_,
        lambda x: x.relu_(),
        lambda x: F.relu(x, inplace=True),
        lambda x: F.relu6(x, True),
    ],
)
def test_what_works_in_place_is_seen_by_later_readers(activation):
    model = Activated(activation).eval()
    graph = trace(model, SHAPE)
    assert len(graph.sites) == 1
    assert same(model, graph.module)
    assert keeps_values(model, graph)


class AddsInPlace(nn.Module):
    def __init__(self, add) -> None:
        super().__init__()
        self.first, self.last = conv(3, 3), conv(3, 3)
        self.add = add

    def forward(self, x):
        out = self.first(x)
        alias = out
        self.add(out, self.last(F.relu(x)))
        return out + alias


@pytest.mark.parametrize("add", [lambda out, x: out.add_(x), lambda out, x: out.mul_(x)])
def test_sums_in_place_change_every_alias_and_no_stored_value(add):
    model = AddsInPlace(add).eval()
    graph = trace(model, SHAPE)
    assert same(model, graph.module)
    assert keeps_values(model, graph)


def _view(y):
    y.flatten(1).add_(1)
    return y


def _other_name(y):
    z = y
    z += 1
    return y


@pytest.mark.parametrize("change", [_view, _other_name])
def test_a_change_that_is_not_followed_is_an_error_not_a_wrong_network(change):
    with pytest.raises(TraceError, match="computes something else"):
        trace(Chain(lambda x: x * 2, change), SHAPE)


def test_the_callers_model_is_not_changed():
    model = TinyResNet().train()
    model.layer1.eval()
    x = torch.randn(4, *SHAPE)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    modules = [(name, id(m), type(m), m.training) for name, m in model.named_modules()]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    random = torch.random.get_rng_state()
    graph = trace(model, SHAPE)
    with torch.no_grad():
        for p in graph.module.parameters():
            p.zero_()
        graph.module.train()(x)
    assert [(name, id(m), type(m), m.training) for name, m in model.named_modules()] == modules
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert model.layer1.relu.inplace
    assert torch.equal(torch.random.get_rng_state(), random)


def test_a_trace_is_in_eval_mode_whatever_the_model_is_in():
    model = nn.Sequential(conv(3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5)).train()
    graph = trace(model, SHAPE)
    assert same(model.eval(), graph.module)


def test_double_networks_and_any_batch():
    model = settle(TinyResNet()).double()
    graph = trace(model, SHAPE)
    for count in (1, 5):
        x = torch.randn(count, *SHAPE, dtype=torch.float64)
        torch.testing.assert_close(graph.module(x), model(x), rtol=1e-12, atol=1e-12)


class NormAct(nn.Module):
    """Functional batch-norm and linear over own parameters, as timm's layers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 4)
        self.norm = nn.BatchNorm2d(4, eps=1e-3)
        self.weight = nn.Parameter(torch.randn(5, 4))
        self.plain = nn.Parameter(torch.randn(2, 5))
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, x):
        n = self.norm
        x = F.batch_norm(self.conv(x), n.running_mean, n.running_var, n.weight, n.bias, False, 0.1, n.eps)
        return F.linear(F.linear(F.relu(x).mean((2, 3)), self.weight, self.bias), self.plain)


def test_functional_layers_over_own_parameters_become_modules():
    model = settle(NormAct())
    graph = trace(model, SHAPE)
    assert same(model, graph.module)
    x = torch.randn(2, *SHAPE).double()
    double = settle(NormAct()).double()
    torch.testing.assert_close(trace(double, SHAPE).module(x), double(x), rtol=1e-12, atol=1e-12)
    types = [
        type(graph.module.get_submodule(n.target)) for n in graph.module.graph.nodes if n.op == "call_module"
    ]
    assert types == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Linear, nn.Linear]


def _explodes(x):
    """NaN but near 0, as a polynomial of high degree does in float32."""
    high = (1e4 * x) ** 12
    return high - high


class ByValue(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class TwoInputs(nn.Module):
    def forward(self, x, y):
        return x + y


class OptionalInput(nn.Module):
    def forward(self, x, scale=None):
        return x if scale is None else x * scale


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(3, 3), ByValue())

    def forward(self, x):
        return self.features(x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Outer(), r"cannot trace the network(.|\n)*Outer, in module 'features.1'(.|\n)*control flow"),
        (ByValue(), r"cannot trace(.|\n)*top level"),
        (Chain(lambda x: {"out": x}), r"must return one tensor(.|\n)*dict"),
        (Chain(lambda x: (x, x)), r"must return one tensor(.|\n)*tuple"),
        (conv(4, 4), r"does not run on this input(.|\n)*Conv2d(.|\n)*\(2, 3, 8, 8\)(.|\n)*4 channels"),
        (nn.Linear(9, 4), r"does not run on this input"),
        (TwoInputs(), r"does not run on this input(.|\n)*'y'"),
        (OptionalInput(), r"the traced network does not run(.|\n)*OptionalInput"),
        (Chain(lambda x: x + torch.rand_like(x)), r"computes something else(.|\n)*max difference"),
        (Chain(lambda x: F.dropout(x, training=True)), r"computes something else"),
        (Chain(lambda x: x + torch.rand(())), r"computes something else"),
        (Chain(lambda x: _explodes(x) + torch.rand_like(x)), r"computes something else"),
    ],
)
def test_what_cannot_be_traced_is_said_clearly(model, message):
    with pytest.raises(TraceError, match=message):
        trace(model, SHAPE)


def test_a_network_that_explodes_on_noise_is_compared_near_0():
    graph = trace(Chain(lambda x: _explodes(x) + x, nn.ReLU()), SHAPE)
    x = 1e-3 * torch.randn(2, *SHAPE)
    assert torch.equal(graph.module(x), x.relu())


def test_patterns():
    graph = trace(Chain(Block(3, 4, 2), nn.ReLU6(), nn.MaxPool2d(2), nn.ReLU()), SHAPE)
    names = {pattern: [s.name for s in graph.match(pattern, ("relu", "relu6"))] for pattern in
             ("*", "parts.0.*", "parts.3, parts.0.relu", "*relu_1")}  # fmt: skip
    assert names == {
        "*": ["parts.0.relu", "parts.0.relu_1", "parts.1", "parts.3"],
        "parts.0.*": ["parts.0.relu", "parts.0.relu_1"],
        "parts.3, parts.0.relu": ["parts.0.relu", "parts.3"],
        "*relu_1": ["parts.0.relu_1"],
    }
    assert [s.name for s in graph.match("*", ("max_pool",))] == ["parts.2"]


def test_a_pattern_that_matches_nothing_names_what_is_near():
    graph = trace(TinyResNet(), SHAPE)
    with pytest.raises(
        InputError, match=r"matches no site(.|\n)*'layer1.relu_7'(.|\n)*allowed: .*layer1.relu_1"
    ):
        graph.match("*relu,layer1.relu_7", ("relu",))
    with pytest.raises(InputError, match="no site of kind"):
        graph.match("*", ("relu6",))
