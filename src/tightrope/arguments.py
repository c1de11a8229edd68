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
