"""README.md of a bundle: a short model card, readable as it is and on a model hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tightrope.report import commands, formats, words
from tightrope.report.compare import compare, verdict
from tightrope.report.facts import Facts

FILES = {
    "plan.json": "the choice at every site, its predicted cost and loss, the bound",
    "plan.safetensors": "what was learned: weights, or masks of the original's",
    "problem.npz": "every option with its loss and cost; solves again for another budget",
    "base.safetensors": "weights of the original network",
    "model.safetensors": "weights of the rewritten network",
    "program.json": "the frozen network that runtimes execute; its weights lie in program.safetensors",
    "measurements.json": "what runs really cost, op by op",
    "accuracy.json": "accuracies and the recipe of the fine-tuning",
    "curve.json": "accuracy and predicted loss against budget",
    "report.html": "all of it as pictures and tables",
}


def render(facts: Facts) -> str:
    text = formats.markdown
    parts = [
        f"# {text(words.title(facts))}",
        text(words.lead(facts)),
        "## What was reached",
        _table(("", "value", ""), [(t.name, t.value, t.sub) for t in words.headline(facts)]),
    ]
    comparison = compare(facts)
    if comparison is not None:
        parts.append(text(f"Predicted and measured, {words.run_name(facts)}: {verdict(comparison)}"))
    parts += [
        *use(commands.missing(facts)["run"]),
        "## How it was made",
        _table(("", ""), words.provenance(facts)),
        _code(commands.reproduce(facts)),
        "## Limits",
        "\n".join(f"- {text(limit)}" for limit in words.limits(facts)),
        *files(facts.bundle.path),
    ]
    return "\n\n".join(parts) + "\n"


def use(command: str) -> list[str]:
    return ["## Use", _code(command)]


def files(bundle: Path) -> list[str]:
    made = ("report.html",)  # written together with this card
    present = {name: what for name, what in FILES.items() if name in made or (bundle / name).exists()}
    return ["## Files", "\n".join(f"- `{name}`: {what}" for name, what in present.items())]


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *(tuple(map(formats.markdown, row)) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _code(text: str) -> str:
    """Indented, so that no text can end the block."""
    return "\n".join(f"    {line}" for line in text.splitlines())
