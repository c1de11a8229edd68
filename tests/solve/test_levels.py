"""Levels and bootstraps: against every assignment there is, on small graphs."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tightrope.errors import BudgetError, InputError
from tightrope.solve.levels import (
    Action,
    Chain,
    Node,
    evaluate,
    frontier,
    least_cost,
    least_loss,
    only,
    uniform,
)

LABELS = ("cheap", "middle", "dear")


def site(name: str, inputs: tuple[str, ...], rng: np.random.Generator, top: int, timed: bool) -> Node:
    actions = []
    for k, label in enumerate(LABELS[: rng.integers(1, 4)]):
        ms: float | tuple[float, ...] = float(rng.integers(1, 5))
        if timed:
            ms = tuple(float(m) for m in np.cumsum(rng.integers(0, 3, top + 1)))
        actions.append(Action(label, 1 + k, float(rng.integers(0, 6)), ms))
    return Node(name, inputs, tuple(actions), int(rng.integers(1, 3)))


@st.composite
def graphs(draw):
    """A few nodes, each read by a later one; joins where two values meet."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    top, timed = draw(st.integers(3, 8)), draw(st.booleans())
    nodes: list[Node] = []
    open_values = [""]
    for k in range(draw(st.integers(1, 4))):
        first = open_values[int(rng.integers(len(open_values)))]
        inputs = (first,)
        if len(open_values) > 1 and rng.random() < 0.5:
            inputs = tuple(dict.fromkeys((first, open_values[int(rng.integers(len(open_values)))])))
        if rng.random() < 0.6 or len(open_values) > 2:
            open_values = [v for v in open_values if v not in inputs]
        nodes.append(site(f"n{k}", inputs, rng, top, timed))
        open_values.append(f"n{k}")
    nodes.append(Node("out", tuple(v for v in open_values if v) or ("",), (Action("join", 0),)))
    refresh = draw(st.one_of(st.none(), st.integers(2, min(5, top))))
    chain = Chain(top=top, refresh=refresh, least=draw(st.integers(0, 1)), bootstrap_ms=3.0)
    return tuple(nodes), chain


def everything(nodes, chain):
    """Every choice of actions, bootstraps and levels that is possible."""
    choices = [range(len(node.actions)) for node in nodes]
    boots = [(False, True) if chain.refresh is not None else (False,) for _ in nodes]
    for picked in product(*choices):
        chosen = {node.name: k for node, k in zip(nodes, picked, strict=True)}
        for flags in product(*boots):
            booted = [node.name for node, flag in zip(nodes, flags, strict=True) if flag]
            timed = any(isinstance(a.ms, tuple) for node in nodes for a in node.actions)
            yield from _runs(nodes, chain, chosen, booted, timed)


def _runs(nodes, chain, chosen, booted, timed, level=None, left=None):
    level, left = level or {}, left or {"": chain.top}
    if len(level) == len(nodes):
        yield evaluate(nodes, chain, chosen, booted, level)
        return
    node = nodes[len(level)]
    most, need = min(left[v] for v in node.inputs), node.actions[chosen[node.name]].levels
    for at in range(need if timed else most, most + 1):
        made = at - need
        if made < 0 or (node.name in booted and made < chain.least):
            continue
        after = chain.refresh if node.name in booted else made
        yield from _runs(
            nodes, chain, chosen, booted, timed, level | {node.name: at}, left | {node.name: after}
        )


def pareto(found, metric):
    points = sorted({(getattr(a, metric), a.loss) for a in found})
    kept = []
    for cost, loss in points:
        if not kept or loss < kept[-1][1]:
            kept.append((cost, loss))
    return kept


@settings(max_examples=150, deadline=None)
@given(graphs(), st.sampled_from(["ms", "bootstraps", "levels"]))
def test_the_frontier_is_that_of_every_assignment(case, metric):
    nodes, chain = case
    if metric == "levels" and chain.refresh is not None:
        with pytest.raises(InputError, match="levels"):
            frontier(nodes, chain, metric)
        return
    want = pareto(list(everything(nodes, chain)), metric)
    if not want:
        with pytest.raises(BudgetError, match="levels"):
            frontier(nodes, chain, metric)
        return
    curve = frontier(nodes, chain, metric)
    assert [(getattr(a, metric), a.loss) for a in curve] == want
    for a in curve:
        assert a == evaluate(nodes, chain, a.chosen, a.bootstrapped, a.level)
        assert least_loss(nodes, chain, metric, getattr(a, metric)).loss == a.loss
        assert getattr(least_cost(nodes, chain, metric, a.loss), metric) == getattr(a, metric)
    with pytest.raises(BudgetError):
        least_loss(nodes, chain, metric, want[0][0] - 1)
    with pytest.raises(BudgetError):
        least_cost(nodes, chain, metric, want[-1][1] - 1)


