"""The supernet against the plain networks that are cut out of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from methods.binas_toys import SPACE, random_supernet
from tightrope.errors import InputError
from tightrope.methods.binas.bank import Bank
from tightrope.methods.binas.extract import extract, inherit
from tightrope.methods.binas.oneshot import heaviest_network
from tightrope.methods.binas.paths import Paths, random_paths, same_path
from tightrope.methods.binas.space import PRESETS, Option, Space, Stage
from tightrope.methods.binas.supernet import Supernet, WithLargest
from tightrope.models.mobilenet import MobileNet

NORMS = ("shared", "path")


def images(space: Space, count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, *space.input_shape, generator=torch.Generator().manual_seed(seed)).double()


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """In float64: the order of sums differs between widths, nothing else."""
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def choice_of(space: Space, paths: Paths, sample: int):
    found, place = [], 0
    for s, stage in enumerate(space.stages):
        depth = int(paths.depths[sample, s])
        found.append(tuple(paths.options[sample, place : place + depth].tolist()))
        place += stage.depths[-1]
    return tuple(found)


@st.composite
def spaces(draw) -> Space:
    """Any expansions, kernels and ratios, in any order; strides, widths and depths."""

    def some(values, least=1):
        return tuple(draw(st.lists(st.sampled_from(values), min_size=least, max_size=3, unique=True)))

    stages = tuple(
        Stage(
            draw(st.sampled_from([8, 16])),
            draw(st.integers(1, 2)),
            tuple(sorted(some([1, 2, 3]))),
            draw(st.sampled_from(["re", "hs", "sw"])),
        )
        for _ in range(draw(st.integers(1, 2)))
    )
    return Space(
        "any", (draw(st.integers(1, 3)), 8, 8), 3, draw(st.sampled_from([8, 16])), draw(st.integers(1, 2)),
        draw(st.sampled_from([8, 16])), stages, 16, 8,
        expansions=some([1, 2, 3.5]), kernels=some([1, 3, 5, 7]), ses=some([0, 0.25, 1]),
    )  # fmt: skip


@settings(max_examples=20)
@given(spaces(), st.sampled_from(NORMS), st.integers(0, 2**32 - 1))
def test_extraction_is_exact_and_so_is_every_sample_of_a_mixed_batch(space, norms, seed):
    supernet = random_supernet(space, norms, seed % 1000)
    choice = space.random(np.random.default_rng(seed))
    x = images(space, 5)
    with torch.no_grad():
        net = extract(supernet, choice)
        assert type(net) is MobileNet
        same(net(x), supernet(x, same_path(space, choice, 5)))
        paths = random_paths(space, 5, torch.Generator().manual_seed(seed % 1000))
        alone = [extract(supernet, choice_of(space, paths, k))(x[k : k + 1]) for k in range(5)]
        same(supernet(x, paths), torch.cat(alone))
        # Folded batch-norm and grouped samples: the same function once more.
        same(Bank(supernet).mixed(paths, x), torch.cat(alone))


@pytest.mark.parametrize("name", ["fashion", "cifar", pytest.param("imagenet", marks=pytest.mark.slow)])
@pytest.mark.parametrize("norms", NORMS)
def test_presets_extract_exactly(name, norms):
    space = PRESETS[name]
    supernet = random_supernet(space, norms)
    x, generator = images(space, 2), np.random.default_rng(0)
    with torch.no_grad():
        for choice in (space.smallest(), space.largest(), space.random(generator), space.random(generator)):
            expected = extract(supernet, choice)(x)
            same(supernet(x, same_path(space, choice, 2)), expected)
            same(Bank(supernet).one(choice, x), expected)


@settings(max_examples=15)
@given(spaces(), st.sampled_from(NORMS))
def test_the_largest_network_of_a_new_supernet_is_the_heaviest(space, norms):
    heaviest = heaviest_network(space)
    for module in heaviest.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.bias.data.normal_()
    supernet, x = inherit(heaviest.double(), space, norms).double().eval(), images(space, 3)
    with torch.no_grad():
        same(supernet(x, same_path(space, space.largest(), 3)), heaviest(x))


def test_largest_and_smallest_whatever_the_order_of_the_lists():
    space = replace(SPACE, expansions=(3, 1), kernels=(5, 3), ses=(0.5, 0))
    assert space.options[space.largest()[0][0]] == Option(3, 5, 0.5)
    assert space.options[space.smallest()[0][0]] == Option(1, 3, 0)


def test_drawn_paths_are_balanced_and_cover_every_decision():
    paths = random_paths(SPACE, 80)
    for s, stage in enumerate(SPACE.stages):
        assert sorted(paths.depths[:, s].unique().tolist()) == list(stage.depths)
        assert len(set(paths.depths[:, s].unique(return_counts=True)[1].tolist())) == 1
    assert (torch.stack([column.bincount(minlength=8) for column in paths.options.T]) == 10).all()
    # Three samples of eight options: the places of the missing ones move.
    seen = {tuple(random_paths(SPACE, 3).options[:, 0].tolist()) for _ in range(300)}
    assert {option for options in seen for option in options} == set(range(8))


def test_a_share_of_a_training_batch_goes_through_the_largest_network() -> None:
    paths, most = WithLargest(SPACE, 0.25)(80), same_path(SPACE, SPACE.largest(), 20)
    assert torch.equal(paths.depths[:20], most.depths) and torch.equal(paths.options[:20], most.options)
    assert (paths[slice(20, None)].options.unique(dim=0)).shape[0] > 20
    assert len(WithLargest(SPACE, 0.125)(3)) == 3  # rounds to none
    supernet = random_supernet().train()
    supernet.drawn = WithLargest(SPACE, 1.0)
    torch.manual_seed(0)
    mixed, x = [], images(SPACE, 6)
    for _ in range(2):  # running statistics change, those of the batch do not
        mixed.append(supernet(x))
    assert torch.equal(*mixed)
    assert not torch.equal(supernet.eval()(x), supernet(x))  # judged on random networks


def test_private_norms_see_the_samples_of_their_path_alone():
    """Gradients and statistics of a path that nobody takes stay untouched; with shared norms there is one."""
    supernet = random_supernet(norms="path").train()
    block = supernet.get_submodule("blocks.1.0")
    assert len(block.bn3) == 4
    before = [norm.running_mean.clone() for norm in block.bn3]
    x = images(SPACE, 8)
    options = torch.zeros(8, 5, dtype=torch.int64)
    options[4:, 0] = 1  # with SE
    supernet(x, Paths(torch.tensor([[1, 1]] * 8), options)).sum().backward()
    moved = [not torch.equal(a, norm.running_mean) for a, norm in zip(before, block.bn3, strict=True)]
    assert moved == [True, True, False, False]
    assert [norm.weight.grad is not None for norm in block.bn3] == moved
    # What the second norm saw: the projection of the last four samples under option 1.
    supernet2 = random_supernet(norms="path").train()
    seen = []
    supernet2.get_submodule("blocks.1.0.bn3.1").register_forward_hook(
        lambda m, args, out: seen.append(args[0])
    )
    supernet2(x, Paths(torch.tensor([[1, 1]] * 8), options))
    assert len(seen[0]) == 4
    assert len(random_supernet(norms="shared").get_submodule("blocks.1.0").bn3) == 1


def test_channels_that_a_path_lacks_get_no_gradient():
    supernet = random_supernet().train()
    choice = ((0,), (0,))  # expansion 1, kernel 3, no SE
    supernet(images(SPACE, 4), same_path(SPACE, choice, 4)).square().sum().backward()
    block = supernet.get_submodule("blocks.1.0")
    width = int(block.inner[0])
    assert block.conv_pwl.weight.grad[:, :width].abs().min() > 0
    assert block.conv_pwl.weight.grad[:, width:].abs().max() == 0
    assert block.conv_dw[0].weight.grad[width:].abs().max() == 0
    assert block.conv_dw[1].weight.grad is None


def test_a_single_value_per_channel_does_not_stop_training():
    space = replace(SPACE, stages=tuple(replace(s, stride=2) for s in SPACE.stages), stride=2)
    supernet = random_supernet(replace(space, input_shape=(1, 4, 4))).train()
    x = torch.randn(3, 1, 4, 4).double()
    paths = random_paths(supernet.space, 3)
    assert torch.isfinite(supernet(x, paths)).all()
    assert all(module.training for module in supernet.modules())


def test_foreign_choices_and_unknown_norms_are_refused():
    with pytest.raises(InputError, match="depth"):
        extract(random_supernet(), ((0, 0), (0,)))
    with pytest.raises(InputError, match="no such option"):
        same_path(SPACE, ((99,), (0,)), 2)
    with pytest.raises(InputError, match="batch-norm"):
        Supernet(SPACE, "private")
