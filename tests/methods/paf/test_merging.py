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

from networks import images, settle
from tightrope.errors import BudgetError, BundleError
from tightrope.graph import trace
from tightrope.lower import lower
from tightrope.methods.paf import PafMethod
from tightrope.place import place
from tightrope.program import Program
from tightrope.runtimes.ckks import CKKS
from tightrope.runtimes.ckks.planning import plan
from tightrope.runtimes.plain import ranges
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
@pytest.mark.parametrize("seed", range(4))
def test_no_choice_within_the_levels_loses_less(seed: int, squares: bool) -> None:
    torch.manual_seed(seed)
    rng, runtime = np.random.default_rng(seed), CKKS(squares=squares)
    net, data = settle(nn.Sequential(Random(rng, sites=3), nn.Conv2d(WIDTH, 1, 3))), images(SHAPE)
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
