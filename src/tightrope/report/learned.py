"""The report of a plan that was learned: what is kept, how good it is, what else could have been done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tightrope.bundle import Bundle
from tightrope.report import formats

HERE = Path(__file__).parent
Table = tuple[str, str, Sequence[str], list[Sequence[str]]]  # heading, note, columns, rows


def render(bundle: Bundle) -> dict[str, str]:
    """report.html and README.md of the bundle. Raises BundleError for a damaged file."""
    plan, about, parts = bundle.plan(), bundle.about, tables(bundle)
    task = bundle.task()
    labels = " / ".join(task.names if task is not None else bundle.record()["classes"])
    title = f"{about.get('model', plan.base)}: {labels}"
    lead = f"Method {plan.method}, budget {plan.budget}, data {about.get('data', 'not recorded')}."
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    css = Markup((HERE / "page.css").read_text())
    page = environment.get_template("learned.html").render(css=css, title=title, lead=lead, tables=parts)
    text = formats.markdown
    lines = [f"# {text(title)}", text(lead)]
    for heading, note, head, rows in parts:
        body = [head, ["---"] * len(head), *([text(cell) for cell in line] for line in rows)]
        lines += [
            f"## {heading}",
            *([text(note)] if note else []),
            "\n".join("| " + " | ".join(line) + " |" for line in body),
        ]
    return {"report.html": page, "README.md": "\n\n".join(lines) + "\n"}


def tables(bundle: Bundle) -> list[Table]:
    """Cost, accuracy, front, layers, and runs if there are any."""
    plan, record, accuracy = bundle.plan(), bundle.record(), bundle.accuracy()
    before, after = plan.baseline.as_dict(), plan.predicted.as_dict()
    cost = [
        (m, f"{after.get(m, 0):,.6g}", f"{v:,.6g}", f"{after.get(m, 0) / v:.1%}") for m, v in before.items()
    ]
    scores = [("this network", "validation", f"{record['accuracy']:.2%}")]
    scores += [(k.replace("_", " "), "validation", f"{v:.2%}") for k, v in record["controls"].items()]
    names = {"test": "this network", "test_base": "restricted"}
    scores += [(names[k], "test", f"{accuracy[k]:.2%}") for k in names if k in accuracy]
    metrics = sorted({key for point in record["front"] for key in point} - {"accuracy"})
    front = [(*(f"{p[m]:,.6g}" for m in metrics), f"{p['accuracy']:.2%}") for p in record["front"]]
    found: list[Table] = [
        ("Cost of one image", "; ".join(plan.notes), ("quantity", "now", "donor", "share"), list(cost)),
        ("Accuracy", "", ("network", "split", "accuracy"), list(scores)),
    ]
    if front:
        note = f"Nothing that was found beats these in {', '.join(metrics)} and accuracy at once."
        found.append(("What the search found", note, (*metrics, "validation accuracy"), list(front)))
    found += [(s["title"], "", s["columns"], list(s["rows"])) for s in record["shown"]]
    runs = [
        (r["runtime"], str(r["batch"]), formats.milliseconds(r["total"].get("online_ms", 0.0)))
        for r in bundle.measurements()
    ]
    if runs:
        found.append(("Runs", "", ("runtime", "images", "ms, online"), list(runs)))
    return found
