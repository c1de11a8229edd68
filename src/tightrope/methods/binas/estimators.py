"""Accuracy estimators fitted to a table of measured sub-networks, and how well they rank others.

`linear`, `bilinear` and `quadratic` are ridge regressions in closed form, solved in the dual: with one-hot
x = [z; beta], the features z (x) beta of the bilinear predictor and x (x) x of the quadratic one (3,600 and
65,025 in the published space, Nayman et al. 2021) have the kernels (z.z')(beta.beta') and (x.x')^2. Their
weight beside the linear features and the ridge are those of the least leave-one-out error, which is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from scipy import stats
from torch import nn

from tightrope.errors import InputError
from tightrope.methods.binas.objective import Formula, encode, split
from tightrope.methods.binas.space import Space
from tightrope.solve.staged import Choice
from tightrope.types import FloatArray

WEIGHTS = (0.0, 0.003, 0.03, 0.3)  # of the products beside the linear features
RIDGES = tuple(10.0**k for k in np.arange(-3, 4.5, 0.5))
LEAST = 8  # networks to fit to


@dataclass(frozen=True)
class Estimator:
    """`formula`: of estimators that the exact solvers can optimise."""

    name: str
    predict: Callable[[Sequence[Choice]], FloatArray]
    formula: Formula | None = None


@dataclass(frozen=True)
class Agreement:
    """Of predicted and measured accuracies; `mse` in the squared unit of the accuracies."""

    kendall: float
    spearman: float
    pearson: float
    mse: float


def agreement(predicted: FloatArray, measured: FloatArray) -> Agreement:
    """Raises InputError where one of the two does not vary: then no rank is."""
    if len(measured) < 2 or np.ptp(predicted) == 0 or np.ptp(measured) == 0:
        raise InputError("networks that are all alike have no order", got=f"{len(measured)} networks")
    return Agreement(
        float(stats.kendalltau(predicted, measured).statistic),
        float(stats.spearmanr(predicted, measured).statistic),
        float(stats.pearsonr(predicted, measured).statistic),
        float(((predicted - measured) ** 2).mean()),
    )


def of_formula(name: str, space: Space, gain: Formula) -> Estimator:
    return Estimator(name, lambda choices: gain.predict(space, choices), gain)


def linear(space: Space, choices: Sequence[Choice], accuracy: FloatArray) -> Estimator:
    """The separable formula, fitted instead of put together from contributions."""
    return of_formula("linear", space, _formula(space, choices, accuracy, (0.0,)))


def bilinear(space: Space, choices: Sequence[Choice], accuracy: FloatArray) -> Estimator:
    return of_formula("bilinear", space, _formula(space, choices, accuracy, WEIGHTS))


def quadratic(space: Space, choices: Sequence[Choice], accuracy: FloatArray) -> Estimator:
    x = np.hstack(encode(space, choices))
    plain = x @ x.T
    dual, weight = _best(plain, plain**2, accuracy, WEIGHTS)
    bias = float(accuracy.mean() - (_mixed(plain, plain**2, weight) @ dual).mean())

    def predict(others: Sequence[Choice]) -> FloatArray:
        inner = np.hstack(encode(space, others)) @ x.T
        found: FloatArray = bias + _mixed(inner, inner**2, weight) @ dual
        return found

    return Estimator("quadratic", predict)


def mlp(
    space: Space,
    choices: Sequence[Choice],
    accuracy: FloatArray,
    *,
    width: int = 128,
    steps: int = 400,
    seed: int = 0,
) -> Estimator:
    """Three hidden ReLU layers, trained on four fifths; the state that is best on the last fifth is kept."""
    if len(choices) < LEAST:
        raise _few(len(choices))
    mean, scale = float(accuracy.mean()), float(accuracy.std()) or 1.0
    order = np.random.default_rng(seed).permutation(len(choices))
    x = torch.tensor(np.hstack(encode(space, choices))[order], dtype=torch.float32)
    y = torch.tensor((accuracy[order] - mean) / scale, dtype=torch.float32)
    held = len(choices) // 5
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        sizes = (x.shape[1], width, width, width)
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU(), nn.Dropout(0.2)]
        net = nn.Sequential(*layers, nn.Linear(width, 1), nn.Flatten(0))
        optimizer = torch.optim.Adam(net.parameters(), lr=2e-3, weight_decay=1e-4)
        best, state = float("inf"), net.state_dict()
        for _ in range(steps):
            optimizer.zero_grad()
            loss = nn.functional.smooth_l1_loss(net.train()(x[held:]), y[held:])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            with torch.no_grad():
                error = float(nn.functional.smooth_l1_loss(net.eval()(x[:held]), y[:held]))
            if error < best:
                best, state = error, {k: v.clone() for k, v in net.state_dict().items()}
    net.load_state_dict(state)

    def predict(others: Sequence[Choice]) -> FloatArray:
        given = torch.tensor(np.hstack(encode(space, others)), dtype=torch.float32)
        with torch.inference_mode():
            found: FloatArray = net.eval()(given).double().numpy() * scale + mean
        return found

    return Estimator("mlp", predict)


FITTED: tuple[Callable[[Space, Sequence[Choice], FloatArray], Estimator], ...] = (
    linear,
    bilinear,
    quadratic,
    mlp,
)


def _formula(
    space: Space, choices: Sequence[Choice], accuracy: FloatArray, weights: Sequence[float]
) -> Formula:
    z, beta = encode(space, choices)
    of_z, of_beta = z @ z.T, beta @ beta.T
    dual, weight = _best(of_z + of_beta, of_z * of_beta, accuracy, weights)
    pair = weight * (z.T * dual) @ beta if weight else None
    block, depth = split(space, np.concatenate([z.T @ dual, beta.T @ dual]))
    found = Formula(0.0, depth, block, pair)
    base = float(accuracy.mean() - found.predict(space, choices).mean())
    return Formula(base, found.depth, found.block, pair)


def _best(
    plain: FloatArray, products: FloatArray, y: FloatArray, weights: Sequence[float]
) -> tuple[FloatArray, float]:
    """(dual coefficients, which sum to 0; weight of the products) of the least leave-one-out error."""
    n = len(y)
    if n < LEAST:
        raise _few(n)
    centre = np.eye(n) - 1 / n
    least, found = np.inf, (np.zeros(n), 0.0)
    for weight in weights:
        values, vectors = np.linalg.eigh(centre @ _mixed(plain, products, weight) @ centre)
        values, turned = np.maximum(values, 0), vectors.T @ (y - y.mean())
        for ridge in RIDGES:
            left = ridge / (values + ridge)  # of each component, what the fit leaves
            # 1 - leverage: the constant, which is fitted freely, has its own 1 / n
            kept = (vectors**2 * left).sum(1) - 1 / n
            error = float(((vectors @ (left * turned) / np.maximum(kept, 1e-9)) ** 2).mean())
            if error < least:
                least, found = error, (vectors @ (turned / (values + ridge)), weight)
    return found


def _mixed(plain: FloatArray, products: FloatArray, weight: float) -> FloatArray:
    return plain + weight * products


def _few(count: int) -> InputError:
    return InputError("too few measured networks to fit to", got=count, allowed=f"{LEAST} or more")
