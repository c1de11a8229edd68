"""block_relu from measurement to plan: options, costs, resuming, preparation, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from block_relus import SMALL, measure
from networks import NETWORKS, Chain, TinyResNet, conv, images, plan_for, settle
from tightrope.errors import InputError, TraceError
from tightrope.graph import trace
from tightrope.lower import lower
from tightrope.methods.block_relu import BlockReluMethod
from tightrope.methods.block_relu.patches import label, parse, patches, sides
from tightrope.nn import BlockReLU
from tightrope.nn.block_relu import tiles
from tightrope.place import place
from tightrope.program import base_cost
from tightrope.rewrite import apply
from tightrope.runtimes.plain import Plain
from tightrope.solve.select import select
from tightrope.types import Budget, total

SHAPE = (3, 8, 8)


def partition(patch: tuple[int, int], size: tuple[int, int]) -> bytes:
    """Which tile each pixel belongs to; what a patch does to a channel depends on nothing else."""
    rows, columns = np.arange(size[0]) // patch[0], np.arange(size[1]) // patch[1]
    return (rows[:, None] * size[1] + columns).tobytes()


@settings(max_examples=150)
@given(st.integers(1, 64), st.integers(1, 64))
def test_the_patches_of_any_map(H, W):
    found = patches((H, W))
    assert found[0] == (1, 1) and found[-1] == (0, 0)
    real = found[:-1]
    assert all(1 <= p <= H and 1 <= q <= W for p, q in real)
    assert len({partition(patch, (H, W)) for patch in real}) == len(real)
    counted = [len(set(np.frombuffer(partition(patch, (H, W)), np.int64))) for patch in real]
    assert [tiles(patch, (H, W)) for patch in real] == counted
    assert counted == sorted(counted, reverse=True)
    assert tiles((0, 0), (H, W)) == 0
    assert {(H, W), (H, 1), (1, W)} <= set(real)
    assert len(real) <= 10 * 10
    assert [parse(label(patch)) for patch in found] == found
    assert patches((W, H))[:-1] != real or H == W or len(real) < 3


@given(st.integers(1, 200))
def test_sides_are_the_smallest_for_their_tile_count(n):
    found = sides(n, most=n)
    assert found == [s for s in range(1, n + 1) if s == 1 or -(-n // s) < -(-n // (s - 1))]
    thinned = sides(n)
    assert set(thinned) <= set(found) and {1, n} <= set(thinned) and len(thinned) <= 10


@pytest.mark.parametrize("name", NETWORKS)
def test_options_are_priced_by_their_tiles(name):
    net = settle(NETWORKS[name]())
    problem = measure(net, images(SHAPE))
    graph = trace(net, SHAPE)
    sites = graph.match("*", ("relu", "relu6"))
    assert [t.site for t in problem.tables] == [s.name for s in sites]
    for site, table in zip(sites, problem.tables, strict=True):
        each = 2 if site.kind == "relu6" else 1
        size = site.shape[1:]
        assert table.loss.shape == (site.shape[0], len(table.labels))
        assert list(table.cost["drelus"]) == [each * tiles(parse(text), size) for text in table.labels]
        assert (table.loss >= 0).all() and (table.loss > 0).any()
        assert table.loss[:, 0] == pytest.approx(0, abs=1e-10)  # 1x1 is what the network does
    program = lower(net, SHAPE)
    assert problem.baseline == total(map(base_cost, program.ops))
    chosen = {s.name for s in sites}
    assert problem.fixed == total(base_cost(op) for op in program.ops if op.name not in chosen)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("residual", {}),
        ("residual", {"sites": "layer1.*,stem.2"}),
        ("concat", {}),
        ("mobile", {}),
        ("mobile", {"max_pool": "avg"}),
        ("mobile", {"relu6": "relu"}),
        ("mobile", {"max_pool": "avg", "relu6": "relu", "sites": "*.2"}),
    ],
)
@pytest.mark.parametrize("share", [90, 60])
def test_planned_costs_are_executed_costs(name, changes, share):
    net = settle(NETWORKS[name]())
    method = replace(SMALL, **changes)
    problem, plan = plan_for(method, net, images(SHAPE), f"drelus<={share}%")
    assert plan.predicted.drelus <= share / 100 * plan.baseline.drelus
    program = lower(apply(net, plan), SHAPE)
    executed = total(map(base_cost, program.ops))
    assert executed.drelus == plan.predicted.drelus
    assert (executed.macs, executed.weights) == (plan.predicted.macs, plan.predicted.weights)
    every = trace(net, SHAPE).match("*", ("relu", "relu6"))
    assert (len(problem.tables) < len(every)) == ("sites" in changes)


def test_choices_are_the_picked_patches():
    net = settle(TinyResNet())
    problem = measure(net, images(SHAPE))
    picked = {t.site: np.arange(len(t.loss)) % len(t.labels) for t in problem.tables}
    choices = SMALL.choices(problem, picked)
    assert {site: [label(tuple(p)) for p in c["patches"]] for site, c in choices.items()} == {
        t.site: [t.labels[k] for k in picked[t.site]] for t in problem.tables
    }


class Ineffective(nn.Module):
    """Its second activation reaches the outputs only through weights of 0, or not at all."""

    def __init__(self, dead: bool) -> None:
        super().__init__()
        self.first, self.second, self.fc = conv(3, 4), conv(4, 4), nn.Linear(8, 5)
        self.relu, self.odd = nn.ReLU(), nn.ReLU()
        self.dead = dead
        with torch.no_grad():
            self.fc.weight[:, 4:] = 0

    def forward(self, x):
        y = self.relu(self.first(x))
        z = self.odd(self.second(y))
        if self.dead:
            return self.fc(torch.cat([y, y], 1).mean((2, 3)).view(z.size(0), -1))
        return self.fc(torch.cat([y, z], 1).mean((2, 3)))


@pytest.mark.parametrize("dead", [False, True])
def test_a_site_without_influence_is_refused(tmp_path, dead):
    net, data = Ineffective(dead).eval(), images(SHAPE)
    for _ in range(2):  # nothing saved makes it pass the second time
        with pytest.raises(
            TraceError, match=r"no influence(.|\n)*odd(.|\n)*--weights(.|\n)*zero_init_last(.|\n)*--sites"
        ):
            measure(net, data, workdir=tmp_path)
    assert len(measure(net, data, replace(SMALL, sites="relu")).tables) == 1


def test_a_site_that_never_cuts_is_free_to_remove():
    """ReLU after ReLU changes nothing, so its removal is rightly predicted to cost nothing."""
    net = Chain(conv(3, 4), nn.ReLU(), nn.ReLU(), conv(4, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    problem = measure(net, images(SHAPE))
    assert (problem.tables[0].loss[:, -1] > 0).any()
    assert problem.tables[1].loss == pytest.approx(0, abs=1e-10)


def test_notes_say_which_relus_go_for_nothing():
    """Channel 1 of the first site is never active, channel 2 of the second one is not used."""
    net = settle(TinyResNet())
    with torch.no_grad():
        net.stem[1].weight[1], net.stem[1].bias[1] = 0, -1
        net.layer1.conv2.weight[:, 2] = 0
    problem = measure(net, images(SHAPE))
    first, second = problem.tables[0].site, problem.tables[1].site
    assert problem.meta["silent"][first] == [1] and problem.meta["silent"][second] == [2]
    keep = {t.site: np.zeros(len(t.loss), dtype=np.intp) for t in problem.tables}
    kept = SMALL.notes(problem, keep)
    silent = [site for site, channels in problem.meta["silent"].items() if channels]
    assert [note.split(":")[0] for note in kept] == silent  # said whatever was chosen
    assert kept[0].startswith(f"{first}: nothing of channel 1 reached")
    assert kept[1].startswith(f"{second}: nothing of channel 2 reached")
    best = select(problem, Budget.parse("drelus<=100%"))
    dropped = problem.baseline.drelus - best.cost.drelus
    assert dropped >= 64 + 63  # an unused channel, and a silent one that a patch keeps at one sign
    free = SMALL.notes(problem, best.picked)[-1]
    assert "of the DReLUs that go have no predicted loss" in free
    assert 64 + 63 <= float(free.split()[0].replace(",", "")) <= dropped
    tight = select(problem, Budget.parse("drelus<=30%"))
    assert (
        f"{problem.baseline.drelus - tight.cost.drelus:,.0f} of" not in SMALL.notes(problem, tight.picked)[-1]
    )


def test_infeasible_budgets_are_found_before_any_image_is_read():
    data = images(SHAPE)

    def refuse(problem):
        assert not any(t.loss.any() for t in problem.tables)
        assert problem.baseline.drelus > 0
        raise InputError("too small")

    with pytest.raises(InputError, match="too small"):
        SMALL.measure(
            trace(settle(TinyResNet()), SHAPE), data, cost=Plain(), workdir=None,
            progress=lambda *_: None, feasible=refuse,
        )  # fmt: skip
    assert not data.reads


def test_preparation_replaces_pools_and_clips_as_torch_would():
    net = settle(NETWORKS["mobile"]())
    method = replace(SMALL, max_pool="avg", relu6="relu")
    graph = trace(net, SHAPE)
    prepared = method.preparation(graph)
    new = {"max_pool": "avg_pool", "relu6": "relu"}
    assert prepared == {s.name: {"replace": new[s.kind]} for s in graph.sites}
    assert SMALL.preparation(graph) == {}
    x = torch.randn(2, *SHAPE)
    steps = [F.relu if isinstance(s, nn.ReLU6) else s for s in net.steps]
    steps[6] = lambda y: F.avg_pool2d(y, 3, 2, 1)
    with torch.no_grad():
        torch.testing.assert_close(place(graph, prepared, method.rewrite).module(x), Chain(*steps)(x))


def test_a_plan_keeps_the_preparation():
    net = settle(NETWORKS["mobile"]())
    method = replace(SMALL, relu6="relu", max_pool="avg", sites="parts.2")
    _, plan = plan_for(method, net, images(SHAPE), "drelus<=90%")
    modules = dict(apply(net, plan).named_modules())
    kinds = {name: type(modules[name]) for name in ("parts.2", "parts.5", "parts.6")}
    assert kinds == {"parts.2": BlockReLU, "parts.5": nn.ReLU, "parts.6": nn.AvgPool2d}
    assert modules["parts.2"].upper is None
    _, plan = plan_for(SMALL, net, images(SHAPE), "drelus<=90%")
    assert dict(apply(net, plan).named_modules())["parts.2"].upper == 6


def test_a_dilated_max_pool_has_no_average_pool():
    net = Chain(conv(3, 4), nn.ReLU(), nn.MaxPool2d(2, dilation=2), conv(4, 2)).eval()
    with pytest.raises(InputError, match=r"dilated max-pool(.|\n)*parts.2"):
        measure(net, images(SHAPE), replace(SMALL, max_pool="avg"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 0}, "samples must be positive"),
        ({"batch_size": -1}, "batch_size must be positive"),
        ({"directions": 0}, "directions must be positive"),
        ({"max_pool": "min"}, r"unknown choice for max_pool(.|\n)*min(.|\n)*avg"),
        ({"relu6": "drop"}, "unknown choice for relu6"),
    ],
)
def test_wrong_configurations_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        BlockReluMethod(**changes)


def test_a_network_without_the_sites_asked_for_is_refused():
    with pytest.raises(InputError, match="matches no site"):
        measure(settle(TinyResNet()), images(SHAPE), replace(SMALL, sites="layer9*"))
    with pytest.raises(InputError, match="no site of kind"):
        measure(Chain(conv(3, 2)), images(SHAPE))


def test_fast_losses_rank_as_exact_ones_on_a_trained_network(trained):
    net, data = trained
    problem = measure(net, data, BlockReluMethod(samples=64, verify=80))
    assert problem.meta["verified"] == 80
    assert problem.meta["spearman"] > 0.9
    assert problem.meta["passes"] * 50 < problem.meta["exact_passes"]
    plain, repaired = (np.array(problem.meta[key]) for key in ("check", "check_repaired"))
    assert plain.shape == repaired.shape == (80, 2)
    assert np.isfinite(plain).all() and (plain >= 0).all()
    assert np.isfinite(repaired).all() and (repaired >= 0).all()
    assert (repaired[:, 0] <= plain[:, 0]).all() and (repaired[:, 0] < 0.99 * plain[:, 0]).any()
    assert problem.meta["spearman_repaired"] > 0.9
    assert problem.meta["spearman_repaired"] != problem.meta["spearman"]


@pytest.mark.parametrize("repair", [False, True])
def test_losses_in_a_tuned_network_are_its_errors_against_the_original(trained, repair):
    """At the last site what follows is linear, so the estimate must equal brute force."""
    net, data = trained
    method = replace(SMALL, repair=repair)
    problem, plan = plan_for(method, net, data, "drelus<=20%")
    tuned = apply(net, plan)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in tuned.parameters():
            p.mul_(1 + 0.1 * torch.randn(p.shape, generator=generator))
    graph = trace(net, plan.input_shape)
    found = method.remeasure(problem, graph, tuned, data)
    table = found.tables[-1]
    assert all(
        np.array_equal(a.cost["drelus"], b.cost["drelus"])
        for a, b in zip(found.tables, problem.tables, strict=True)
    )
    before = [list(p) for p in plan.choices[table.site]["patches"]]
    with torch.no_grad():
        x = data.x[: method.samples]
        wanted = graph.module(x).double()
        for c, k in ((0, 0), (1, 3), (2, len(table.labels) - 1), (3, 7)):
            shapes = [*before[:c], list(parse(table.labels[k])), *before[c + 1 :]]
            tuned.set_submodule(table.site, BlockReLU(shapes))
            errors = []
            for factor in (1.0, 0.0, 2.0) if repair else (1.0,):
                scale = torch.ones(len(shapes)).index_fill(0, torch.tensor([c]), float(factor))
                hook = tuned.get_submodule(table.site).register_forward_hook(
                    lambda m, a, y, scale=scale: y * scale[:, None, None]
                )
                errors.append(float((tuned(x).double() - wanted).square().mean()))
                hook.remove()
            least = errors[0]
            if repair:  # of the parabola through the three: its vertex
                one, zero, two = errors
                bend, slope = (zero + two) / 2 - one, (4 * one - 3 * zero - two) / 2
                least = zero - slope**2 / (4 * bend)
            assert table.loss[c, k] == pytest.approx(least, rel=1e-4)
