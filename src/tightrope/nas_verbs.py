"""The commands that find a network in a search space: measure, binas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from tightrope.arguments import AsJson
from tightrope.command import Json
from tightrope.view import View, grid

SpaceName = Annotated[str, typer.Option(help="imagenet, cifar, fashion, or a TOML file.")]


def register(verb: Callable[..., Callable[[Callable[..., Json | None]], object]]) -> None:
    """Make commands of the verbs; `verb` is the command line's decorator."""
    verb(kept="the same command goes on where it stopped")(measure)


def measure(
    space: SpaceName = "fashion",
    device: Annotated[str, typer.Option(help="cpu (torch), cuda, onnx or openvino.")] = "onnx",
    out: Annotated[Path, typer.Option("--out", "-o", help="The JSON file to write.")] = Path("latency.json"),
    threads: Annotated[int, typer.Option(help="Of the processor, within an op.")] = 1,
    batch: Annotated[int, typer.Option(help="Images that run together.")] = 1,
    clock: Annotated[
        str, typer.Option(help="wall, or cpu: of one thread, on a machine that does other work too.")
    ] = "wall",
    runs: Annotated[int, typer.Option(help="Of each block and network, per visit.")] = 25,
    visits: Annotated[int, typer.Option(help="Rounds over everything; the least median counts.")] = 3,
    networks: Annotated[int, typer.Option(help="Random whole networks; a third is held out.")] = 36,
    seed: Annotated[int, typer.Option(help="Of the random networks.")] = 0,
    as_json: AsJson = False,
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
