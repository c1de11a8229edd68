"""What a trained network is worth: top-1 accuracy, and batch-norm statistics that fit its weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from tightrope.data import Data
from tightrope.errors import InputError

Batches = Iterable[tuple[Tensor, Tensor]]
BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def accuracy(
    model: nn.Module,
    data: Data,
    split: Literal["validation", "test"],
    *,
    batch_size: int = 500,
    limit: int | None = None,
) -> float:
    """Share of the split's images, in [0, 1], whose highest output is their label; evaluation mode.

    `limit` takes only the split's first images.
    """
    hits, seen = count_hits(model, data.batches(split, batch_size, limit=limit))
    if seen == 0:
        raise InputError("no images to measure the accuracy on", where=f"{split} split")
    return hits / seen


def count_hits(model: nn.Module, batches: Batches) -> tuple[int, int]:
    """(images classified correctly, images). `model` keeps its modes; its device is used."""
    hits, seen = 0, 0
    for outputs, y in outputs_of(model, batches):
        hits += int((outputs.argmax(1) == y).sum())
        seen += len(y)
    return hits, seen


def outputs_of(model: nn.Module, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """The outputs of every batch and its labels, on the device of `model`, which keeps its modes."""
    device = _device(model)
    for x, y in batches:
        with evaluating(model), torch.inference_mode():
            outputs = model(x.to(device, memory_format=torch.channels_last))
        yield outputs, y.to(device)


def chance(model: nn.Module, data: Data, *, limit: int = 256) -> tuple[float, float]:
    """(recall, luck) on the first `limit` validation images, in [0, 1].

    `recall` is the mean over the classes of the share that is recognised, so that a constant answer gains
    nothing where one class is frequent; `luck` is what guessing reaches in 999 of 1,000 cases. Outputs that
    are not (N, classes) give (1, 0).
    """
    found = []
    with evaluating(model), torch.inference_mode():
        for x, y in data.batches("validation", 64, limit=limit):
            outputs = model(x.to(_device(model))).cpu()
            if outputs.dim() != 2:
                return 1.0, 0.0
            found.append((outputs.argmax(1) == y, y, outputs.shape[1]))
    if not found:
        return 1.0, 0.0
    hits, labels = (torch.cat([part[k] for part in found]) for k in (0, 1))
    seen = labels.bincount()
    present = seen > 0
    recall = labels[hits].bincount(minlength=len(seen))[present] / seen[present]
    guess = 1 / max(found[0][2], len(seen))
    deviation = float((guess * (1 - guess) / seen[present]).sum().sqrt()) / len(recall)
    return float(recall.mean()), guess + 3 * deviation


def recalibrate(model: nn.Module, batches: Batches) -> None:
    """Replace the running statistics of every batch-norm layer of `model` by their mean over `batches`.

    Everything but the batch-norm layers runs in evaluation mode; no weight changes. Without batch-norm
    layers `batches` is not read. Raises InputError, before anything changes, when there is no batch.
    """
    layers = [m for m in model.modules() if isinstance(m, BATCH_NORM) and m.running_mean is not None]
    if not layers:
        return
    device = _device(model)
    momenta = [layer.momentum for layer in layers]
    seen = 0
    with evaluating(model), torch.no_grad():
        try:
            for x, _ in batches:
                if seen == 0:
                    for layer in layers:
                        layer.reset_running_stats()
                        layer.momentum = None  # the mean over all batches, each counting the same
                        layer.train()
                model(x.to(device, memory_format=torch.channels_last))
                seen += 1
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum
    if seen == 0:
        raise InputError("no batches to estimate the batch-norm statistics from")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within; then every module's own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
