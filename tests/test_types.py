"""Budgets, costs, problems and plans: what is read, what is refused, what survives a round trip."""

from __future__ import annotations

import errno
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightrope.errors import BudgetError, BundleError, InputError, TightropeError, meant, near
from tightrope.types import METRICS, Budget, Cost, Limit, Plan, Problem, Table, atomic_write, total

PLAN = Plan(
    method="block_relu",
    config={"sites": "*", "seed": 3},
    budget="drelus<=12%",
    choices={"relu": {"patches": [[1, 1], [0, 0]]}},
    predicted=Cost(drelus=10, online_bytes=1.5),
    baseline=Cost(drelus=100),
    loss=2.0,
    bound=1.5,
    base="demo",
    base_sha256="ab",
    input_shape=(3, 8, 8),
    notes=("pool: replaced by avg_pool",),
)


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("drelus<=33000", [("drelus", 33000, False)]),
        ("drelus<=12%", [("drelus", 0.12, True)]),
        ("weights<=0.1x", [("weights", 0.1, True)]),
        ("online_bytes<=20e6", [("online_bytes", 2e7, False)]),
        (" drelus <= 1_000 , online_ms<= 2.5 ", [("drelus", 1000, False), ("online_ms", 2.5, False)]),
        ("ckks_levels<=0", [("ckks_levels", 0, False)]),
        ("drelus<=6,480,online_ms<=1,234,567.5", [("drelus", 6480, False), ("online_ms", 1234567.5, False)]),
        ("drelus<=1,000%", [("drelus", 10, True)]),
        ("drelus<=1e+3", [("drelus", 1000, False)]),
    ],
)
def test_budgets_are_read(text, limits):
    parsed = Budget.parse(text).limits
    assert [(x.metric, x.relative) for x in parsed] == [(m, r) for m, _, r in limits]
    assert [x.value for x in parsed] == pytest.approx([v for _, v, _ in limits], rel=1e-15)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read"),
        ("drelus", "cannot read"),
        ("drelus<5", "cannot read"),
        ("drelus>=5", "cannot read"),
        ("drelus<=5,", "cannot read"),
        ("drelus<=6,48", "cannot read"),
        ("drelus<=6480,480", "cannot read"),
        ("drelus<=6,480,48", "cannot read"),
        ("drelus<=6,480,", "cannot read"),
        ("drelus<=5,<=6,480", "cannot read"),
        ("drelus<=5kB", "cannot read"),
        ("drelus<=nan", "cannot read"),
        ("drelus<=inf", "cannot read"),
        ("drelus<=1.2.3", "not a number"),
        ("drelus<=_", "not a number"),
        ("drelus<=1e999", "finite"),
        ("drelus<=-5", "not negative"),
        ("drelu<=5", "unknown quantity.*\n.*drelu\n.*drelus"),
        ("power<=5", "allowed: ckks_levels, drelus, offline_bytes, offline_ms, online_bytes, online_ms$"),
        ("drelus<=5,drelus<=6", "twice"),
    ],
)
def test_budgets_are_refused(text, message):
    with pytest.raises(BudgetError, match=message):
        Budget.parse(text)


@given(
    st.lists(st.sampled_from(METRICS), unique=True, min_size=1),
    st.floats(0, 1e12, allow_subnormal=False),
    st.booleans(),
)
def test_a_printed_budget_reads_the_same(metrics, value, relative):
    """The plan keeps the budget as text: it must not be rounded there."""
    budget = Budget(tuple(Limit(m, value, relative) for m in metrics))
    again = Budget.parse(str(budget))
    assert [(x.metric, x.relative) for x in again.limits] == [(m, relative) for m in metrics]
    assert all(math.isclose(x.value, value, rel_tol=1e-14) for x in again.limits)


def test_budgets_are_printed_as_people_write_them():
    shown = {"drelus<=33000": "drelus<=33000", "drelus<=7%": "drelus<=7%", "weights<=0.1x": "weights<=10%"}
    assert {text: str(Budget.parse(text)) for text in shown} == shown
    assert str(Budget.parse("online_bytes<=1234567.5")) == "online_bytes<=1234567.5"


def test_relative_limits_multiply_the_baseline():
    baseline = Cost(drelus=200, weights=40)
    assert Budget.parse("drelus<=12%,weights<=0.5x").resolve(baseline) == {"drelus": 24, "weights": 20}
    assert Budget.parse("online_ms<=3").resolve(baseline) == {"online_ms": 3}
    with pytest.raises(BudgetError, match=r"does not have(.|\n)*drelus, weights"):
        Budget.parse("online_ms<=10%").resolve(baseline)


def test_costs_add_field_by_field():
    parts = [Cost(drelus=1, online_bytes=8), Cost(drelus=2, rounds=3), Cost()]
    assert total(parts) == Cost(drelus=3, online_bytes=8, rounds=3)
    assert Cost(drelus=3, online_ms=0.5).scaled(2) == Cost(drelus=6, online_ms=1)
    assert Cost(drelus=3.0, online_ms=0.5).as_dict() == {"drelus": 3, "online_ms": 0.5}


def problem() -> Problem:
    generator = np.random.default_rng(0)
    tables = tuple(
        Table(
            site,
            ("1x1", "2x2", "identity"),
            generator.random((groups, 3)),
            {"drelus": np.array([4.0, 1, 0]), "online_bytes": generator.random(3)},
        )
        for site, groups in (("layer1.relu", 5), ("layer1.relu_1", 2))
    )
    return Problem(
        tables, Cost(macs=7), Cost(macs=7, drelus=28), {"config": {"seed": 1}, "check": [[0.5, 1]]}
    )


