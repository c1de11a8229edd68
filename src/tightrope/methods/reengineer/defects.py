"""What a student inherits of its donor's defects: attacks made on the public donor alone, tried on students.

Students are made by fine-tuning everything, from nothing, or with the donor's weights that a mask has kept
(Qi et al., SeaM, ICSE 2023, indirect reuse).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tightrope.data import Data
from tightrope.errors import InputError
from tightrope.graph import Graph
from tightrope.methods import Progress
from tightrope.methods.reengineer.attacks import Attack, feature_attack, features, label_attack
from tightrope.methods.reengineer.heads import attach
from tightrope.methods.reengineer.method import ReengineerMethod
from tightrope.methods.reengineer.search import STRIDE
from tightrope.nn.masked import Bits
from tightrope.types import Json

STUDENTS = ("standard", "scratch", "regrow", "masked", "reinit")
Z = 1.96  # of a 95 % interval


@dataclass(frozen=True, kw_only=True)
class Study:
    """Settings of one study.

    `students`: `standard` fine-tunes the donor; `scratch` starts at random; `regrow` starts at the kept
    weights and trains all, as published; `masked` keeps the others at 0; `reinit` starts them at random.
    A mask search ends at the epoch where `removed` of the weights are masked, under the penalty `alpha`.
    Fine-tuning: SGD, `lr_head` for the new head and for everything from scratch. `eps` is in pixels of
    [0, 1], `images` of the test part are attacked.
    """

    students: str = ",".join(STUDENTS)
    removed: float = 0.6
    alpha: float = 0.5
    lr_mask: float = 0.05
    search_epochs: int = 30
    epochs: int = 30
    lr: float = 0.005
    lr_head: float = 0.05
    momentum: float = 0.0
    weight_decay: float = 1e-4
    batch_size: int = 64
    eps: float = 8 / 255
    iterations: int = 40
    images: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = [name for name in self.names if name not in STUDENTS]
        if wrong:
            raise InputError("unknown student", got=", ".join(wrong), allowed=", ".join(STUDENTS))
        for key in ("search_epochs", "epochs", "batch_size", "iterations", "images"):
            if getattr(self, key) < 1:
                raise InputError(f"{key} must be positive", got=getattr(self, key))
        for key in ("lr_mask", "lr", "lr_head", "eps"):
            if not 0 < getattr(self, key) < math.inf:
                raise InputError(f"{key} must be positive", got=getattr(self, key))
        if not 0 < self.removed < 1:
            raise InputError("removed is a share of the weights", got=self.removed, allowed="between 0 and 1")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.students.split(","))


@dataclass(frozen=True, kw_only=True)
class Inherited:
    """Of one student: `correct` of `images` clean test images; `broken` of these by the attack on the donor's
    features; `robust` images stay right under the standard attack on the student itself; share of the weights
    that the mask kept (1 without one).
    """

    student: str
    seed: int
    images: int
    correct: int
    broken: int
    robust: int
    kept: float

    @property
    def rate(self) -> float:
        """The defect inheritance rate."""
        return self.broken / max(self.correct, 1)

    def to_dict(self) -> dict[str, Json]:
        low, high = wilson(self.broken, self.correct)
        shares = {"rate": self.rate, "rate_95": [low, high], "accuracy": self.correct / self.images}
        return asdict(self) | shares


def wilson(hits: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927); (0, 1) of nothing."""
    if of == 0:
        return 0.0, 1.0
    share, spread = hits / of, Z * Z / of
    middle = share + spread / 2
    half = Z * math.sqrt(share * (1 - share) / of + spread / (4 * of))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def study(graph: Graph, data: Data, settings: Study, progress: Progress) -> list[Inherited]:
    """Make every student of the donor `graph` on `data`, and try on each the images that break the donor.

    The test part is read once for each student, at the end: nothing is selected. Raises InputError for a
    donor that does not end in a linear layer.
    """
    attack = Attack(
        mean=tuple(data.mean), std=tuple(data.std), eps=settings.eps, step=settings.eps / 10,
        iterations=settings.iterations, seed=settings.seed,
    )  # fmt: skip
    donor = features(graph)
    batches = list(data.batches("test", settings.batch_size, limit=settings.images))
    made = [feature_attack(donor, x, attack) for x, _ in batches]
    bits: Bits | None = None
    found = []
    for k, name in enumerate(settings.names):
        if name not in ("standard", "scratch") and bits is None:
            bits = search_mask(graph, data, settings)
        student = make(name, graph, data, settings, bits)
        found.append(try_on(name, student, batches, made, attack, settings, bits))
        progress("students", k + 1, len(settings.names))
    return found


