"""The commands that find a network in a search space: measure, binas."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tightrope import arguments as arg
from tightrope.command import Json
from tightrope.errors import InputError
from tightrope.view import View, accuracies, grid

if TYPE_CHECKING:
    from tightrope.nas import Found

SpaceName = Annotated[str, typer.Option(help="imagenet, cifar, fashion, or a TOML file.")]


def register(verb: Callable[..., Callable[[Callable[..., Json | None]], object]]) -> None:
    """Make commands of the verbs; `verb` is the command line's decorator."""
    for function in (measure, binas):
        verb(kept="the same command goes on where it stopped")(function)


def measure(
    space: SpaceName = "fashion",
    device: Annotated[str, typer.Option(help="cpu (torch), cuda, onnx or openvino.")] = "onnx",
    out: Annotated[Path, typer.Option("--out", "-o", help="The JSON file to write.")] = Path("latency.json"),
    threads: Annotated[int, typer.Option(help="Of the processor, within an op.")] = 1,
    batch: Annotated[int, typer.Option(help="Images that run together.")] = 1,
    clock: Annotated[
        str, typer.Option(help="wall, or cpu: of one thread, on a machine that does other work too.")
    ] = "wall",
    runs: Annotated[int, typer.Option(help="In a row, at least; three rows a visit.")] = 25,
    visits: Annotated[int, typer.Option(help="Rounds over everything; the least median counts.")] = 5,
    networks: Annotated[int, typer.Option(help="Random whole networks; a third is held out.")] = 36,
    seed: Annotated[int, typer.Option(help="Of the random networks.")] = 0,
    as_json: arg.AsJson = False,
) -> Json:
    """Time every block of a search space on a device, and how well that predicts whole networks."""
    from tightrope.measure import measure as work
    from tightrope.methods.binas import resolve

    view, found = View(as_json), resolve(space)
    view.stage(f"timing the blocks of {found.name} and {networks} networks")
    with view.progress() as progress:
        table = work(
            found, device, out, threads=threads, batch=batch, clock=clock, runs=runs, visits=visits,
            fitted=networks - networks // 3, held_out=networks // 3, seed=seed, progress=progress,
        )  # fmt: skip
    fit = table.calibration(found)
    shown = grid("Latency of whole networks, by the formula", "quantity", "value")
    shown.add_row("measured on", str(table.conditions))
    shown.add_row("blocks and ends timed alone", str(len(table.parts_ms)))
    shown.add_row("random networks", f"{table.measured.min():.4g} to {table.measured.max():.4g} ms")
    shown.add_row("formula", f"{fit.intercept_ms:.3g} ms + {fit.slope:.3g} x the sum of the parts")
    shown.add_row(
        "error, held-out networks", f"{fit.held_out_error:.1%} mean, {fit.held_out_worst:.1%} worst"
    )
    view.table(shown)
    view.say(f"wrote {out}")
    return {
        "table": str(out),
        "slope": fit.slope,
        "intercept_ms": fit.intercept_ms,
        "held_out": fit.held_out,
        "held_out_error": fit.held_out_error,
        "held_out_worst": fit.held_out_worst,
    }


