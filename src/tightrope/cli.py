"""The command line: one function per verb, thin over `tightrope.pipeline`; imports are lazy.

Exit status 0 on success, 2 for anything the user can mend, 130 when interrupted.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from tightrope import arguments as arg
from tightrope import deploy, nas_verbs, running, studies
from tightrope.command import Json, app, verb
from tightrope.errors import TightropeError
from tightrope.recipe import Recipe
from tightrope.view import View, accuracies, control, grid, plan_summary, tasks

if TYPE_CHECKING:
    from tightrope.bundle import Bundle

DEMO_EPOCHS = 4
ABREAST = 5  # accuracies in a row of a terminal
RECIPE = Recipe()


@verb(kept="the same command goes on where it stopped (with paf it starts again)")
def search(
    budget: arg.BudgetText,
    model: arg.Model = "demo",
    data: arg.Dataset = "embedded",
    out: arg.Out = Path("runs/search"),
    method: Annotated[str, typer.Option(help="Which method decides.")] = "block_relu",
    weights: arg.Weights = None,
    root: arg.Root = None,
    image_size: arg.ImageSize = None,
    settings: arg.Settings = None,
    classes: arg.Classes = None,
    superclasses: arg.Superclasses = None,
    new_data: arg.NewData = None,
    sites: arg.Sites = None,
    samples: arg.Samples = None,
    repair: arg.Repair = None,
    verify: arg.Verify = None,
    max_pool: arg.MaxPool = None,
    relu6: arg.Relu6 = None,
    runtime: arg.PricedBy = None,
    network: arg.Network = None,
    profile: arg.Profile = None,
    seed: arg.Seed = None,
    devices: arg.Devices = 1,
    nodes: arg.Nodes = 1,
    accelerator: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    overwrite: arg.Overwrite = False,
    restart: arg.Restart = False,
    as_json: arg.AsJson = False,
) -> Json | None:
    """Measure every option of a network and choose the best ones within a budget."""
    from tightrope import pipeline
    from tightrope.learning import EACH, Wanted
    from tightrope.options import method_settings
    from tightrope.shard import launch

    view = View(as_json)
    view.stage("reading the data and the network")
    shard = launch(devices, nodes, accelerator)
    given = {
        "sites": sites, "samples": samples, "repair": repair, "verify": verify, "max_pool": max_pool,
        "relu6": relu6, "seed": seed,
    }  # fmt: skip
    config = method_settings(method, given, settings or [])
    prices: Json = {} if network is None else {"network": network}
    if profile is not None:
        prices["profile"] = pipeline.read_profile(profile)
    asked: Json = {
        "model": model, "data": data, "method": method, "config": config, "weights": weights, "root": root,
        "image_size": image_size, "runtime": runtime, "pricing": prices, "budget": budget, "out": out,
        "overwrite": overwrite, "restart": restart, "shard": shard,
    }  # fmt: skip
    wanted = Wanted(classes=classes, superclasses=superclasses, new_data=new_data)
    with view.progress() as progress:
        if wanted == EACH:
            several = pipeline.search_each(**asked, progress=progress, warn=view.warn)
            return tasks(view, several) if shard.first else None
        bundle = pipeline.search(**asked, wanted=wanted, progress=progress, warn=view.warn)
    return _chosen(view, bundle) if shard.first else None


def _chosen(view: View, bundle: Bundle) -> Json:
    from tightrope.rewrite import tunable

    result = plan_summary(view, bundle)
    verb = "finetune" if tunable(bundle.plan()) else "apply"
    view.say(f"bundle: {bundle.path}   next: {shlex.join(['tightrope', verb, str(bundle.path)])}")
    return result


@verb()
def solve(
    bundle: arg.BundleDir,
    budget: arg.BudgetText,
    out: arg.Out = Path("runs/solve"),
    overwrite: arg.Overwrite = False,
    as_json: arg.AsJson = False,
) -> Json:
    """Solve a bundle's saved problem for another budget, without measuring the network again."""
    from tightrope import replan
    from tightrope.bundle import Bundle

    return _chosen(View(as_json), replan.solve(Bundle.open(bundle), budget, out, overwrite=overwrite))


