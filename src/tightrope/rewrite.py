"""apply(model, plan): a new plain module with the plan's choices in place."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx, nn

from tightrope.errors import BundleError, InputError
from tightrope.graph import trace
from tightrope.methods import Learner, Method, method_type
from tightrope.place import model_sha256, place
from tightrope.types import Plan


def method_of(plan: Plan) -> Method | Learner:
    """The method that made the plan, with its settings. Raises BundleError when these are damaged."""
    try:
        method: Method | Learner = method_type(plan.method)(**plan.config)
    except TypeError as error:
        raise BundleError("the plan's configuration is not one of its method", got=str(error)) from error
    return method


def measuring_method_of(plan: Plan) -> Method:
    """The same, of a plan that a Problem stands behind. Raises InputError for one that was learned."""
    method = method_of(plan)
    if isinstance(method, Learner):
        raise InputError(
            "this plan was learned: there are no measured options to choose from again",
            got=plan.method,
            fix="the command that learned it, with another --budget and --out",
        )
    return method


def tunable(plan: Plan) -> bool:
    """Whether training after the plan keeps what was chosen."""
    method = method_of(plan)
    return not isinstance(method, Learner) or method.tunable


def apply(model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor] | None = None) -> fx.GraphModule:
    """Rewrite a copy of `model` by `plan`, and by the `tensors` of a plan that was learned. The caller's
    model is never changed.

    Raises InputError when the plan was made for another network or names an unknown site, BundleError
    when its configuration is damaged.
    """
    graph = trace(model, plan.input_shape)
    sha256 = model_sha256(graph.module)
    if sha256 != plan.base_sha256:
        raise InputError(
            "the plan was made for another network",
            got=f"{type(model).__name__} {sha256[:12]}",
            allowed=f"{plan.base} {plan.base_sha256[:12]}",
            fix="the same --model and --weights as in tightrope search",
        )
    method = method_of(plan)
    if isinstance(method, Learner):
        return method.rebuild(graph, plan.choices, tensors or {})
    return place(graph, plan.choices, method.rewrite).module
