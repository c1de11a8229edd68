"""Hints: draw the student's activations to the teacher's, site by site (FitNets, Romero et al. 2015)."""

from __future__ import annotations

from collections.abc import Callable
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


class Hints:
    """Watches the sites that were rewritten in `student` and stand under the same name in `teacher`.

    Both networks must be traced: one module per call. The hooks live as long as the two networks do.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        theirs = dict(teacher.named_modules())
        self.names = [name for name in rewritten_sites(student) if name in theirs]
        self.values: dict[tuple[str, str], Tensor] = {}
        for who, module in (("student", student), ("teacher", teacher)):
            for name in self.names:
                module.get_submodule(name).register_forward_hook(self._keep(who, name))

    def _keep(self, who: str, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.values[who, name] = output.float()

        return hook

    def loss(self) -> Tensor | float:
        """Mean over the sites of the squared difference over the teacher's mean square; 0 without sites.

        Call it after both have seen the same batch.
        """
        # Not mse_loss: its gradient loses the channels-last format, which slows everything before it.
        parts = []
        for name in self.names:
            mine, theirs = self.values["student", name], self.values["teacher", name]
            if mine.shape == theirs.shape:
                apart, size = vector_norm(mine - theirs), vector_norm(theirs)
                floor = 1e-12 * theirs.numel()
                parts.append(apart.square() / size.square().clamp_min(floor))
        self.values.clear()
        return sum(parts) / len(parts) if parts else 0.0
