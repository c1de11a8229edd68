"""Hints against the definition; they must watch the right activations and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tightrope.graph import trace
from tightrope.hints import Hints, rewritten_sites, with_named_sites
from tightrope.models import resolve
from tightrope.nn import BlockReLU
from tightrope.place import place

SHAPE = (3, 8, 8)


def student_of(teacher: nn.Module) -> nn.Module:
    graph = trace(teacher, SHAPE)
    sites = graph.sites[1:3]
    return place(
        graph,
        {site.name: None for site in sites},
        lambda site, module, choice: BlockReLU([(2, 2)] * site.shape[0]),
    ).module


def test_the_loss_is_the_mean_relative_square_over_rewritten_sites() -> None:
    base = resolve("resnet8")
    student, teacher = student_of(base), with_named_sites(base, SHAPE)
    names = rewritten_sites(student)
    assert names == ["stages.0.0.relu", "stages.0.0.relu_1"]
    hints = Hints(student, teacher)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for module in (student, teacher):
        for name in names:
            module.get_submodule(name).register_forward_hook(lambda m, a, out, n=name: seen[n].append(out))
    x = torch.randn(4, *SHAPE)
    student(x)
    with torch.no_grad():
        teacher(x)
    loss = hints.loss()
    expected = sum((s - t).square().mean() / t.square().mean() for s, t in seen.values()) / 2
    torch.testing.assert_close(loss, expected)
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    assert student.get_parameter("stages.0.0.conv1.weight").grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())


def test_the_same_network_has_no_loss_and_another_one_no_sites() -> None:
    student = student_of(resolve("resnet8"))
    hints = Hints(student, twin := copy.deepcopy(student))
    x = torch.randn(2, *SHAPE)
    student(x), twin(x)
    assert torch.as_tensor(hints.loss()).item() == 0.0
    foreign = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    assert Hints(student_of(resolve("resnet8")), foreign).loss() == 0.0


def test_a_teacher_that_cannot_be_traced_is_left_as_it_is() -> None:
    class Wild(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    wild = Wild()
    assert with_named_sites(wild, SHAPE) is wild


@pytest.mark.parametrize("name", ["stages.0.0.relu_1", "relu"])
def test_sites_called_again_get_names_of_their_own(name: str) -> None:
    assert name in dict(with_named_sites(resolve("resnet8"), SHAPE).named_modules())


def test_gradients_keep_the_channels_last_format() -> None:
    """A gradient in the other format costs training more than twice its time on a CPU."""
    base = resolve("resnet8").to(memory_format=torch.channels_last)
    student, teacher = student_of(base), with_named_sites(base, SHAPE)
    hints = Hints(student, teacher)
    formats: list[bool] = []

    def check(grad: torch.Tensor) -> None:
        formats.append(grad.is_contiguous(memory_format=torch.channels_last))

    def hook(module: nn.Module, args: object, output: torch.Tensor) -> None:
        output.register_hook(check)

    for name in rewritten_sites(student):
        student.get_submodule(name).register_forward_hook(hook)
    x = torch.randn(4, *SHAPE).to(memory_format=torch.channels_last)
    student(x)
    with torch.no_grad():
        teacher(x)
    loss = hints.loss()
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    assert formats == [True, True]
