"""The report of bundles made by hand: complete, partial, hostile and damaged ones."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from tightrope.bundle import SCHEMA, Bundle, write_json
from tightrope.cli import app
from tightrope.errors import BundleError
from tightrope.methods.block_relu.patches import label, patches
from tightrope.program import Conv2d, Flatten, GlobalAvgPool, Linear, Program, Relu, base_cost
from tightrope.report import commands, write
from tightrope.report.compare import compare
from tightrope.report.facts import gather
from tightrope.runtimes.mpc import MPC, costs
from tightrope.types import Cost, Measurement, OpTrace, Plan, Problem, Table, total

HOSTILE = "<script>alert('x')</script>"
BATCH = 4
SIZES = {"first": (3, 8, 8), HOSTILE: (4, 4, 4)}  # site: (C, H, W)
CHOSEN = {"first": ((1, 1), (2, 4), (0, 0)), HOSTILE: ((4, 4), (4, 4), (2, 2), (2, 1))}
KEPT = {"first": 64 + 8 + 0, HOSTILE: 1 + 1 + 4 + 8}  # counted by hand
BEFORE = {"first": 3 * 64, HOSTILE: 4 * 16}
OPTIONAL = ("accuracy.json", "curve.json", "measurements.json", "program.json")
VOID = {"meta", "br", "hr", "img", "input", "link"}


def program() -> Program:
    def conv(name: str, source: str, channels: int, out: tuple[int, ...], stride: int) -> Conv2d:
        return Conv2d(
            name=name, inputs=(source,), shape=out, kernel=(3, 3), stride=(stride, stride),
            padding=(1, 1, 1, 1), in_channels=channels,
        )  # fmt: skip

    ops = (
        conv("conv1", Program.INPUT, 1, SIZES["first"], 1),
        Relu(name="first", inputs=("conv1",), shape=SIZES["first"], patches=CHOSEN["first"]),
        conv("conv2", "first", 3, SIZES[HOSTILE], 2),
        Relu(name=HOSTILE, inputs=("conv2",), shape=SIZES[HOSTILE], patches=CHOSEN[HOSTILE]),
        GlobalAvgPool(name="pool", inputs=(HOSTILE,), shape=(4, 1, 1)),
        Flatten(name="flatten", inputs=("pool",), shape=(4,)),
        Linear(name="fc", inputs=("flatten",), shape=(10,), in_features=4),
    )
    names = [Program.INPUT, *(op.name for op in ops), *(f"{s}:tiles" for s in SIZES)]
    tensors = {f"{op.name}.{part}": np.zeros(shapes[0]) for op in ops for part, shapes in op.parts.items()}
    return Program(ops, (1, 8, 8), "fc", tensors, dict.fromkeys(names, 2.0))


def problem(meta: dict[str, Any]) -> Problem:
    tables = []
    generator = np.random.default_rng(0)
    for site, (C, H, W) in SIZES.items():
        options = patches((H, W))
        drelus = np.array([float(-(-H // p) * -(-W // q)) if p else 0.0 for p, q in options])
        labels = tuple(label(p) for p in options)
        tables.append(Table(site, labels, generator.random((C, len(options))), {"drelus": drelus}))
    baseline = Cost(drelus=sum(BEFORE.values()))
    return Problem(tuple(tables), Cost(), baseline, meta)


def measurement(runtime: str = "mpc") -> Measurement:
    ops = program().ops
    if runtime == "plain":
        traces = [OpTrace(op.name, op.kind, base_cost(op).scaled(BATCH) + Cost(online_ms=0.5)) for op in ops]
        return Measurement(
            runtime="plain", batch=BATCH, ops=tuple(traces), total=total(t.cost for t in traces)
        )
    spent = costs(program(), MPC(), BATCH)
    traces = [OpTrace(op.name, op.kind, spent.ops[op.name] + Cost(online_ms=1.25)) for op in ops]
    return Measurement(
        runtime="mpc", batch=BATCH, ops=tuple(traces), total=replace(spent.total, online_ms=8.75),
        links=spent.links, offline_links=spent.offline_links, host={"mode": "execute", "cpu": HOSTILE},
    )  # fmt: skip


def curve() -> list[dict[str, Any]]:
    rows = []
    for share, accuracy, loss in ((0.05, 0.2, 3.0), (0.3, 0.7, 0.4), (1.0, 0.9, 0.0)):
        cost = {"drelus": round(256 * share)}
        found = {"tightrope": accuracy, "uniform": accuracy / 2, "layers": 0.1}
        rows.append(
            {"share": share, "cost": cost, "loss": loss, "bound": loss * 0.99, "accuracy": found,
             "uniform": {"drelus": 8}, "layers": {}}
        )  # fmt: skip
    return rows


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """Complete, and hostile wherever a text of a user or of a network can be."""
    path = tmp_path / "bundle"
    made = Bundle(path)
    config = {"sites": "*", "samples": 32, "batch_size": 8, "directions": 16, "verify": 5, "max_pool": "avg",
              "relu6": "keep", "seed": 3}  # fmt: skip
    path.mkdir()
    write_json(
        path / "bundle.json",
        {"schema": SCHEMA, "versions": {"tightrope": "0.1.0", "python": "3.11.7"}, "model": f"demo {HOSTILE}",
         "data": HOSTILE, "num_classes": 10, "in_channels": 1, "root": None, "runtime": "mpc"},
    )  # fmt: skip
    check = [[1e-4, 1.1e-4], [2e-3, 2.1e-3], [0.5, 0.4], [0.0, 1e-9]]
    meta = {
        "sites": {k: list(v) for k, v in SIZES.items()}, "prepared": {}, "passes": 40, "exact_passes": 8000,
        "verified": 4, "spearman": 0.9876, "check": check,
    }  # fmt: skip
    problem(meta).save(path / "problem.npz")
    made.save_plan(
        Plan(
            method="block_relu", config=config, budget="drelus<=34%",
            choices={s: {"patches": [list(p) for p in CHOSEN[s]]} for s in SIZES},
            predicted=Cost(drelus=sum(KEPT.values())), baseline=Cost(drelus=256), loss=0.5, bound=0.499,
            base="demo", base_sha256="ab" * 32, input_shape=(1, 8, 8),
            notes=(f"{HOSTILE}: replaced by avg_pool",),
        )
    )  # fmt: skip
    program().save(path)
    made.add_measurement(measurement(), {"max_abs_error": 3.1e-5, "same_class": BATCH})
    recipe = {"epochs": 4.0, "lr": 0.05, "batch_size": 128, "seed": 0}
    accuracy = {"validation_base": 0.92, "validation_untuned": 0.7, "validation": 0.91, "test_base": 0.915,
                "test": 0.9042, "recipe": recipe}  # fmt: skip
    write_json(path / "accuracy.json", accuracy)
    write_json(path / "curve.json", curve())
    return made


class Page(HTMLParser):
    """Tags with their attributes, the text with what a hover shows, and tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.mismatched: list[str] = []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.mismatched.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def page(bundle: Bundle) -> Page:
    return Page(write(bundle).read_text())


