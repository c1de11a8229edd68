"""A head that is trained on what the network below it gave once learns what it learns epoch by epoch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tightrope.data import load, parse_task, view
from tightrope.graph import trace
from tightrope.methods.reengineer import ReengineerMethod, head_fit
from tightrope.methods.reengineer.controls import magnitude, magnitude_per_layer
from tightrope.models.resnet import ResNet

DATA = load("embedded")
TASK = parse_task(DATA.classes, chosen="3")
PART = view(DATA, TASK)
EPOCHS = 3


class WithDropout(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = ResNet(8, ((8, 1, 2),), 10, 1)
        self.net.fc = nn.Sequential(nn.Dropout(0.3), self.net.fc)

    def forward(self, x):
        return self.net(x)


def _searches(net, **config):
    method = ReengineerMethod(mode="reference", lr_head=0.1, batch_size=64, **config)
    return method.searches(trace(net.eval(), DATA.input_shape), 2, TASK.groups, PART)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return ResNet(8, ((8, 1, 2),), 10, 1).eval()


def _by_epoch(search, bits):
    optimizer = torch.optim.Adam(search.head.parameters(), lr=search.settings.lr_head)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * search.per_epoch)
    for epoch in range(EPOCHS):
        search.run(epoch, [optimizer], bits, None, schedule.step)


@pytest.mark.parametrize(
    "config", [{}, {"distill": 2.0, "head": "linear"}, {"head": "relu_linear", "seed": 5}]
)
def test_as_epoch_by_epoch(net, config):
    start = _searches(net, **config)
    one, other = start(), start()
    bits = magnitude(one.masked, one.masked.total // 2)
    before = one.head.weight.detach().clone()
    head_fit.fit_head(one, bits, EPOCHS)
    _by_epoch(other, bits)
    assert (one.head.weight - before).abs().max() > 0.01
    torch.testing.assert_close(one.head.weight, other.head.weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(one.head.bias, other.head.bias, rtol=1e-3, atol=1e-4)


def _passes(search):
    """Images that go through the network while the head is trained."""
    seen = []
    search.headed.model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    head_fit.fit_head(search, {}, EPOCHS)
    return sum(seen) / PART.size("train")


def test_images_go_through_the_network_once(net):
    assert _passes(_searches(net)()) == 1


@pytest.mark.parametrize("why", ["augmentation", "dropout", "size"])
def test_every_epoch_where_what_the_head_sees_changes_or_is_too_much(net, monkeypatch, why):
    if why == "size":
        monkeypatch.setattr(head_fit, "MOST_BYTES", 1000)
    network = WithDropout() if why == "dropout" else net
    search = _searches(network, augment=why == "augmentation")()
    assert _passes(search) == EPOCHS


def test_the_same_share_of_every_layer(net):
    masked = _searches(net)().masked
    bits = magnitude_per_layer(masked, masked.total // 4)
    for name in masked.names:
        values = masked.model.get_parameter(name).abs()
        kept, most = values[bits[name]], round(values.numel() / 4)
        assert abs(len(kept) - max(1, most)) <= 1
        assert kept.min() >= values[~bits[name]].max()


def test_a_head_that_does_not_learn_stays(net):
    single = parse_task(DATA.classes, chosen="2,5,7")
    method = ReengineerMethod(mode="reference", head="slice")
    search = method.searches(trace(net, DATA.input_shape), 3, single.groups, view(DATA, single))()
    before = search.head.weight.detach().clone()
    head_fit.fit_head(search, {}, EPOCHS)
    assert torch.equal(search.head.weight, before)
