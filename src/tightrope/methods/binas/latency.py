"""The latency table of a space on one device, and what it predicts: the bilinear formula of BINAS.

    latency = intercept + slope * (t_stem + t_head + sum_s sum_{b < d_s} t[s, b, c_sb])

t are times of the parts run alone; slope and intercept are fitted to random whole networks, because an engine
neither starts as often in a whole network nor copies as much; what is left is measured on other networks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tightrope.errors import InputError
from tightrope.forms import Amount, mismatch, parse
from tightrope.methods.binas.parts import FIXED, keys, of_choice, parts
from tightrope.methods.binas.space import Space
from tightrope.models.arch import Architecture
from tightrope.solve.staged import Choice
from tightrope.types import SCHEMA, FloatArray, atomic_write, check_schema

METRIC = "online_ms"
KIND = "latency table"


@dataclass(frozen=True)
class Timing:
    """Of `runs` runs in a row, of one batch."""

    median_ms: float
    iqr_ms: float
    runs: int


@dataclass(frozen=True)
class Conditions:
    """What times belong to. `clock`: `wall`, or `cpu`, the processor's time on one thread."""

    device: str
    runtime: str
    threads: int
    batch: int
    clock: str
    host: Mapping[str, str | int]

    def __str__(self) -> str:
        where = ", ".join(f"{k} {v}" for k, v in self.host.items())
        threads = f"{self.threads} thread" + ("s" if self.threads > 1 else "")
        rest = f"{threads}, batch {self.batch}, {self.clock} clock"
        return f"{self.device} ({self.runtime}), {rest}, on {where}"


@dataclass(frozen=True)
class Calibration:
    """`held_out_error`: mean of |predicted - measured| / measured over `held_out` networks that were not
    fitted; `held_out_worst` the largest."""

    slope: float
    intercept_ms: float
    fitted: int
    held_out: int
    held_out_error: float
    held_out_worst: float


@dataclass(frozen=True)
class LatencyTable:
    """Visits to every part, and to random networks by their architecture strings: none yet where a list is
    empty. The first `fitted` networks calibrate, the others are held out."""

    space: str
    space_sha256: str
    conditions: Conditions
    visits: int
    fitted: int
    parts_ms: Mapping[str, tuple[Timing, ...]]
    networks_ms: Mapping[str, tuple[Timing, ...]]

    @property
    def complete(self) -> bool:
        every = (*self.parts_ms.values(), *self.networks_ms.values())
        return all(len(found) >= self.visits for found in every)

    def add(self, key: str, timing: Timing) -> LatencyTable:
        """With one more visit to a part or a network."""
        if key in self.parts_ms:
            return replace(self, parts_ms={**self.parts_ms, key: (*self.parts_ms[key], timing)})
        return replace(self, networks_ms={**self.networks_ms, key: (*self.networks_ms[key], timing)})

    def choices(self, space: Space) -> list[Choice]:
        return [space.choice(Architecture.parse(text)) for text in self.networks_ms]

    def raw(self, space: Space, choice: Choice) -> float:
        """The sum of the parts' times, in ms per image."""
        return sum(self.part_ms(key) for key in of_choice(space, choice))

    def part_ms(self, key: str) -> float:
        """Per image."""
        return least(self.parts_ms[key]) / self.conditions.batch

    @cached_property
    def measured(self) -> FloatArray:
        """Of the whole networks, in their order; ms per image."""
        return np.array([least(found) for found in self.networks_ms.values()]) / self.conditions.batch

    @cached_property
    def _fits(self) -> dict[str, Calibration]:
        return {}

    def calibration(self, space: Space) -> Calibration:
        """Least squares of the relative errors of the fitted networks; computed once."""
        key = space.sha256()
        if key not in self._fits:
            self._fits[key] = self._fit(space)
        return self._fits[key]

    def _fit(self, space: Space) -> Calibration:
        raw, measured = np.array([self.raw(space, c) for c in self.choices(space)]), self.measured
        n = self.fitted
        design = np.stack([raw, np.ones_like(raw)], 1) / measured[:, None]
        (slope, intercept), *_ = np.linalg.lstsq(design[:n], np.ones(n), rcond=None)
        if slope <= 0:  # prices would be negative
            raise InputError(
                "the times of whole networks do not grow with those of their parts",
                got=f"slope {slope:.3g}",
                fix="measure again, on an idle machine or with --clock cpu",
            )
        errors = np.abs(design @ (slope, intercept) - 1)[n:]
        return Calibration(
            float(slope), float(intercept), n, len(errors), float(errors.mean()), float(errors.max())
        )

    def priced(self, space: Space) -> tuple[float, dict[tuple[int, int], FloatArray]]:
        """(fixed, price per option of every (stage, position)) in ms per image, as `objective` takes them."""
        fit = self.calibration(space)
        fixed = fit.intercept_ms + fit.slope * sum(self.part_ms(key) for key in FIXED)
        prices = {
            place: fit.slope * np.array([self.part_ms(key) for key in named])
            for place, named in keys(space).items()
        }
        return fixed, prices

    def predict(self, space: Space, choice: Choice) -> float:
        """Milliseconds per image of a whole network, by the formula."""
        fit = self.calibration(space)
        return fit.intercept_ms + fit.slope * self.raw(space, choice)

    def check(self, space: Space, conditions: Conditions | None = None) -> None:
        """Raise InputError unless the table is of this space, and was measured under these conditions."""
        if self.space_sha256 != space.sha256():
            raise InputError(
                "the latency table is of another space",
                got=f"{self.space} {self.space_sha256[:12]}",
                allowed=f"{space.name} {space.sha256()[:12]}",
                fix="tightrope measure --space",
            )
        if conditions is not None and self.conditions != conditions:
            raise InputError(
                "the latency table was measured on another device, or otherwise",
                got=self.conditions,
                allowed=conditions,
                fix="tightrope measure, into another file",
            )

    def save(self, path: Path) -> None:
        body = {"schema": SCHEMA, "kind": KIND, **asdict(self)}
        text = json.dumps(body, indent=1) + "\n"
        atomic_write(path, lambda f: f.write(text.encode()))


