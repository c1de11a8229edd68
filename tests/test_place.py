"""place and apply: chosen sites change, everything else stays, and nothing is the caller's."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from networks import TinyResNet, settle
from tightrope.errors import BundleError, InputError, TraceError
from tightrope.graph import trace
from tightrope.nn import BlockReLU
from tightrope.place import model_sha256, place
from tightrope.rewrite import apply
from tightrope.types import Cost, Plan

SHAPE = (3, 8, 8)


def by_name(site, module, choice):
    """A rewrite that any test can read: the choice names the layer."""
    layers = {"tanh": nn.Tanh, "identity": nn.Identity}
    return layers[choice]()


def test_the_chosen_sites_change_and_no_others():
    model = settle(TinyResNet())
    graph = trace(model, SHAPE)
    placed = place(graph, {"layer1.relu_1": "tanh", "layer2.relu": "identity"}, by_name)
    expected = copy.deepcopy(model)
    x = torch.randn(3, *SHAPE)
    with torch.no_grad():
        y = expected.stem(x)
        b = expected.layer1
        y = torch.tanh(b.bn2(b.conv2(torch.relu(b.bn1(b.conv1(y))))) + y)
        b = expected.layer2
        y = torch.relu(b.bn2(b.conv2(b.bn1(b.conv1(y)))) + b.down(y))
        y = expected.fc(expected.pool(y).flatten(1))
        torch.testing.assert_close(placed.module(x), y)
    assert [s.name for s in placed.sites] == ["stem.2", "layer1.relu", "layer2.relu_1"]


def test_what_is_placed_may_have_sites_of_its_own():
    graph = trace(settle(TinyResNet()), SHAPE)

    def rewrite(site, module, choice):
        return nn.Sequential(nn.ReLU(), nn.Tanh()) if choice == "two" else by_name(site, module, choice)

    placed = place(graph, {"stem.2.0": "identity", "stem.2": "two"}, rewrite)
    assert isinstance(placed.module.get_submodule("stem.2.0"), nn.Identity)
    assert isinstance(placed.module.get_submodule("stem.2.1"), nn.Tanh)
    with pytest.raises(InputError, match=r"stem\.2\.7"):
        place(graph, {"stem.2": "two", "stem.2.7": "identity"}, rewrite)


def test_the_graph_and_the_model_stay_as_they_were():
    model = settle(TinyResNet())
    graph = trace(model, SHAPE)
    before = model_sha256(model), model_sha256(graph.module), str(graph.module.graph)
    placed = place(graph, {"stem.2": "tanh"}, by_name)
    with torch.no_grad():
        for p in placed.module.parameters():
            p.add_(1)
    assert (model_sha256(model), model_sha256(graph.module), str(graph.module.graph)) == before
    assert isinstance(graph.module.get_submodule("stem.2"), nn.ReLU)
    assert isinstance(model.stem[2], nn.ReLU)


def test_placing_nothing_gives_an_equal_network_of_its_own():
    graph = trace(settle(TinyResNet()), SHAPE)
    placed = place(graph, {}, by_name)
    x = torch.randn(2, *SHAPE)
    assert torch.equal(placed.module(x), graph.module(x))
    assert placed.sites == graph.sites
    assert not {id(p) for p in placed.module.parameters()} & {id(p) for p in graph.module.parameters()}


def test_an_unknown_site_is_named_with_what_is_near():
    with pytest.raises(InputError, match=r"does not have(.|\n)*layer1.rleu(.|\n)*layer1.relu"):
        place(trace(TinyResNet(), SHAPE), {"layer1.rleu": "tanh"}, by_name)


def test_a_network_is_named_by_its_weights_and_their_names():
    model = settle(TinyResNet())
    name = model_sha256(model)
    assert model_sha256(copy.deepcopy(model)) == name
    assert model_sha256(settle(TinyResNet())) != name  # other random weights
    variants = []
    for key in ("fc.weight", "stem.1.running_mean", "layer1.bn1.num_batches_tracked"):
        changed = copy.deepcopy(model)
        changed.state_dict()[key].view(-1)[0] += 1
        variants.append(model_sha256(changed))
    renamed = nn.Module()
    renamed.other = copy.deepcopy(model)
    variants += [model_sha256(renamed), model_sha256(copy.deepcopy(model).double())]
    assert len({name, *variants}) == 6


def test_equal_weights_in_another_structure_have_another_name():
    class Net(nn.Module):
        def __init__(self, act, stride=1, double=False):
            super().__init__()
            self.conv, self.act, self.double = nn.Conv2d(3, 4, 3, stride), act, double
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            y = self.act(self.conv(x))
            y = y + y if self.double else y
            return self.fc(y.mean((2, 3)))

    plain = Net(nn.ReLU())
    others = [Net(nn.ReLU6()), Net(nn.ReLU(), stride=2), Net(nn.ReLU(), double=True)]
    for other in others:
        other.load_state_dict(plain.state_dict())
    networks = [plain, *others]
    assert len({model_sha256(trace(net, SHAPE).module) for net in networks}) == 4
    same = copy.deepcopy(plain).train()
    assert model_sha256(trace(same, SHAPE).module) == model_sha256(trace(plain, SHAPE).module)
    plan = Plan(
        method="block_relu", config={}, budget="drelus<=50%", choices={"act": {"patches": [[2, 2]] * 4}},
        predicted=Cost(), baseline=Cost(), loss=0.0, bound=0.0, base="net", input_shape=SHAPE,
        base_sha256=model_sha256(trace(plain, SHAPE).module),
    )  # fmt: skip
    apply(same, plan)
    for other in others:
        with pytest.raises(InputError, match="another network"):
            apply(other, plan)


def test_weights_of_every_type_and_layout_have_a_name():
    model = nn.Module()
    model.register_buffer("scalar", torch.tensor(3))
    model.register_buffer("empty", torch.empty(0))
    model.register_buffer("flags", torch.tensor([True, False]))
    model.register_buffer("short", torch.ones(2, dtype=torch.bfloat16))
    model.register_buffer("turned", torch.arange(6.0).view(2, 3).t())
    name = model_sha256(model)
    model.turned = torch.arange(6.0).view(2, 3).t().contiguous()
    assert model_sha256(model) == name


def plan_for(model: nn.Module, **changes) -> Plan:
    patches = [[2, 2], [0, 0], [1, 1], [3, 5]]
    return replace(
        Plan(
            method="block_relu",
            config={"seed": 1},
            budget="drelus<=50%",
            choices={"stem.2": {"patches": patches}, "layer1.relu_1": {"patches": patches[::-1]}},
            predicted=Cost(),
            baseline=Cost(),
            loss=0.0,
            bound=0.0,
            base="tiny",
            base_sha256=model_sha256(trace(model, SHAPE).module),
            input_shape=SHAPE,
        ),
        **changes,
    )


def test_apply_puts_the_plan_into_a_new_module():
    model = settle(TinyResNet()).train()
    before = model_sha256(model)
    rewritten = apply(model, plan_for(model))
    assert model.training and not rewritten.training
    assert model_sha256(model) == before
    assert isinstance(model.stem[2], nn.ReLU)
    found = {n: m.patches for n, m in rewritten.named_modules() if isinstance(m, BlockReLU)}
    assert found == {
        "stem.2": ((2, 2), (0, 0), (1, 1), (3, 5)),
        "layer1.relu_1": ((3, 5), (1, 1), (0, 0), (2, 2)),
    }
    with torch.no_grad():
        assert not torch.equal(rewritten(torch.ones(1, *SHAPE)), model.eval()(torch.ones(1, *SHAPE)))


def test_apply_refuses_another_network():
    model = settle(TinyResNet())
    with pytest.raises(InputError, match=r"another network(.|\n)*TinyResNet(.|\n)*tiny(.|\n)*--weights"):
        apply(settle(TinyResNet()), plan_for(model))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"method": "block_rleu"}, InputError, r"unknown method(.|\n)*block_relu"),
        ({"config": {"sedd": 1}}, BundleError, "configuration(.|\n)*sedd"),
        ({"choices": {"stem.3": {"patches": [[1, 1]] * 4}}}, InputError, r"does not have(.|\n)*stem.2"),
        (
            {"choices": {"stem.2": {"patches": [[1, 1]] * 3}}},
            InputError,
            "one patch per channel(.|\n)*stem.2",
        ),
        ({"choices": {"stem.2": {"patches": [[1, -1]] * 4}}}, InputError, "not a patch"),
        ({"choices": {"stem.2": {"colour": 1}}}, InputError, r"does not know this choice(.|\n)*stem.2"),
        ({"choices": {"stem.2": {"patches": 7}}}, BundleError, "cannot be read(.|\n)*stem.2"),
        ({"choices": {"stem.2": {"patches": [1, 2, 3, 4]}}}, BundleError, "cannot be read(.|\n)*stem.2"),
        ({"choices": {"stem.2": None}}, BundleError, "cannot be read(.|\n)*stem.2"),
        ({"input_shape": (4, 8, 8)}, TraceError, "does not run on this input"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(changes, error, message):
    model = settle(TinyResNet())
    with pytest.raises(error, match=message):
        apply(model, plan_for(model, **changes))
