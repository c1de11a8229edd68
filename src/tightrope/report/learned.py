"""The report of a plan that was learned: what is kept, how good it is, what else could have been done."""

from __future__ import annotations

from collections.abc import Sequence

from tightrope.bundle import Bundle
from tightrope.report import card, commands, formats, words
from tightrope.report.compare import COUNTED, Comparison, compare, verdict
from tightrope.report.facts import Facts, gather
from tightrope.report.templates import fill
from tightrope.types import Budget

Table = tuple[str, str, Sequence[str], list[Sequence[str]]]  # heading, note, columns, rows


def render(bundle: Bundle) -> dict[str, str]:
    """report.html and README.md of the bundle. Raises BundleError for a damaged file."""
    plan, about, facts = bundle.plan(), bundle.about, gather(bundle)
    parts, use = tables(bundle, facts), commands.use(facts)
    task = bundle.task()
    budget = formats.budget(Budget.parse(plan.budget))
    title = f"{formats.name(str(about.get('model', plan.base)))}, {budget}" + (
        f": {' / '.join(task.names)}" if task else ""
    )
    classes = len(bundle.record()["classes"])
    lead = f"Method {plan.method}, data {about.get('data', 'not recorded')}, {classes} classes."
    page = fill("learned.html", title=title, lead=lead, tables=parts, use=use)
    text = formats.markdown
    lines = [f"# {text(title)}", text(lead)]
    for heading, note, head, rows in parts:
        body = [head, ["---"] * len(head), *([text(cell) for cell in line] for line in rows)]
        lines += [
            f"## {heading}",
            *([text(note)] if note else []),
            "\n".join("| " + " | ".join(line) + " |" for line in body),
        ]
    lines += [*card.use(use), *card.files(bundle.path)]
    return {"report.html": page, "README.md": "\n\n".join(lines) + "\n"}


def tables(bundle: Bundle, facts: Facts) -> list[Table]:
    """Cost, accuracy, front, layers, runs if there are any, and what went in."""
    plan, record, accuracy = bundle.plan(), bundle.record(), bundle.accuracy()
    before, after = plan.baseline.as_dict(), plan.predicted.as_dict()
    cost = [
        (formats.metric(m), formats.amount(after.get(m, 0)), formats.amount(v), f"{after.get(m, 0) / v:.1%}")
        for m, v in before.items()
    ]
    scores = [("as the search left it", "validation", f"{record['accuracy']:.2%}")]
    scores += [(k.replace("_", " "), "validation", f"{v:.2%}") for k, v in record["controls"].items()]
    known = record["controls"] or "validation_base" not in accuracy
    scores += [] if known else [("original network", "validation", f"{accuracy['validation_base']:.2%}")]
    names = {
        "validation": ("this network, fine-tuned", "validation"),
        "test_base": ("original network" if bundle.task() is None else "restricted", "test"),
        "test": ("this network", "test"),
    }
    scores += [(*names[k], f"{accuracy[k]:.2%}") for k in names if k in accuracy]
    metrics = sorted({key for point in record["front"] for key in point} - {"accuracy"})
    front = [(*(formats.amount(p[m]) for m in metrics), f"{p['accuracy']:.2%}") for p in record["front"]]
    found: list[Table] = [
        ("Cost of one image", "; ".join(plan.notes), ("quantity", "now", "original", "share"), list(cost)),
        ("Accuracy", "", ("network", "split", "accuracy"), list(scores)),
    ]
    if front:
        shown = [formats.metric(m) for m in metrics]
        note = f"Nothing that was found beats these in {', '.join(shown)} and accuracy at once."
        found.append(("What the search found", note, (*shown, "validation accuracy"), list(front)))
    found += [(s["title"], "", s["columns"], list(s["rows"])) for s in record["shown"]]
    runs = [
        (
            r["runtime"],
            str(r["batch"]),
            formats.milliseconds(r["total"].get("online_ms", 0.0)),
            formats.size(r["total"].get("online_bytes", 0)),
            f"{r['same_class']} of {r['batch']}" if "same_class" in r else formats.ABSENT,
        )
        for r in bundle.measurements()
    ]
    if runs:
        note = "Of all images together; same class: as the float64 reference gives."
        found.append(
            ("Runs", note, ("runtime", "images", "ms, online", "sent online", "same class"), list(runs))
        )
    if (comparison := compare(facts)) is not None:
        found.append(_compared(comparison, words.run_name(facts)))
    return [*found, _made(bundle)]


def _compared(comparison: Comparison, run: str) -> Table:
    """Of the whole network, with a sentence on its ops."""
    predicted, measured = comparison.whole.predicted, comparison.whole.measured
    rows = [
        (formats.metric(q), formats.amount(predicted[q]), formats.amount(getattr(measured, q)))
        for q in COUNTED
        if q in predicted
    ]
    if comparison.online_ms is not None and measured.online_ms:
        ms = formats.milliseconds
        rows.append(
            ("online milliseconds, of an idle machine", ms(comparison.online_ms), ms(measured.online_ms))
        )
    note = comparison.missing or verdict(comparison)
    return f"Predicted and measured, {run}", note, ("quantity", "predicted", "measured"), list(rows)


def _made(bundle: Bundle) -> Table:
    plan, about = bundle.plan(), bundle.about
    rows = [
        *words.origin(plan),
        ("method", f"{plan.method}: {words.settings(plan.config)}"),
        ("costs priced by", str(about.get("runtime", "not recorded"))),
        ("fine-tuning", words.settings(bundle.accuracy().get("recipe", {})) or "none"),
        ("versions", words.settings(about.get("versions", {})) or "not recorded"),
    ]
    note = (
        "What was chosen was found by training: nothing is proved about it. Accuracies are of one run; their "
        "spread over seeds is not measured."
    )
    return "How this was made, and limits", note, ("", ""), list(rows)
