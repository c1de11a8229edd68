"""`tightrope binas`: from a search space, images and a limit to a trained network in a bundle."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tightrope import data as datasets
from tightrope.bundle import RESULTS, Bundle
from tightrope.data import Data
from tightrope.device import CLOCKS, conditions, open_device, time_ms, torch_threads
from tightrope.errors import BudgetError, InputError
from tightrope.graph import Graph, trace
from tightrope.learning import EVERYTHING, ask, keep, made_by
from tightrope.lock import check_writable
from tightrope.lower import lower
from tightrope.measure import ROW_SECONDS, ROWS, VISITS
from tightrope.measure import measure as measure_latency
from tightrope.methods import Learned, Shown
from tightrope.methods.binas import accuracies, latency, oneshot
from tightrope.methods.binas.accuracies import Accuracies
from tightrope.methods.binas.choosing import Compared, candidates, check, compare, pick
from tightrope.methods.binas.contributions import drawn, evaluations, summary
from tightrope.methods.binas.counts import METRICS, counts
from tightrope.methods.binas.extract import extract
from tightrope.methods.binas.latency import METRIC, LatencyTable
from tightrope.methods.binas.method import BinasMethod, chosen
from tightrope.methods.binas.objective import Contributions, problem
from tightrope.methods.binas.oneshot import OneShot
from tightrope.methods.binas.regression import pooled, regression
from tightrope.methods.binas.space import Space
from tightrope.methods.binas.supernet import Supernet
from tightrope.models.mobilenet import MobileNet
from tightrope.place import model_sha256
from tightrope.program import base_cost
from tightrope.recipe import Recipe
from tightrope.shard import launch
from tightrope.solve.staged import Answer, Choice
from tightrope.types import Budget, Cost, Json

Progress = Callable[[str, int, int], None]
Log = Callable[[Mapping[str, Json]], None]
RUNS = 25
TUNING = Recipe(batch_size=128, label=0.5, distill=0.5, temperature=1.0)  # of what is found
LIMITED = (METRIC, *METRICS)
BEGINNINGS = {"search.json", "checkpoint.safetensors"}  # of a bundle that is being fine-tuned


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where the network is to run: see `measure.measure`. `elsewhere`: the table given is of another machine,
    so nothing is timed here."""

    device: str = "onnx"
    threads: int = 1
    batch: int = 1
    clock: str = "wall"
    table: Path | None = None
    elsewhere: bool = False

    def __post_init__(self) -> None:
        if self.clock not in CLOCKS:
            raise InputError("unknown clock", got=self.clock, allowed=tuple(CLOCKS))


@dataclass(frozen=True)
class Studied:
    """What is known of a space once its supernet is trained: the same for every limit. `heaviest`: the
    largest network as it was trained alone, which is more accurate than with the supernet's weights.
    """

    space: Space
    data: Data
    supernet: Supernet = field(repr=False)
    heaviest: MobileNet = field(repr=False)
    contributions: Contributions = field(repr=False)
    errors: Contributions = field(repr=False)
    fitted: Accuracies = field(repr=False)
    held_out: Accuracies = field(repr=False)
    compared: list[Compared] = field(repr=False)


@dataclass(frozen=True)
class Found:
    """`answers`: the solver's, then the next best; `validated`: their accuracies in [0, 1] with inherited
    weights.
    """

    bundle: Bundle
    studied: Studied
    answers: list[Answer]
    validated: list[float]
    taken: int
    measured_ms: float | None


def latency_table(
    space: Space, target: Target, work: Path, progress: Progress, **settings: int
) -> LatencyTable:
    """The table given, or the one of this machine under `work`, measured where it is not there yet.

    Raises InputError for a table of another space, device or machine, with both named.
    """
    path = target.table or work / f"latency-{target.device}.json"
    how = {"threads": target.threads, "batch": target.batch, "clock": target.clock}
    if target.table is None and (settings or not _measured(path, space)):
        return measure_latency(space, target.device, path, progress=progress, **how, **settings)  # type: ignore[arg-type]
    table = latency.load(path, space)
    if not target.elsewhere:
        device = open_device(target.device, target.threads)
        table.check(space, conditions(target.device, device, **how))  # type: ignore[arg-type]
    return table


