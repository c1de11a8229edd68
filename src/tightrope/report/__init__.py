"""From a bundle to report.html, one self-contained page, and README.md, its model card."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import BinaryIO

from tightrope.bundle import Bundle
from tightrope.report import card, learned, page
from tightrope.report.facts import gather
from tightrope.types import atomic_write

__all__ = ["write"]


def write(bundle: Bundle) -> Path:
    """Write both files into the bundle and return the path of the report.

    Parts that the bundle lacks are named together with the command that makes them. Raises BundleError when
    there is no plan or no problem yet, or when any file is damaged; then nothing is written.
    """
    bundle.check()
    if bundle.record():
        rendered = learned.render(bundle)
    else:
        facts = gather(bundle)
        rendered = {"report.html": page.render(facts), "README.md": card.render(facts)}
    for name, text in rendered.items():
        atomic_write(bundle.path / name, partial(_put, text.encode()))
    return bundle.path / "report.html"


def _put(data: bytes, file: BinaryIO) -> None:
    file.write(data)
