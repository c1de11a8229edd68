"""The separable accuracy formula fitted to single evaluations: an image, its random network, right or wrong.

Contributions average over all that differs between evaluations but one decision. A ridge regression on all
decisions at once, of what `contributions.evaluations` measured anyway, leaves less noise: a block counts at
every depth that reaches it, and what the data do not show is drawn to nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from tightrope.methods.binas.accuracies import Accuracies
from tightrope.methods.binas.contributions import PERCENT
from tightrope.methods.binas.objective import Formula, split
from tightrope.methods.binas.objective import encode as encode_choices
from tightrope.methods.binas.paths import Paths
from tightrope.methods.binas.rows import Hits
from tightrope.methods.binas.space import Space
from tightrope.types import FloatArray

FOLDS = 5  # of images
RIDGES = tuple(10.0**k for k in np.arange(0, 6.5, 0.5))


def encode(space: Space, paths: Paths) -> FloatArray:
    """(N, all blocks x options + all depths): as `objective.encode`, of paths."""
    depths, options, K = paths.depths.numpy(), paths.options.numpy(), len(space.options)
    places = [(s, b) for s, stage in enumerate(space.stages) for b in range(stage.depths[-1])]
    x = np.zeros((len(paths), len(places) * K))
    for i, (s, b) in enumerate(places):
        there = np.flatnonzero(depths[:, s] > b)
        x[there, i * K + options[there, i]] = 1
    beta = [depths[:, s, None] == np.array(stage.depths) for s, stage in enumerate(space.stages)]
    return np.hstack([x, *beta])


def regression(space: Space, table: Hits, paths: Iterable[Paths]) -> Formula:
    """Of hits (passes, images) and the paths of each pass, in points of %; the ridge has the least error on
    images that were left out.
    """
    folds = _of_passes(space, table, paths)
    return _fitted(space, table, folds, folds)


def pooled(space: Space, table: Hits, paths: Iterable[Paths], networks: Accuracies) -> Formula:
    """`regression` on the evaluations of whole networks as well, each of which counts as one of `table` does.
    `networks` saw the first of the images; the ridge has the least error on images of `table` that were left
    out.
    """
    folds = _of_passes(space, table, paths)
    return _fitted(space, table, folds, folds + _of_networks(space, networks))


def _fitted(space: Space, table: Hits, judged: FloatArray, folds: FloatArray) -> Formula:
    errors = [sum(_error(folds, judged, f, ridge) for f in range(FOLDS)) for ridge in RIDGES]
    weights, bias = _solve(folds.sum(0), RIDGES[int(np.argmin(errors))])
    block, depth = split(space, weights)
    return Formula(PERCENT * float(table.mean(dtype=np.float64)) + bias, depth, block)


def _of_passes(space: Space, table: Hits, paths: Iterable[Paths]) -> FloatArray:
    """Per fold, the sums of products of [features, 1, target] over all evaluations."""
    passes, images = table.shape
    of_image = table.mean(0, dtype=np.float64)
    fold = np.arange(images) % FOLDS
    grams: list[FloatArray] = []
    for row, path in zip(table, paths, strict=True):
        x = encode(space, path)
        y = PERCENT * (row - of_image) * passes / (passes - 1)  # an image's mean contains the evaluation
        whole = np.hstack([x, np.ones((images, 1)), y[:, None]])
        grams.append(np.stack([whole[fold == f].T @ whole[fold == f] for f in range(FOLDS)]))
    total: FloatArray = np.sum(grams, 0)
    return total


def _of_networks(space: Space, networks: Accuracies) -> FloatArray:
    """As `_of_passes`: every network has seen all of some images."""
    count, images = networks.hits.shape
    x = np.hstack([*encode_choices(space, networks.choices), np.ones((count, 1))])
    y = PERCENT * (networks.hits - networks.hits.mean(0, dtype=np.float64)) * count / (count - 1)
    fold, grams = np.arange(images) % FOLDS, []
    for f in range(FOLDS):
        some = y[:, fold == f]
        target = some.sum(1)
        gram = np.block([[x.T @ x * some.shape[1], (x.T @ target)[:, None]], [target @ x, np.zeros(1)]])
        gram[-1, -1] = (some**2).sum()
        grams.append(gram)
    return np.stack(grams)


def _solve(gram: FloatArray, ridge: float) -> tuple[FloatArray, float]:
    """(weights, constant) from the sums of products of [features, 1, target]; the constant is free."""
    n, mean, target = gram[-2, -2], gram[-2, :-2] / gram[-2, -2], gram[-2, -1] / gram[-2, -2]
    centred = gram[:-2, :-2] - n * np.outer(mean, mean)
    weights = np.linalg.solve(centred + ridge * np.eye(len(mean)), gram[:-2, -1] - n * mean * target)
    return weights, float(target - mean @ weights)


def _error(folds: FloatArray, judged: FloatArray, left_out: int, ridge: float) -> float:
    """Of the squares on one fold of `judged`, fitted to the others of `folds`."""
    weights, bias = _solve(folds.sum(0) - folds[left_out], ridge)
    whole = np.array([*weights, bias, -1.0])
    return float(whole @ judged[left_out] @ whole)