def _measured(path: Path, space: Space) -> bool:
    """Whether there is a whole table, however often its parts were visited."""
    return path.exists() and latency.load(path, space, unfinished=True).complete


def study(
    space: Space,
    data: Data,
    method: BinasMethod,
    training: OneShot,
    work: Path,
    *,
    log: Log | None = None,
    progress: Progress = lambda *_: None,
) -> Studied | None:
    """Train the supernet and measure networks with its weights on validation images; each part is kept under
    `work`, and an interrupted call goes on there.

    With several devices or nodes in the recipes of `training` every process makes this call; all train, then
    the first alone measures, and the others return None.

    Contributions and fitted networks see the same number of images: `passes` times the validation split, the
    latter as ten times as many networks on a tenth of it.
    """
    whole = data.size("validation")
    some = max(1, whole // 10)
    generator = np.random.default_rng(method.seed)
    fit = _distinct(space, generator, method.passes * whole // some, set())
    rest = _distinct(space, generator, method.held_out, set(fit))
    recipe = training.elastic
    shard = (
        launch(recipe.devices, recipe.nodes, recipe.accelerator)
        if recipe.devices * recipe.nodes > 1
        else None
    )
    supernet = oneshot.train(space, data, training, folder=work / "oneshot", log=log)
    if shard is not None and not shard.first:
        return None
    table = evaluations(
        supernet, data, passes=method.passes, seed=method.seed, file=work / "contributions.hits",
        progress=progress,
    )  # fmt: skip
    paths = [drawn(space, whole, method.seed, k) for k in range(method.passes)]
    means, errors = summary(space, table, paths)
    fitted = accuracies.measure(
        supernet, data, fit, images=some, file=work / "fitted.hits", progress=progress
    )
    held_out = accuracies.measure(supernet, data, rest, file=work / "networks.hits", progress=progress)
    regressed, both = regression(space, table, paths), pooled(space, table, paths, fitted)
    compared = compare(space, means, regressed, both, method.passes * whole, fitted, held_out)
    heaviest = oneshot.load_heaviest(work / "oneshot" / oneshot.HEAVIEST_FILE, space)
    return Studied(space, data, supernet, heaviest, means, errors, fitted, held_out, compared)


def find(
    *,
    space: Space,
    data: str,
    root: Path | None = None,
    image_size: int | None = None,
    budget: str,
    method: BinasMethod,
    target: Target,
    training: OneShot,
    work: Path,
    out: Path,
    overwrite: bool = False,
    log: Log | None = None,
    progress: Progress = lambda *_: None,
) -> Found | None:
    """The best network of `space` within `budget`, with inherited weights, as a bundle at `out`; its teacher
    is the largest network, trained alone. What does not depend on the budget is kept under `work` for the
    next one. None in all but the first of several processes that train together.

    A bundle that the same call left while it was fine-tuned is returned as it is, to go on with.

    Raises a TightropeError before any training when the budget, the data or the latency table cannot be used;
    at the end where the bundle at `out` turns out to be of another training.
    """
    limits = Budget.parse(budget)
    if unknown := sorted({limit.metric for limit in limits.limits} - set(LIMITED)):
        raise BudgetError("binas limits other quantities", got=unknown[0], allowed=LIMITED)
    about: dict[str, Json] = {
        "model": f"arch:{space.architecture(space.largest())}", "num_classes": space.classes,
        "in_channels": space.input_shape[0], "data": datasets.located(data),
        "root": None if root is None else os.path.abspath(root), "image_size": image_size,
        "runtime": method.runtime, "pricing": {}, "task": None,
    }  # fmt: skip
    begun = None if overwrite else _begun(out, limits, method, about)
    Bundle.check_target(out, overwrite=overwrite or begun is not None)
    check_writable(work, "another --work")
    images = datasets.load(data, root=root, image_size=image_size)
    work.mkdir(parents=True, exist_ok=True)
    timed = target.table is not None or any(limit.metric == METRIC for limit in limits.limits)
    table = latency_table(space, target, work, progress) if timed else None
    largest = cost(space, space.largest(), table)
    resolved = limits.resolve(largest)
    priced = {} if table is None else {METRIC: table.priced(space)}
    check(space, method, resolved, priced)
    studied = study(space, images, method, training, work, log=log, progress=progress)
    if studied is None:
        return None
    staged = problem(space, pick(method, studied.compared), resolved, priced=priced)
    answers = candidates(method, staged)
    choices = [answer.choice for answer in answers]
    scored = accuracies.measure(
        studied.supernet, images, choices, file=work / "networks.hits", progress=progress
    )
    taken = int(scored.mean.argmax())
    net = extract(studied.supernet, choices[taken])
    ms = None
    if table is not None and not target.elsewhere:
        ms = time_network(space, net, target)
    teacher = studied.heaviest
    held_out = [cost(space, choice, table) for choice in studied.held_out.choices]
    learned = Learned(
        choices=chosen(space.architecture(choices[taken]), space.classes),
        tensors={k: v.detach().clone() for k, v in net.state_dict().items()},
        predicted=cost(space, choices[taken], table, net),
        baseline=cost(space, space.largest(), table, teacher),
        loss=1 - float(scored.mean[taken]),
        accuracy=float(scored.mean[taken]),
        controls=_random(studied, held_out, resolved),
        front=_front(studied, held_out, "macs" if table is None else METRIC),
        shown=(_network(space, choices[taken]), _tried(answers, scored), _estimators(studied.compared)),
        notes=_notes(method, answers[0], table, ms, resolved.get(METRIC)),
    )
    graph, bundle = trace(teacher, space.input_shape), begun
    if bundle is None or not _same(bundle, learned, graph):
        bundle = Bundle.create(out, about, teacher, overwrite=overwrite)
        asked = ask(images, EVERYTHING, image_size, method.seed)
        keep(bundle, method, learned, asked, limits, about["model"], graph)
    return Found(bundle, studied, answers, [float(v) for v in scored.mean], taken, ms)


def _begun(out: Path, limits: Budget, method: BinasMethod, about: Mapping[str, Json]) -> Bundle | None:
    """The bundle at `out` if it is of the same method, limits and images, and holds no results yet."""
    results = [name for name in RESULTS if (out / name).exists()]
    if not (out / "plan.json").is_file() or not set(results) <= BEGINNINGS:
        return None
    bundle = Bundle.open(out)
    return bundle if made_by(bundle, method, limits, about) else None


def _same(bundle: Bundle, learned: Learned, graph: Graph) -> bool:
    """Whether it holds what was found, weights, prices and all."""
    plan = bundle.plan()
    tensors = bundle.learned(plan)
    return (
        plan.choices == learned.choices
        and (plan.predicted, plan.baseline) == (learned.predicted, learned.baseline)
        and plan.base_sha256 == model_sha256(graph.module)
        and tensors.keys() == learned.tensors.keys()
        and all(torch.equal(tensors[name], learned.tensors[name]) for name in tensors)
    )


def time_network(space: Space, net: nn.Module, target: Target, rows: int = ROWS * VISITS) -> float:
    """Milliseconds per image: the least median of so many rows of runs, by default as a table has of each."""
    run = open_device(target.device, target.threads).load(net, space.input_shape, target.batch)
    with torch_threads(target.threads):
        timing = time_ms(run, RUNS, target.clock, rows=rows, row_seconds=ROW_SECONDS)
    return timing.median_ms / target.batch


def cost(space: Space, choice: Choice, table: LatencyTable | None, net: nn.Module | None = None) -> Cost:
    """What a network costs by its counts and the table; its DReLUs too where it is given."""
    drelus = 0.0
    if net is not None:
        drelus = sum(base_cost(op).drelus for op in lower(net, space.input_shape).ops)
    ms = 0.0 if table is None else table.predict(space, choice)
    return Cost(**counts(space, choice), drelus=drelus, online_ms=ms)


def _distinct(space: Space, generator: np.random.Generator, count: int, known: set[Choice]) -> list[Choice]:
    """Random networks, none twice; raises InputError where the space has too few."""
    if count + len(known) > space.count:
        raise InputError(
            "the space has fewer networks than are to be measured",
            got=f"{space.count:,}",
            allowed=f"{count + len(known):,} or more",
            fix="a smaller --held-out, or fewer --passes",
        )
    found: dict[Choice, None] = {}
    while len(found) < count:
        choice = space.random(generator)
        if choice not in known:
            found[choice] = None
    return list(found)


def _front(studied: Studied, costs: list[Cost], metric: str) -> tuple[dict[str, float], ...]:
    """Of the held-out networks, those that no other one beats in cost and accuracy at once."""
    points: list[dict[str, float]] = []
    for spent, accuracy in zip(costs, studied.held_out.mean, strict=True):
        points.append({metric: getattr(spent, metric), "accuracy": float(accuracy)})
    points.sort(key=lambda p: (p[metric], -p["accuracy"]))
    front: list[dict[str, float]] = []
    for point in points:
        if not front or point["accuracy"] > front[-1]["accuracy"]:
            front.append(point)
    return tuple(front)


def _random(studied: Studied, costs: list[Cost], limits: Mapping[str, float]) -> dict[str, float]:
    """Mean accuracy of the held-out networks that meet the limits."""
    meet = [all(getattr(c, metric) <= limit for metric, limit in limits.items()) for c in costs]
    if not any(meet):
        return {}
    return {f"random networks within the limits, {sum(meet)}": float(studied.held_out.mean[meet].mean())}


def _network(space: Space, choice: Choice) -> Shown:
    rows = [
        (str(s + 1), str(space.stages[s].channels), " | ".join(str(space.options[k]) for k in options))
        for s, options in enumerate(choice)
    ]
    return Shown(title="The network", columns=("stage", "channels", "blocks"), rows=tuple(rows))


def _tried(answers: list[Answer], scored: Accuracies) -> Shown:
    rows = [
        (
            ", ".join(f"{v:,.{0 if v >= 1000 else 4}f} {m}" for m, v in a.cost.items()),
            f"{a.gain:.2f} %",
            f"{mean:.2%} ± {error:.2%}",
        )
        for a, mean, error in zip(answers, scored.mean, scored.error, strict=True)
    ]
    columns = ("cost", "predicted", "validation, inherited weights")
    return Shown(
        title="Candidates: what the solver found, then the next best", columns=columns, rows=tuple(rows)
    )


def _estimators(compared: list[Compared]) -> Shown:
    rows = [
        (
            c.estimator.name,
            f"{a.kendall:.3f}",
            f"{a.spearman:.3f}",
            f"{a.pearson:.3f}",
            f"{a.mse:.3f}",
            f"{c.images:,}",
        )
        for c in compared
        for a in (c.agreement,)
    ]
    columns = ("estimator", "Kendall", "Spearman", "Pearson", "MSE, points²", "images")
    return Shown(title="Estimators of accuracy, on held-out networks", columns=columns, rows=tuple(rows))


def _notes(
    method: BinasMethod,
    best: Answer,
    table: LatencyTable | None,
    measured_ms: float | None,
    limit_ms: float | None,
) -> tuple[str, ...]:
    proved = f"gap {best.gap:.2g} points" if np.isfinite(best.gap) else "nothing is proved"
    notes = [f"solver {method.solver}: {proved}, of the estimator's accuracy, which is no measured one"]
    if table is not None:
        notes.append(f"milliseconds by the latency table of {table.conditions}")
    if measured_ms is not None:
        over = limit_ms is not None and measured_ms > limit_ms
        more = f", above the limit of {limit_ms:.4g}, which the prediction meets" if over else ""
        notes.append(f"measured here: {measured_ms:.4g} ms{more}")
    return tuple(notes)
