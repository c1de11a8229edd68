"""One coefficient of a polynomial as a layer: a secret factor per channel on a power of the value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from tightrope.program import Op

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Term(Op):
    """c_power * x^power of one stage of the Program's op `polynomial`; the first term adds c_0 too.

    The wires hold powers of x / 2^unit, so the coefficient counts 2^(unit * power).
    """

    kind: ClassVar[str] = "term"
    polynomial: str
    stage: int
    power: int
    unit: int

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.shape[:1]

    def tensors(self, tensors: Mapping[str, NDArray[Any]]) -> tuple[Array, Array]:
        """(factor, bias), (C,) each."""
        stage = np.asarray(tensors[f"{self.polynomial}.stage{self.stage}"], np.float64)
        factor = np.ldexp(stage[..., self.power], self.unit * self.power)
        bias = stage[..., 0] if self.power == 1 else np.zeros(())
        shape = self.weight_shape
        return np.broadcast_to(factor, shape).copy(), np.broadcast_to(bias, shape).copy()
