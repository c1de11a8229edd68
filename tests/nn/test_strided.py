"""Gradients of 1x1 convolutions with a stride are right with channels innermost, however few they are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tightrope.nn.strided import Strided1x1, repair, restore


@pytest.mark.parametrize("stride", [1, 2, 3, (2, 1)])
@pytest.mark.parametrize("inputs", [1, 2, 3, 5, 7, 8, 12, 16])
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_are_those_in_float64(inputs, stride, bias):
    torch.manual_seed(0)
    conv = nn.Conv2d(inputs, 16, 1, stride, bias=bias)
    exact, net = copy.deepcopy(conv).double(), nn.Sequential(conv)
    repair(net)
    x = torch.randn(8, inputs, 9, 8).to(memory_format=torch.channels_last).requires_grad_()
    wide = x.detach().double().contiguous().requires_grad_()
    y, expected = net(x), exact(wide)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    slope = torch.randn(y.shape)
    y.backward(slope.to(memory_format=torch.channels_last))
    expected.backward(slope.double())
    for found, right in [(x, wide), *zip(conv.parameters(), exact.parameters(), strict=True)]:
        torch.testing.assert_close(found.grad.double(), right.grad, rtol=1e-4, atol=1e-4)


def test_only_those_with_a_stride_and_few_inputs_are_touched():
    convs = [nn.Conv2d(4, 8, 1, 2), nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 3, 2), nn.Conv2d(16, 8, 1, 2)]
    convs += [nn.Conv2d(4, 8, 1, 2, padding=1), nn.Conv2d(32, 8, 1, 2, groups=4)]
    model = nn.Sequential(*convs)
    repair(model)
    assert [type(conv) is Strided1x1 for conv in convs] == [True, False, False, False, False, True]
    restore(model)
    assert {type(conv) for conv in convs} == {nn.Conv2d}
