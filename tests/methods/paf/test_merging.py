"""Levels where layers merge: the choice is the best of all, counted by the steps that the runtime plans."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ckks_toys import ToyCKKS
from networks import images, settle
from tightrope.errors import BudgetError, BundleError
from tightrope.graph import trace
from tightrope.lower import lower
from tightrope.methods.paf import PafMethod
from tightrope.nn import PolynomialActivation
from tightrope.place import place
from tightrope.program import Program
from tightrope.runtimes.ckks import CKKS
from tightrope.runtimes.ckks.planning import plan
from tightrope.runtimes.plain import evaluate, ranges
from tightrope.solve.select import price, select
from tightrope.types import Budget, Cost, Problem, Step, Table

WIDTH, SHAPE = 2, (2, 4, 4)


class Random(nn.Module):
    """Residual blocks in random order of their parts: activations before layers or after joins, pools
    between joins, joins of joins."""

    def __init__(self, rng: np.random.Generator, sites: int) -> None:
        super().__init__()
        kinds = ["relu"] * sites + list(rng.choice(["conv", "conv", "pool", "join", "join", "norm"], 7))
        self.kinds = [str(kind) for kind in rng.permutation(kinds)]
        self.back = [int(k) for k in rng.integers(1, 5, len(kinds))]
        parts = {
            "conv": lambda: nn.Conv2d(WIDTH, WIDTH, 3, 1, 1),
            "pool": lambda: nn.AvgPool2d(3, 1, 1),
            "norm": lambda: nn.BatchNorm2d(WIDTH),
            "relu": nn.ReLU,
            "join": nn.Identity,
        }
        self.parts = nn.ModuleList(parts[kind]() for kind in self.kinds)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for kind, back, part in zip(self.kinds, self.back, self.parts, strict=True):
            earlier = values[-min(back, len(values))]
            values.append(values[-1] + earlier if kind == "join" else part(values[-1]))
        return values[-1]


class Shared(nn.Module):
    """An activation after an activation; other branches read what the first one reads, and it may be a layer
    or not: `first`. `join`: it is also added to what the activations make of it, which comes later."""

    def __init__(self, first: nn.Module, join: bool) -> None:
        super().__init__()
        self.first, self.join = first, join
        self.r1, self.r2, self.r3 = (nn.ReLU() for _ in range(3))
        self.c, self.last = nn.Conv2d(WIDTH, WIDTH, 3, 1, 1), nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        late = self.r2(self.r1(a))
        return self.last((late + a if self.join else late) + self.r3(self.c(a)))


def shared(first: str, join: bool) -> nn.Module:
    return Shared(nn.AvgPool2d(3, 1, 1) if first == "pool" else nn.Conv2d(WIDTH, WIDTH, 3, 1, 1), join)


def depth(program: Program, squares: bool) -> int:
    steps = plan(program.public(), squares)
    steps.materialise(program.output)
    return max(spent for _, spent in steps.real.values())


def everything(problem: Problem) -> list[dict[str, np.ndarray]]:
    options = (range(len(t.labels)) for t in problem.tables)
    sites = [t.site for t in problem.tables]
    return [
        {site: np.array([k]) for site, k in zip(sites, ks, strict=True)} for ks in itertools.product(*options)
    ]


@pytest.mark.parametrize("squares", [True, False])
@pytest.mark.parametrize("made", [*range(4), *itertools.product(("pool", "conv"), (False, True))])
def test_no_choice_within_the_levels_loses_less(made: int | tuple[str, bool], squares: bool) -> None:
    seed = made if isinstance(made, int) else 0
    torch.manual_seed(seed)
    rng, runtime = np.random.default_rng(seed), CKKS(squares=squares)
    first = Random(rng, sites=3) if isinstance(made, int) else shared(*made)
    net, data = settle(nn.Sequential(first, nn.Conv2d(WIDTH, 1, 3))), images(SHAPE)
    graph, method = trace(net, SHAPE), PafMethod(samples=8, batch_size=8, polynomials="degree [123]")
    problem = method.measure(graph, data, cost=runtime.pricing(), workdir=None, progress=lambda *_: None)
    losses = (rng.integers(0, 100, (1, len(t.labels))).astype(np.float64) for t in problem.tables)
    problem = replace(
        problem, tables=tuple(replace(t, loss=loss) for t, loss in zip(problem.tables, losses, strict=True))
    )
    found = []
    for picked in everything(problem):
        program = lower(place(graph, method.choices(problem, picked), method.rewrite).module, SHAPE)
        found.append((depth(program, squares), price(problem, picked).loss))
        assert price(problem, picked).cost.ckks_levels == found[-1][0]
    least, most = (pick(levels for levels, _ in found) for pick in (min, max))
    for limit in range(least, most + 1):
        best = select(problem, Budget.parse(f"ckks_levels<={limit}"))
        assert best.loss == best.bound == min(loss for levels, loss in found if levels <= limit)
        assert best.cost.ckks_levels <= limit
    program = lower(place(graph, method.choices(problem, best.picked), method.rewrite).module, SHAPE)
    program = ranges(program, [data.x[:8]]).public()
    assert runtime.exact(program).ckks_levels == best.cost.ckks_levels
    with pytest.raises(BudgetError, match=f"ckks_levels<={least} or more"):
        select(problem, Budget.parse(f"ckks_levels<={least - 1}"))


def test_how_steps_merge_is_saved_and_checked(tmp_path: Path) -> None:
    steps = (Step("a", ("",), 1, ("layer",)), Step("b", ("a",), 0, ("none", "square", "sum")))
    table = Table("b", ("x", "y", "z"), np.zeros((1, 3)), {"ckks_levels": np.array([2.0, 1.0, 0.0])})
    file = tmp_path / "problem.npz"
    Problem((table,), Cost(), Cost(), {}, steps).save(file)
    loaded = Problem.load(file)
    assert loaded.path == steps
    picked = [price(loaded, {"b": np.array([k])}).cost.ckks_levels for k in range(3)]
    assert picked == [3, 3, 1]  # the square is made to be the output, the factor is a part of the layer

    def with_path(path: list[object]) -> Problem:
        with np.load(file) as data:
            arrays = dict(data)
        head = json.loads(bytes(arrays["head"])) | {"path": path}
        np.savez(
            tmp_path / "other.npz", **arrays | {"head": np.frombuffer(json.dumps(head).encode(), np.uint8)}
        )
        return Problem.load(tmp_path / "other.npz")

    older = with_path([["a", [""], 1], ["b", ["a"], 0]])  # of before ops merged: what a site takes is its own
    assert [price(older, {"b": np.array([k])}).cost.ckks_levels for k in range(3)] == [3, 2, 1]
    with pytest.raises(BundleError, match="damaged"):
        with_path([["a", [""], 1, ["somehow"]], ["b", ["a"], 0]])


@pytest.mark.parametrize(
    ("first", "join", "degrees", "levels"),
    [
        ("pool", False, (2, 3, 15), 6),  # the convolution that also reads the pool merges with it, else 7
        ("conv", True, (2, 3, 3), 6),  # the first convolution waits to be added; `last` merges with the sum
        ("conv", True, (2, 3, 1), 6),  # as do the other two, made while the activations take their levels
    ],
)
def test_what_a_quadratic_reads_stays_a_sum_for_others(
    first: str, join: bool, degrees: tuple[int, ...], levels: int
) -> None:
    torch.manual_seed(0)
    net = shared(first, join)
    for site, degree in zip(("r1", "r2", "r3"), degrees, strict=True):
        stage = [0.1, 0.5, 0.25, *[0.01] * degree][: degree + 1]
        setattr(net, site, PolynomialActivation([stage], gated=False))
    x = torch.randn(8, *SHAPE)
    program = ranges(lower(net.eval(), SHAPE), [x])
    assert depth(program, True) == CKKS().exact(program.public()).ckks_levels == levels
    with ToyCKKS().open(program, "simulate") as session:
        found, measured = session.run(x.numpy())
    assert measured.total.ckks_levels == measured.config["levels_planned"] == levels
    np.testing.assert_allclose(found, evaluate(program, x).numpy(), atol=1e-11)
