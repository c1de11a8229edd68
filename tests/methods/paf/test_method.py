"""The method: exact choices along the graph, losses and histograms that are what they say, bad input."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from networks import Chain, Concat, Images, TinyResNet, conv, images, mobile, plan_for, settle
from tightrope.errors import BudgetError, BundleError, InputError, TraceError
from tightrope.graph import trace
from tightrope.lower import lower
from tightrope.methods.paf import PafMethod
from tightrope.methods.paf.controls import controls
from tightrope.methods.paf.library import names
from tightrope.methods.paf.options import TARGETS, fit, matching
from tightrope.methods.paf.scales import compare
from tightrope.methods.paf.sites import Seen, histograms
from tightrope.nn import PolynomialActivation
from tightrope.place import place
from tightrope.rewrite import apply
from tightrope.runtimes.ckks import CKKS
from tightrope.runtimes.mpc import MPC
from tightrope.runtimes.plain import Plain, evaluate, ranges
from tightrope.solve.select import cheapest, price, select
from tightrope.types import Budget, Cost, Problem, Step, Table

FEW = {"samples": 16, "batch_size": 8, "polynomials": "degree *"}


@st.composite
def problems(draw) -> Problem:
    """Random graphs of up to 7 values with joins, up to 4 of them sites; small integer levels."""
    count = draw(st.integers(1, 7))
    steps = []
    for k in range(count):
        before = ["", *(f"v{i}" for i in range(k))]
        last = before[-1]  # so that every value is read
        more = draw(st.lists(st.sampled_from(before), max_size=1))
        steps.append(Step(f"v{k}", tuple(dict.fromkeys([last, *more])), draw(st.integers(0, 2))))
    chosen = draw(st.lists(st.sampled_from(range(count)), min_size=1, max_size=4, unique=True))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tables = []
    for k in sorted(chosen):
        levels = np.sort(generator.choice(np.arange(1, 9), draw(st.integers(1, 3)), replace=False))[::-1]
        labels = tuple(list(reversed(names()))[: len(levels)])
        loss = np.sort(generator.random(len(levels)))[None, :]
        cost = {"drelus": np.zeros(len(levels)), "ckks_levels": levels.astype(np.float64)}
        tables.append(Table(f"v{k}", labels, loss, cost))
    return Problem(tuple(tables), Cost(), Cost(ckks_levels=100), {}, tuple(steps))


@settings(max_examples=60)
@given(problems(), st.floats(0, 1))
def test_the_choice_along_a_graph_is_the_best_of_all(problem, share):
    every = [
        price(problem, {t.site: np.array([k]) for t, k in zip(problem.tables, ks, strict=True)})
        for ks in itertools.product(*(range(len(t.labels)) for t in problem.tables))
    ]
    least, most = (pick(e.cost.ckks_levels for e in every) for pick in (min, max))
    assert cheapest(problem, "ckks_levels") == least
    limit = int(least + share * (most - least))
    budget = Budget.parse(f"ckks_levels<={limit}")
    best = select(problem, budget)
    assert best.cost.ckks_levels <= limit
    assert best.loss == best.bound
    assert best.loss == pytest.approx(min(e.loss for e in every if e.cost.ckks_levels <= limit))
    for name, picked in controls(problem, budget).items():
        assert price(problem, picked).cost.ckks_levels <= limit, name
        assert price(problem, picked).loss >= best.loss - 1e-12, name
    if least >= 1:
        with pytest.raises(BudgetError, match="no choice meets"):
            select(problem, Budget.parse(f"ckks_levels<={least - 1}"))


def test_levels_planned_are_the_levels_of_the_circuit(trained):
    """Priced by ckks: merged layers, residual joins and all."""
    net, data = trained
    graph, method, runtime = trace(net, (1, 14, 14)), PafMethod(**FEW), CKKS()
    problem = method.measure(graph, data, cost=runtime.pricing(), workdir=None, progress=lambda *_: None)
    for limit in (6, 8, 9, 11, 12, 16, 18):
        _, plan = plan_for(method, net, data, "ckks_levels<=15")
        chosen = select(problem, Budget.parse(f"ckks_levels<={limit}"))
        rewritten = apply(net, replace(plan, choices=method.choices(problem, chosen.picked)))
        program = ranges(lower(rewritten, (1, 14, 14)), [data.x[:8]])
        assert runtime.exact(program).ckks_levels == chosen.cost.ckks_levels <= limit
    with pytest.raises(BudgetError, match="ckks_levels<=6 or more"):  # 6 layers, and 5 sites of degree 1
        select(problem, Budget.parse("ckks_levels<=5"))


@pytest.mark.parametrize("make", [lambda: TinyResNet(channels=1, classes=10, width=4), Concat, mobile])
def test_levels_are_those_of_the_circuit_whatever_stands_beside_what(make):
    """A degree 1 costs none, beside layers, joins, pools and concatenations; what is computed stays right."""
    torch.manual_seed(0)
    net, runtime = settle(make()), CKKS()
    channels = next(m.in_channels for m in net.modules() if isinstance(m, nn.Conv2d))
    data = images((channels, 8, 8))
    graph, method = trace(net, (channels, 8, 8)), PafMethod(**FEW | {"polynomials": "degree [123]"})
    problem = method.measure(graph, data, cost=runtime.pricing(), workdir=None, progress=lambda *_: None)
    generator = np.random.default_rng(0)
    for _ in range(4):
        picked = {t.site: generator.integers(0, len(t.labels), 1) for t in problem.tables}
        rewritten = place(graph, method.choices(problem, picked), method.rewrite).module
        program = ranges(lower(rewritten, (channels, 8, 8)), [data.x])
        levels = price(problem, picked).cost.ckks_levels
        assert runtime.exact(program).ckks_levels == levels
        with runtime.open(program, "simulate") as session:
            got, _ = session.run(data.x[:2].numpy())
        expected = evaluate(program, data.x[:2]).numpy()
        assert np.abs(got - expected).max() < 1e-10 * max(1.0, np.abs(expected).max())


def test_under_mpc_bytes_are_priced_and_levels_are_not(trained):
    net, data = trained
    graph, method, pricing = trace(net, (1, 14, 14)), PafMethod(**FEW), MPC().pricing()
    problem = method.measure(graph, data, cost=pricing, workdir=None, progress=lambda *_: None)
    assert problem.path == () and problem.baseline.ckks_levels == 0
    assert problem.baseline.online_bytes == sum(
        c.online_bytes for c in pricing.prices(lower(net, (1, 14, 14))).values()
    )
    least = cheapest(problem, "offline_bytes")
    chosen = select(problem, Budget.parse(f"offline_bytes<={1.1 * least}"))
    assert least <= chosen.cost.offline_bytes <= 1.1 * least < problem.baseline.offline_bytes
    with pytest.raises(BudgetError, match="no option is priced"):
        select(problem, Budget.parse("ckks_levels<=20"))


def test_under_mpc_what_it_refuses_is_not_offered_and_the_rest_runs(trained):
    net, data = trained
    graph, pricing = trace(net, (1, 14, 14)), MPC().pricing()
    method = PafMethod(**FEW | {"polynomials": "degree 3;7,7,13;15,15,27"})
    problem = method.measure(graph, data, cost=pricing, workdir=None, progress=lambda *_: None)
    assert {t.labels for t in problem.tables} == {("7,7,13", "degree 3")}
    dearest = {t.site: np.array([0]) for t in problem.tables}
    rewritten = place(graph, method.choices(problem, dearest), method.rewrite).module
    program = ranges(lower(rewritten, (1, 14, 14)), [data.x[:64]])
    assert pricing.exact(program).online_bytes > problem.baseline.online_bytes
    with MPC().open(program, "simulate") as session:
        got, _ = session.run(data.x[:4].numpy())
    expected = evaluate(program, data.x[:4]).numpy()
    assert np.abs(got - expected).max() < 2**-6 * np.abs(expected).max()
    with pytest.raises(TraceError, match="not the digits"):
        only = replace(method, polynomials="15,15,27")
        only.measure(graph, data, cost=pricing, workdir=None, progress=lambda *_: None)


def test_a_loss_is_the_change_of_the_outputs_with_one_site_replaced(trained):
    net, data = trained
    method = PafMethod(**FEW)
    problem, plan = plan_for(method, net, data, "ckks_levels<=15")
    table = problem.tables[2]
    picked = {t.site: np.array([0]) for t in problem.tables}
    choice = method.choices(problem, picked)[table.site]
    alone = apply(net, replace(plan, choices={table.site: choice}))
    x = data.x[:16]
    with torch.no_grad():
        expected = (alone(x) - net(x)).square().mean(1).mean()
    assert table.loss[0, 0] == pytest.approx(float(expected), rel=1e-4)


def test_scales_are_tried_on_images_that_did_not_set_them():
    """u - 0.4 u^2 is negative from 2.5 scales on; of a batch the largest input is one scale."""
    act = PolynomialActivation([[0.0, 1.0, -0.4]], gated=False, scale=1.5)
    net = nn.Sequential(nn.Flatten(), act, nn.Linear(1, 2, bias=False))
    with torch.no_grad():
        net[-1].weight.copy_(torch.tensor([[1.0], [-1.0]]))
    x = torch.tensor([0.5, 0.5, 2.0, 9.0]).reshape(4, 1, 1, 1)
    data = Images(x, torch.zeros(4, dtype=torch.long))
    told: list[tuple[str, int, int]] = []
    accuracies, beyond = compare(net, data, 2, lambda *part: told.append(part))
    assert "of 4 validation images" in accuracies
    assert "75.0% are right with the plan's static scales" in accuracies
    assert "100.0% with those of each batch of 2" in accuracies
    assert beyond.startswith("2 of 4 inputs") and "at 1 of 1 sites, most at 1 (2)" in beyond
    passes = ("trial of static scales", "trial of scales of each batch")
    assert told == [(what, done, 4) for what in passes for done in (2, 4)]
    few = Images(x[:2], data.y[:2])
    assert compare(net, few, 2, lambda *_: None)[1].startswith("none of 2 inputs")


@pytest.mark.parametrize("last", [nn.Conv2d(1, 2, 1), nn.Flatten(2)])
def test_scales_are_tried_where_outputs_are_not_classes(last):
    """Maps, and sequences whose length is that of a batch, which would compare with labels."""
    act = PolynomialActivation([[0.0, 1.0, -0.4]], gated=False, scale=1.5)
    x = torch.tensor([[0.5, 0.5], [0.5, 2.0], [9.0, -9.0], [1.0, 1.0]]).reshape(4, 1, 1, 2)
    told: list[tuple[str, int, int]] = []
    notes = compare(
        nn.Sequential(act, last), Images(x, torch.zeros(4).long()), 2, lambda *part: told.append(part)
    )
    assert notes[0].startswith("4 validation images") and "have no accuracy" in notes[0]
    assert notes[1].startswith("3 of 8 inputs") and "at 1 of 1 sites, most at 0 (3)" in notes[1]
    assert told == [("trial of static scales", done, 4) for done in (2, 4)]


def test_histograms_count_every_input_of_every_site():
    net, data = settle(TinyResNet()), images((3, 8, 8))
    graph = trace(net, (3, 8, 8))
    seen: dict[str, list[np.ndarray]] = {s.name: [] for s in graph.sites}
    for s in graph.sites:
        graph.module.get_submodule(s.name).register_forward_pre_hook(
            lambda m, args, name=s.name: seen[name].append(args[0].numpy().copy())
        )
    found = histograms(graph, graph.sites, (x for x, _ in data.batches("train", 4)))
    for s in graph.sites:
        values = np.concatenate([v.reshape(-1) for v in seen[s.name]])
        histogram = found[s.name].histogram
        assert found[s.name].largest == np.abs(values).max() <= histogram.limit
        expected, _ = np.histogram(values, len(histogram.counts), (-histogram.limit, histogram.limit))
        assert histogram.counts.sum() == values.size
        assert np.abs(np.cumsum(histogram.counts - expected)).max() <= 2  # floats at the edge of a bin
        by_channel = np.moveaxis(np.concatenate(seen[s.name]), 1, -1).reshape(-1, s.shape[0])
        assert np.allclose(found[s.name].mean, by_channel.mean(0), atol=1e-6)
        assert np.allclose(found[s.name].deviation, by_channel.std(0), atol=1e-6)


@pytest.mark.parametrize("kind", TARGETS)
def test_every_kind_of_activation_is_fitted_better_by_higher_degrees(kind):
    seen = Seen.of(np.random.default_rng(0).standard_normal((20_000, 1)) * 2)
    rmse = [fit(kind, f"degree {n}", seen, 8.0).rmse for n in (2, 3, 5, 7)]
    assert all(b <= 1.01 * a for a, b in itertools.pairwise(rmse))  # a hundredth counts beyond the inputs
    assert rmse[-1] < 0.12


def test_activations_that_no_composite_makes_are_fitted_directly():
    class Act(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Chain(
                conv(3, 4), nn.SiLU(), conv(4, 4), nn.Hardswish(), conv(4, 4), nn.ReLU6(),
                conv(4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
            )  # fmt: skip

        def forward(self, x):
            return self.net(x)

    net, data = settle(Act()), images((3, 8, 8))
    method = PafMethod(samples=16, polynomials="degree 3;degree 7;f1 g2")
    problem, plan = plan_for(method, net, data, "ckks_levels<=12")
    offered = {t.site: t.labels for t in problem.tables}
    assert [len(labels) for labels in offered.values()] == [2, 2, 2, 3]
    assert plan.predicted.ckks_levels <= 12
    assert "f1 g2" in method.controls(problem, Budget.parse("ckks_levels<=15"))
    with pytest.raises(InputError, match="no polynomial can stand"):
        plan_for(PafMethod(samples=16, polynomials="f1 g2"), net, data, "ckks_levels<=30")


def test_a_max_pool_becomes_rounds_that_have_polynomials_of_their_own():
    """Two rounds, each a level for the difference and those of its polynomial; the sums merge onwards."""
    steps = (conv(3, 4), nn.ReLU(), nn.MaxPool2d(2), conv(4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net, data = settle(Chain(*steps, nn.Linear(4, 5))), images((3, 8, 8))
    graph, method, runtime = trace(net, (3, 8, 8)), PafMethod(**FEW), CKKS()
    problem = method.measure(graph, data, cost=runtime.pricing(), workdir=None, progress=lambda *_: None)
    assert [t.site.rsplit(".", 3)[-1] for t in problem.tables[1:]] == ["act", "act"]
    _, plan = plan_for(method, net, data, "ckks_levels<=6")
    chosen = select(problem, Budget.parse("ckks_levels<=8"))
    rewritten = apply(net, replace(plan, choices=method.choices(problem, chosen.picked)))
    program = ranges(lower(rewritten, (3, 8, 8)), [data.x])
    assert "max_pool" not in {op.kind for op in program.ops}
    assert runtime.exact(program).ckks_levels == chosen.cost.ckks_levels <= 8
    with pytest.raises(BudgetError, match="ckks_levels<=6 or more"):  # counted one by one it would be 7
        select(problem, Budget.parse("ckks_levels<=5"))
    least = apply(
        net,
        replace(
            plan, choices=method.choices(problem, select(problem, Budget.parse("ckks_levels<=6")).picked)
        ),
    )
    program = ranges(lower(least, (3, 8, 8)), [data.x])
    with runtime.open(program, "simulate") as session:
        assert session.run(data.x[:1].numpy())[1].total.ckks_levels == 6
    average, _ = plan_for(PafMethod(**FEW, max_pool="avg"), net, data, "ckks_levels<=3")
    assert len(average.tables) == 1
    padded = settle(Chain(conv(3, 4), nn.MaxPool2d(3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)))
    with pytest.raises(InputError, match="needs inputs that are not negative"):
        plan_for(method, padded, data, "ckks_levels<=30")


@pytest.mark.parametrize("square", [True, False])
def test_the_notes_say_what_a_max_pool_costs(square):
    """Levels are those that the circuit has more than the one without the pool."""

    def deepest(pool: nn.Module, tail: nn.Module, names: tuple[str, ...]) -> tuple[int, tuple[str, ...]]:
        steps = (conv(3, 4), nn.ReLU(), pool, tail, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        method = PafMethod(**FEW | {"polynomials": "f1 g2;degree 7;degree 2", "max_pool": kind})
        net, data, runtime = settle(Chain(*steps)), images((3, 8, 8)), CKKS(squares=square)
        graph = trace(net, (3, 8, 8))
        problem = method.measure(graph, data, cost=runtime.pricing(), workdir=None, progress=lambda *_: None)
        picked = {t.site: np.array([t.labels.index(n)]) for t, n in zip(problem.tables, names, strict=False)}
        rewritten = place(graph, method.choices(problem, picked), method.rewrite).module
        program = ranges(lower(rewritten, (3, 8, 8)), [data.x])
        return runtime.exact(program).ckks_levels, method.notes(problem, picked)

    kind = "tournament"
    without, nothing = deepest(nn.Identity(), conv(4, 4), ("degree 7",))
    assert nothing == ()
    for rounds, multiplications in (("degree 2", "f1 g2"), 7), (("degree 7", "degree 7"), 8):
        found, notes = deepest(nn.MaxPool2d(2), conv(4, 4), ("degree 7", *rounds))
        assert notes == (
            f"parts.2: replaced by tournament, in rounds of {', '.join(rounds)}: levels {found - without}, "
            f"ciphertext multiplications {multiplications}",
        )
    kind = "avg"
    for tail, more in ((conv(4, 4), 0), (nn.ReLU(), 1)):
        without, _ = deepest(nn.Identity(), tail, ("degree 7", "degree 7"))
        found, notes = deepest(nn.MaxPool2d(2), tail, ("degree 7", "degree 7"))
        assert found - without == more
        assert notes == (
            "parts.2: replaced by avg pool: levels 0 where it merges with a layer, else 1, "
            "ciphertext multiplications 0",
        )


def test_the_notes_count_levels_where_none_are_priced_and_leave_out_what_has_no_polynomial():
    bare = {"drelus": np.zeros(1)}
    tables = tuple(Table(f"p.rounds.{k}.act", ("a7",), np.zeros((1, 1)), bare) for k in range(2))
    meta = {"prepared": {"p": {"replace": "tournament"}, "q": {"replace": "tournament"}}}
    notes = PafMethod().notes(Problem(tables, Cost(), Cost(), meta), {t.site: np.array([0]) for t in tables})
    assert notes == (
        "p: replaced by tournament, in rounds of a7, a7: levels 16, ciphertext multiplications 22",
        "q: replaced by tournament, none of whose rounds has a polynomial",
    )


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"samples": 0}, "samples"),
        ({"polynomials": "degree 9"}, "matches no polynomial"),
        ({"margin": 0.0}, "margin"),
        ({"seed": -1}, "seed"),
        ({"max_pool": "min"}, "max_pool"),
    ],
)
def test_bad_settings_are_refused(config, what):
    with pytest.raises(InputError, match=what):
        PafMethod(**config)


def test_patterns_of_names():
    assert matching("degree *;a7") == ("a7", *(f"degree {n}" for n in (7, 5, 3, 2, 1)))
    assert matching("*") == tuple(name for name in reversed(names()) if name != "herpn")
    assert matching("degree [12]; herpn") == ("herpn", "degree 2", "degree 1")


def test_an_interrupted_measurement_goes_on_and_other_images_or_settings_begin_anew(tmp_path):
    graph, data = trace(settle(TinyResNet()), (3, 8, 8)), images((3, 8, 8))
    method = PafMethod(**FEW)

    def measure(method, data, done):
        def progress(what, k, of):
            done.append(what)
            if done.count("loss of every polynomial") == stop:
                raise KeyboardInterrupt

        return method.measure(graph, data, cost=Plain(), workdir=tmp_path, progress=progress)

    stop, first, second, third, changed = 2, [], [], [], []
    with pytest.raises(KeyboardInterrupt):
        measure(method, data, first)
    assert len(list(tmp_path.iterdir())) == 2
    stop = -1
    problem = measure(method, data, second)
    sites = len(problem.tables)
    assert second.count("loss of every polynomial") == sites - 2
    again = measure(method, data, third)
    assert "loss of every polynomial" not in third
    assert [t.loss.tobytes() for t in again.tables] == [t.loss.tobytes() for t in problem.tables]
    fresh = method.measure(graph, data, cost=Plain(), workdir=None, progress=lambda *_: None)
    assert [t.loss.tobytes() for t in fresh.tables] == [t.loss.tobytes() for t in problem.tables]
    measure(replace(method, margin=2.0), data, changed)
    assert changed.count("loss of every polynomial") == sites
    changed.clear()
    measure(replace(method, seed=1), data, changed)
    assert changed.count("loss of every polynomial") == sites
    (tmp_path / f"{problem.tables[0].site}.npz").write_bytes(b"PK")
    with pytest.raises(BundleError, match="damaged"):
        measure(replace(method, seed=1), data, [])