def binas(
    budget: Annotated[
        str,
        typer.Option(
            "--budget", "-b", help="online_ms, macs, weights: 'online_ms<=60%', 'macs<=40%,weights<=5e4'."
        ),
    ],
    space: SpaceName = "fashion",
    data: arg.Dataset = "fashion-mnist",
    root: arg.Root = None,
    image_size: arg.ImageSize = None,
    out: arg.Out = Path("runs/binas"),
    work: Annotated[
        Path | None,
        typer.Option(help="What serves every budget: supernet, table, accuracies. \\[default: runs/SPACE]"),
    ] = None,
    solver: Annotated[str, typer.Option(help="pareto, milp, iqcp: exact; bcfw, evo: not.")] = "pareto",
    estimator: Annotated[
        str,
        typer.Option(
            help="released, conditional, regression, pooled, linear, bilinear, or auto: what ranks best."
        ),
    ] = "auto",
    candidates: Annotated[int, typer.Option(help="Networks that are validated before one is taken.")] = 10,
    device: Annotated[str, typer.Option(help="cpu (torch), cuda, onnx or openvino.")] = "onnx",
    threads: Annotated[int, typer.Option(help="Of the processor, within an op.")] = 1,
    batch: Annotated[int, typer.Option(help="Images that are timed together.")] = 1,
    clock: Annotated[str, typer.Option(help="wall, or cpu; as in measure.")] = "wall",
    lut: Annotated[
        Path | None, typer.Option(help="A latency table of `measure`. \\[default: measured in --work]")
    ] = None,
    elsewhere: Annotated[
        bool, typer.Option("--elsewhere", help="--lut is of another machine, where the network will run.")
    ] = False,
    heaviest_epochs: Annotated[float | None, typer.Option(help="Of the largest network alone.")] = None,
    elastic_epochs: Annotated[float | None, typer.Option(help="Of all networks together.")] = None,
    norms: Annotated[str, typer.Option(help="Batch-norm of the supernet: path, or shared.")] = "path",
    largest: Annotated[float, typer.Option(help="Share of a batch for the largest network.")] = 0.125,
    passes: Annotated[int, typer.Option(help="Over the validation images, for every contribution.")] = 60,
    held_out: Annotated[int, typer.Option(help="Networks that estimators are judged on.")] = 100,
    epochs: Annotated[float, typer.Option(help="Of fine-tuning what is found; 0 for none.")] = 3.0,
    devices: Annotated[int, typer.Option(help="Processes (or GPUs) per machine, for one-shot training.")] = 1,
    nodes: arg.Nodes = 1,
    accelerator: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    precision: Annotated[str, typer.Option(help="32-true or bf16-mixed.")] = "32-true",
    seed: int = 0,
    test: Annotated[bool, typer.Option("--test", help="Then read the test split, once.")] = False,
    overwrite: arg.Overwrite = False,
    as_json: arg.AsJson = False,
) -> Json | None:
    """Find the best network of a search space within a limit: measure, train, estimate, solve, fine-tune."""
    from tightrope import nas, pipeline
    from tightrope.bundle import write_json
    from tightrope.methods.binas import resolve
    from tightrope.methods.binas.method import BinasMethod
    from tightrope.methods.binas.oneshot import ELASTIC, HEAVIEST, OneShot
    from tightrope.report import explain
    from tightrope.types import atomic_write

    view, found = View(as_json), resolve(space)
    place = work or Path("runs") / found.name
    method = BinasMethod(
        solver=solver, estimator=estimator, candidates=candidates, passes=passes, held_out=held_out, seed=seed
    )
    on: dict[str, Any] = {
        "devices": devices, "nodes": nodes, "accelerator": accelerator, "precision": precision, "seed": seed,
    }  # fmt: skip
    if norms not in ("path", "shared"):
        raise InputError("unknown norms", got=norms, allowed="path, shared")
    training = OneShot(
        heaviest=replace(HEAVIEST, **on, **_given(epochs=heaviest_epochs)),
        elastic=replace(ELASTIC, **on, **_given(epochs=elastic_epochs)),
        norms=norms,  # type: ignore[arg-type]
        largest=largest,
    )
    if elsewhere and lut is None:
        raise InputError("--elsewhere is about a table that is given", fix="--lut FILE")
    if nodes > 1 and lut is None and "online_ms" in budget:
        raise InputError("machines that train together cannot all measure into one table", fix="--lut FILE")
    alone = on | {"devices": 1, "nodes": 1}
    tuning = replace(nas.TUNING, epochs=epochs, **alone) if epochs else None
    target = nas.Target(
        device=device, threads=threads, batch=batch, clock=clock, table=lut, elsewhere=elsewhere
    )

    def show(entry: Mapping[str, Any]) -> None:
        shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in entry.items())
        view.say("  " + "  ".join(shown))

    with view.progress() as progress:
        result = nas.find(
            space=found, data=data, root=root, image_size=image_size, budget=budget, method=method,
            target=target, training=training, work=place, out=out, overwrite=overwrite, log=show,
            progress=progress,
        )  # fmt: skip
    if result is None:  # not the first of several processes
        return None
    studied = result.studied
    page = explain.render(found, studied.contributions, studied.errors, studied.compared).encode()
    atomic_write(place / "explain.html", lambda f: f.write(page))
    summary = _summary(view, result)
    write_json(out / "binas.json", summary)
    if tuning is None:
        pipeline.apply_plan(result.bundle, warn=view.warn)
    else:
        summary |= pipeline.train(result.bundle, tuning, log=show, warn=view.warn)
    if test:
        summary |= pipeline.test(result.bundle)
    if tuning is not None or test:
        accuracies(view, summary)
    view.say(f"bundle: {out}   next: {shlex.join(['tightrope', 'run', str(out), '--runtime', 'plain'])}")
    view.say(f"what each decision contributes: {place / 'explain.html'}")
    return summary


def _given(**values: float | None) -> dict[str, Any]:
    return {k: v for k, v in values.items() if v is not None}


def _summary(view: View, result: Found) -> Json:
    plan, best = result.bundle.plan(), result.answers[0]
    for title, columns, rows in [
        (t["title"], t["columns"], t["rows"]) for t in result.bundle.record()["shown"]
    ]:
        table = grid(title, *columns)
        for row in rows:
            table.add_row(*row)
        view.table(table)
    for note in plan.notes:
        view.say(note)
    return {
        "bundle": str(result.bundle.path),
        "architecture": plan.choices["network"]["architecture"],
        "predicted": plan.predicted.as_dict(),
        "limits": plan.budget,
        "predicted_accuracy": [answer.gain for answer in result.answers],
        "gap": best.gap if best.bound < float("inf") else None,
        "validation_inherited": result.validated,
        "taken": result.taken,
        "measured_ms": result.measured_ms,
        "estimators": {
            c.estimator.name: vars(c.agreement) | {"images": c.images} for c in result.studied.compared
        },
    }
