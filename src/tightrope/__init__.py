"""Fit a trained vision network to a hard budget, with a proved bound and a runtime that executes it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# where each public name lives; imported on first use, so that `tightrope --help` does not wait for torch
_PUBLIC = {
    "BlockReluMethod": "tightrope.methods.block_relu",
    "Budget": "tightrope.types",
    "Bundle": "tightrope.bundle",
    "Plan": "tightrope.types",
    "Problem": "tightrope.types",
    "Program": "tightrope.program",
    "Recipe": "tightrope.finetune",
    "TightropeError": "tightrope.errors",
    "apply": "tightrope.rewrite",
    "finetune": "tightrope.finetune",
    "lower": "tightrope.lower",
    "search": "tightrope.pipeline",
    "select": "tightrope.solve.select",
    "trace": "tightrope.graph",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tightrope' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
