"""Train a rewritten network until it does again what the original did: one loop on Lightning Fabric."""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from tightrope import checkpoint as disk
from tightrope.data import Data
from tightrope.errors import InputError
from tightrope.evaluate import Batches, accuracy, count_hits, recalibrate
from tightrope.hints import Watch, rewritten_sites, with_named_sites
from tightrope.place import model_sha256
from tightrope.reach import freeze
from tightrope.recipe import SEED_STRIDE, Recipe, learning_rate
from tightrope.shard import quiet_fabric, start_fabric
from tightrope.training import Training
from tightrope.types import Json

__all__ = ["Recipe", "accuracy", "finetune", "recalibrate"]

EVALUATION_BATCH = 500
CALIBRATION_BATCHES = 50


def finetune(
    model: nn.Module,
    data: Data,
    *,
    teacher: nn.Module | None = None,
    recipe: Recipe = Recipe(),  # noqa: B008 - frozen
    watch: Watch | None = None,
    checkpoint: Path | None = None,
    log: Callable[[dict[str, float | int | str]], None] | None = None,
) -> nn.Module:
    """A trained copy of `model`, in evaluation mode on the CPU; `model` and `teacher` stay as they are.

    Its weights are the averaged ones (`Recipe.ema`) after the last epoch, its batch-norm statistics those of
    training images under those weights. Each epoch ends with a record for `log` (in the first process):
    epoch, step, loss (mean), validation_accuracy (before those statistics), lr, seconds. The test split is
    not read.

    `watch` says which activations are drawn to the teacher's (`Recipe.hints`): by default those at rewritten
    sites. A model that draws random numbers, in evaluation too, draws the same in every call.

    With `checkpoint`, a file, the run is saved every epoch and when interrupted (KeyboardInterrupt; with
    several processes only every epoch, and all must see the same file), and a call with the same arguments
    goes on from there: the same losses and weights as without the interruption.

    Raises InputError for a recipe that this machine, model or data cannot follow, and when the loss is no
    longer finite (the checkpoint stays as it was); BundleError for a checkpoint that is damaged or belongs
    to another run.
    """
    with ExitStack() as stack:
        stack.enter_context(quiet_fabric())
        fabric = start_fabric(recipe.devices, recipe.nodes, recipe.accelerator, recipe.precision)
        cuda = [fabric.device] if fabric.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(cuda))
        rank, world = fabric.global_rank, fabric.world_size
        run = identity(model, teacher, data, recipe)
        found = None if checkpoint is None else disk.load(checkpoint, run)
        if teacher is not None and recipe.hints and watch is None and rewritten_sites(model):
            teacher = with_named_sites(teacher, data.input_shape)
        state = Training.start(model, teacher, recipe, fabric, watch)
        batch = recipe.batch_size // world
        images = min(data.size("train"), recipe.limit or data.size("train"))
        per_epoch = math.ceil(math.ceil(images / world) / batch)
        steps = max(1, round(recipe.epochs * per_epoch))

        def save() -> None:
            if checkpoint is not None and rank == 0:
                disk.save(checkpoint, run, state.checkpoint())

        if found is not None:
            state.restore(found)
        else:
            save()  # a place that cannot be written shows before the work, not after it
        show = stack.enter_context(_progress(steps, visible=rank == 0))
        interrupted = stack.enter_context(disk.deferred_interrupt(checkpoint is not None and world == 1))
        try:
            while (first := state.epoch * per_epoch) < steps:
                last = min(first + per_epoch, steps)
                start = time.perf_counter() - state.seconds
                batches = data.batches(
                    "train", batch, shuffle=True, seed=recipe.seed * SEED_STRIDE + state.epoch,
                    augment=recipe.augment, limit=recipe.limit, rank=rank, world=world,
                )  # fmt: skip
                for x, y in islice(batches, state.step - first, last - first):
                    if interrupted():
                        raise KeyboardInterrupt
                    state.learn(x, y, learning_rate(recipe, state.step, steps))
                    state.seconds = time.perf_counter() - start
                    show(state.step, state.loss / (state.step - first))
                if state.step < last:
                    raise InputError(
                        "the training split gave fewer batches than its size says",
                        got=state.step - first,
                        allowed=f"{last - first} batches of up to {batch} images",
                    )
                loss = state.total(state.loss)[0] / (last - first) / world
                torch.manual_seed(recipe.seed)
                held_out = data.batches("validation", EVALUATION_BATCH, rank=rank, world=world)
                hits, seen = state.total(*count_hits(state.average, held_out))
                state.check_weights()
                record: dict[str, float | int | str] = {
                    "epoch": state.epoch + 1,
                    "step": last,
                    "loss": loss,
                    "validation_accuracy": hits / seen,
                    "lr": learning_rate(recipe, last - 1, steps),
                    "seconds": time.perf_counter() - start,
                }
                state.epoch, state.loss, state.seconds = state.epoch + 1, 0.0, 0.0
                save()
                if log is not None and rank == 0:
                    log(record)
            if interrupted():
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            if world == 1 and not state.midway:
                save()
            raise
        torch.manual_seed(recipe.seed)
        recalibrate(state.average, calibration(data, recipe))
        plain = calibration(data, replace(recipe, augment=False))
        freeze(state.average, ((x.to(fabric.device), y) for x, y in plain))
        result = copy.deepcopy(model).cpu()
        result.load_state_dict({k: v.cpu() for k, v in state.average.state_dict().items()})
        return result.eval()


def calibration(data: Data, recipe: Recipe) -> Batches:
    """The training images that batch-norm statistics and scales are of."""
    some = min(data.size("train"), recipe.limit or data.size("train"))
    some = min(some, CALIBRATION_BATCHES * recipe.batch_size)
    return data.batches("train", recipe.batch_size, seed=recipe.seed, augment=recipe.augment, limit=some)


def identity(model: nn.Module, teacher: nn.Module | None, data: Data, recipe: Recipe) -> dict[str, Json]:
    """What a checkpoint must agree with."""
    return {
        "recipe": asdict(recipe),
        "model": model_sha256(model),
        "teacher": None if teacher is None else model_sha256(teacher),
        "data": {"name": data.name, "train": data.size("train")},
    }


@contextmanager
def _progress(steps: int, visible: bool) -> Iterator[Callable[[int, float], None]]:
    """A bar with the mean loss and an estimate, on a terminal only."""
    if not visible or not sys.stderr.isatty():
        yield lambda step, loss: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("fine-tuning"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("fine-tuning", total=steps, loss=math.nan)
        yield lambda step, loss: progress.update(task, completed=step, loss=loss)
