"""apply(model, plan): a new plain module with the plan's choices in place."""

from __future__ import annotations

from torch import fx, nn

from tightrope.errors import BundleError, InputError
from tightrope.graph import trace
from tightrope.methods import Method, method_type
from tightrope.place import model_sha256, place
from tightrope.types import Plan


def method_of(plan: Plan) -> Method:
    """The method that made the plan, with its settings. Raises BundleError when these are damaged."""
    try:
        method: Method = method_type(plan.method)(**plan.config)
    except TypeError as error:
        raise BundleError("the plan's configuration is not one of its method", got=str(error)) from error
    return method


def apply(model: nn.Module, plan: Plan) -> fx.GraphModule:
    """Rewrite a copy of `model` by `plan`. The caller's model is never changed.

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
    return place(graph, plan.choices, method_of(plan).rewrite).module
