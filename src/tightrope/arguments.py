"""Arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

BundleDir = Annotated[Path, typer.Argument(help="Directory of the bundle.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Directory of the bundle to write.")]
BudgetText = Annotated[
    str,
    typer.Option(
        "--budget",
        "-b",
        help="e.g. 'drelus<=12%', that is 'drelus<=0.12x', 'online_bytes<=2e5', 'online_ms<=30'.",
    ),
]
Network = Annotated[
    str | None,
    typer.Option(help="Of mpc: loopback, lan, wan, or bits per second and round-trip ms: 1e9,0.5."),
]
Profile = Annotated[
    Path | None, typer.Option(help="Of predicted times: what `tightrope calibrate` measured.")
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace a bundle that holds a fine-tuned network or measurements."),
]
Restart = Annotated[bool, typer.Option("--restart", help="Forget an interrupted run.")]
Model = Annotated[
    str,
    typer.Option(
        help="demo, resnet18, torchvision:NAME, timm:NAME, arch:STRING, FILE.py:FUNCTION, a bundle."
    ),
]
Dataset = Annotated[str, typer.Option(help="embedded, fashion-mnist, cifar10, cifar100, or a directory.")]
Weights = Annotated[Path | None, typer.Option(help="Trained weights, .safetensors.")]
Root = Annotated[Path | None, typer.Option(help="Where the files of a named data set are.")]
ImageSize = Annotated[int | None, typer.Option(help="Side of the images of a directory.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Any setting of the method, NAME=VALUE; repeat.")
]
Classes = Annotated[
    str | None, typer.Option(help="Of reengineer: one class against the rest, several (2,5,7), or each.")
]
Superclasses = Annotated[
    Path | None, typer.Option(help="Of reengineer: a JSON file, names with lists of classes.")
]
NewData = Annotated[str | None, typer.Option(help="Of reengineer: images of another task.")]
Sites = Annotated[
    str | None,
    typer.Option(help="Of block_relu, paf: shell patterns of activations, comma-separated. \\[default: *]"),
]
Samples = Annotated[
    int | None,
    typer.Option(help="Of block_relu, paf, seesaw: images behind each loss. \\[default: the method's]"),
]
Repair = Annotated[
    bool | None,
    typer.Option(
        "--repair/--no-repair",
        help="Of block_relu: charge what remains after rescaling a channel. \\[default: repair]",
    ),
]
Verify = Annotated[
    int | None,
    typer.Option(help="Of block_relu: options measured exactly, for the rank correlation. \\[default: 100]"),
]
MaxPool = Annotated[
    str | None,
    typer.Option(help="Of block_relu: keep, or avg; of paf: tournament, keep or avg. \\[default: the first]"),
]
Relu6 = Annotated[
    str | None, typer.Option(help="Of block_relu: keep (two comparisons), or relu. \\[default: keep]")
]
Seed = Annotated[int | None, typer.Option(help="Of every random choice. \\[default: 0]")]
PricedBy = Annotated[
    str | None, typer.Option("--runtime", help="Whose costs price the options. \\[default: the method's]")
]
Devices = Annotated[int, typer.Option(help="Processes (or GPUs) per machine that share the images.")]
Nodes = Annotated[int, typer.Option(help="Machines.")]