@verb()
def refine(
    bundle: arg.BundleDir,
    out: arg.Out = Path("runs/refined"),
    budget: Annotated[str | None, typer.Option(help="Another one than the bundle's.")] = None,
    overwrite: arg.Overwrite = False,
    as_json: arg.AsJson = False,
) -> Json:
    """Measure the options again in a fine-tuned network, and solve again; then fine-tune on."""
    from tightrope import replan
    from tightrope.bundle import Bundle

    view = View(as_json)
    with view.progress() as progress:
        refined = replan.refine(
            Bundle.open(bundle), out, budget=budget, overwrite=overwrite, progress=progress
        )
    return _chosen(view, refined)


@verb()
def apply(
    bundle: arg.BundleDir,
    test: Annotated[bool, typer.Option("--test", help="Then read the test split, once.")] = False,
    as_json: arg.AsJson = False,
) -> Json:
    """Rewrite the network by the plan without training, and freeze it."""
    from tightrope import pipeline
    from tightrope.bundle import Bundle

    view = View(as_json)
    opened = Bundle.open(bundle)
    pipeline.apply_plan(opened, view.warn)
    view.say(f"wrote {bundle / 'model.safetensors'} and {bundle / 'program.json'}")
    result = pipeline.test(opened) if test else {}
    if test:
        accuracies(view, result)
    words = ["tightrope", "run", str(bundle), "--runtime", opened.about.get("runtime", "mpc")]
    view.say(f"next: {shlex.join(words)}")
    return {"bundle": str(bundle), **result}


@verb(kept="the same command, without --restart, goes on where it stopped")
def finetune(
    bundle: arg.BundleDir,
    epochs: Annotated[float, typer.Option(help="Passes over the training data.")] = RECIPE.epochs,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = RECIPE.lr,
    batch_size: Annotated[int, typer.Option(help="Images per step, all devices.")] = RECIPE.batch_size,
    hints: Annotated[float, typer.Option(help="Weight of the teacher's activations.")] = RECIPE.hints,
    schedule: Annotated[
        str, typer.Option(help="joint; for polynomials progressive, alternate or progressive+alternate too.")
    ] = "joint",
    scales: Annotated[
        str, typer.Option(help="Of polynomials: static, ema or dynamic until they are frozen at the end.")
    ] = RECIPE.scales,
    seed: Annotated[int, typer.Option(help="Of the order of the images.")] = RECIPE.seed,
    devices: Annotated[int, typer.Option(help="Devices per machine.")] = RECIPE.devices,
    nodes: Annotated[int, typer.Option(help="Machines.")] = RECIPE.nodes,
    accelerator: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = RECIPE.accelerator,
    precision: Annotated[str, typer.Option(help="32-true or bf16-mixed.")] = RECIPE.precision,
    restart: arg.Restart = False,
    test: Annotated[bool, typer.Option("--test", help="Then read the test split, once.")] = False,
    as_json: arg.AsJson = False,
) -> Json | None:
    """Train the rewritten network with the original as its teacher; an interrupted run resumes."""
    from tightrope import pipeline
    from tightrope.bundle import Bundle

    view = View(as_json)
    opened = Bundle.open(bundle)
    recipe = Recipe(
        epochs=epochs, lr=lr, batch_size=batch_size, hints=hints, seed=seed, devices=devices, nodes=nodes,
        accelerator=accelerator, precision=cast(Any, precision), scales=cast(Any, scales),
    )  # fmt: skip

    def show(entry: Mapping[str, Any]) -> None:
        shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in entry.items())
        view.say("  " + "  ".join(shown) + "  (before the batch-norm statistics are estimated anew)")

    result = pipeline.train(opened, recipe, schedule=schedule, resume=not restart, log=show, warn=view.warn)
    if not result:  # not the first of several processes
        return None
    if test:
        result |= pipeline.test(opened)
    accuracies(view, result)
    return result