def test_headline_states_what_was_reached(bundle: Bundle) -> None:
    text = page(bundle).text
    for expected in (
        "33.6 % 86 of 256 per image",
        "90.42 % original 91.50 % (−1.08 points)",
        "91.00 % original 92.00 % (−1.00 points); before fine-tuning 70.00 %",
        "0.200 % predicted loss 0.5; no plan in the budget below 0.499",
        "4 of 4 images same class; outputs differ by at most 3.1×10⁻⁵",
    ):
        assert expected in text


def test_both_files_are_written_and_small(bundle: Bundle) -> None:
    report = write(bundle)
    assert report == bundle.path / "report.html"
    assert 10_000 < report.stat().st_size < 500_000
    card = (bundle.path / "README.md").read_text()
    assert "90.42 %" in card and "`problem.npz`" in card
    assert not list(bundle.path.glob(".*"))  # no temporary file left


def test_nothing_is_loaded_from_anywhere(bundle: Bundle) -> None:
    html = write(bundle).read_text()
    found = Page(html)
    assert not found.mismatched and not found.open
    assert not {tag for tag, _ in found.tags} & {"script", "link", "img", "iframe", "object", "embed", "base"}
    given = [item for _, attrs in found.tags for item in attrs.items()]
    links = {str(value) for name, value in given if name in ("src", "href", "xlink:href")}
    assert links and all(link.startswith("#") for link in links)
    assert not re.search(r"https?:|url\(|@import", html)
    assert not any(name.startswith("on") for name, _ in given)
    assert {link[1:] for link in links} <= {value for name, value in given if name == "id"}


