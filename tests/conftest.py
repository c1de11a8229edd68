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

torch.set_num_threads(1)
# Durations say nothing on a shared machine.
settings.register_profile("tightrope", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tightrope")


def _prepare_torchvision() -> list[torch.library.Library]:
    """Define the two operators whose absence makes `import torchvision` fail.

    PyPI's torchvision is built for PyPI's torch with CUDA; its compiled operators do not load beside a CPU
    build, and registering their shape functions then raises. No network of these tests calls them.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return []
    try:
        for compiled in Path(spec.origin).parent.glob("_C*"):
            torch.ops.load_library(compiled)
            return []
    except OSError:
        pass
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return [library]


_LIBRARIES = _prepare_torchvision()  # a definition lives as long as its Library


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