run = verb()(running.run)


@verb()
def curve(
    bundle: arg.BundleDir,
    points: Annotated[int, typer.Option(help="How many budgets.")] = 20,
    limit: Annotated[int, typer.Option(help="Validation images per budget.")] = 1000,
    as_json: arg.AsJson = False,
) -> Json:
    """Accuracy against budget before any training, with the controls."""
    from tightrope import budgets
    from tightrope.bundle import Bundle
    from tightrope.decisions import decided
    from tightrope.report import formats
    from tightrope.types import Budget

    view, opened = View(as_json), Bundle.open(bundle)
    with view.progress() as progress:
        rows = budgets.curve(opened, points=points, limit=limit, progress=progress)
    names = list(dict.fromkeys(name for row in rows for name in row["accuracy"]))
    metric = decided(opened.problem(), Budget.parse(opened.plan().budget).limits[0].metric)
    title = f"Validation accuracy before training, and {formats.metric(metric)}"
    for start in range(0, len(names), ABREAST):
        part = names[start : start + ABREAST]
        table = grid(title if start == 0 else "", "budget", *part)
        for row in rows:
            table.add_row(f"{row['share']:.1%}", *(control(row, name, metric) for name in part))
        view.table(table)
    return {"curve": rows}


@verb()
def calibrate(
    runtime: Annotated[str, typer.Option(help="Which runtime to measure.")] = "mpc",
    out: Annotated[Path, typer.Option("--out", "-o", help="The JSON file to write.")] = Path("profile.json"),
    as_json: arg.AsJson = False,
) -> Json:
    """Measure what this machine takes per unit of work: search and run --estimate predict times from it."""
    from tightrope.bundle import write_json
    from tightrope.lock import check_writable
    from tightrope.runtimes import runtime_type

    view = View(as_json)
    check_writable(out.parent)
    with view.progress() as progress:
        found = runtime_type(runtime)().calibrate(progress)
    write_json(out, found)
    view.say(f"wrote {out}: search --profile {out}, run --estimate --profile {out}")
    return {"profile": str(out)}


@verb()
def report(bundle: arg.BundleDir, as_json: arg.AsJson = False) -> Json:
    """Write the bundle's report.html and README.md."""
    from tightrope.bundle import Bundle
    from tightrope.report import write

    view = View(as_json)
    path = write(Bundle.open(bundle))
    view.say(f"report: {path}")
    return {"report": str(path)}


@verb(kept="the same command starts again, with what was measured")
def demo(
    out: arg.Out = Path("runs/demo"),
    budget: arg.BudgetText = "drelus<=12%",
    overwrite: arg.Overwrite = False,
    as_json: arg.AsJson = False,
) -> Json:
    """The whole way on embedded data: search, fine-tune, 16 secure predictions, report.

    An earlier demo at --out is replaced.
    """
    from tightrope.bundle import Bundle

    if not overwrite and (out / "bundle.json").is_file():
        before = Bundle(out).about
        overwrite = (before.get("model"), before.get("data")) == ("demo", "embedded")
    view = View(as_json)
    result: Json = {}
    view.say("1. search: what each patch of each channel would cost in accuracy, then the best choice")
    result["search"] = search(budget, out=out, verify=60, overwrite=overwrite, as_json=as_json)
    view.say("\n2. fine-tune, with the original network as teacher; then the test split, once")
    result["finetune"] = finetune(out, epochs=DEMO_EPOCHS, restart=True, test=True, as_json=as_json)
    view.say("\n3. private inference: client, server and dealer in three processes")
    result["run"] = run(out, count=16, as_json=as_json)
    view.say("\n4. the same problem solved for other budgets, with the controls")
    result["curve"] = curve(out, limit=500, as_json=as_json)
    result["report"] = report(out, as_json=as_json)
    return result


deploy.register(verb())  # the verbs of parties on machines of their own
nas_verbs.register(verb)
studies.register(verb, app)


def main() -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads starve the other parties
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that parties and their files go too
    try:
        app(standalone_mode=True)
    except TightropeError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
