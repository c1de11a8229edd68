"""The state of a fine-tuning run, and what one step does to it."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tightrope import reach
from tightrope.checkpoint import Checkpoint
from tightrope.errors import InputError
from tightrope.hints import Hints, Watch
from tightrope.nn.depthwise import quicken
from tightrope.nn.strided import repair
from tightrope.reach import Reach
from tightrope.recipe import SEED_STRIDE, Recipe


@dataclass
class Training:
    """Everything that changes while training, and one step of it. `wrapped`: as Fabric runs it."""

    recipe: Recipe
    fabric: Any
    net: nn.Module
    wrapped: Any
    average: nn.Module  # `net` itself without averaging
    teacher: nn.Module | None
    optimizer: torch.optim.Optimizer
    wrapped_optimizer: Any
    hints: Hints | None
    within: Reach | None
    step: int = 0
    epoch: int = 0  # epochs that ended with a record
    loss: float = 0.0  # summed over the steps of the unfinished epoch
    seconds: float = 0.0  # spent on the unfinished epoch
    midway: bool = False  # within a step: nothing to save

    @classmethod
    def start(
        cls,
        model: nn.Module,
        teacher: nn.Module | None,
        recipe: Recipe,
        fabric: Any,
        watch: Watch | None = None,
    ) -> Training:
        net = _copy(model, recipe).train()
        quicken(net)
        repair(net)
        reach.start(net, recipe.scales)
        optimizer = torch.optim.SGD(
            _groups(net, recipe), lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0
        )
        wrapped, wrapped_optimizer = fabric.setup(net, optimizer)
        average = copy.deepcopy(net).requires_grad_(False) if recipe.ema else net
        if teacher is not None:
            teacher = _copy(teacher, recipe).to(fabric.device).eval()
        hints = Hints(net, teacher, watch) if teacher is not None and recipe.hints else None
        within = Reach(net) if recipe.reach and reach.activations(net) else None
        return cls(
            recipe, fabric, net, wrapped, average, teacher, optimizer, wrapped_optimizer, hints, within
        )

    def learn(self, x: Tensor, y: Tensor, lr: float) -> None:
        """One step on a batch."""
        self.midway = True
        recipe, fabric = self.recipe, self.fabric
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["share"]
        # Dropout and the like depend on nothing but the step, so a resumed run draws the same.
        torch.manual_seed((recipe.seed * SEED_STRIDE + self.step) * fabric.world_size + fabric.global_rank)
        x, y = x.to(fabric.device, memory_format=recipe.memory_format), y.to(fabric.device)
        outputs = self.wrapped(x)
        soft = None
        if self.teacher is not None:
            with torch.no_grad(), fabric.autocast():
                soft = self.teacher(x).float()
        if self.step == 0:
            _check_outputs(outputs, soft, y)
        loss = objective(outputs, y, soft, recipe)
        if self.hints is not None:
            loss = loss + recipe.hints * self.hints.loss()
        if self.within is not None:
            loss = loss + recipe.reach * self.within.loss()
        self.loss += self._finite(float(loss.detach()))
        self.wrapped_optimizer.zero_grad()
        fabric.backward(loss)
        if recipe.clip and reach.activations(self.net):
            norm = fabric.clip_gradients(
                self.wrapped, self.wrapped_optimizer, max_norm=recipe.clip, error_if_nonfinite=False
            )
            self._finite(float(norm), "the gradient")
        self.wrapped_optimizer.step()
        self.step += 1
        self._average()
        self.midway = False

    @torch.no_grad()
    def _average(self) -> None:
        if not self.recipe.ema:
            return
        # The first steps count more, or a short run would keep the weights it started from.
        decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        means, now = self.average.state_dict(), self.net.state_dict()
        floats = [name for name, mean in means.items() if mean.is_floating_point()]
        for dtype in {means[n].dtype for n in floats}:  # lists of one type take the fast way
            same = [n for n in floats if means[n].dtype == dtype]
            torch._foreach_lerp_([means[n] for n in same], [now[n] for n in same], 1 - decay)
        for name in means.keys() - floats:
            means[name].copy_(now[name])

    def _finite(self, value: float, what: str = "the loss") -> float:
        if not math.isfinite(value):
            raise InputError(
                f"training diverged: {what} is not finite",
                where=f"step {self.step}",
                got=value,
                fix=f"a learning rate below {self.recipe.lr:g}",
            )
        return value

    def check_weights(self) -> None:
        """The last step's damage shows only here."""
        for parameter in self.net.parameters():
            self._finite(float(parameter.detach().abs().sum()))

    def total(self, *values: float) -> list[float]:
        """Each value summed over all processes."""
        if self.fabric.world_size == 1:
            return list(values)
        summed: Tensor = self.fabric.all_reduce(torch.tensor(values, dtype=torch.float64), reduce_op="sum")
        return summed.tolist()

    def checkpoint(self) -> Checkpoint:
        momentum = {
            str(i): slots["momentum_buffer"]
            for i, slots in self.optimizer.state_dict()["state"].items()
            if slots.get("momentum_buffer") is not None
        }
        parts = {"net": self.net.state_dict(), "momentum": momentum}
        if self.recipe.ema:
            parts["average"] = self.average.state_dict()
        tensors = {f"{part}/{name}": t for part, named in parts.items() for name, t in named.items()}
        progress = {"step": self.step, "epoch": self.epoch, "loss": self.loss, "seconds": self.seconds}
        return Checkpoint(tensors, progress)

    def restore(self, checkpoint: Checkpoint) -> None:
        parts: dict[str, dict[str, Tensor]] = {"net": {}, "average": {}, "momentum": {}}
        for key, tensor in checkpoint.tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor
        self.net.load_state_dict(parts["net"])
        if self.recipe.ema:
            self.average.load_state_dict(parts["average"])
        body = self.optimizer.state_dict()
        body["state"] = {int(i): {"momentum_buffer": tensor} for i, tensor in parts["momentum"].items()}
        self.optimizer.load_state_dict(body)
        for name, value in checkpoint.progress.items():
            setattr(self, name, value)


