"""The faster depthwise convolutions against torch's own."""

from __future__ import annotations

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tightrope.nn.depthwise import QuickDepthwise, quicken


@settings(max_examples=15)
@given(
    channels=st.integers(1, 9),
    kernel=st.sampled_from([5, 6, 7]),
    stride=st.integers(1, 3),
    padding=st.integers(0, 4),
    size=st.tuples(st.integers(1, 3), st.integers(7, 11), st.integers(7, 11)),
    last=st.booleans(),
)
def test_outputs_and_gradients_are_torchs(channels, kernel, stride, padding, size, last):
    torch.manual_seed(0)
    usual = nn.Conv2d(channels, channels, kernel, stride, padding, groups=channels, bias=False)
    quick = copy.deepcopy(usual)
    quicken(quick)
    assert type(quick) is QuickDepthwise
    found = []
    for conv in (usual, quick):
        x = torch.randn(size[0], channels, *size[1:], generator=torch.Generator().manual_seed(1))
        x = x.to(memory_format=torch.channels_last) if last else x
        x.requires_grad_()
        y = conv(x)
        y.backward(torch.cos(y.detach()))
        found.append((y.detach(), x.grad, conv.weight.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_only_what_gains_is_touched():
    kept = nn.ModuleList(
        [
            nn.Conv2d(4, 4, 3, groups=4, bias=False),
            nn.Conv2d(4, 4, 5, groups=4),
            nn.Conv2d(4, 8, 5, groups=4, bias=False),
            nn.Conv2d(4, 4, 5, groups=2, bias=False),
            nn.Conv2d(4, 4, (5, 3), groups=4, bias=False),
            nn.Conv2d(4, 4, 5, groups=4, bias=False, padding="same"),
            nn.Conv2d(4, 4, 5, groups=4, bias=False, dilation=2),
            nn.Conv2d(4, 4, 5, groups=4, bias=False, padding=2, padding_mode="reflect"),
        ]
    )
    quicken(kept)
    assert all(type(conv) is nn.Conv2d for conv in kept)


def test_under_autocast_and_in_evaluation_it_is_torchs_own():
    conv = nn.Conv2d(8, 8, 5, groups=8, bias=False)
    quick = copy.deepcopy(conv)
    quicken(quick)
    x = torch.randn(2, 8, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        assert quick(x).dtype == torch.bfloat16
        assert torch.equal(quick(x), conv(x))
    with torch.no_grad():
        assert torch.equal(quick(x), conv(x))
    assert quick.state_dict().keys() == conv.state_dict().keys()