def resnet(blocks: int, rng: np.random.Generator, tuples: int = 0) -> tuple[Node, ...]:
    """conv, act, then blocks of conv, act, conv, join, act; and a head."""
    pafs = (("quadratic", 2, 8.0, 1.0), ("f1 g2", 6, 3.0, 4.0), ("a7", 7, 1.0, 9.0), ("deep", 9, 0.7, 12.0))

    def act(name: str, source: str) -> Node:
        w = float(rng.uniform(0.2, 2.0))
        return Node(name, (source,), tuple(Action(n, lv, w * loss, ms) for n, lv, loss, ms in pafs))

    nodes = [Node("stem", ("",), (Action("conv", 1, 0.0, 2.0),)), act("a", "stem")]
    last = "a"
    for k in range(blocks):
        c1, c2 = f"{k}.conv1", f"{k}.conv2"
        nodes += [Node(c1, (last,), (Action("conv", 1, 0.0, 2.0),)), act(f"{k}.act1", c1)]
        nodes += [Node(c2, (f"{k}.act1",), (Action("conv", 1, 0.0, 2.0),))]
        nodes += [Node(f"{k}.add", (c2, last), (Action("add", 0),)), act(f"{k}.act2", f"{k}.add")]
        last = f"{k}.act2"
    return (*nodes, Node("head", (last,), (Action("fc", 1, 0.0, 1.0),)))


@pytest.mark.parametrize("metric", ["ms", "bootstraps"])
def test_no_uniform_choice_is_better_at_equal_cost(metric):
    """A network of ResNet-20's shape; each uniform choice gets its own best bootstraps."""
    nodes = resnet(9, np.random.default_rng(3))
    chain = Chain(top=10, refresh=10, bootstrap_ms=40.0)
    curve = frontier(nodes, chain, metric)
    strictly = 0
    for label in ("quadratic", "f1 g2", "a7", "deep"):
        fixed = frontier(only(nodes, uniform(nodes, label)), chain, metric)[0]
        ours = [a for a in curve if getattr(a, metric) <= getattr(fixed, metric)][-1]
        assert ours.loss <= fixed.loss + 1e-9
        strictly += ours.loss < fixed.loss - 1e-9
    assert strictly >= 1


def test_levels_without_a_bootstrap_are_those_of_the_deepest_path():
    nodes = resnet(1, np.random.default_rng(0))
    curve = frontier(nodes, Chain(top=40), "levels")
    assert curve[0].levels == 1 + 2 + 1 + 2 + 1 + 2 + 1 and curve[-1].levels == 4 + 3 * 9
    a = least_loss(nodes, Chain(top=18), "levels", 18)
    assert a.levels <= 18 and not a.bootstrapped
    assert a.loss == pytest.approx(least_loss(nodes, Chain(top=40), "levels", 18).loss)


def test_what_is_no_graph_is_refused():
    act = (Action("a", 1),)
    for nodes in ((), (Node("a", ("b",), act),), (Node("a", ("",), ()),), (Node("a", (), act),)):
        with pytest.raises(InputError):
            frontier(nodes, Chain(top=3), "levels")
    with pytest.raises(InputError, match="read"):
        frontier((Node("a", ("",), act), Node("b", ("",), act)), Chain(top=3), "levels")
    with pytest.raises(InputError, match="bootstrap"):
        frontier((Node("a", ("",), act),), Chain(top=3, refresh=4), "ms")
    with pytest.raises(InputError, match="every level"):
        frontier((Node("a", ("",), (Action("a", 1, 0.0, (1.0,)),)),), Chain(top=3), "ms")
    with pytest.raises(InputError, match="offers"):
        uniform((Node("a", ("",), (Action("x", 1), Action("y", 1))),), "z")
    with pytest.raises(BudgetError, match="bootstrap"):
        evaluate((Node("a", ("",), act),), Chain(top=3), {"a": 0}, ["a"])
    with pytest.raises(BudgetError, match="where:   a"):
        evaluate((Node("a", ("",), act),), Chain(top=0), {"a": 0})


MERGES = ("none", "layer", "sum", "same", "square", "product")


