"""The verbs: search, solve, finetune, run. Each reads a bundle, does one step, writes the bundle.

The command line is a thin layer over these; they can be called from Python just as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tightrope import models
from tightrope.bundle import DISTORTION, Bundle, read_json, write_json
from tightrope.data import Data, load
from tightrope.errors import InputError
from tightrope.finetune import Recipe, accuracy, finetune, recalibrate
from tightrope.graph import trace
from tightrope.lower import lower
from tightrope.methods import Method, method_type
from tightrope.place import model_sha256, place
from tightrope.program import Program
from tightrope.rewrite import apply
from tightrope.runtimes import Runtime, runtime_type
from tightrope.runtimes.plain import ranges
from tightrope.shard import Shard
from tightrope.solve.select import Selection, price, select
from tightrope.types import Budget, Json, Measurement, Plan, Problem

Progress = Callable[[str, int, int], None]
SINGLE = Shard()
CALIBRATION = 512  # images behind the value ranges of a Program


def quiet(what: str, done: int, of: int) -> None:
    """No progress shown."""


def search(
    *,
    model: str,
    data: str,
    budget: str,
    out: Path,
    method: str = "block_relu",
    config: Mapping[str, Json] | None = None,
    weights: Path | None = None,
    root: Path | None = None,
    image_size: int | None = None,
    runtime: str = "mpc",
    progress: Progress = quiet,
    shard: Shard = SINGLE,
) -> Bundle:
    """Measure every option of `model` on training images, solve for `budget`, write a bundle at `out`.

    Interrupted, the same call goes on where it stopped. Raises a TightropeError before anything is
    written when the budget, the model or the data cannot be used.
    """
    limits = Budget.parse(budget)
    chosen: Method = method_type(method)(**(config or {}))
    images = load(data, root=root, image_size=image_size)
    classes, channels = len(images.classes), images.input_shape[0]
    net = models.resolve(model, num_classes=classes, in_channels=channels, weights=weights)
    graph = trace(net, images.input_shape)
    cost: Runtime = runtime_type(runtime)()
    Bundle.check_target(out)
    problem = chosen.measure(
        graph,
        images,
        cost=cost,
        workdir=out / DISTORTION,
        progress=progress,
        feasible=lambda unmeasured: select(unmeasured, limits),
        shard=shard,
    )
    selection = select(problem, limits)
    about = {
        "model": model,
        "num_classes": classes,
        "in_channels": channels,
        "data": data,
        "root": None if root is None else str(root),
        "image_size": image_size,
        "runtime": runtime,
    }
    if shard.first:
        bundle = Bundle.create(out, about, net)
        problem.save(out / "problem.npz")
        bundle.save_plan(_plan(chosen, problem, limits, selection, model, net, images.input_shape))
    shard.barrier()
    return Bundle(out)


def solve(source: Bundle, budget: str, out: Path) -> Bundle:
    """Solve the saved problem of `source` for another budget; the network is not touched."""
    problem, old = source.problem(), source.plan()
    limits = Budget.parse(budget)
    selection = select(problem, limits)
    chosen: Method = method_type(old.method)(**old.config)
    base = source.base()
    about = {k: v for k, v in source.about.items() if k not in ("schema", "versions")}
    if out.resolve() == source.path.resolve():
        raise InputError("solve needs a bundle of its own", where=str(out), fix="another --out")
    bundle = Bundle.create(out, about, base)
    problem.save(out / "problem.npz")
    bundle.save_plan(_plan(chosen, problem, limits, selection, old.base, base, old.input_shape))
    return bundle


def _plan(
    method: Method,
    problem: Problem,
    budget: Budget,
    selection: Selection,
    base: str,
    net: nn.Module,
    input_shape: tuple[int, ...],
) -> Plan:
    prepared = problem.meta.get("prepared", {})
    return Plan(
        method=method.name,
        config=problem.meta["config"],
        budget=str(budget),
        choices=method.choices(problem, selection.picked),
        predicted=selection.cost,
        baseline=problem.baseline,
        loss=selection.loss,
        bound=selection.bound,
        base=base,
        base_sha256=model_sha256(net),
        input_shape=input_shape,
        notes=tuple(f"{site}: replaced by {how['replace']}" for site, how in prepared.items()),
    )


def freeze(model: nn.Module, data: Data) -> Program:
    """Lower the network and record its value ranges on training images."""
    program = lower(model, data.input_shape)
    return ranges(program, (x for x, _ in data.batches("train", 128, shuffle=True, limit=CALIBRATION)))


def apply_plan(bundle: Bundle) -> nn.Module:
    """Rewrite the base by the plan, without any training, and freeze it.

    Raises InputError where that would overwrite a fine-tuned network.
    """
    if (bundle.path / "accuracy.json").exists():
        raise InputError(
            "the bundle holds a fine-tuned network",
            where=str(bundle.path),
            fix="a copy: tightrope solve --out",
        )
    model = apply(bundle.base(), bundle.plan())
    bundle.save_model(model, freeze(model, bundle.data()))
    return model


def train(
    bundle: Bundle,
    recipe: Recipe,
    *,
    resume: bool = True,
    log: Callable[[Mapping[str, Json]], None] | None = None,
) -> dict[str, float]:
    """Fine-tune the rewritten network with the base as teacher; freeze it; validation accuracies."""
    base, data = bundle.base(), bundle.data()
    model = apply(base, bundle.plan())
    checkpoint = bundle.path / "checkpoint.safetensors"
    if not resume:
        checkpoint.unlink(missing_ok=True)

    def record(entry: Mapping[str, Json]) -> None:
        bundle.log(entry)
        if log is not None:
            log(entry)

    tuned = finetune(model, data, teacher=base, recipe=recipe, checkpoint=checkpoint, log=record)
    bundle.save_model(tuned, freeze(tuned, data))
    checkpoint.unlink(missing_ok=True)
    result = {
        "validation_base": accuracy(base, data, "validation"),
        "validation_untuned": accuracy(model, data, "validation"),
        "validation": accuracy(tuned, data, "validation"),
    }
    write_json(bundle.path / "accuracy.json", result | {"recipe": asdict(recipe)})
    return result


def test(bundle: Bundle) -> dict[str, float]:
    """Accuracy on the test split, of the original and the final network: to be read once, at the end."""
    base, data, model = bundle.base(), bundle.data(), bundle.model()
    result = {"test_base": accuracy(base, data, "test"), "test": accuracy(model, data, "test")}
    path = bundle.path / "accuracy.json"
    write_json(path, (read_json(path) if path.exists() else {}) | result)
    return result


def run(
    bundle: Bundle, x: NDArray[Any], *, runtime: str = "mpc", config: Mapping[str, Json] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64], Measurement]:
    """Execute the frozen network on (N, C, H, W); outputs of the runtime and of `plain`, and the cost."""
    program = bundle.program()
    program.check_input(x)
    chosen: Runtime = runtime_type(runtime)(**(config or {}))
    expected, plain = runtime_type("plain")().open(program).run(x)
    if runtime == "plain":
        outputs, measurement = expected, plain
    else:
        with chosen.open(program, "execute") as session:
            outputs, measurement = session.run(x)
    agreement = {
        "max_abs_error": float(np.abs(outputs - expected).max()),
        "same_class": int((outputs.argmax(-1) == expected.argmax(-1)).sum()),
    }
    bundle.add_measurement(measurement, agreement)
    return outputs, expected, measurement


def test_images(data: Data, count: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """The first `count` test images and their labels."""
    available = data.size("test")
    if not 0 < count <= available:
        raise InputError("that many test images do not exist", got=count, allowed=f"1 to {available}")
    batches = list(data.batches("test", 256, limit=count))
    x = torch.cat([b[0] for b in batches])[:count]
    y = torch.cat([b[1] for b in batches])[:count]
    return x.numpy(), y.numpy()


def curve(
    bundle: Bundle, *, points: int = 20, limit: int = 1000, progress: Progress = quiet
) -> list[dict[str, Json]]:
    """Solve the saved problem for many budgets; validation accuracy of each without any training.

    Batch-norm statistics are re-estimated on training images first, for every plan and control alike.

    At every third budget the method's controls are measured too.
    """
    problem, plan, data = bundle.problem(), bundle.plan(), bundle.data()
    method: Method = method_type(plan.method)(**plan.config)
    metric = Budget.parse(plan.budget).limits[0].metric
    graph = trace(bundle.base(), plan.input_shape)

    def score(picked: Mapping[str, Any]) -> float:
        module = place(graph, method.choices(problem, picked), method.rewrite).module
        recalibrate(module, data.batches("train", 128, shuffle=True, limit=CALIBRATION))
        return float(accuracy(module, data, "validation", limit=limit))

    rows: list[dict[str, Json]] = []
    for k, share in enumerate(np.geomspace(0.02, 1.0, points)):
        budget = Budget.parse(f"{metric}<={share * 100:.6g}%")
        best = select(problem, budget)
        entry: dict[str, Json] = {
            "share": float(share),
            "cost": best.cost.as_dict(),
            "loss": best.loss,
            "bound": best.bound,
        }
        entry["accuracy"] = {"tightrope": score(best.picked)}
        if k % 3 == 0:
            for name, picked in method.controls(problem, budget).items():
                entry["accuracy"][name] = score(picked)
                entry[name] = price(problem, picked).cost.as_dict()
        rows.append(entry)
        progress("accuracy against budget", k + 1, points)
    write_json(bundle.path / "curve.json", rows)
    return rows


def with_limit(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with the given, not None, settings."""
    return replace(recipe, **{k: v for k, v in changes.items() if v is not None})
