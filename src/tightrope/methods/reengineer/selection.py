"""Which epoch of a mask search is the result: rules on (accuracy, share of the weights kept)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Floor:
    """The donor's accuracy on `images`, and how many of its standard errors above it an epoch should be."""

    accuracy: float
    images: int
    margin: float

    @property
    def wanted(self) -> float:
        """At most 1."""
        error = math.sqrt(self.accuracy * (1 - self.accuracy) / self.images)
        return min(1.0, self.accuracy + self.margin * error)


@dataclass
class Fewest(Generic[T]):
    """The fewest weights without losing accuracy (SeaM, ICSE 2023).

    An epoch that reaches `floor` is accepted when it keeps fewer thousandths of the weights than the best so
    far, or no more weights at a higher accuracy. If no epoch reaches the floor, the result is the one with
    the largest accuracy minus share. After the floor was reached once, `patience` epochs below it (or, with
    None, any number) are waited for. The first epoch that reaches `wanted` makes this the floor.
    """

    floor: float
    patience: int | None = None
    wanted: float = 0.0
    best: T | None = None
    fallback: T | None = None
    _share: float = 1.0
    _accuracy: float = 0.0
    _gain: float = field(default=-math.inf)
    _armed: bool = False
    _waited: int = 0

    def offer(self, accuracy: float, share: float, take: Callable[[], T]) -> bool:
        """Judge an epoch; `take` copies its state when it is kept. False: the search should stop."""
        if accuracy - share > self._gain:
            self._gain, self.fallback = accuracy - share, take()
        if accuracy >= self.floor:
            self._armed = True
            if accuracy >= self.wanted > self.floor:
                self.floor, self._share, self._accuracy = self.wanted, 1.0, 0.0
            smaller = math.floor(1000 * share) < math.floor(1000 * self._share)
            if smaller or (share <= self._share and accuracy > self._accuracy):
                self._share, self._accuracy, self.best = share, accuracy, take()
                self._waited = 0 if smaller else self._waited
        elif self._armed:
            self._waited += 1
        return self.patience is None or self._waited < self.patience

    @property
    def kept(self) -> list[T]:
        """What may still be the result."""
        return [found for found in (self.best, self.fallback) if found is not None]

    @property
    def result(self) -> T | None:
        return self.best if self.best is not None else self.fallback


@dataclass
class Best(Generic[T]):
    """The highest accuracy among the epochs that meet the budget."""

    best: T | None = None
    _accuracy: float = -1.0

    @property
    def kept(self) -> list[T]:
        return [] if self.best is None else [self.best]

    def offer(self, accuracy: float, feasible: bool, take: Callable[[], T]) -> None:
        if feasible and accuracy > self._accuracy:
            self._accuracy, self.best = accuracy, take()


def front(points: list[dict[str, float]]) -> list[dict[str, float]]:
    """The points (`weights`, `macs`, `accuracy`) that no other one beats in all three, cheapest first."""

    def beats(a: dict[str, float], b: dict[str, float]) -> bool:
        at_least = a["weights"] <= b["weights"] and a["macs"] <= b["macs"] and a["accuracy"] >= b["accuracy"]
        return at_least and (a["weights"], a["macs"], a["accuracy"]) != (
            b["weights"],
            b["macs"],
            b["accuracy"],
        )

    kept = [p for p in points if not any(beats(q, p) for q in points)]
    return sorted(kept, key=lambda p: (p["weights"], p["macs"]))