def test_a_problem_survives_its_file(tmp_path):
    before = problem()
    before.save(tmp_path / "problem.npz")
    after = Problem.load(tmp_path / "problem.npz")
    assert (after.fixed, after.baseline, after.meta) == (before.fixed, before.baseline, before.meta)
    for a, b in zip(before.tables, after.tables, strict=True):
        assert (a.site, a.labels) == (b.site, b.labels)
        assert a.loss.tobytes() == b.loss.tobytes()
        assert {m: v.tobytes() for m, v in a.cost.items()} == {m: v.tobytes() for m, v in b.cost.items()}


def test_options_and_costs_come_from_the_table():
    table = problem().tables[1]
    option = table.option(1, 2)
    assert (option.label, option.loss) == ("identity", table.loss[1, 2])
    assert option.cost == Cost(drelus=0, online_bytes=table.cost["online_bytes"][2])
    assert table.cost_of(np.array([0, 1])).drelus == 5


def test_damaged_problems_are_refused(tmp_path):
    path = tmp_path / "problem.npz"
    with pytest.raises(BundleError, match="no saved problem"):
        Problem.load(path)
    problem().save(path)
    whole = path.read_bytes()
    for damaged in (b"", b"PK", whole[: len(whole) // 2], whole[:-30], b"\0" * 100):
        path.write_bytes(damaged)
        with pytest.raises(BundleError, match="damaged"):
            Problem.load(path)


@pytest.mark.parametrize(
    ("head", "message"),
    [({"schema": 99}, "another version"), ({"schema": 1}, "damaged"), ([], "damaged"), (None, "damaged")],
)
def test_problems_of_another_form_are_refused(tmp_path, head, message):
    path = tmp_path / "problem.npz"
    np.savez(path, head=np.frombuffer(json.dumps(head).encode(), dtype=np.uint8))
    with pytest.raises(BundleError, match=message):
        Problem.load(path)


def test_a_problem_with_pickled_objects_is_refused(tmp_path):
    path = tmp_path / "problem.npz"
    np.savez(path, head=np.array([{"schema": 1}], dtype=object))
    with pytest.raises(BundleError, match="damaged"):
        Problem.load(path)


def test_a_plan_survives_json(tmp_path):
    assert Plan.from_json(PLAN.to_json(), tmp_path) == PLAN
    assert PLAN.gap == pytest.approx(0.25)
    assert replace(PLAN, bound=2.0).gap == 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-20], "damaged"),
        (lambda text: "", "damaged"),
        (lambda text: "[]", "damaged"),
        (lambda text: "null", "damaged"),
        (lambda text: text.replace('"schema": 1', '"schema": 2'), "another version"),
        (lambda text: text.replace('"loss"', '"los"'), "damaged"),
        (lambda text: text.replace('"drelus"', '"relus"'), "damaged"),
        (lambda text: text.replace('"notes"', '"extra"'), "damaged"),
        (lambda text: text.replace('"loss": 2.0', '"loss": "low"'), "damaged.*\n.*\n.*loss is"),
        (lambda text: text.replace('"drelus": 10,', '"drelus": "x",'), r"predicted\.drelus is"),
        (lambda text: text.replace('"drelus<=12%"', '"dreelus<=12%"'), "unknown quantity"),
        (lambda text: text.replace('"seed": 3', '"seed": ' + "[" * 900 + "]" * 900), "nested deeper"),
    ],
)
def test_damaged_plans_are_refused(tmp_path, damage, message):
    text = damage(PLAN.to_json())
    assert text != PLAN.to_json()
    with pytest.raises(BundleError, match=message) as caught:
        Plan.from_json(text, tmp_path / "plan.json")
    assert "plan.json" in str(caught.value)


def test_atomic_write_replaces_a_file_completely(tmp_path):
    path = tmp_path / "new" / "file"
    atomic_write(path, lambda f: f.write(b"one"))
    atomic_write(path, lambda f: f.write(b"two"))
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def half(f):
        f.write(b"new")
        raise error

    with pytest.raises(error):
        atomic_write(path, half)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_write_onto_a_directory_leaves_nothing_behind(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        atomic_write(tmp_path / "taken", lambda f: f.write(b"new"))
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_errors_say_what_where_got_allowed_and_how_to_go_on():
    error = InputError("no such site", where="net", got="relu9", allowed="relu1", fix="--sites relu1")
    assert isinstance(error, TightropeError)
    assert error.what == "no such site"
    words = ["no such site", "net", "relu9", "relu1", "--sites relu1"]
    assert [word in line for word, line in zip(words, str(error).split("\n"), strict=True)] == [True] * 5
    assert str(InputError("x", allowed=("keep", "avg"))).endswith("allowed: keep, avg")
    assert str(InputError("x", allowed=(3, 8, 8))).endswith("allowed: (3, 8, 8)")


def test_near_names_all_of_few_the_close_ones_first_and_some_of_many():
    assert near("relu9", ["conv", "relu1"]) == "relu1, conv"
    assert near("zzz", ["b", "a"]) == "a, b"
    assert near("net", ["netb", "neta", "x"]) == "neta, netb, x"  # as close: in their own order
    many = [f"net{k}" for k in range(20)]
    assert near("nt7", many).startswith("net7, ")
    assert near("qq", [*many, "xqwertyy"]).startswith(
        "xqwertyy, "
    )  # of many, the closest whatever the distance
    assert near("qq", many).endswith(", … (20 in all)")


def test_meant_is_silent_about_words_that_are_not_alike():
    known = ["demo", "resnet14", "resnet18", "embedded"]
    assert meant("nope", known) is None
    assert meant("resnet19", known) == "near: resnet14, resnet18"


def test_an_error_of_the_disk_names_the_file(tmp_path):
    def full(f):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left(.|\n)*wanted\.json"):
        atomic_write(tmp_path / "wanted.json", full)
    assert not list(tmp_path.iterdir())
