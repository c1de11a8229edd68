"""A composite polynomial in place of an activation (Lee et al. 2021; SmartPAF 2024, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tightrope.errors import InputError


def horner(stage: Tensor, x: Tensor) -> Tensor:
    """The polynomial with ascending coefficients (d + 1,) or (C, d + 1), on x (N, C, ...)."""
    terms = stage.unbind(-1)
    if stage.dim() == 2:
        terms = tuple(term.reshape(-1, *(1,) * (x.dim() - 2)) for term in terms)
    y = terms[-1] * x + terms[-2]
    for term in reversed(terms[:-2]):
        y = y * x + term
    return y


def composite(stages: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    """What each stage makes of x, in order; the last one is the value of the composite."""
    values: list[Tensor] = []
    for stage in stages:
        values.append(horner(stage, values[-1] if values else x))
    return values


class PolynomialActivation(nn.Module):
    """y = p(x / scale), or x * p(x / scale) if `gated`, with p = p_k(...p_1(.)).

    `stages`: the coefficients of p_1 (applied first) to p_k in ascending order, (degree + 1,) or per channel
    (C, degree + 1), as parameters. ReLU is gated, with (1 + sign) / 2 as p: `relu` makes it. With `dynamic`
    the scale is the largest magnitude of the batch; `freeze` sets a static one, which lowering folds into the
    first stage. In training only: with a `momentum` the scale follows the largest magnitude of the batches,
    and with a `bound` p sees no input beyond that many scales, so that a bad step does not overflow.

    Input and output (N, C, H, W) or (N, C). Raises InputError for coefficients of another shape and a scale
    that is not positive.
    """

    scale: Tensor

    def __init__(
        self, stages: Sequence[Any], *, gated: bool, scale: float = 1.0, dynamic: bool = False
    ) -> None:
        super().__init__()
        tensors = [torch.as_tensor(np.asarray(stage, np.float64)).float() for stage in stages]
        for k, stage in enumerate(tensors):
            if stage.dim() not in (1, 2) or stage.shape[-1] < 2 or not stage.isfinite().all():
                raise InputError(
                    "not the coefficients of a polynomial",
                    where=f"stage {k}",
                    got=tuple(stage.shape),
                    allowed="(degree + 1,) or (C, degree + 1), finite, of degree 1 or more",
                )
        if not tensors:
            raise InputError("a polynomial activation needs at least one stage", got="none")
        self.stages = nn.ParameterList(nn.Parameter(stage) for stage in tensors)
        self.gated = gated
        self.dynamic = dynamic
        self.momentum = 0.0
        self.bound = 0.0
        self.register_buffer("scale", torch.ones(()))
        self.freeze(scale)
        self.dynamic = dynamic

    @classmethod
    def relu(cls, sign: Sequence[Any], *, scale: float = 1.0, dynamic: bool = False) -> PolynomialActivation:
        """x * (1 + sign(x / scale)) / 2 from a composite that approximates the sign on [-1, 1]."""
        *first, last = (np.asarray(stage, np.float64) for stage in sign)
        half = last / 2
        half[..., 0] += 0.5
        return cls([*first, half], gated=True, scale=scale, dynamic=dynamic)

    def freeze(self, scale: float) -> None:
        """From now on divide by `scale`."""
        if not 0 < scale < float("inf"):
            raise InputError("the scale of a polynomial activation must be positive", got=scale)
        self.scale.fill_(scale)
        self.dynamic = False

    def folded(self) -> list[Tensor]:
        """The stages in float64 with the scale folded into the first: c_k / scale^k."""
        first, *rest = (stage.detach().double() for stage in self.stages)
        powers = torch.arange(first.shape[-1], dtype=torch.float64, device=first.device)
        return [first * self.scale.double() ** -powers, *rest]

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale
        if self.dynamic or (self.training and self.momentum):
            largest = x.detach().abs().amax().clamp(min=torch.finfo(x.dtype).tiny)
            if self.dynamic:
                scale = largest
            else:
                self.scale.lerp_(largest.to(self.scale.dtype), self.momentum)
                scale = self.scale.clone()  # the next batch changes it before gradients are asked for
        u = x / scale
        if self.training and self.bound:
            u = u.clamp(-self.bound, self.bound)
        y = composite(list(self.stages), u)[-1]
        return x * y if self.gated else y

    def extra_repr(self) -> str:
        degrees = ", ".join(str(stage.shape[-1] - 1) for stage in self.stages)
        return f"degrees {degrees}, gated={self.gated}, scale={float(self.scale):g}, dynamic={self.dynamic}"
