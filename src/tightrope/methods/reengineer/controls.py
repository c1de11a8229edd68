"""What a user could do without a mask search: the donor itself, a new head, fine-tuning, other prunings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tightrope.data import Data
from tightrope.data.base import Split
from tightrope.methods.reengineer.head_fit import fit_head
from tightrope.methods.reengineer.search import STRIDE, Search, Settings
from tightrope.nn.group_max import GroupMax
from tightrope.nn.masked import Bits, Masked

Groups = Sequence[Sequence[int]]
SNIP_BATCHES = 4
TUNE_LR, TUNE_MOMENTUM, TUNE_DECAY = 0.005, 0.9, 1e-4


def donor_accuracy(
    model: nn.Module, data: Data, groups: Groups, split: str = "validation"
) -> dict[str, float]:
    """`restricted`: the donor chooses among the task's labels. `unrestricted`: an answer outside is wrong."""
    hits, device = {"restricted": 0, "unrestricted": 0}, next(model.parameters()).device
    label_of = {k: label for label, group in enumerate(groups) for k in group}
    within, seen = GroupMax(groups), 0
    with torch.no_grad():
        for x, y in data.batches(split, 500):  # type: ignore[arg-type]
            outputs = model(x.to(device)).cpu()
            free = torch.tensor([label_of.get(int(k), -1) for k in outputs.argmax(1)])
            hits["restricted"] += int((within(outputs).argmax(1) == y).sum())
            hits["unrestricted"] += int((free == y).sum())
            seen += len(y)
    return {name: count / seen for name, count in hits.items()}


def magnitude(masked: Masked, keep: int) -> Bits:
    """Masks of the `keep` largest weights of the whole network."""
    parameters = dict(masked.model.named_parameters())
    return _largest({name: parameters[name].detach().abs() for name in masked.names}, keep)


def magnitude_per_layer(masked: Masked, keep: int) -> Bits:
    """Masks of the largest weights of every tensor, the same share of each: `keep` in all, but for rounding.
    No layer is cut off.
    """
    parameters = dict(masked.model.named_parameters())
    share, found = keep / masked.total, Bits()
    for name in masked.names:
        values = {name: parameters[name].detach().abs()}
        found |= _largest(values, max(1, round(share * values[name].numel())))
    return found


def snip(search: Search, keep: int) -> Bits:
    """Masks of the `keep` weights with the largest |w dL/dw| (Lee et al. 2019) on a few training batches."""
    masked = search.masked
    ones = {name: torch.ones_like(masked.model.get_parameter(name)) for name in masked.names}
    return _largest(search.felt(ones, SNIP_BATCHES), keep)


def _largest(values: dict[str, Tensor], keep: int) -> Bits:
    flat = torch.cat([v.flatten() for v in values.values()])
    chosen = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    chosen[flat.topk(min(keep, len(flat))).indices] = True
    parts = torch.split(chosen, [v.numel() for v in values.values()])
    return {name: part.view_as(values[name]) for name, part in zip(values, parts, strict=True)}


def fine_tuned(model: nn.Module, data: Data, settings: Settings, epochs: int) -> nn.Module:
    """A copy with every weight trained on the task: nothing is saved, and nothing of the donor stays."""
    net = copy.deepcopy(model).requires_grad_().eval()  # the donor's statistics, as everywhere here
    device = next(net.parameters()).device
    optimizer = torch.optim.SGD(net.parameters(), TUNE_LR, TUNE_MOMENTUM, weight_decay=TUNE_DECAY)
    for epoch in range(epochs):
        for x, y in data.batches(
            "train", settings.batch_size, shuffle=True, seed=settings.seed * STRIDE + epoch,
            augment=settings.augment,
        ):  # fmt: skip
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(net(x.to(device)), y.to(device)))
            optimizer.step()
    return net.requires_grad_(False).cpu()


def with_new_head(
    fresh: Callable[[], Search], keep: int, epochs: int, splits: Sequence[Split] = ("validation",)
) -> dict[str, tuple[float, ...]]:
    """Accuracies on `splits` of frozen networks under the same kind of head, trained for `epochs`, after the
    last: `head_only` keeps every weight; `magnitude`, `magnitude_per_layer` and `snip` keep `keep` of them,
    chosen at once. `fresh` gives a search whose head is at its start; masks are per weight.
    """
    found = {}
    kinds: dict[str, Callable[[Search], Bits]] = {
        "head_only": lambda s: {},
        "magnitude": lambda s: magnitude(s.masked, keep),
        "magnitude_per_layer": lambda s: magnitude_per_layer(s.masked, keep),
        "snip": lambda s: snip(s, keep),
    }
    for name, masks in kinds.items():
        search = fresh()
        bits = masks(search)
        fit_head(search, bits, epochs)
        found[name] = tuple(search.accuracy(bits, split) for split in splits)
    return found


def controls(
    fresh: Callable[[], Search], keep: int, epochs: int, score: Callable[[nn.Module], float]
) -> dict[str, float]:
    """Validation accuracies of `with_new_head`, and `fine_tuned`, whose weights are all trained."""
    search = fresh()
    tuned = fine_tuned(search.headed.model, search.data, search.settings, epochs)
    heads = with_new_head(fresh, keep, epochs)
    return {name: value for name, (value,) in heads.items()} | {"fine_tuned": score(tuned)}
