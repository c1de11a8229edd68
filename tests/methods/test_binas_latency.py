"""Latency tables: whole files, the formula on an artificial device, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commands import call
from tightrope import device as devices
from tightrope import measure as measuring
from tightrope.errors import BundleError, InputError
from tightrope.methods.binas import latency
from tightrope.methods.binas.latency import Conditions, LatencyTable, Timing, load
from tightrope.methods.binas.objective import Formula, problem
from tightrope.methods.binas.parts import of_choice, parts
from tightrope.methods.binas.space import PRESETS, resolve

SPACE = PRESETS["fashion"]
HERE = Conditions("onnx", "onnxruntime 1", 1, 1, "cpu", {"processor": "abacus", "cores": 1})
TINY = """
input_shape = [1, 8, 8]
classes = 3
stem = 8
stride = 2
first = 8
last = 16
head = 16
expansions = [1, 2]
kernels = [3]
ses = [0, 0.25]
stages = [
  {channels = 8, stride = 1, depths = [1, 2], act = "re"},
  {channels = 16, stride = 2, depths = [1, 2]},
]
"""


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY)
    return resolve(str(tmp_path / "tiny.toml"))


def filled(space, seed: int, slope: float, intercept: float, noise: float = 0.0) -> LatencyTable:
    """Of a device on which whole networks take slope x parts + intercept."""
    generator = np.random.default_rng(seed)
    table = latency.empty(space, HERE, visits=2, fitted=12, held_out=6, seed=seed)
    for key in table.parts_ms:
        ms = float(generator.uniform(0.1, 1))
        table = table.add(key, Timing(2 * ms, 0.1, 5)).add(key, Timing(ms, 0.1, 5))
    for text, choice in zip(table.networks_ms, table.choices(space), strict=True):
        ms = slope * table.raw(space, choice) + intercept
        ms *= float(np.exp(generator.normal(0, noise)))
        table = table.add(text, Timing(ms, 0.1, 5)).add(text, Timing(1.5 * ms, 0.1, 5))
    return table


def test_the_parts_of_the_published_space():
    assert len(parts(PRESETS["imagenet"])) == 120 + 2
    assert len(parts(SPACE)) == 6 * 12 + 2


def test_the_calibrated_formula_is_the_solvers_cost():
    table = filled(SPACE, 1, 0.8, 0.3)
    fit = table.calibration(SPACE)
    assert (fit.slope, fit.intercept_ms) == pytest.approx((0.8, 0.3))
    assert fit.held_out == 6 and fit.held_out_error < 1e-9
    nothing = Formula(0.0, (np.zeros(3),) * 3, (np.zeros((3, 12)),) * 3)
    staged = problem(SPACE, nothing, {"online_ms": 5.0}, priced={"online_ms": table.priced(SPACE)})
    choice = ((3,), (0, 11), (5, 6, 7))
    assert len(of_choice(SPACE, choice)) == 2 + 6
    assert table.predict(SPACE, choice) == pytest.approx(float(staged.cost(choice)[0]))


def test_a_table_whose_networks_are_slower_the_less_they_have_is_refused():
    with pytest.raises(InputError, match="do not grow"):
        filled(SPACE, 1, -0.1, 5.0).calibration(SPACE)


def test_the_held_out_error_is_of_the_networks_that_were_not_fitted():
    table = filled(SPACE, 2, 1.0, 0.0)
    last = list(table.networks_ms)[-1]
    doubled = tuple(replace(t, median_ms=2 * t.median_ms) for t in table.networks_ms[last])
    table = replace(table, networks_ms={**table.networks_ms, last: doubled})
    fit = table.calibration(SPACE)
    assert fit.held_out_worst == pytest.approx(0.5)
    assert fit.held_out_error == pytest.approx(0.5 / 6)


def test_a_table_goes_through_its_file(tmp_path):
    table = filled(SPACE, 3, 0.9, 0.1, noise=0.05)
    table.save(tmp_path / "t.json")
    assert load(tmp_path / "t.json", SPACE) == table


@settings(max_examples=40)
@given(st.data())
def test_damaged_tables_are_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / "t.json"
    filled(SPACE, 3, 0.9, 0.1).save(path)
    body = json.loads(path.read_text())
    where = data.draw(st.sampled_from(sorted(body.keys() - {"space"})))
    body[where] = data.draw(st.sampled_from([None, -1, "x", [], {}, {"a": [{}]}, 1e999, True]))
    path.write_text(json.dumps(body))
    with pytest.raises((InputError, BundleError), match=r"table|version"):
        load(path, SPACE)


def test_tables_of_another_space_or_device_name_both(tmp_path):
    table = filled(SPACE, 4, 1.0, 0.0)
    table.save(tmp_path / "t.json")
    with pytest.raises(InputError, match=r"another space(.|\n)*fashion(.|\n)*cifar"):
        load(tmp_path / "t.json", PRESETS["cifar"])
    other = replace(HERE, device="openvino", host={"processor": "slide rule", "cores": 1})
    with pytest.raises(InputError, match=r"another device(.|\n)*abacus(.|\n)*slide rule"):
        table.check(SPACE, other)


def test_measuring_resumes_and_keeps_what_was_measured(tiny, tmp_path, monkeypatch):
    out = tmp_path / "t.json"
    visited = []

    class Counting(devices.TorchDevice):
        def load(self, net, input_shape, batch):
            visited.append(input_shape)
            if len(visited) == 20:
                raise KeyboardInterrupt
            return super().load(net, input_shape, batch)

    monkeypatch.setattr(devices, "TorchDevice", Counting)
    settings = {"runs": 2, "visits": 2, "fitted": 4, "held_out": 2}
    with pytest.raises(KeyboardInterrupt):
        measuring.measure(tiny, "cpu", out, **settings)
    with pytest.raises(InputError, match="interrupted"):
        load(out, tiny)
    before = load(out, tiny, unfinished=True)
    table = measuring.measure(tiny, "cpu", out, **settings)
    assert len(visited) == 2 * (len(parts(tiny)) + 6) + 1
    assert table.complete and load(out, tiny) == table
    for key, found in before.parts_ms.items():
        assert table.parts_ms[key][: len(found)] == found
    with pytest.raises(InputError, match="another device"):
        measuring.measure(tiny, "cpu", out, batch=2, **settings)
    with pytest.raises(InputError, match="other networks"):
        measuring.measure(tiny, "cpu", out, **settings | {"visits": 3})


@pytest.mark.parametrize("name", devices.PACKAGES)
def test_engines_time_networks_too(tiny, name):
    pytest.importorskip(devices.PACKAGES[name])
    part = parts(tiny)["stem"]
    run = devices.open_device(name, 1).load(part.module(), part.input_shape, 3)
    assert run().shape == (3, 8, 4, 4)
    timing = devices.time_ms(run, 5, "wall")
    assert timing.median_ms > 0 and timing.iqr_ms >= 0 and timing.runs == 5


def test_the_fastest_row_counts_and_short_runs_fill_it(monkeypatch):
    now, spent = 0.0, 0

    def run() -> None:
        nonlocal now, spent
        spent += 1
        now += 0.005 if spent < 80 else 0.002 if spent < 120 else 0.009

    monkeypatch.setattr(devices, "WARM_UP", 0)
    monkeypatch.setitem(devices.CLOCKS, "made up", lambda: now)
    monkeypatch.setattr(devices.time, "perf_counter", lambda: now)
    timing = devices.time_ms(run, 10, "made up", rows=4, row_seconds=0.2)
    # rows of 40 runs at 5 ms, 40 at 5, 40 to 100 at 2, and at least 23 at 9
    assert timing.median_ms == pytest.approx(2) and 40 < timing.runs <= 100
    spent = 0
    assert devices.time_ms(run, 10, "made up").runs == 10


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "abacus"], "unknown device"),
        (["--clock", "cpu", "--threads", "2"], "one thread"),
        (["--clock", "sun"], "unknown clock"),
        (["--runs", "1"], "quartile"),
        (["--networks", "2"], "too little"),
        (["--batch", "0"], "batch"),
        (["--space", "nowhere"], "space"),
    ],
)
def test_what_cannot_be_measured_is_refused(monkeypatch, capsys, tmp_path, options, words):
    out = tmp_path / "t.json"
    assert call(monkeypatch, "measure", "--out", out, *options) == 2
    assert words in capsys.readouterr().err
    assert not out.exists()


def test_the_command_measures_and_says_how_well(monkeypatch, capsys, tmp_path, tiny):
    words = ("--space", tmp_path / "tiny.toml", "--device", "cpu", "--runs", "2", "--visits", "1")
    assert (
        call(monkeypatch, "measure", *words, "--networks", "6", "--out", tmp_path / "t.json", "--json") == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["held_out"] == 2 and found["held_out_error"] >= 0
