"""Train the head alone: what lies below it is frozen, so every image goes through that once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tightrope.data.base import epoch_order
from tightrope.methods.reengineer.search import STRIDE, Search
from tightrope.nn.masked import Bits

MOST_BYTES = 2**30  # of what is kept between epochs
BATCH = 500


def fit_head(search: Search, bits: Bits, epochs: int) -> None:
    """Train a search's head for so many epochs on fixed masks, by a learning rate that falls to zero like a
    cosine; a head that does not learn stays.

    Images that augmentation or dropout changes, or that are too many, go through the network in every epoch.
    """
    if not search.headed.trained:
        return
    optimizer = torch.optim.Adam(search.head.parameters(), lr=search.settings.lr_head)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, epochs * search.per_epoch))
    if _changes(search) or 4 * search.data.size("train") * search.head.in_features > MOST_BYTES:
        for epoch in range(epochs):
            search.run(epoch, [optimizer], bits, None, schedule.step)
        return
    inputs, labels, soft = _inputs(search, bits)
    seed = search.settings.seed * STRIDE
    for epoch in range(epochs):
        order, _ = epoch_order(len(labels), shuffle=True, seed=seed + epoch, limit=None, rank=0, world=1)
        for part in torch.split(order.to(labels.device), search.settings.batch_size):
            taught = None if soft is None else soft[part]
            search.learn(search.loss(search.head(inputs[part]), labels[part], taught), [optimizer])
            schedule.step()


def _changes(search: Search) -> bool:
    dropped = any(m.training for m in search.headed.model.modules() if isinstance(m, nn.Dropout))
    return search.settings.augment or dropped


@torch.no_grad()
def _inputs(search: Search, bits: Bits) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of every training image: what the head sees, its label, and what the teacher says."""
    seen: list[Tensor] = []
    labels, soft = [], []

    def see(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0].clone())

    handle = search.head.register_forward_pre_hook(see)
    try:
        parameters = search.masked.effective(bits)
        for batch in search.data.batches("train", BATCH):
            x, y = search.placed(*batch)
            search.masked(x, parameters)
            labels.append(y)
            said = search.said(x)
            soft += [] if said is None else [said]
    finally:
        handle.remove()
    return torch.cat(seen), torch.cat(labels), torch.cat(soft) if soft else None
