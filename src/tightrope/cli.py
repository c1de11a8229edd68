"""The command line: one function per verb, thin over `tightrope.pipeline`; imports are lazy.

Exit status 0 on success, 2 for anything the user can mend, 130 when interrupted.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tightrope.errors import InputError, TightropeError

if TYPE_CHECKING:
    from tightrope.bundle import Bundle

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fit a trained vision network to a hard budget, and really execute it: in the clear or in private.",
)
BundleDir = Annotated[Path, typer.Argument(help="Directory of the bundle.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
DEMO_EPOCHS = 4
Out = Annotated[Path, typer.Option("--out", "-o", help="Directory of the bundle to write.")]
BudgetText = Annotated[str, typer.Option("--budget", "-b", help="e.g. 'drelus<=12%', 'drelus<=4500'.")]


class _View:
    """Human tables and progress, or a single JSON object."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.out = Console(highlight=False, width=None if sys.stdout.isatty() else 120)

    def say(self, text: str) -> None:
        if not self.as_json:
            self.out.print(text, soft_wrap=True)

    def table(self, table: Table) -> None:
        if not self.as_json:
            self.out.print(table)

    def result(self, body: Mapping[str, Any]) -> None:
        if self.as_json:
            print(json.dumps(body))

    @contextmanager
    def progress(self) -> Iterator[Callable[[str, int, int], None]]:
        """A bar with an estimate on a terminal; silent otherwise."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
            tasks: dict[str, Any] = {}

            def update(what: str, done: int, of: int) -> None:
                if what not in tasks:
                    tasks[what] = bars.add_task(what, total=of)
                bars.update(tasks[what], completed=done, total=of)

            yield update


def _percent(x: float) -> str:
    return f"{x * 100:.2f} %"


def _grid(title: str, *columns: str) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim"
    )
    for k, name in enumerate(columns):
        table.add_column(name, justify="left" if k == 0 else "right", no_wrap=True)
    return table


def _plan_summary(view: _View, bundle: Bundle) -> None:
    plan, problem = bundle.plan(), bundle.problem()
    kept = {k: v for k, v in plan.choices.items() if "patches" in v}
    table = _grid("Plan", "site", "shape", "DReLUs", "kept", "share", "distinct patches")
    total = 0
    for t in problem.tables:
        shapes = [f"{p}x{q}" if p else "identity" for p, q in kept[t.site]["patches"]]
        before = t.cost["drelus"][t.labels.index("1x1")] * len(shapes)
        after = sum(t.cost["drelus"][t.labels.index(s)] for s in shapes)
        total += int(after)
        shape = "x".join(map(str, problem.meta["sites"][t.site]))
        table.add_row(
            t.site, shape, f"{before:,.0f}", f"{after:,.0f}", f"{after / before:.1%}", str(len(set(shapes)))
        )
    view.table(table)
    for note in plan.notes:
        view.say(f"  {note}")
    view.say(
        f"budget {plan.budget}: {plan.predicted.drelus:,.0f} of {plan.baseline.drelus:,.0f} DReLUs; "
        f"predicted loss {plan.loss:.4g}, proved within {plan.gap:.3%} of the optimum"
    )
    if "spearman" in problem.meta:
        view.say(
            f"fast against exact distortion: Spearman {problem.meta['spearman']:.4f} over "
            f"{problem.meta['verified']} random options; {problem.meta['passes']} network passes "
            f"instead of {problem.meta['exact_passes']:,}"
        )
    view.result(
        {
            "bundle": str(bundle.path),
            "budget": plan.budget,
            "predicted": plan.predicted.as_dict(),
            "baseline": plan.baseline.as_dict(),
            "loss": plan.loss,
            "bound": plan.bound,
            "gap": plan.gap,
            "spearman": problem.meta.get("spearman"),
            "notes": list(plan.notes),
        }
    )


@app.command()
def search(
    budget: BudgetText,
    model: Annotated[
        str, typer.Option(help="demo, resnet18, torchvision:NAME, timm:NAME, FILE.py:FUNCTION.")
    ] = "demo",
    data: Annotated[
        str, typer.Option(help="embedded, fashion-mnist, cifar10, cifar100, or a directory.")
    ] = "embedded",
    out: Out = Path("runs/search"),
    method: Annotated[str, typer.Option(help="Which method decides.")] = "block_relu",
    weights: Annotated[Path | None, typer.Option(help="Trained weights, .safetensors.")] = None,
    root: Annotated[Path | None, typer.Option(help="Where the files of a named data set are.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of the images of a directory.")] = None,
    sites: Annotated[
        str, typer.Option(help="Shell patterns of activations to decide, comma-separated.")
    ] = "*",
    samples: Annotated[int, typer.Option(help="Training images behind each predicted loss.")] = 256,
    repair: Annotated[
        bool, typer.Option(help="Charge an option for what remains after rescaling its channel.")
    ] = True,
    verify: Annotated[int, typer.Option(help="Options measured exactly, for the rank correlation.")] = 100,
    max_pool: Annotated[str, typer.Option(help="keep, or avg: average-pools instead.")] = "keep",
    relu6: Annotated[str, typer.Option(help="keep (two comparisons), or relu.")] = "keep",
    runtime: Annotated[str, typer.Option(help="Whose costs price the options.")] = "mpc",
    seed: int = 0,
    devices: Annotated[int, typer.Option(help="Processes (or GPUs) per machine that share the images.")] = 1,
    nodes: Annotated[int, typer.Option(help="Machines.")] = 1,
    accelerator: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Measure every option of a network and choose the best ones within a budget."""
    from tightrope import pipeline
    from tightrope.shard import launch

    view = _View(as_json)
    shard = launch(devices, nodes, accelerator)
    config = {
        "sites": sites, "samples": samples, "repair": repair, "verify": verify, "max_pool": max_pool,
        "relu6": relu6, "seed": seed,
    }  # fmt: skip
    with view.progress() as progress:
        bundle = pipeline.search(
            model=model, data=data, budget=budget, out=out, method=method, config=config, weights=weights,
            root=root, image_size=image_size, runtime=runtime, progress=progress, shard=shard,
        )  # fmt: skip
    if not shard.first:
        return
    _plan_summary(view, bundle)
    view.say(f"bundle: {out}   next: tightrope finetune {out}")