def test_hostile_text_stays_text(bundle: Bundle) -> None:
    html = write(bundle).read_text()
    assert "<script" not in html.lower()
    assert HOSTILE in Page(html).text  # shown literally
    card = (bundle.path / "README.md").read_text()
    prose = "\n".join(line for line in card.splitlines() if not line.startswith("    "))
    assert "<script" not in prose and "&lt;script&gt;" in prose


def test_predictions_equal_counts_op_by_op(bundle: Bundle) -> None:
    comparison = compare(gather(bundle))
    assert comparison is not None
    spent = costs(program(), MPC(), BATCH)
    rows = {row.op: row for row in comparison.rows}
    assert set(rows) == {"conv1", "first", "conv2", HOSTILE, "fc"} and comparison.locals_count == 2
    for site in SIZES:
        assert rows[site].predicted["drelus"] == KEPT[site] * BATCH == rows[site].measured.drelus
    for name, row in rows.items():
        assert row.predicted["online_bytes"] == spent.ops[name].online_bytes
        assert row.gap == 0
    assert comparison.whole.predicted["online_bytes"] == spent.total.online_bytes
    text = page(bundle).text
    assert "Every count equals its prediction: DReLUs, online bytes, offline bytes, rounds." in text
    assert f"{spent.total.online_bytes:,.0f}" in text


@pytest.mark.parametrize(("factor", "flagged"), [(1.09, False), (1.11, True), (0.5, True)])
def test_a_gap_is_flagged_above_ten_percent(bundle: Bundle, factor: float, flagged: bool) -> None:
    path = bundle.path / "measurements.json"
    runs = json.loads(path.read_text())
    op = next(op for op in runs[0]["ops"] if op["op"] == "conv2")
    op["online_bytes"] *= factor
    write_json(path, runs)
    found = page(bundle)
    marked = [a for tag, a in found.tags if tag == "tr" and "flag" in str(a.get("class"))]
    assert len(marked) == flagged
    if flagged:
        assert "1 of 5 ops are off by more than 10%." in found.text
    else:
        assert "Largest gap: 9.00 %, at conv2" in found.text


def test_what_was_never_predicted_is_no_small_gap(bundle: Bundle) -> None:
    path = bundle.path / "measurements.json"
    runs = json.loads(path.read_text())
    next(op for op in runs[0]["ops"] if op["op"] == "flatten")["online_bytes"] = 7
    write_json(path, runs)
    assert "predicted 0" in page(bundle).text


def test_the_plans_own_price_stands_beside_the_run(bundle: Bundle) -> None:
    run = measurement().total
    plan = bundle.plan()
    bundle.save_plan(replace(plan, predicted=Cost(drelus=86, online_bytes=run.online_bytes / BATCH * 0.8)))
    text = page(bundle).text
    assert "What the plan predicted" in text and "DReLUs 86 86 0 %" in text
    assert f"{run.online_bytes / BATCH:,.1f}".removesuffix(".0") + " 25.00 %" in text


def test_a_search_alone_gives_a_report(bundle: Bundle) -> None:
    for name in OPTIONAL:
        (bundle.path / name).unlink()
    text = page(bundle).text
    for expected in (
        "What a run costs: not measured.",
        f"tightrope finetune {bundle.path} && tightrope run {bundle.path} --runtime mpc",
        f"Accuracy and loss against budget: not measured. tightrope curve {bundle.path} makes it.",
        "Secure and plain agree not measured",
        "Test accuracy not measured",
        "Secure execution, its bytes and its time: not measured.",
        "Spearman 0.9876",  # part of the search
    ):
        assert expected in text


@pytest.mark.parametrize("absent", OPTIONAL)
def test_each_part_may_be_absent(bundle: Bundle, absent: str) -> None:
    (bundle.path / absent).unlink()
    text = page(bundle).text
    assert "not measured" in text or absent == "program.json"
    if absent == "program.json":
        assert "Bytes and rounds were not predicted: the bundle has no program." in text