def least(visits: tuple[Timing, ...]) -> float:
    """The least median: other work on the machine only ever adds to a time."""
    return min(visit.median_ms for visit in visits)


def empty(
    space: Space, conditions: Conditions, *, visits: int, fitted: int, held_out: int, seed: int
) -> LatencyTable:
    """A table in which everything is still to be measured. Raises InputError for too few networks to fit."""
    if visits < 1 or fitted < 3 or held_out < 1:
        raise InputError(
            "too little to measure",
            got=f"{visits} visits, {fitted} networks fitted, {held_out} held out",
            allowed="at least 1, 3 and 1",
        )
    generator = np.random.default_rng(seed)
    networks: dict[str, tuple[Timing, ...]] = {}
    wanted = min(fitted + held_out, space.count)
    while len(networks) < wanted:
        networks.setdefault(str(space.architecture(space.random(generator))), ())
    if wanted <= fitted:
        raise InputError("the space has too few networks to hold some out", got=f"{space.count} networks")
    nothing: dict[str, tuple[Timing, ...]] = dict.fromkeys(parts(space), ())
    return LatencyTable(space.name, space.sha256(), conditions, visits, fitted, nothing, networks)


_TIMINGS = {str: [{"median_ms": Amount, "iqr_ms": Amount, "runs": int}]}
FORM = {
    "schema": int, "kind": str, "space": str, "space_sha256": str, "visits": int, "fitted": int,
    "conditions": {
        "device": str, "runtime": str, "threads": int, "batch": int, "clock": str, "host": {str: (str, int)},
    },
    "parts_ms": _TIMINGS, "networks_ms": _TIMINGS,
}  # fmt: skip


def load(path: Path, space: Space, *, unfinished: bool = False) -> LatencyTable:
    """The table of `space` at `path`.

    Raises InputError for a file that is none, or is of another space, or (unless `unfinished`) whose
    measurement was interrupted; BundleError for another version's.
    """
    try:
        body: dict[str, Any] = parse(path.read_bytes())
        if wrong := mismatch(body, FORM):
            raise ValueError(wrong)
        if body.pop("kind") != KIND:
            raise ValueError("another kind of file")
        check_schema(body, path)
        del body["schema"]
        for part in ("parts_ms", "networks_ms"):
            body[part] = {k: tuple(Timing(**t) for t in found) for k, found in body[part].items()}
        table = LatencyTable(**{**body, "conditions": Conditions(**body["conditions"])})
    except FileNotFoundError:
        raise InputError("no such latency table", where=str(path), fix="tightrope measure") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError("not a latency table, or a damaged one", where=str(path), got=str(error)) from error
    table.check(space)
    counted = table.visits >= 1 and 3 <= table.fitted < len(table.networks_ms)
    if table.parts_ms.keys() != parts(space).keys() or not counted:
        raise InputError("the latency table lacks blocks or networks", where=str(path))
    table.choices(space)
    if not unfinished and not table.complete:
        raise InputError(
            "the latency table is not finished: measuring was interrupted",
            where=str(path),
            fix="the same tightrope measure again, which goes on where it stopped",
        )
    if any(timing.median_ms == 0 for found in table.networks_ms.values() for timing in found):
        raise InputError("the latency table has a network that takes no time", where=str(path))
    return table
