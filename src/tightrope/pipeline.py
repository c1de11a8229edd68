"""The verbs: search, solve, finetune, run. Each reads a bundle, does one step, writes the bundle.

The command line is a thin layer over these; they can be called from Python just as well.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tightrope import turns
from tightrope.bundle import DISTORTION, Bundle, write_json
from tightrope.chain import finished
from tightrope.choose import Chooser, exact_cost, freeze
from tightrope.data import Data
from tightrope.donor import open_donor, warn_of_chance
from tightrope.errors import InputError, TightropeError, TraceError
from tightrope.finetune import Recipe, accuracy, finetune
from tightrope.forms import parse
from tightrope.learning import EVERYTHING, Wanted, learn, learn_each
from tightrope.lock import check_unlocked, locked
from tightrope.methods import Learner
from tightrope.place import model_sha256
from tightrope.program import Program
from tightrope.replan import pricing_of
from tightrope.rewrite import apply, tunable
from tightrope.runtimes import Estimate, Mode, Pricing, Runtime, Watchable, runtime_type
from tightrope.shard import Shard, launch
from tightrope.types import Budget, Cost, Json, Measurement, Problem

Progress = Callable[[str, int, int], None]
SINGLE = Shard()


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
    runtime: str | None = None,
    pricing: Mapping[str, Json] | None = None,
    wanted: Wanted = EVERYTHING,
    overwrite: bool = False,
    restart: bool = False,
    progress: Progress = quiet,
    warn: Callable[[str], object] = warnings.warn,
    shard: Shard = SINGLE,
) -> Bundle:
    """Measure every option of `model` on training images, solve for `budget`, write a bundle at `out`.

    `pricing`: settings of the runtime's prices, for mpc its `network` and `profile`.
    Interrupted, the same call goes on where it stopped, or anew with `restart`. A bundle with a fine-tuned
    network or measurements is replaced only with `overwrite`. `wanted`: a task of its own, for a method that
    makes a network for one.
    `runtime`: None for the method's. `warn` hears of a network, given or learned, that classifies no better
    than chance.
    Raises a TightropeError before anything is written when the budget, the model or the data cannot be used.
    """
    limits = Budget.parse(budget)
    Bundle.check_target(out, overwrite=overwrite)
    donor = open_donor(
        model=model, data=data, method=method, config=config, weights=weights, root=root,
        image_size=image_size, runtime=runtime, pricing=pricing,
    )  # fmt: skip
    if shard.first:
        fix = "Is it trained? Weights are read with --weights FILE.safetensors (weights=)"
        warn_of_chance("the network", donor.net, donor.images, warn, fix)
    chosen, cost, images, net, graph = donor.method, donor.cost, donor.images, donor.net, donor.graph
    about = donor.about
    if isinstance(chosen, Learner):
        return learn(
            donor, wanted, limits, out,
            overwrite=overwrite, restart=restart, progress=progress, warn=warn, shard=shard,
        )  # fmt: skip
    wanted.refuse(method)
    if restart and shard.first:
        shutil.rmtree(out / DISTORTION, ignore_errors=True)
    shard.barrier()
    chooser = Chooser(chosen, cost, limits, lambda: (graph, images))
    unchanged: list[Cost | None] = []

    def feasible(unmeasured: Problem) -> None:
        unchanged.append(chooser.unchanged(unmeasured))
        chooser.check(chooser.anchored(unmeasured, unchanged[0]))

    problem = chosen.measure(
        graph,
        images,
        cost=cost,
        workdir=out / DISTORTION,
        progress=progress,
        priced=chooser.priced,
        feasible=feasible,
        shard=shard,
    )
    problem = chooser.anchored(problem, unchanged[0])
    if shard.first:
        sha256 = model_sha256(graph.module)
        plan = chooser.plan(problem, model, sha256, images.input_shape, exact=True, progress=progress)
        plan = replace(plan, chain=donor.chain)
        bundle = Bundle.create(out, about, net, overwrite=overwrite)
        problem.save(out / "problem.npz")
        bundle.save_plan(plan)
    shard.barrier()
    return Bundle(out)


def search_each(
    *,
    budget: str,
    out: Path,
    overwrite: bool = False,
    restart: bool = False,
    progress: Progress = quiet,
    warn: Callable[[str], object] = warnings.warn,
    shard: Shard = SINGLE,
    **donor: Any,
) -> list[Bundle]:
    """`search` for every class against the rest, a bundle each below `out`; see `learn_each`.

    `donor`: what `open_donor` takes; network and images are read once.
    """
    limits = Budget.parse(budget)
    return learn_each(
        open_donor(**donor), limits, out,
        overwrite=overwrite, restart=restart, progress=progress, warn=warn, shard=shard,
    )  # fmt: skip


def read_profile(path: Path) -> Json:
    """What `tightrope calibrate` wrote. Raises InputError for a file that is no JSON."""
    try:
        return parse(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            "cannot read the profile", where=str(path), got=error, fix="tightrope calibrate"
        ) from error


def estimate(
    bundle: Bundle,
    *,
    runtime: str,
    batch: int,
    config: Mapping[str, Json] | None = None,
    profile: Json = None,
) -> tuple[Estimate, Mapping[str, Json]]:
    """What a run of the frozen network will cost under `config`, and the settings of that prediction.

    Without a `profile` times are those that the bundle's options were priced with. Weights count where the
    bundle has them: a runtime may refuse some. Raises what `Pricing.estimate` does.
    """
    if batch < 1:
        raise InputError("a batch needs at least one image", got=batch)
    about = bundle.about
    if profile is None and about.get("runtime") == runtime:
        profile = about.get("pricing", {}).get("profile")
    settings = {} if profile is None else {"profile": profile}
    cost: Pricing = runtime_type(runtime)(**(config or {})).pricing(**settings)
    weights = (bundle.path / "program.safetensors").exists()
    return cost.estimate(bundle.program(weights=weights), batch), cost.settings


def _warn_of_budget(bundle: Bundle, program: Program, warn: Callable[[str], object]) -> None:
    """Training moves value ranges, and with them the widths of comparisons: count the final network again."""
    plan, pricing = bundle.plan(), pricing_of(bundle)
    for metric, limit in Budget.parse(plan.budget).resolve(plan.baseline).items():
        if metric in pricing.approximate:
            spent = getattr(exact_cost(pricing, program), metric)
            if spent > limit:
                warn(
                    f"the final network costs {spent:,.6g} {metric}, more than {plan.budget} allows "
                    f"({limit:,.6g}): its value ranges are not those of the plan. A budget tighter by "
                    f"{spent / limit - 1:.1%} leaves room for that"
                )


def _frozen(bundle: Bundle, model: nn.Module, data: Data) -> Program:
    """The program of a network of the bundle, in the form that its method wants executed."""
    return freeze(finished(bundle, model), data)


def apply_plan(bundle: Bundle, warn: Callable[[str], object] = warnings.warn) -> nn.Module:
    """Rewrite the base by the plan, without any training, and freeze it.

    Raises InputError where that would overwrite a fine-tuned network, and where values of the network do not
    fit the runtime that prices it.
    """
    if (bundle.path / "accuracy.json").exists():
        raise InputError(
            "the bundle holds a fine-tuned network",
            where=str(bundle.path),
            fix="a copy: tightrope solve --out",
        )
    with locked(bundle.path):
        model = bundle.rewritten()
        program = _frozen(bundle, model, bundle.data())
        with suppress(TraceError):  # an op that the runtime does not have: another one may run it
            exact_cost(pricing_of(bundle), program)
        _warn_of_budget(bundle, program, warn)
        bundle.save_model(model, program)
    return model


def train(
    bundle: Bundle,
    recipe: Recipe,
    *,
    schedule: str = "joint",
    resume: bool = True,
    log: Callable[[Mapping[str, Json]], None] | None = None,
    warn: Callable[[str], object] = warnings.warn,
) -> dict[str, float]:
    """Fine-tune the rewritten network with the original, which answers within the bundle's task, as teacher
    (images of a new task have none); freeze it; validation accuracies.

    `schedule`: everything at once, or polynomials in turns (`tightrope.turns`). `warn` hears of a final
    network whose exact cost is above the budget.

    Several processes (`Recipe.devices`, `nodes`) each run this call; the first alone writes the bundle, and
    the others return {}. Raises BundleError when another command is writing the bundle.
    """
    if not tunable(bundle.plan()):
        raise InputError(
            "the search has trained this network already; more training would undo what it learned",
            where=str(bundle.path),
            fix="tightrope apply",
        )
    check_unlocked(bundle.path)  # before the other processes are started
    several = recipe.devices * recipe.nodes > 1
    shard = launch(recipe.devices, recipe.nodes, recipe.accelerator) if several else SINGLE
    with locked(bundle.path) if shard.first else nullcontext():
        return _train(bundle, recipe, schedule, resume, log, warn, shard)


def _train(
    bundle: Bundle,
    recipe: Recipe,
    schedule: str,
    resume: bool,
    log: Callable[[Mapping[str, Json]], None] | None,
    warn: Callable[[str], object],
    shard: Shard,
) -> dict[str, float]:
    teacher, data = bundle.donor(), bundle.data()
    model = bundle.rewritten()
    checkpoint = bundle.path / "checkpoint.safetensors"
    if not resume and shard.first:
        checkpoint.unlink(missing_ok=True)
    shard.barrier()

    def record(entry: Mapping[str, Json]) -> None:
        bundle.log(entry)
        if log is not None:
            log(entry)

    if schedule == "joint":
        tuned = finetune(model, data, teacher=teacher, recipe=recipe, checkpoint=checkpoint, log=record)
    else:
        tuned = turns.train(
            model, partial(_without, bundle), data, schedule,
            teacher=teacher, recipe=recipe, checkpoint=checkpoint, log=record,
        )  # fmt: skip
    if not shard.first:
        return {}
    program = _frozen(bundle, tuned, data)
    with suppress(TightropeError):  # what the runtime cannot execute, `run` says
        _warn_of_budget(bundle, program, warn)
    bundle.save_model(tuned, program)
    result = {} if teacher is None else {"validation_base": accuracy(teacher, data, "validation")}
    result |= {
        "validation_untuned": accuracy(model, data, "validation"),
        "validation": accuracy(tuned, data, "validation"),
    }
    how = asdict(recipe) | ({} if schedule == "joint" else {"schedule": schedule})
    write_json(bundle.path / "accuracy.json", result | {"recipe": how})
    checkpoint.unlink(missing_ok=True)  # last: until here, the same call goes on from it
    return result


def _without(bundle: Bundle, names: Collection[str]) -> nn.Module:
    """The rewritten network with these sites as they were."""
    plan = bundle.plan()
    choices = {site: choice for site, choice in plan.choices.items() if site not in names}
    return apply(bundle.base(), replace(plan, choices=choices))


def test(bundle: Bundle) -> dict[str, float]:
    """Accuracy on the test split, of the original and the final network: to be read once, at the end."""
    donor, data, model = bundle.donor(), bundle.data(), bundle.model()
    result = {} if donor is None else {"test_base": accuracy(donor, data, "test")}
    result["test"] = accuracy(model, data, "test")
    write_json(bundle.path / "accuracy.json", bundle.accuracy() | result)
    return result


def run(
    bundle: Bundle,
    x: NDArray[Any],
    *,
    runtime: str = "mpc",
    config: Mapping[str, Json] | None = None,
    mode: str = "execute",
    warn: Callable[[str], object] = warnings.warn,
    progress: Progress = quiet,
) -> tuple[NDArray[np.float64], NDArray[np.float64], Measurement]:
    """Execute the frozen network on (N, C, H, W); outputs of the runtime and of `plain`, and the cost.

    With `mode="simulate"` the runtime predicts instead, and the bundle keeps no measurement, nor of any mode
    that a runtime has beside `execute`. `warn` hears what the runtime and `plain` warn of, `progress` how far
    a session is that can tell.

    With `config={"reveal": "label"}` the outputs of `mpc` are one-hot vectors.

    The processes of `mpc` inherit the environment. Set OMP_WAIT_POLICY=passive before Python starts, as the
    command line does for itself: threads that spin while they wait starve the other parties.
    """
    program = bundle.program()
    program.check_input(x)
    chosen: Runtime = runtime_type(runtime)(**(config or {}))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        expected, plain = runtime_type("plain")().open(program).run(x)
        if runtime == "plain":
            outputs, measurement = expected, plain
        else:
            with chosen.open(program, cast(Mode, mode)) as session:
                if isinstance(session, Watchable):
                    session.watch(progress)
                outputs, measurement = session.run(x)
    for text in dict.fromkeys(str(warning.message) for warning in told):  # of both: the same
        warn(text)
    agreement: dict[str, Json] = {"same_class": int((outputs.argmax(-1) == expected.argmax(-1)).sum())}
    if measurement.config.get("reveal") != "label":  # a label has no error
        agreement["max_abs_error"] = float(np.abs(outputs - expected).max())
    if mode == "execute":
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