def test_without_an_exact_check_none_is_invented(bundle: Bundle) -> None:
    meta = {k: v for k, v in bundle.problem().meta.items() if k not in ("check", "spearman", "verified")}
    problem(meta).save(bundle.path / "problem.npz")
    text = page(bundle).text
    assert "Fast against exact distortion: not measured." in text and "--verify 100" in text
    assert "Spearman 0" not in text


def test_a_run_in_the_clear_is_not_called_secure(bundle: Bundle) -> None:
    (bundle.path / "measurements.json").unlink()
    bundle.add_measurement(measurement("plain"), {"max_abs_error": 0.0, "same_class": BATCH})
    text = page(bundle).text
    assert "Secure and plain agree not measured" in text
    assert "How the run in the clear (plain) spent" in text
    assert "Every count equals its prediction: DReLUs." in text
    assert "No bytes were sent." in text


def test_an_unmeasured_setup_is_said_and_a_measured_one_shown(bundle: Bundle) -> None:
    assert "set-up bytes not measured" in page(bundle).text
    extra = {"setup_links": {"server->client": 12_345}, "config": {"margin": 4.0}}
    bundle.add_measurement(measurement(), extra)
    text = page(bundle).text
    assert "set-up bytes 12.3 kB, once per session" in text and "mpc: margin 4.0" in text


def test_controls_lie_where_their_cost_is(bundle: Bundle) -> None:
    drawn = page(bundle)
    assert "uniform: 35.00 % at 3.1 %" in drawn.text  # 8 of 256, whatever the budget allowed
    assert "layers: 10.00 %" not in drawn.text  # keeps nothing: not drawn at a budget it does not use
    assert "3 assignments that keep nothing at all have no place on the logarithmic axis." in drawn.text
    assert "1 of loss 0 cannot be drawn" in drawn.text
    assert "fine-tuned: 91.00 % at 33.6 %" in drawn.text


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("accuracy.json", "[]"),
        ("accuracy.json", "{"),
        ("curve.json", '[{"share": 0.1}]'),
        ("measurements.json", '[{"runtime": "mpc"}]'),
        ("program.json", "{}"),
        ("plan.json", "not json"),
    ],
)
def test_a_damaged_part_is_an_error_and_nothing_is_written(bundle: Bundle, name: str, body: str) -> None:
    (bundle.path / name).write_text(body)
    with pytest.raises(BundleError):
        write(bundle)
    assert not (bundle.path / "report.html").exists() and not (bundle.path / "README.md").exists()


def test_a_plan_of_another_problem_is_an_error(bundle: Bundle) -> None:
    plan = bundle.plan()
    bundle.save_plan(replace(plan, choices={"first": {"patches": [[9, 9]] * 3}}))
    with pytest.raises(BundleError, match="do not belong together"):
        write(bundle)


def test_no_command_shown_overwrites_the_bundle(bundle: Bundle) -> None:
    facts = gather(bundle)
    shown = [*commands.reproduce(facts).splitlines(), commands.missing(facts)["search"]]
    searches = [shlex.split(line) for line in shown if " search " in line]
    assert len(searches) == 2
    for words in searches:
        assert words[words.index("--out") + 1] == f"{bundle.path}-again"
        assert words[words.index("--weights") + 1] == str(bundle.path / "base.safetensors")


def test_every_command_shown_is_one_that_the_command_line_takes(bundle: Bundle) -> None:
    facts = gather(bundle)
    group: Any = typer.main.get_command(app)
    shown = [*commands.reproduce(facts).splitlines(), *commands.missing(facts).values()]
    lines = [part for line in shown if not line.startswith("#") for part in line.split(" && ")]
    assert len(lines) >= 9
    for line in lines:
        name, verb, *words = shlex.split(line)
        assert name == "tightrope"
        group.commands[verb].make_context(verb, words)  # raises for an unknown option or value
    assert any("--set batch_size=8" in line for line in shown)
    assert "--max-pool avg" in shown[0] and "--seed 3" in shown[0]
