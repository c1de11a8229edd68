"""Accuracy and batch-norm statistics, exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from stripes import Stripes, network, same
from tightrope.errors import InputError
from tightrope.evaluate import accuracy, chance, recalibrate


def test_accuracy_is_exact() -> None:
    class Says(nn.Module):
        """Always class 1; notes that it is evaluated, and on which images."""

        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            assert not torch.is_grad_enabled()
            return torch.tensor([0.0, 1.0, 0.0, 0.0]).repeat(len(x), 1)

    model = Says().train()
    labels = torch.cat([y for _, y in Stripes().batches("test", 64)])
    assert accuracy(model, Stripes(), "test", batch_size=7) == int((labels == 1).sum()) / 64
    assert accuracy(model, Stripes(), "test", limit=10) == int((labels[:10] == 1).sum()) / 10
    assert model.training


def test_recalibrate_changes_the_batch_norm_buffers_only() -> None:
    model = network().train()
    model[3].eval()
    before = copy.deepcopy(model)
    batches = list(Stripes().batches("train", 32))
    recalibrate(model, batches)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before.state_dict()[k])}
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert model[1].momentum == before[1].momentum
    with torch.no_grad():
        outputs = [before[0](x) for x, _ in batches]
    means = torch.stack([o.mean(dim=(0, 2, 3)) for o in outputs]).mean(0)
    variances = torch.stack([o.var(dim=(0, 2, 3)) for o in outputs]).mean(0)
    assert torch.allclose(model[1].running_mean, means, atol=1e-6)
    assert torch.allclose(model[1].running_var, variances, atol=1e-6)


def test_recalibrate_without_batches_changes_nothing() -> None:
    model = network()
    before = copy.deepcopy(model)
    with pytest.raises(InputError, match="no batches"):
        recalibrate(model, [])
    assert same(model, before)
    recalibrate(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), [])  # nothing to estimate


class Labels:
    """Images that are their own one-hot label, the class 0 nine times as frequent as each other one."""

    def batches(
        self, split: str, batch_size: int, *, limit: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        assert split == "validation"
        labels = torch.tensor(([0] * 9 + [1, 2, 3]) * 20)[:limit]
        for part in labels.split(batch_size):
            yield torch.eye(4)[part], part


def test_chance_is_told_from_skill() -> None:
    generator = torch.Generator().manual_seed(0)

    class Answers(nn.Module):
        def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.how = how

        def forward(self, x: Tensor) -> Tensor:
            return self.how(x)

    constant = Answers(lambda x: torch.eye(4)[torch.zeros(len(x), dtype=torch.long)])  # right in 75 %
    guessing = Answers(lambda x: torch.rand(len(x), 4, generator=generator))
    skilled = Answers(lambda x: x)
    half = Answers(lambda x: torch.where(torch.arange(len(x))[:, None] % 2 == 0, x, x.flip(1)))
    assert chance(constant, Labels())[0] == pytest.approx(0.25)
    found = [chance(net, Labels()) for net in (constant, guessing, half, skilled)]
    assert [recall > luck for recall, luck in found] == [False, False, True, True]
    assert chance(skilled, Labels(), limit=60)[0] == 1
    maps = Answers(lambda x: x[:, :, None, None])
    assert chance(maps, Labels()) == (1.0, 0.0)  # not a classifier
