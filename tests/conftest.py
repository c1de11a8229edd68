"""What every test needs: one thread, fixed seeds, and torchvision beside a CPU build of torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from commands import QUICK, call
from networks import Images, TinyResNet, settle
from tightrope import data
from tightrope.models.external import vision

torch.set_num_threads(1)
# Durations say nothing on a shared machine.
settings.register_profile("tightrope", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tightrope")


if importlib.util.find_spec("torchvision") is not None:
    vision("torchvision")  # some tests import it themselves, which fails beside a CPU torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = [name for name in ("torchvision", "timm") if importlib.util.find_spec(name) is None]
    for item in items:
        if missing and item.get_closest_marker("vision"):
            item.add_marker(pytest.mark.skip(reason=f"not installed: {', '.join(missing)}"))


@pytest.fixture(autouse=True)
def _seeds() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session")
def trained() -> tuple[TinyResNet, Images]:
    """A small residual network after 60 steps on Fashion-MNIST at half resolution, and such images."""
    torch.manual_seed(0)
    net = TinyResNet(channels=1, classes=10, width=6).train()
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    batches = data.load("embedded").batches("train", 64, shuffle=True, limit=64 * 64)
    halved = [(torch.nn.functional.avg_pool2d(x, 2), y) for x, y in batches]
    for x, y in halved[:60]:
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimiser.step()
    x, y = (torch.cat(parts) for parts in zip(*halved[60:], strict=True))
    return settle(net, weights=False), Images(x, y)


@pytest.fixture(scope="session")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the demo network after search and apply; tests only read it, or copy it."""
    out = tmp_path_factory.mktemp("searched") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        assert call(patch, "search", "--budget", "drelus<=12%", "--out", out, *QUICK) == 0
        assert call(patch, "apply", out) == 0
    return out