def _groups(net: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Weights, and coefficients of polynomials: these learn at a rate of their own and do not decay."""
    polynomials = {p for m in reach.activations(net).values() for p in m.stages.parameters()}
    trained = [p for p in net.parameters() if p.requires_grad]
    if not trained:
        raise InputError("the network has nothing to train", where=type(net).__name__)
    weights = [p for p in trained if p not in polynomials]
    coefficients = [p for p in trained if p in polynomials]
    groups = [
        {"params": weights, "weight_decay": recipe.weight_decay, "share": 1.0},
        {"params": coefficients, "weight_decay": 0.0, "share": recipe.coefficients},
    ]
    return [group for group in groups if group["params"]]


def objective(outputs: Tensor, labels: Tensor, soft: Tensor | None, recipe: Recipe) -> Tensor:
    """The loss of one batch: labels (N,), outputs and the teacher's outputs `soft` (N, classes)."""
    hard = F.cross_entropy(outputs, labels, label_smoothing=recipe.smoothing)
    if soft is None:
        return hard
    T = recipe.temperature
    divergence = F.kl_div(
        F.log_softmax(outputs / T, 1), F.log_softmax(soft / T, 1), log_target=True, reduction="batchmean"
    )
    return recipe.label * hard + recipe.distill * T * T * divergence


def _copy(model: nn.Module, recipe: Recipe) -> nn.Module:
    model = copy.deepcopy(model).to(memory_format=recipe.memory_format)  # type: ignore[call-overload]
    model.zero_grad(set_to_none=True)
    return model


def _check_outputs(outputs: Tensor, soft: Tensor | None, labels: Tensor) -> None:
    if outputs.dim() != 2 or int(labels.max()) >= outputs.shape[1]:
        raise InputError(
            "the network does not fit the data",
            got=f"outputs {tuple(outputs.shape)}, labels up to {int(labels.max())}",
            allowed="(N, classes)",
        )
    if soft is not None and soft.shape != outputs.shape:
        raise InputError(
            "the teacher has other outputs than the network",
            got=tuple(soft.shape),
            allowed=tuple(outputs.shape),
        )
