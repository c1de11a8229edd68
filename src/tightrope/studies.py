"""Verbs that study networks rather than make one: `reengineer defects`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from tightrope import arguments as arg
from tightrope.errors import InputError
from tightrope.view import View, grid, percent

Json = dict[str, Any]


def register(verb: Callable[..., Callable[[Callable[..., Json | None]], object]], app: typer.Typer) -> None:
    """Make commands of the verbs; `verb` is the command line's decorator."""
    group = typer.Typer(no_args_is_help=True, help="Studies of re-engineered networks.")
    verb(app=group)(defects)
    app.add_typer(group, name="reengineer")


def defects(
    model: arg.Model,
    donor_classes: Annotated[int, typer.Option(help="Outputs of the donor.")],
    data: arg.Dataset = "embedded",
    weights: arg.Weights = None,
    root: arg.Root = None,
    image_size: arg.ImageSize = None,
    classes: Annotated[
        str | None, typer.Option(help="Of the data, those of the students: several, or all without it.")
    ] = None,
    settings: arg.Settings = None,
    seeds: Annotated[int, typer.Option(help="Runs, each with a seed of its own.")] = 1,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A JSON file to write.")] = None,
    as_json: arg.AsJson = False,
) -> Json:
    """How many attacks made on a public donor alone break students that were made from it.

    --set takes every field of `methods.reengineer.defects.Study`.
    """
    from tightrope import data as datasets
    from tightrope import models
    from tightrope.bundle import write_json
    from tightrope.graph import trace
    from tightrope.lock import check_writable
    from tightrope.methods import check_settings, parse_settings
    from tightrope.methods.reengineer.defects import Study, over_seeds

    view = View(as_json)
    given = parse_settings(settings or [], Study)
    check_settings("defects", Study, given)
    study = Study(**given)
    if seeds < 1:
        raise InputError("seeds must be positive", got=seeds)
    if out is not None:
        check_writable(out.parent)
    images = datasets.load(data, root=root, image_size=image_size)
    if classes is not None:
        images = datasets.view(images, datasets.parse_task(images.classes, chosen=classes, seed=study.seed))
    net = models.resolve(model, num_classes=donor_classes, in_channels=images.input_shape[0], weights=weights)
    with view.progress() as progress:
        found = over_seeds(trace(net, images.input_shape), images, study, seeds, progress)
    table = grid(
        "Defects inherited", "student", "seed", "accuracy", "broken", "of", "rate", "95 %", "robust", "kept"
    )
    rows = [one.to_dict() for one in found]
    for one, row in zip(found, rows, strict=True):
        low, high = row["rate_95"]
        table.add_row(
            one.student, str(one.seed), percent(row["accuracy"]), str(one.broken), str(one.correct),
            percent(one.rate), f"{low:.1%} to {high:.1%}", percent(one.robust / one.images),
            percent(one.kept),
        )  # fmt: skip
    view.table(table)
    result: Json = {"settings": asdict(study), "students": rows}
    if out is not None:
        write_json(out, result)
    return result