@settings(max_examples=100, deadline=None)
@given(graphs(), st.integers(0, 2**32 - 1))
def test_merging_actions_are_chosen_as_among_all(case, seed):
    nodes, _ = case
    rng, chain = np.random.default_rng(seed), Chain(top=20)
    nodes = [
        replace(
            node,
            actions=tuple(
                replace(a, merge=MERGES[rng.integers(6 if len(node.inputs) == 1 else 3)], ms=0.0)
                for a in node.actions
            ),
        )
        for node in nodes
    ]
    found = [
        evaluate(nodes, chain, dict(zip((n.name for n in nodes), picked, strict=True)))
        for picked in product(*(range(len(node.actions)) for node in nodes))
    ]
    curve = frontier(nodes, chain, "levels")
    assert [(a.levels, a.loss) for a in curve] == pareto(found, "levels")
    least = curve[0].levels
    assert frontier(nodes, Chain(top=least), "levels")[0].levels == least
    with pytest.raises(BudgetError):
        frontier(nodes, Chain(top=least - 1), "levels")


def test_what_waits_to_be_merged_takes_a_level_once_it_is_read():
    """A second layer or a polynomial makes the first layer; a pool of a ciphertext is made to be read."""
    conv, pool = (Action(merge, n, merge=merge) for merge, n in (("layer", 1), ("sum", 0)))
    square, cube = Action("square", 1, merge="square"), Action("cube", 2)

    def levels(*actions: Action) -> int:
        values = ("", *(f"n{k}" for k in range(len(actions))))
        nodes = [Node(f"n{k}", (values[k],), (a,)) for k, a in enumerate(actions)]
        return frontier(nodes, Chain(top=20), "levels")[0].levels

    assert levels(conv) == levels(pool) == levels(pool, pool) == levels(pool, conv) == levels(conv, pool) == 1
    assert levels(conv, pool, conv) == 2 and levels(conv, square, conv) == 3 == levels(conv, cube)
    assert levels(conv, cube, pool) == 4 == levels(conv, cube, pool, conv)
    assert levels(square) == 2 and levels(conv, square, square, conv) == 5  # a sum between two squares


@pytest.mark.parametrize(("degree", "levels"), [(0, 2), (1, 2), (2, 3), (3, 4)])
def test_a_layer_is_made_while_the_sum_that_reads_it_waits_for_another_input(degree: int, levels: int):
    conv, join, last = (Action("", n, merge=merge) for n, merge in ((1, "layer"), (0, "sum"), (1, "layer")))
    power = Action("", degree)
    nodes = [
        Node("branch", ("",), (conv,)),
        Node("late", ("",), (power,)),
        Node("join", ("branch", "late"), (join,)),
        Node("last", ("join",), (last,)),
    ]
    assert frontier(nodes, Chain(top=20), "levels")[0].levels == levels


def test_equal_sums_are_equal_in_any_order():
    """0.1 + 0.2 + 0.3 and 0.3 + 0.2 + 0.1 differ in the last bit of a float: that is no gain."""

    def node(name, before, *actions):
        return Node(name, (before,), tuple(Action("", 1, loss, ms) for loss, ms in actions))

    middle = node("b", "a", (0.2, 1.0))
    nodes = (node("a", "", (0.1, 5.0), (0.3, 3.0)), middle, node("c", "b", (0.3, 1.0), (0.1, 4.0)))
    curve = frontier(nodes, Chain(top=3), "ms")
    assert [(a.ms, a.loss) for a in curve] == [(5.0, 0.8), (7.0, 0.6), (10.0, 0.4)]
    nodes = (node("a", "", (5.0, 0.1), (3.0, 0.3)), middle, node("c", "b", (1.0, 0.3), (4.0, 0.1)))
    nodes = (nodes[0], node("b", "a", (1.0, 0.2)), nodes[2])
    curve = frontier(nodes, Chain(top=3), "ms")  # the cheaper of equal costs is that of the smaller loss
    assert [(a.ms, a.loss) for a in curve] == [(0.4, 10.0), (0.6, 7.0), (0.8, 5.0)]


def test_an_infinite_loss_is_taken_only_where_nothing_finite_fits():
    acts = (Action("dear", 2, 1e300), Action("cheap", 1, float("inf")), Action("broken", 1, float("nan")))
    nodes = (Node("a", ("",), acts), Node("b", ("a",), acts))
    assert [(a.levels, a.chosen["a"] + a.chosen["b"]) for a in frontier(nodes, Chain(top=4), "levels")] == [
        (2, 2), (3, 1), (4, 0),
    ]  # fmt: skip
