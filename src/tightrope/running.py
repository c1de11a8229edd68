"""The verb `run`, thin over `tightrope.pipeline`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tightrope.arguments import AsJson, BundleDir, Network, Profile
from tightrope.command import Json
from tightrope.errors import InputError
from tightrope.view import View, grid, measurement, predicted, times

if TYPE_CHECKING:
    from tightrope.runtimes import Estimate


def run(
    bundle: BundleDir,
    runtime: Annotated[
        str,
        typer.Option(
            help="mpc: three processes, none sees image and weights; ckks: on ciphertexts; in the clear: "
            "plain, onnx, openvino."
        ),
    ] = "mpc",
    image: Annotated[Path | None, typer.Option(help="A PNG or JPEG.")] = None,
    resize: Annotated[
        bool, typer.Option("--resize", help="Scale an image of another size, and cut out the centre.")
    ] = False,
    count: Annotated[
        int | None, typer.Option(help="Without an image: so many test images. \\[default: 1]")
    ] = None,
    port: Annotated[int | None, typer.Option(help="First of the loopback ports of mpc.")] = None,
    reveal: Annotated[
        str | None, typer.Option(help="What mpc shows the client: logits, or only the label.")
    ] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Run nothing: predict what --count images together will cost.")
    ] = False,
    network: Network = None,
    profile: Profile = None,
    ring: Annotated[
        str | None, typer.Option(help="Of mpc: 64, 32 (half of the bytes), or auto: 32 if precise enough.")
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            help="Of ckks: execute; simulate: in the clear, noise and times predicted; crosscheck: a shallow "
            "network by another library, unprotected."
        ),
    ] = None,
    log_n: Annotated[
        int | None,
        typer.Option(
            help="Of ckks: the ring's degree as a power of two. \\[default: the smallest secure one]"
        ),
    ] = None,
    scale_bits: Annotated[
        int | None, typer.Option(help="Of ckks: bits of the fixed point. \\[default: 40]")
    ] = None,
    memory_gb: Annotated[
        float | None,
        typer.Option(help="Of ckks: refuse to take more. \\[default: 4/5 of what is free]"),
    ] = None,
    bootstrap: Annotated[
        str | None, typer.Option(help="Of ckks: auto, where no secure ring has the levels, always or never.")
    ] = None,
    refresh_levels: Annotated[
        int | None, typer.Option(help="Of ckks: after a bootstrap. \\[default: what makes them cheapest]")
    ] = None,
    squares: Annotated[
        bool | None,
        typer.Option(help="Of ckks: quadratics in one level instead of two. \\[default: squares]"),
    ] = None,
    as_json: AsJson = False,
) -> Json:
    """Execute a bundle's network and show what it predicts and what it really cost."""
    import numpy as np

    from tightrope import pipeline
    from tightrope.bundle import Bundle
    from tightrope.data import read_image
    from tightrope.options import settings
    from tightrope.runtimes import runtime_type

    view = View(as_json)
    opened = Bundle.open(bundle)
    runtime_type(runtime)
    if image is not None and count is not None:
        raise InputError("one image, or so many test images", got=f"--image {image} with --count {count}")
    asked = {
        "port": port, "reveal": reveal, "network": network, "profile": profile, "ring": ring, "mode": mode,
        "log_n": log_n, "scale_bits": scale_bits, "memory_gb": memory_gb, "bootstrap": bootstrap,
        "refresh_levels": refresh_levels, "squares": squares,
    }  # fmt: skip
    config = settings(opened, runtime, asked)
    measured_times = None if profile is None else pipeline.read_profile(profile)

    def expect(batch: int) -> tuple[Estimate, Mapping[str, Any]]:
        return pipeline.estimate(opened, runtime=runtime, batch=batch, config=config, profile=measured_times)

    if estimate:
        batch = 1 if count is None else count
        return predicted(view, *expect(batch), batch)
    if image is None and resize:
        raise InputError("--resize is for an image of your own", got="--resize without --image")
    data = opened.data()
    if image is not None:
        x, labels = read_image(image, data, resize=resize).numpy(), None
    else:
        x, labels = pipeline.test_images(data, 1 if count is None else count)
    with view.progress() if mode == "simulate" else nullcontext(pipeline.quiet) as progress:
        outputs, expected, measured = pipeline.run(
            opened, x, runtime=runtime, config=config, mode=mode or "execute", warn=view.warn,
            progress=progress,
        )  # fmt: skip
    got, want = outputs.argmax(-1), expected.argmax(-1)
    error = None if reveal == "label" else float(np.abs(outputs - expected).max())
    table = grid("Predictions", "image", "predicted", "plain", *(() if labels is None else ("label",)))
    for k in range(len(x)):
        row = [str(image or k), data.classes[got[k]], data.classes[want[k]]]
        table.add_row(*row, *(() if labels is None else (data.classes[labels[k]],)))
    view.table(table)
    same = int((got == want).sum())
    difference = "" if error is None else f"; largest difference of an output: {error:.3g}"
    view.say(f"same class as plain: {same} of {len(x)}{difference}")
    measurement(view, measured)
    expected_cost = None if runtime == "plain" else expect(len(x))[0].total
    if expected_cost is not None and mode in (None, "execute"):
        times(view, expected_cost, measured.total)
    return {
        "predictions": [data.classes[k] for k in got],
        "plain": [data.classes[k] for k in want],
        "labels": None if labels is None else [data.classes[k] for k in labels],
        "max_abs_error": error,
        "measurement": measured.to_dict(),
        "predicted": None if expected_cost is None else expected_cost.as_dict(),
    }
