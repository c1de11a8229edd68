"""Train the supernet: weights on training images, choices on held-out ones, in turns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tightrope import checkpoint as disk
from tightrope.checkpoint import Checkpoint
from tightrope.data import Data
from tightrope.errors import InputError
from tightrope.methods import Progress
from tightrope.methods.seesaw.decide import Judge, expendable, sensitivities, settle
from tightrope.methods.seesaw.objectives import Dual, Reference, learned
from tightrope.methods.seesaw.space import Architecture
from tightrope.methods.seesaw.supernet import Supernet
from tightrope.shard import Shard
from tightrope.types import Json

STRIDE = 1_000_003  # between seeds: neighbouring ones share no epoch's order
SHRUNK = 0.75  # share of the epochs after which every block has its few operators
LATE = 0.75  # share of the epochs after which branch weights are driven apart, if that is wanted


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train. `branches`: operators of a block in one step, 0 for all. `limit`: images per epoch.
    `shrink`: whether operators go after every epoch, until `keep` of a block are left.
    """

    epochs: int
    batch_size: int
    limit: int | None
    lr: float
    lr_choice: float
    momentum: float
    weight_decay: float
    cosine: bool
    choice_betas: tuple[float, float]
    choice_decay: float
    branches: int
    shrink: bool
    keep: int
    distill: float
    smoothing: float
    variance: float
    precision: str
    seed: int


