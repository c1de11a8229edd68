"""Accuracy and batch-norm statistics, exactly."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from stripes import Stripes, network, same
from tightrope.errors import InputError
from tightrope.finetune import accuracy, recalibrate


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
