"""The command lines that made a bundle, and those that would make what it lacks."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict

from tightrope.methods import method_type
from tightrope.report.facts import CLEAR, Facts
from tightrope.types import Json

SEARCH_FLAGS = ("sites", "samples", "verify", "max_pool", "relu6", "seed")
PRIVATE = ("mpc", "ckks")  # runtimes in which no party has both image and weights
FINETUNE_FLAGS = ("epochs", "lr", "batch_size", "seed", "schedule", "scales")


def missing(facts: Facts) -> dict[str, str]:
    """Verb -> the command that makes that part of this bundle."""
    path = str(facts.bundle.path)
    frozen = [] if facts.program is not None else [_join("finetune", path)]
    return {
        "search": _line("search", facts, _again(facts), "--verify", "100"),
        "finetune": _join("finetune", path, "--test"),
        "run": " && ".join([*frozen, _join("run", path, "--runtime", private(facts), "--count", "16")]),
        "curve": _join("curve", path),
    }


def use(facts: Facts) -> str:
    """Run what the bundle holds, where its costs were priced; freeze it first if nobody did."""
    path = str(facts.bundle.path)
    frozen = [] if facts.program is not None else [_join("apply", path)]
    runtime = str(facts.about.get("runtime", CLEAR))
    return " && ".join([*frozen, _join("run", path, "--runtime", runtime, "--count", "16")])


def private(facts: Facts) -> str:
    """The runtime that the options were priced for, if it is one of several parties."""
    priced = str(facts.about.get("runtime", CLEAR))
    return priced if priced in PRIVATE else "mpc"


def reproduce(facts: Facts) -> str:
    """Every step whose result lies in the bundle, one a line, into a second bundle beside it.

    The search starts from the weights of this one.
    """
    path, plan = _again(facts), facts.plan
    config = dict(plan.config)
    default = asdict(method_type(plan.method)())
    changed = {k: v for k, v in config.items() if v != default.get(k)}
    chosen = _flags({k: v for k, v in changed.items() if k in SEARCH_FLAGS})
    for name, value in changed.items():
        if name not in SEARCH_FLAGS:
            chosen += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
    lines = [_line("search", facts, path, *chosen)]
    if "validation" in facts.accuracy:
        recipe = facts.accuracy.get("recipe", {})
        flags = _flags({k: recipe[k] for k in FINETUNE_FLAGS if k in recipe})
        test = ["--test"] if "test" in facts.accuracy else []
        lines.append(_join("finetune", path, *flags, *test))
    elif facts.program is not None:
        lines.append(_join("apply", path))
    if facts.run is not None:
        lines.append(
            _join("run", path, "--runtime", facts.run["runtime"], "--count", str(facts.run["batch"]))
        )
    if facts.curve:
        lines.append(_join("curve", path, "--points", str(len(facts.curve))))
    return "\n".join([*lines, _join("report", path)])


def _again(facts: Facts) -> str:
    """A search does not overwrite what a bundle holds."""
    return f"{facts.bundle.path}-again"


def _line(verb: str, facts: Facts, out: str, *more: str) -> str:
    about, path = facts.about, facts.bundle.path
    words = [
        *("--model", str(about.get("model", facts.plan.base))),
        *("--weights", str(path / "base.safetensors")),
        *("--data", str(about.get("data", "?"))),
        *_flags({k: about[k] for k in ("root", "image_size") if about.get(k) is not None}),
        *("--method", facts.plan.method),
        *("--budget", facts.plan.budget),
        *_flags({k: about[k] for k in ("runtime",) if k in about}),
        *_flags({k: v for k, v in about.get("pricing", {}).items() if k == "network"}),
        *more,
        *("--out", out),
    ]
    return _join(verb, *words)


def _flags(values: Mapping[str, Json]) -> list[str]:
    words = []
    for name, value in values.items():
        words += ["--" + name.replace("_", "-"), f"{value:g}" if isinstance(value, float) else str(value)]
    return words


def _join(*words: str) -> str:
    return shlex.join(["tightrope", *words])
