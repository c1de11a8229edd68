"""Hints: draw the student's activations to the teacher's, site by site (FitNets, Romero et al. 2015)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.linalg import vector_norm

from tightrope.errors import TraceError
from tightrope.graph import trace
from tightrope.nn import BlockReLU, PolynomialActivation

REWRITTEN = (BlockReLU, PolynomialActivation)


def rewritten_sites(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, REWRITTEN)]


def with_named_sites(teacher: nn.Module, input_shape: tuple[int, ...]) -> nn.Module:
    """The teacher with its sites named as in a network made from it; as it is when it cannot be traced."""
    try:
        return trace(teacher, input_shape).module
    except TraceError:
        return teacher


def relative(mine: Tensor, theirs: Tensor) -> Tensor:
    """The squared difference over the mean square of the second."""
    # Not mse_loss: its gradient loses the channels-last format, which slows everything before it.
    apart, size = vector_norm(mine - theirs), vector_norm(theirs)
    found: Tensor = apart.square() / size.square().clamp_min(1e-12 * theirs.numel())
    return found


def mean_square(mine: Tensor, theirs: Tensor) -> Tensor:
    """The mean squared difference."""
    found: Tensor = vector_norm(mine - theirs).square() / theirs.numel()
    return found


@dataclass(frozen=True)
class Watch:
    """Which modules' outputs are drawn to the teacher's, and how their distance is measured."""

    sites: Sequence[str]
    distance: Callable[[Tensor, Tensor], Tensor] = relative


class Hints:
    """Watches modules of `student` and those of the same names in `teacher`: by default the sites that were
    rewritten in `student`.

    Then both networks must be traced: one module per call. The hooks live as long as the two networks do.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, watch: Watch | None = None) -> None:
        watch = Watch(rewritten_sites(student)) if watch is None else watch
        theirs = dict(teacher.named_modules())
        self.distance = watch.distance
        self.names = [name for name in watch.sites if name in theirs]
        self.values: dict[tuple[str, str], Tensor] = {}
        for who, module in (("student", student), ("teacher", teacher)):
            for name in self.names:
                module.get_submodule(name).register_forward_hook(self._keep(who, name))

    def _keep(self, who: str, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.values[who, name] = output.float()

        return hook

    def loss(self) -> Tensor | float:
        """Mean over the sites of the distance to the teacher's output; 0 without sites.

        Call it after both have seen the same batch.
        """
        parts = []
        for name in self.names:
            mine, theirs = self.values["student", name], self.values["teacher", name]
            if mine.shape == theirs.shape:
                parts.append(self.distance(mine, theirs))
        self.values.clear()
        return sum(parts) / len(parts) if parts else 0.0
