"""MACs and parameters of every block of a space, and of its fixed parts: counted, not measured."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tightrope.methods.binas.space import Space
from tightrope.models.mobilenet import divisible
from tightrope.solve.staged import Choice
from tightrope.types import FloatArray

METRICS = ("macs", "weights")


def block_counts(
    inputs: int, side: int, channels: int, stride: int, expansion: float, kernel: int, se: float
) -> tuple[int, int]:
    """(MACs, parameters) of an inverted residual on a `side` x `side` map; batch-norm has 2 per channel."""
    inner = divisible(inputs * expansion)
    after = -(-side // stride)
    hidden = divisible(se * inner) if se else 0
    expand, depth, project = inputs * inner, inner * kernel**2, inner * channels
    excite = 2 * inner * hidden
    macs = expand * side**2 + (depth + project) * after**2 + excite
    weights = expand + depth + project + excite + (hidden + inner if se else 0) + 4 * inner + 2 * channels
    return macs, weights


def fixed_counts(space: Space) -> tuple[int, int]:
    """(MACs, parameters) of what no choice changes: stem, first block, last convolution, head, classifier."""
    side = -(-space.input_shape[1] // space.stride)
    last = side
    for stage in space.stages:
        last = -(-last // stage.stride)
    stem = space.input_shape[0] * space.stem * 9
    first = space.stem * 9 + space.stem * space.first
    end = space.stages[-1].channels * space.last
    head, classifier = space.last * space.head, space.head * space.classes
    macs = (stem + first) * side**2 + end * last**2 + head + classifier
    norms = 2 * (space.stem + space.stem + space.first + space.last)
    return macs, stem + first + end + head + classifier + norms + space.head + space.classes


def count_tables(space: Space) -> dict[str, dict[tuple[int, int], FloatArray]]:
    """Per metric and (stage, position) a price for every option."""
    found: dict[str, dict[tuple[int, int], FloatArray]] = {metric: {} for metric in METRICS}
    for s, b, inputs, side in space.places():
        stage = space.stages[s]
        rows = [
            block_counts(
                inputs, side, stage.channels, stage.stride if b == 0 else 1, o.expansion, o.kernel, o.se
            )
            for o in space.options
        ]
        for k, metric in enumerate(METRICS):
            found[metric][s, b] = np.array([row[k] for row in rows], dtype=np.float64)
    return found


def counts(space: Space, choice: Choice) -> Mapping[str, float]:
    """MACs and parameters of one network."""
    tables = count_tables(space)
    return {
        metric: fixed
        + sum(tables[metric][s, b][k] for s, stage in enumerate(choice) for b, k in enumerate(stage))
        for metric, fixed in zip(METRICS, fixed_counts(space), strict=True)
    }
