"""What may stand at a site: every polynomial of the library, fitted to what the site sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from tightrope.errors import InputError, near
from tightrope.methods.paf import library
from tightrope.methods.paf.hermite import quadratics, residual, widened
from tightrope.methods.paf.library import HERMITE, MINIMAX, Array, Paf, paf
from tightrope.methods.paf.sites import Seen
from tightrope.methods.paf.tuning import measure, tune
from tightrope.types import Json

TRIES, FLOOR = 3, 0.01  # changed starts of a fit; weight where the histogram is empty


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))


TARGETS: dict[str, Callable[[Array], Array]] = {  # kind of a site -> what it computes
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "hard_swish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "silu": lambda x: x * _sigmoid(x),
}


def matching(patterns: str) -> tuple[str, ...]:
    """The polynomials that match one of the shell patterns, separated by semicolons, the dearest first.

    Those with coefficients per channel are only matched by their whole name. Raises InputError for a pattern
    that matches none.
    """
    names, found = library.names(), set[str]()
    shared = [name for name in names if name not in HERMITE]
    for pattern in patterns.split(";"):
        hits = {name for name in shared if fnmatchcase(name, pattern.strip())}
        hits |= HERMITE.keys() & {pattern.strip()}
        if not hits:
            raise InputError(
                "the pattern matches no polynomial", got=repr(pattern.strip()), allowed=near(pattern, names)
            )
        found |= hits
    return tuple(name for name in reversed(names) if name in found)


def offered(kind: str, names: Sequence[str], compared: bool) -> tuple[str, ...]:
    """Those of `names` that can stand for an activation of this kind.

    A composite approximates the sign, of which ReLU is made, and the Hermite expansions are those of ReLU;
    the others are fitted directly. Where two values are `compared`, in the rounds of a max-pool, there is no
    degree 1: it would make an average pool of that, which `max_pool` says outright, and its levels depend on
    the rounds beside it.
    """
    found = (name for name in names if kind == "relu" or not (paf(name).gated or name in HERMITE))
    return tuple(name for name in found if not (compared and paf(name).degrees == (1,)))


@dataclass(frozen=True)
class Fitted:
    """y = p(x / scale), or x * p(x / scale) if `gated`: the coefficients of p's stages, ascending, each
    (degree + 1,) or per channel (C, degree + 1).

    `rmse` is in units of the activation on the histogram, or per channel on normal distributions.
    """

    stages: tuple[Array, ...]
    gated: bool
    scale: float
    rmse: float

    def choice(self, name: str) -> dict[str, Json]:
        """What a plan says of a site."""
        stages = [stage.tolist() for stage in self.stages]
        return {"polynomial": name, "stages": stages, "gated": self.gated, "scale": self.scale}

    def to_json(self) -> dict[str, Json]:
        return self.choice("") | {"rmse": self.rmse}


def structure(name: str) -> tuple[tuple[int, ...], bool]:
    """Degrees of the stages, and whether the last is multiplied with the input: all that decides a cost."""
    return paf(name).degrees, paf(name).gated


def fit(kind: str, name: str, seen: Seen, scale: float) -> Fitted:
    """The polynomial `name` for an activation of this kind, tuned to what it sees.

    Minimax composites stay as they are: within 2^-10 and better there is nothing to tune.
    """
    if name in HERMITE:
        deviation = widened(seen.mean, seen.deviation, scale)
        stage = quadratics(seen.mean, deviation) * scale ** np.arange(3)
        return Fitted((stage,), False, scale, residual(seen.mean, deviation))
    target = TARGETS[kind]
    start = paf(name)
    if name in MINIMAX:
        found = measure(start, seen.histogram, scale, target)
    else:
        starts = [start] if name == "a7" or not start.gated else [start, paf(name, published=True)]
        found = tune(starts, seen.histogram, scale, target, tries=TRIES, floor=FLOOR)
    return Fitted(_inserted(found.paf, scale), start.gated, scale, found.rmse)


def _inserted(found: Paf, scale: float) -> tuple[Array, ...]:
    """As a layer holds it: (1 + sign) / 2 in the gate, and in units of the activation where there is none."""
    *first, last = (np.array(stage) for stage in found.stages)
    if not found.gated:
        return (*first, scale * last)
    half = last / 2
    half[0] += 0.5
    return (*first, half)