def search_mask(graph: Graph, data: Data, settings: Study) -> Bits:
    """Masks of single weights, as published for indirect reuse: the head and the scores train together."""
    method = ReengineerMethod(
        mode="reference", epochs=settings.search_epochs, batch_size=settings.batch_size,
        lr_mask=settings.lr_mask, lr_head=0.001, seed=settings.seed,
    )  # fmt: skip
    search = method.searches(graph, len(data.classes), (), data)()
    search.run(0, [o for o in search.adam()[:1] if o is not None], search.masked.snapshot(), None)
    optimizers = [o for o in search.adam() if o is not None]
    for epoch in range(1, settings.search_epochs + 1):
        search.run(epoch, optimizers, None, search.share(settings.alpha))
        kept = int(search.masked.kept(search.masked.snapshot())[0])
        if 1 - kept / search.masked.total >= settings.removed:
            break
    return search.masked.snapshot()


def make(name: str, graph: Graph, data: Data, settings: Study, bits: Bits | None) -> nn.Module:
    """Train one student; `bits` are what `search_mask` found, needed by students that start at a mask."""
    headed = attach(graph, "linear", len(data.classes), (), settings.seed + 1)
    model = headed.model.requires_grad_()
    generator = torch.Generator().manual_seed(settings.seed)
    parameters = dict(model.named_parameters())
    masks = {} if bits is None or name in ("standard", "scratch") else bits
    with torch.no_grad():
        for key, parameter in parameters.items():
            module = model.get_submodule(key.rpartition(".")[0])
            if name == "scratch" and parameter.dim() > 1:
                _reset(parameter, generator)
            elif name == "scratch":
                parameter.fill_(1.0 if isinstance(module, nn.BatchNorm2d) and key.endswith("weight") else 0.0)
            elif key in masks:
                spread = float(parameter.std()) if name == "reinit" and parameter.numel() > 1 else 0.0
                fresh = torch.randn(parameter.shape, generator=generator) * spread
                parameter.copy_(torch.where(masks[key], parameter, fresh))
    if name == "scratch":
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
    head = set(model.get_submodule(headed.name).parameters())
    body = [p for p in model.parameters() if p not in head]
    rate = settings.lr_head if name == "scratch" else settings.lr
    optimizer = torch.optim.SGD(
        [{"params": body, "lr": rate}, {"params": list(head), "lr": settings.lr_head}],
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    model.train()
    for epoch in range(settings.epochs):
        for x, y in _epoch(data, settings, epoch):
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            if name == "masked":
                with torch.no_grad():
                    for key, mask in masks.items():
                        parameters[key].mul_(mask)
    return model.eval().requires_grad_(False)


def _reset(parameter: Tensor, generator: torch.Generator) -> None:
    """He et al. 2015, for ReLU."""
    spread = math.sqrt(2 / (parameter.numel() / parameter.shape[0]))
    parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)


def _epoch(data: Data, settings: Study, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    seed = settings.seed * STRIDE + epoch
    return data.batches("train", settings.batch_size, shuffle=True, seed=seed)


def try_on(
    name: str,
    student: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    made: Sequence[Tensor],
    attack: Attack,
    settings: Study,
    bits: Bits | None,
) -> Inherited:
    """Count on test images, clean and `made` on the donor, and attack the student itself."""
    images = correct = broken = robust = 0
    for (x, y), attacked in zip(batches, made, strict=True):
        own = label_attack(student, x, y, attack)
        with torch.no_grad():
            right = student(x).argmax(1) == y
            images += len(y)
            correct += int(right.sum())
            broken += int((right & (student(attacked).argmax(1) != y)).sum())
            robust += int((student(own).argmax(1) == y).sum())
    kept = 1.0
    if bits is not None and name not in ("standard", "scratch"):
        kept = sum(int(b.sum()) for b in bits.values()) / sum(b.numel() for b in bits.values())
    return Inherited(
        student=name,
        seed=settings.seed,
        images=images,
        correct=correct,
        broken=broken,
        robust=robust,
        kept=kept,
    )


def over_seeds(graph: Graph, data: Data, settings: Study, count: int, progress: Progress) -> list[Inherited]:
    """The study with so many seeds, from that of the settings on."""
    found = []
    for k in range(count):
        found += study(graph, data, replace(settings, seed=settings.seed + k), progress)
    return found