@app.command()
def solve(
    bundle: BundleDir, budget: BudgetText, out: Out = Path("runs/solve"), as_json: AsJson = False
) -> None:
    """Solve a bundle's saved problem for another budget, without touching the network."""
    from tightrope import pipeline
    from tightrope.bundle import Bundle

    view = _View(as_json)
    _plan_summary(view, pipeline.solve(Bundle.open(bundle), budget, out))
    view.say(f"bundle: {out}   next: tightrope finetune {out}")


@app.command()
def apply(bundle: BundleDir, as_json: AsJson = False) -> None:
    """Rewrite the network by the plan without training, and freeze it."""
    from tightrope import pipeline
    from tightrope.bundle import Bundle

    view = _View(as_json)
    pipeline.apply_plan(Bundle.open(bundle))
    view.say(f"wrote {bundle / 'model.safetensors'} and {bundle / 'program.json'}")
    view.result({"bundle": str(bundle)})


@app.command()
def finetune(
    bundle: BundleDir,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training data.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option()] = None,
    hints: Annotated[float | None, typer.Option(help="Weight of the teacher's activations.")] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    devices: Annotated[int | None, typer.Option(help="Devices per machine.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Machines.")] = None,
    accelerator: Annotated[str | None, typer.Option(help="cpu, cuda, mps.")] = None,
    precision: Annotated[str | None, typer.Option(help="32-true or bf16-mixed.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget an interrupted run.")] = False,
    test: Annotated[bool, typer.Option("--test", help="Then read the test split, once.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train the rewritten network with the original as its teacher; an interrupted run resumes."""
    from tightrope import pipeline
    from tightrope.bundle import Bundle
    from tightrope.finetune import Recipe

    view = _View(as_json)
    opened = Bundle.open(bundle)
    recipe = pipeline.with_limit(
        Recipe(), epochs=epochs, lr=lr, batch_size=batch_size, hints=hints, seed=seed, devices=devices,
        nodes=nodes, accelerator=accelerator, precision=precision,
    )  # fmt: skip

    def show(entry: Mapping[str, Any]) -> None:
        shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in entry.items())
        view.say("  " + "  ".join(shown))

    result = pipeline.train(opened, recipe, resume=not restart, log=show)
    if test:
        result |= pipeline.test(opened)
    table = _grid("Accuracy", "split", "original", "after the plan", "fine-tuned")
    untuned, tuned = _percent(result["validation_untuned"]), _percent(result["validation"])
    table.add_row("validation", _percent(result["validation_base"]), untuned, tuned)
    if test:
        table.add_row("test", _percent(result["test_base"]), "", _percent(result["test"]))
    view.table(table)
    view.result(result)


@app.command()
def run(
    bundle: BundleDir,
    runtime: Annotated[
        str, typer.Option(help="plain, or mpc: three processes, none sees image and weights.")
    ] = "mpc",
    image: Annotated[Path | None, typer.Option(help="A PNG or JPEG.")] = None,
    count: Annotated[int, typer.Option(help="Without an image: so many test images.")] = 1,
    port: Annotated[int | None, typer.Option(help="First of the loopback ports of mpc.")] = None,
    as_json: AsJson = False,
) -> None:
    """Execute a bundle's network and show what it predicts and what it really cost."""
    import numpy as np

    from tightrope import pipeline
    from tightrope.bundle import Bundle
    from tightrope.data import read_image
    from tightrope.runtimes import runtime_type

    view = _View(as_json)
    opened = Bundle.open(bundle)
    runtime_type(runtime)
    if port is not None and runtime != "mpc":
        raise InputError("only the mpc runtime has ports", got=f"--port with --runtime {runtime}")
    data = opened.data()
    if image is not None:
        x, labels = read_image(image, data).numpy(), None
    else:
        x, labels = pipeline.test_images(data, count)
    config = {} if port is None else {"port": port}
    outputs, expected, measured = pipeline.run(opened, x, runtime=runtime, config=config)
    got, want = outputs.argmax(-1), expected.argmax(-1)
    error = float(np.abs(outputs - expected).max())
    table = _grid("Predictions", "image", "predicted", "plain", *(() if labels is None else ("label",)))
    for k in range(len(x)):
        row = [str(image or k), data.classes[got[k]], data.classes[want[k]]]
        table.add_row(*row, *(() if labels is None else (data.classes[labels[k]],)))
    view.table(table)
    same = int((got == want).sum())
    view.say(f"same class as plain: {same} of {len(x)}; largest difference of an output: {error:.3g}")
    _show_measurement(view, measured)
    view.result(
        {
            "predictions": [data.classes[k] for k in got],
            "plain": [data.classes[k] for k in want],
            "labels": None if labels is None else [data.classes[k] for k in labels],
            "max_abs_error": error,
            "measurement": measured.to_dict(),
        }
    )


def _show_measurement(view: _View, measured: Any) -> None:
    table = _grid(
        f"Measured: {measured.runtime}, batch of {measured.batch}",
        "op", "DReLUs", "online bytes", "offline bytes", "rounds", "online ms",
    )  # fmt: skip
    for trace in measured.ops:
        c = trace.cost
        numbers = (c.drelus, c.online_bytes, c.offline_bytes, c.rounds)
        if any(numbers) or c.online_ms >= 0.05:
            shown = ("" if not v else f"{v:,.0f}" for v in numbers)
            table.add_row(trace.op, *shown, f"{c.online_ms:,.1f}")
    t = measured.total
    totals = (t.drelus, t.online_bytes, t.offline_bytes, t.rounds)
    table.add_row("total", *(f"{v:,.0f}" for v in totals), f"{t.online_ms:,.1f}", style="bold")
    view.table(table)
    for title, links in (("online", measured.links), ("offline", measured.offline_links)):
        if links:
            view.say(f"{title}: " + ", ".join(f"{link} {n:,} bytes" for link, n in links.items()))
    if t.offline_ms:
        view.say(f"offline phase: {t.offline_ms:,.0f} ms")


@app.command()
def curve(
    bundle: BundleDir,
    points: Annotated[int, typer.Option(help="How many budgets.")] = 20,
    limit: Annotated[int, typer.Option(help="Validation images per budget.")] = 1000,
    as_json: AsJson = False,
) -> None:
    """Accuracy against budget before any training, with the controls."""
    from tightrope import pipeline
    from tightrope.bundle import Bundle

    view = _View(as_json)
    with view.progress() as progress:
        rows = pipeline.curve(Bundle.open(bundle), points=points, limit=limit, progress=progress)
    names = ("tightrope", "per_layer", "uniform", "random", "layers")
    table = _grid("Validation accuracy before training", "budget", *names)
    for row in rows:
        found = row["accuracy"]
        table.add_row(f"{row['share']:.1%}", *(_percent(found[n]) if n in found else "" for n in names))
    view.table(table)
    view.result({"curve": rows})


@app.command()
def report(bundle: BundleDir, as_json: AsJson = False) -> None:
    """Write the bundle's report.html and README.md."""
    from tightrope.bundle import Bundle
    from tightrope.report import write

    view = _View(as_json)
    path = write(Bundle.open(bundle))
    view.say(f"report: {path}")
    view.result({"report": str(path)})


@app.command()
def demo(out: Out = Path("runs/demo"), budget: BudgetText = "drelus<=12%", as_json: AsJson = False) -> None:
    """The whole way on embedded data: search, fine-tune, 16 secure predictions, report."""
    view = _View(as_json)
    view.say("1. search: what each patch of each channel would cost in accuracy, then the best choice")
    search(budget, out=out, verify=60, as_json=as_json)
    view.say("\n2. fine-tune, with the original network as teacher; then the test split, once")
    finetune(out, epochs=DEMO_EPOCHS, restart=True, test=True, as_json=as_json)
    view.say("\n3. private inference: client, server and dealer in three processes")
    run(out, count=16, as_json=as_json)
    view.say("\n4. the same problem solved for other budgets, with the controls")
    curve(out, limit=500, as_json=as_json)
    report(out, as_json=as_json)


def main() -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads starve the other parties
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that parties and their files go too
    try:
        app(standalone_mode=True)
    except TightropeError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.strerror or error}: {error.filename or ''}")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(130)


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