@dataclass
class Search:
    """The state of a search. `choose_weights`: whether the operators' weights belong to the choices."""

    net: Supernet
    data: Data
    settings: Settings
    objective: Dual | Reference
    teacher: nn.Module | None
    shard: Shard
    progress: Progress
    choose_weights: bool
    judge: Judge
    epoch: int = 0

    def __post_init__(self) -> None:
        settings, net = self.settings, self.net
        choices = [c.logits for c in net.choices.values()]
        if self.choose_weights:
            choices += [m.weights for m in net.mixtures]
        taken = {id(p) for p in choices}
        weights = [p for p in net.parameters() if p.requires_grad and id(p) not in taken]
        self.weights = torch.optim.SGD(
            weights,
            lr=settings.lr,
            momentum=settings.momentum,
            nesterov=settings.momentum > 0,
            weight_decay=settings.weight_decay,
        )
        self.choices = torch.optim.Adam(
            choices, lr=settings.lr_choice, betas=settings.choice_betas, weight_decay=settings.choice_decay
        )

    @property
    def per_epoch(self) -> int:
        images = min(self.data.size("train"), self.settings.limit or self.data.size("train"))
        return math.ceil(
            math.ceil(images / self.shard.world) / (self.settings.batch_size // self.shard.world)
        )

    def run(self, workdir: Path | None, identity: Mapping[str, Json]) -> None:
        """Train to the end, from where an interrupted run stopped; the state is kept after every epoch."""
        path = None if workdir is None else workdir / "search.safetensors"
        run = dict(identity) | {"settings": {k: _plain(v) for k, v in asdict(self.settings).items()}}
        if path is not None and (found := disk.load(path, run)) is not None:
            self._restore(found)
        self._tell(self.epoch * self.per_epoch)
        while self.epoch < self.settings.epochs:
            self._epoch()
            self.epoch += 1
            if self.settings.shrink:
                self._shrink()
            if path is not None and self.shard.first:
                disk.save(path, run, self._checkpoint())
                self._tell(self.epoch * self.per_epoch)  # again: now it is kept

    def _epoch(self) -> None:
        seed = self.settings.seed * STRIDE + self.epoch
        held_out = self._endless("validation", seed)
        self.net.train()
        for k, (x, y) in enumerate(self._batches("train", seed)):
            done = self.epoch * self.per_epoch + k
            generator = torch.Generator().manual_seed(self.settings.seed * STRIDE + done)
            self._choose(*next(held_out), generator)
            self._fit(x, y, generator, done)
            self._tell(done + 1)

    def _tell(self, done: int) -> None:
        self.progress("steps of the supernet", done, self.per_epoch * self.settings.epochs)

    def _choose(self, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
        """A step of the choices on held-out images."""
        self._draw(generator, learn=True)
        loss = self._loss(x, y, teach=False) + self.objective.penalty()
        self._step(self.choices, loss - self._apart() if self.choose_weights else loss)

    def _fit(self, x: Tensor, y: Tensor, generator: torch.Generator, done: int) -> None:
        """A step of the weights on training images."""
        if self.settings.cosine:
            share = done / (self.per_epoch * self.settings.epochs)
            for group in self.weights.param_groups:
                group["lr"] = self.settings.lr * 0.5 * (1 + math.cos(math.pi * share))
        self._draw(generator, learn=False)
        loss = self._loss(x, y, teach=True)
        if not self.choose_weights:  # then this step is the one that moves the operators' weights
            loss = loss + self.objective.penalty() - self._apart()
        self._step(self.weights, loss)

    def _apart(self) -> Tensor | float:
        """The reward for operators' weights that differ, late in the search."""
        if not self.settings.variance or self.epoch < LATE * self.settings.epochs:
            return 0.0
        spread = [m.weights[m.alive].var() for m in self.net.mixtures if len(m.alive) > 1]
        return self.settings.variance * sum(spread, torch.zeros(()))

    def _draw(self, generator: torch.Generator, *, learn: bool) -> None:
        for mixture in self.net.mixtures:
            mixture.draw(self.settings.branches or len(mixture.alive), generator)
        for choice in self.net.choices.values():
            choice.draw(generator, learn=learn)

    def _loss(self, x: Tensor, y: Tensor, *, teach: bool) -> Tensor:
        x, y = x.to(self.shard.device), y.to(self.shard.device)
        soft = None
        with self._autocast():
            if teach and self.teacher is not None and self.settings.distill:
                with torch.no_grad():
                    soft = self.teacher(x).float()
            outputs = self.net(x).float()
        return learned(outputs, y, soft, self.settings.distill, self.settings.smoothing)

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        mixed = self.settings.precision == "bf16-mixed"
        with torch.autocast(self.shard.device.type, torch.bfloat16, enabled=mixed):
            yield

    def _step(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        if not math.isfinite(float(loss.detach())):
            raise InputError(
                "the search diverged: the loss is not finite",
                where=f"epoch {self.epoch + 1}",
                fix=f"--set lr=VALUE below {self.settings.lr:g}",
            )
        self.net.zero_grad(set_to_none=True)
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        if not trained:  # a ReLU map may leave no choice
            return
        torch.autograd.backward(loss, inputs=trained)
        if self.shard.world > 1:
            self._average([p for p in trained if p.grad is not None])
        optimizer.step()

    def _average(self, parameters: list[nn.Parameter]) -> None:
        """Gradients over all processes, which draw the same branches."""
        flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        mean = self.shard.total(flat).to(flat.device) / self.shard.world
        for p, part in zip(parameters, torch.split(mean, [p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p)

    def _shrink(self) -> None:
        """Fewer operators in every block: those go that the loss is least sensitive to."""
        every, settings = len(self.net.space.operators), self.settings
        share = min(1.0, self.epoch / max(SHRUNK * settings.epochs, 1))
        target = max(settings.keep, round(every * (min(settings.keep, every) / every) ** share))
        if all(len(mixture.alive) <= target for mixture in self.net.mixtures):
            return
        settle(self.net)
        found = sensitivities(self.net, self.judge.batches, self.settings.batch_size)
        for mixture, felt in zip(self.net.mixtures, found, strict=True):
            rest = expendable(mixture, felt, felt)
            for k in sorted(rest, key=lambda k: rest[k])[: max(0, len(mixture.alive) - target)]:
                mixture.drop(k)
        agree(self.net, self.shard)

    def _batches(self, split: str, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        s, shard = self.settings, self.shard
        return self.data.batches(
            split, s.batch_size // shard.world, shuffle=True, seed=seed,  # type: ignore[arg-type]
            limit=s.limit if split == "train" else None, rank=shard.rank, world=shard.world,
        )  # fmt: skip

    def _endless(self, split: str, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from self._batches(split, seed)
            seed += STRIDE // 2

    def _checkpoint(self) -> Checkpoint:
        tensors = {f"net/{k}": v for k, v in self.net.state_dict().items()}
        for word, optimizer in (("weights", self.weights), ("choices", self.choices)):
            for k, slots in optimizer.state_dict()["state"].items():
                tensors |= {f"{word}/{k}/{name}": v for name, v in slots.items() if v is not None}
        progress = {
            "epoch": self.epoch,
            "alive": [m.alive for m in self.net.mixtures],
            "done": self.objective.done,
            "multiplier": self.objective.multiplier,
        }
        return Checkpoint(tensors, progress)

    def _restore(self, found: Checkpoint) -> None:
        parts: dict[str, dict[str, Tensor]] = {"net": {}, "weights": {}, "choices": {}}
        for key, tensor in found.tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor
        self.net.load_state_dict(parts["net"])
        for word, optimizer in (("weights", self.weights), ("choices", self.choices)):
            body = optimizer.state_dict()
            for key, tensor in parts[word].items():
                number, _, name = key.partition("/")
                body["state"].setdefault(int(number), {})[name] = tensor
            optimizer.load_state_dict(body)
        self.epoch = found.progress["epoch"]
        self.objective.done = found.progress["done"]
        self.objective.multiplier = found.progress["multiplier"]
        for mixture, alive in zip(self.net.mixtures, found.progress["alive"], strict=True):
            mixture.alive = mixture.picked = list(alive)


def agree(net: Supernet, shard: Shard) -> None:
    """Leave the first process's operators in all: elsewhere rounding may have ranked others lowest."""
    for mixture in net.mixtures:
        left = torch.zeros(len(mixture.branches), dtype=torch.int64)
        left[mixture.alive] = 1
        mixture.alive = mixture.picked = shard.agreed(left).nonzero().flatten().tolist()


def agreed(net: Supernet, network: Architecture, shard: Shard) -> Architecture:
    """The network that the first process has decided for; `network` is this one's."""
    agree(net, shard)
    made = [("", block.relu) for block in network.blocks]
    made += [(aggregate.pool, aggregate.relu) for aggregate in network.aggregates]
    options = [c.options.index(option) for c, option in zip(net.choices.values(), made, strict=True)]
    return net.architecture(shard.agreed(torch.tensor(options)).tolist())


def _plain(value: object) -> Json:
    return list(value) if isinstance(value, tuple) else value
