"""Learn which weights a task needs: the loop over epochs, one step, and what each epoch is worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tightrope.data import Data
from tightrope.errors import InputError
from tightrope.methods import Progress
from tightrope.methods.reengineer.heads import Headed
from tightrope.methods.reengineer.projection import fits, found, project, smallest
from tightrope.methods.reengineer.resume import Journal
from tightrope.methods.reengineer.selection import Best, Fewest, Floor
from tightrope.nn.masked import CHANNELS, Bits, Masked

CYCLE = 5  # epochs; the first of each cycle trains the head alone (SeaM)
STRIDE = 1_000_003  # between seeds: neighbouring ones share no epoch's order
TIGHTENED = 0.6  # share of the search after which limits have their values
SLACK = 0.97  # of a time: measurements differ
EVERY = 4  # steps between cuts
ORDER_BATCHES = 8
Teacher = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What both ways to search share; see `ReengineerMethod`."""

    epochs: int
    batch_size: int
    lr_mask: float
    lr_head: float
    distill: float
    augment: bool
    multiple: int
    decay: bool
    seed: int


@dataclass(frozen=True)
class State:
    """An epoch's result: masks and the head's weights, copies both, on the CPU."""

    epoch: int
    bits: Bits
    head: dict[str, Tensor]
    accuracy: float
    weights: int
    macs: int


@dataclass(frozen=True)
class Clock:
    """A limit on measured time: `measure` gives the milliseconds of one image, `whole` the donor's."""

    limit: float
    whole: float
    measure: Callable[[State], float]


