"""A composite polynomial in place of an activation (Lee et al. 2021; SmartPAF 2024, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from tightrope.errors import InputError

NARROW = 13  # the highest degree of a stage whose powers leave float32 digits


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
    (C, degree + 1), as parameters in float64, whatever type the network is cast to: those of degree 27 reach
    1e5 and cancel to 1. They are rounded to the type of the input (to float32 for a shorter one), unless a
    stage has a degree above NARROW: then all are evaluated in float64. A state that has them in another type,
    as earlier versions saved it, comes back as it was.

    ReLU is gated, with (1 + sign) / 2 as p: `relu` makes it. With `dynamic` the scale is the largest
    magnitude of the batch; `freeze` sets a static one, which lowering folds into the first stage. In training
    only: with a `momentum` the scale follows the largest magnitude of the batches, and with a `bound` p sees
    no input beyond that many scales, so that a bad step does not overflow.

    Input and output (N, C, H, W) or (N, C), of the same type. Raises InputError for coefficients of another
    shape, a scale that is not positive, and a degree above NARROW on a device without float64 (mps).
    """

    scale: Tensor

    def __init__(
        self, stages: Sequence[Any], *, gated: bool, scale: float = 1.0, dynamic: bool = False
    ) -> None:
        super().__init__()
        tensors = [torch.tensor(np.asarray(stage, np.float64)) for stage in stages]
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

    @property
    def wide(self) -> bool:
        """Whether float32 has not the digits to evaluate it."""
        return any(stage.shape[-1] - 1 > NARROW for stage in self.stages)

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
        u = (x.double() if self.wide else x) / scale
        if self.training and self.bound:
            u = u.clamp(-self.bound, self.bound)
        dtype = torch.promote_types(u.dtype, torch.float32)
        y = composite([stage.to(dtype) for stage in self.stages], u)[-1]
        return (x * y if self.gated else y).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Coefficients go where the network goes, but stay float64 where the device has that."""
        if recurse:
            self.stages._apply(partial(_moved, fn))  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse=False)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for k, stage in enumerate(self.stages):
            saved = state_dict.get(f"{prefix}stages.{k}", stage)
            stage.data = stage.data.to(saved.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        degrees = ", ".join(str(stage.shape[-1] - 1) for stage in self.stages)
        return f"degrees {degrees}, gated={self.gated}, scale={float(self.scale):g}, dynamic={self.dynamic}"


def weights_dtype(model: nn.Module) -> torch.dtype:
    """The type of a network's weights, and of its inputs: not that of coefficients; float32 without any."""
    polynomials = (m for m in model.modules() if isinstance(m, PolynomialActivation))
    coefficients = {stage for m in polynomials for stage in m.stages}
    return next((p.dtype for p in model.parameters() if p not in coefficients), torch.float32)


def _moved(fn: Callable[[Tensor], Tensor], stage: Tensor) -> Tensor:
    """What `fn` makes of coefficients or their gradients, in float64 if they were and the device has that."""
    if stage.dtype != torch.float64:
        return fn(stage)
    try:
        moved = fn(stage)
    except TypeError:  # mps
        if stage.shape[-1] - 1 > NARROW:
            raise InputError(
                "a polynomial of this degree needs float64, which the device has not",
                got=f"degree {stage.shape[-1] - 1}",
                allowed=f"degrees up to {NARROW}",
                fix="--accelerator cpu",
            ) from None
        return fn(stage.float())
    return moved if moved.dtype == stage.dtype else stage.to(moved.device)