@dataclass
class Search:
    """Masks under training. `weights` and `macs` of the head are counted on top of what masks leave."""

    masked: Masked
    headed: Headed
    data: Data
    settings: Settings
    progress: Progress
    teacher: Teacher | None = None
    journal: Journal | None = None
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def head(self) -> nn.Linear:
        layer = self.headed.model.get_submodule(self.headed.name)
        assert isinstance(layer, nn.Linear)
        return layer

    def least(self) -> State:
        """The masks that leave the least, not judged: its accuracy is 0."""
        return self._state(-1, smallest(self.masked, self.settings.multiple), 0.0)

    def reference(
        self, alpha: float, floor: Floor, patience: int | None, limits: Mapping[str, float]
    ) -> tuple[State, bool]:
        """SeaM: cross-entropy plus `alpha` times the share kept; the fewest weights at `floor` accuracy among
        the epochs within the limits, and whether there is one; if not, the last epoch.

        With `Settings.decay` learning rates fall to zero like a cosine, so that masks settle.
        """
        rule: Fewest[int] = Fewest(floor.accuracy, patience, wanted=floor.wanted)
        head, masks = self.adam()
        both = [o for o in (head, masks) if o is not None]
        decay = self._cosine(both) if self.settings.decay else lambda done: None
        done = 0

        def after() -> None:
            nonlocal done
            done += 1
            decay(done)

        def train(epoch: int) -> None:
            """The head; in four epochs of five, or without a head to train, the masks too."""
            nonlocal done
            done = epoch * self.per_epoch
            decay(done)
            joint = epoch % CYCLE > 0 or not self.headed.trained
            optimizers = ([head] if head is not None else []) + ([masks] if joint else [])
            self.run(epoch, optimizers, None if joint else self.masked.snapshot(), self.share(alpha), after)

        def offer(epoch: int, entry: Mapping[str, float]) -> bool:
            share = entry["weights"] / self.masked.total
            return not entry["fits"] or rule.offer(entry["accuracy"], share, lambda: epoch)

        states = self._follow(both, train, offer, rule, lambda state: fits(self.masked, state.bits, limits))
        return (states[max(states)], False) if rule.result is None else (states[rule.result], True)

    def dual(self, limits: Mapping[str, float], clock: Clock | None = None) -> tuple[State, bool]:
        """The most accurate epoch within the limits, and whether there is one; if not, the last epoch.

        `limits`: `weights` and `macs` that masks may leave, head excluded; `clock`: on time.

        Scores start in the order of how much the loss feels each mask. The limits tighten from the whole
        network to their values over the first part of the search, and are held from there on, so that the
        result has been trained after the last cut; see `project`. Learning rates fall to zero like a cosine.
        Time follows multiplications, not in proportion: after every epoch it is measured, and the limit on
        multiplications corrected.
        """
        self._order_scores()
        whole = found(self.masked, self.masked.snapshot())
        per_epoch, steps = self.per_epoch, self.per_epoch * self.settings.epochs
        optimizers = [o for o in self.adam() if o is not None]
        decay = self._cosine(optimizers)
        rule: Best[int] = Best()
        done = 0
        now = dict(limits)
        if clock is not None:
            now["macs"] = min(now.get("macs", math.inf), whole["macs"] * clock.limit / clock.whole)

        def after() -> None:
            nonlocal done
            done += 1
            decay(done)
            if done % EVERY == 0 or done % per_epoch == 0:
                tightened = min(1.0, done / (TIGHTENED * steps))
                limited = {m: whole[m] * (v / whole[m]) ** tightened for m, v in now.items()}
                project(self.masked, limited, self.settings.multiple)

        def train(epoch: int) -> None:
            nonlocal done
            done = epoch * per_epoch
            decay(done)
            self.run(epoch, optimizers, None, None, after)

        def judge(state: State) -> bool:
            feasible = fits(self.masked, state.bits, limits)
            if clock is None:
                return feasible
            ms = clock.measure(state)
            corrected = SLACK * state.macs * clock.limit / ms
            held = done >= TIGHTENED * steps  # from here on the limit does not grow again
            now["macs"] = min(corrected, limits.get("macs", math.inf), now["macs"] if held else math.inf)
            return feasible and ms <= clock.limit

        def offer(epoch: int, entry: Mapping[str, float]) -> bool:
            rule.offer(entry["accuracy"], bool(entry["fits"]), lambda: epoch)
            return True

        states = self._follow(optimizers, train, offer, rule, judge, now)
        return (states[max(states)], False) if rule.best is None else (states[rule.best], True)

    @property
    def per_epoch(self) -> int:
        """Steps."""
        return math.ceil(self.data.size("train") / self.settings.batch_size)

    def _cosine(self, optimizers: list[torch.optim.Optimizer]) -> Callable[[int], None]:
        """Sets learning rates after so many steps: from what they are to zero at the search's end."""
        rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
        steps = self.per_epoch * self.settings.epochs

        def decay(done: int) -> None:
            for optimizer, rate in zip(optimizers, rates, strict=True):
                optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * done / steps)) / 2

        return decay

    def _follow(
        self,
        optimizers: list[torch.optim.Optimizer],
        train: Callable[[int], None],
        offer: Callable[[int, Mapping[str, float]], bool],
        rule: Fewest[int] | Best[int],
        judge: Callable[[State], bool],
        now: dict[str, float] | None = None,
    ) -> dict[int, State]:
        """Epoch after epoch until the rule says no (`offer`), from where the journal ends.

        Returns the states that the rule keeps, and the last one. `now`: limits that move.
        """
        states = self._resume(optimizers, now)
        goes_on = all(offer(epoch, entry) for epoch, entry in enumerate(self.history))
        for epoch in range(len(self.history), self.settings.epochs if goes_on else 0):
            train(epoch)
            states[epoch] = self._judge(epoch, judge)
            goes_on = offer(epoch, self.history[-1])
            states = {k: s for k, s in states.items() if k in (*rule.kept, epoch)}
            self._write(optimizers, states, now)
            if not goes_on:
                break
        return states

    def _write(
        self, optimizers: list[torch.optim.Optimizer], states: Mapping[int, State], now: object
    ) -> None:
        if self.journal is None:
            return
        tensors = {f"score.{name}": score for name, score in self.masked.scores.items()}
        tensors |= {f"head.{name}": value for name, value in self.head.state_dict().items()}
        for k, state in states.items():
            tensors |= {f"state.{k}.bits.{name}": bits for name, bits in state.bits.items()}
            tensors |= {f"state.{k}.head.{name}": value for name, value in state.head.items()}
        self.journal.write(tensors, optimizers, {"history": self.history, "now": now})

    def _resume(
        self, optimizers: list[torch.optim.Optimizer], now: dict[str, float] | None
    ) -> dict[int, State]:
        found = None if self.journal is None else self.journal.read(optimizers)
        if found is None:
            return {}
        tensors, notes = found
        self.history[:] = notes["history"]
        if now is not None:
            now |= notes["now"]

        def below(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        with torch.no_grad():
            for name, score in self.masked.scores.items():
                score.copy_(tensors[f"score.{name}"])
        self.head.load_state_dict(below("head."))
        states = {}
        for k in {int(name.split(".")[1]) for name in tensors if name.startswith("state.")}:
            entry, bits, head = self.history[k], below(f"state.{k}.bits."), below(f"state.{k}.head.")
            states[k] = State(k, bits, head, entry["accuracy"], int(entry["weights"]), int(entry["macs"]))
        return states

    def _order_scores(self) -> None:
        """Scores from just above 0 to 1 by |dL/d mask| on a few batches (Lee et al. 2019, SNIP)."""
        felt = self.felt(
            {n: torch.ones_like(score) for n, score in self.masked.scores.items()}, ORDER_BATCHES
        )
        for names in ({CHANNELS} & felt.keys(), felt.keys() - {CHANNELS}):  # of one kind: in one order
            ordered = sorted(names)
            if not ordered:
                continue
            flat = torch.cat([felt[name].flatten() for name in ordered])
            rank = (flat.argsort(stable=True).argsort() + 1) / len(flat)
            with torch.no_grad():
                start = 0
                for name in ordered:
                    score = self.masked.scores[name]
                    score.copy_(rank[start : start + score.numel()].view(score.shape))
                    start += score.numel()

    def felt(self, masks: Bits, batches: int) -> Bits:
        """|dL/d mask| of every mask on so many training batches of 64 (Lee et al. 2019, SNIP)."""
        leaves = {name: mask.requires_grad_() for name, mask in masks.items()}
        few = self.data.batches("train", 64, shuffle=True, seed=self.settings.seed, limit=64 * batches)
        with self.seeded(self.settings.seed):
            for batch in few:
                x, y = self.placed(*batch)
                loss = F.cross_entropy(self.masked(x, self.masked.effective(leaves)), y)
                torch.autograd.backward(loss)
        self.head.zero_grad()
        return {n: torch.zeros_like(o) if o.grad is None else o.grad.abs() for n, o in leaves.items()}

    def share(self, alpha: float) -> Callable[[Bits], Tensor]:
        """SeaM's penalty: `alpha` times the share of the weights that is kept."""
        return lambda bits: alpha * self.masked.kept(bits)[0] / self.masked.total

    def accuracy(self, bits: Bits, split: str = "validation") -> float:
        """Share of a split's images that the masked network labels right."""
        hits, seen = 0, 0
        with torch.no_grad(), _without_dropout(self.headed.model):
            parameters = self.masked.effective(bits)
            for x, y in self.data.batches(split, 500):  # type: ignore[arg-type]
                x, y = self.placed(x, y)
                hits += int((self.masked(x, parameters).argmax(1) == y).sum())
                seen += len(y)
        return hits / seen

    def adam(self) -> tuple[torch.optim.Optimizer | None, torch.optim.Optimizer]:
        """Optimisers of the head, if it learns, and of the scores."""
        settings = self.settings
        head = None
        if self.headed.trained:
            head = torch.optim.Adam(self.head.parameters(), lr=settings.lr_head)
        return head, torch.optim.Adam(list(self.masked.scores.values()), lr=settings.lr_mask)

    def run(
        self,
        epoch: int,
        optimizers: list[torch.optim.Optimizer],
        fixed: Bits | None,
        penalty: Callable[[Bits], Tensor] | None,
        after: Callable[[], object] = lambda: None,
    ) -> None:
        """One epoch; `after` is called after every step."""
        with self.seeded(self.settings.seed * STRIDE + epoch):
            for batch in self._batches(epoch):
                x, y = self.placed(*batch)
                bits = self.masked.bits() if fixed is None else fixed
                loss = self.loss(self.masked(x, self.masked.effective(bits)), y, self.said(x))
                if fixed is None and penalty is not None:
                    apart = self.masked.bits()  # bits of its own: each gradient is clipped alone
                    loss = loss + penalty(apart)
                self.learn(loss, optimizers)
                after()

    def said(self, x: Tensor) -> Tensor | None:
        """Log-probabilities of the teacher, if it counts."""
        if self.teacher is None or not self.settings.distill:
            return None
        with torch.no_grad():
            return self.teacher(x).log_softmax(1)

    def loss(self, outputs: Tensor, y: Tensor, soft: Tensor | None) -> Tensor:
        """Cross-entropy, and `distill` times the divergence from `soft`, where there is a teacher."""
        loss = F.cross_entropy(outputs, y)
        if soft is None:
            return loss
        divergence = F.kl_div(outputs.log_softmax(1), soft, log_target=True, reduction="batchmean")
        return loss + self.settings.distill * divergence

    def learn(self, loss: Tensor, optimizers: list[torch.optim.Optimizer]) -> None:
        """One step of each. Raises InputError for a loss that is not finite."""
        if not math.isfinite(float(loss.detach())):
            raise InputError("the search diverged: the loss is not finite", fix="a smaller lr_head")
        for optimizer in optimizers:
            optimizer.zero_grad()
        torch.autograd.backward(loss)
        for optimizer in optimizers:
            optimizer.step()

    def placed(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x.to(self.masked.device), y.to(self.masked.device)

    @contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """Dropout draws from here on by the seed alone."""
        device = self.masked.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        settings = self.settings
        return self.data.batches(
            "train", settings.batch_size, shuffle=True, seed=settings.seed * STRIDE + epoch,
            augment=settings.augment,
        )  # fmt: skip

    def _judge(self, epoch: int, judge: Callable[[State], bool]) -> State:
        bits = self.masked.snapshot()
        state = self._state(epoch, bits, self.accuracy(bits))
        entry = {
            "weights": state.weights,
            "macs": state.macs,
            "accuracy": state.accuracy,
            "fits": judge(state),
        }
        self.history.append(entry)
        self.progress("mask search", epoch + 1, self.settings.epochs)
        return state

    def _state(self, epoch: int, bits: Bits, accuracy: float) -> State:
        weights, macs = (int(v) for v in self.masked.kept(bits))
        head = {k: v.detach().clone().cpu() for k, v in self.head.state_dict().items()}
        return State(epoch, {k: mask.cpu() for k, mask in bits.items()}, head, accuracy, weights, macs)


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Dropout learns with the masks, as published; what an epoch is worth does not depend on it."""
    active = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.training]
    for module in active:
        module.eval()
    yield
    for module in active:
        module.train()
