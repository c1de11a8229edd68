"""From any traceable network to a Graph: the same network, every activation a module of its own.

One Site per *call*: torchvision's BasicBlock calls one nn.ReLU twice, so it gives two sites. Functional
activations become modules, so that a method replaces any site the same way.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tightrope.errors import InputError, TightropeError, TraceError, near
from tightrope.nn import BlockReLU, PolynomialActivation
from tightrope.nn.polynomial import weights_dtype
from tightrope.types import Site

LEAVES: tuple[type[nn.Module], ...] = (BlockReLU, PolynomialActivation)

# kinds of module that are a choice for some method; the nonlinear part of a network
KINDS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hard_swish",
    nn.Hardsigmoid: "hard_sigmoid",
    nn.SiLU: "silu",
    nn.Sigmoid: "sigmoid",
    nn.MaxPool2d: "max_pool",
    BlockReLU: "block_relu",
    PolynomialActivation: "polynomial",
}


def _max_pool(
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    **_: Any,
) -> nn.Module:
    return nn.MaxPool2d(kernel_size, stride, padding, dilation, ceil_mode=ceil_mode)


def _clamp(min: Any = None, max: Any = None, **_: Any) -> nn.Module | None:
    return _hardtanh(min, max) if min is not None and max is not None else (nn.ReLU() if min == 0 else None)


def _hardtanh(min_val: Any = -1.0, max_val: Any = 1.0, **_: Any) -> nn.Module | None:
    return nn.ReLU6() if (min_val, max_val) == (0, 6) else None


def _plain(kind: Callable[[], nn.Module]) -> Callable[..., nn.Module | None]:
    return lambda *_, **__: kind()


FUNCTIONS: dict[Any, Callable[..., nn.Module | None]] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu"), _plain(nn.ReLU)),
    F.relu6: _plain(nn.ReLU6),
    F.hardtanh: _hardtanh,
    **dict.fromkeys((torch.clamp, "clamp"), _clamp),
    F.hardswish: _plain(nn.Hardswish),
    F.hardsigmoid: _plain(nn.Hardsigmoid),
    F.silu: _plain(nn.SiLU),
    **dict.fromkeys((torch.sigmoid, F.sigmoid, "sigmoid"), _plain(nn.Sigmoid)),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), _max_pool),
}


@dataclass(frozen=True)
class Graph:
    """A traced network in eval mode. `shapes` maps a node to its tensor shape without the batch."""

    module: fx.GraphModule
    input_shape: tuple[int, ...]
    sites: tuple[Site, ...]
    shapes: dict[str, tuple[int, ...]]

    @property
    def outputs(self) -> int:
        """How many numbers the network returns per sample."""
        result = next(n for n in self.module.graph.nodes if n.op == "output").args[0]
        return math.prod(self.shapes[result.name])

    def match(self, pattern: str, kinds: tuple[str, ...]) -> tuple[Site, ...]:
        """The sites of these kinds whose name matches one of the comma-separated shell patterns.

        Raises InputError when a part of the pattern matches nothing.
        """
        offered = [s for s in self.sites if s.kind in kinds]
        chosen: dict[str, Site] = {}
        for part in pattern.split(","):
            hits = [s for s in offered if fnmatchcase(s.name, part.strip())]
            if not hits:
                names = [s.name for s in offered]
                raise InputError(
                    "the pattern matches no site",
                    got=repr(part.strip()),
                    allowed=near(part.strip(), names) or f"none: the network has no site of kind {kinds}",
                )
            chosen |= {s.name: s for s in hits}
        return tuple(s for s in offered if s.name in chosen)

    def node(self, site: Site) -> fx.Node:
        found: fx.Node = next(
            n for n in self.module.graph.nodes if n.op == "call_module" and n.target == site.name
        )
        return found


class _Tracer(fx.Tracer):
    """Remembers where it is, so that an error can name the module."""

    def __init__(self) -> None:
        super().__init__()
        self.path = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, LEAVES) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        before, self.path = self.path, self.path_of_module(m)
        result = super().call_module(m, forward, args, kwargs)
        self.path = before
        return result


def trace(model: nn.Module, input_shape: tuple[int, ...]) -> Graph:
    """Trace a copy of `model` in eval mode on inputs (N, *input_shape).

    Raises TraceError naming the module when the network has control flow on tensors, needs another
    input, returns something else than one tensor, or behaves differently once traced.
    """
    model = copy.deepcopy(model).eval()
    with torch.no_grad(), _running(model, "the network does not run on this input", input_shape):
        example, expected = _tried(model, input_shape)
    if not isinstance(expected, Tensor):
        raise TraceError(
            "the network must return one tensor",
            where=type(model).__name__,
            got=type(expected).__name__,
            fix="wrap it in a module that returns the tensor you need",
        )
    tracer = _Tracer()
    try:
        graph = tracer.trace(model)
    except Exception as error:
        raise TraceError(
            "cannot trace the network",
            where=f"{type(model).__name__}, in module {tracer.path or '(top level)'!r}",
            got=str(error).split("\n")[0],
            allowed="a forward pass whose control flow does not depend on tensor values",
        ) from error
    inputs = [n for n in graph.nodes if n.op == "placeholder" and not n.args]
    if len(inputs) != 1:
        raise TraceError("the network must take one tensor", got=", ".join(n.name for n in inputs) or "none")
    module = fx.GraphModule(model, graph)
    _out_of_place(module)
    _drop_checks(module)
    _functions_to_modules(module)
    _one_module_per_call(module)
    module = fx.GraphModule(module, module.graph)  # copies only what the graph uses
    with torch.no_grad(), _running(model, "the traced network does not run on this input", input_shape):
        shapes = _shapes(module, example)
        got = module(example)
    scale = max(1.0, float(expected.abs().max()))
    if got.shape != expected.shape or not torch.allclose(got, expected, rtol=1e-4, atol=1e-5 * scale):
        raise TraceError(
            "the traced network computes something else than the network",
            where=type(model).__name__,
            got=f"max difference {float((got - expected).abs().max()):.3g}"
            if got.shape == expected.shape
            else f"shape {tuple(got.shape)}",
            allowed=f"{tuple(expected.shape)}, equal within 1e-4",
        )
    return Graph(module, tuple(input_shape), _sites(module, shapes), shapes)


def _tried(model: nn.Module, input_shape: tuple[int, ...]) -> tuple[Tensor, Any]:
    """Noise, and the network's outputs, finite if they can be: beyond their scale polynomials explode."""
    noise = torch.randn(2, *input_shape, generator=torch.Generator().manual_seed(0)).to(weights_dtype(model))
    for size in (1.0, 0.1, 0.01, 0.0):
        example = size * noise
        outputs = model(example)
        if not isinstance(outputs, Tensor) or outputs.isfinite().all():
            break
    return example, outputs


@contextmanager
def _running(model: nn.Module, what: str, input_shape: tuple[int, ...]) -> Iterator[None]:
    try:
        yield
    except TightropeError:
        raise
    except Exception as error:
        raise TraceError(
            what,
            where=type(model).__name__,
            got=f"input shape (2, {', '.join(map(str, input_shape))}): {str(error).splitlines()[0][:200]}",
        ) from error


INPLACE_SECOND = (F.relu, F.relu6, F.hardswish, F.hardsigmoid, F.silu)  # F.relu(x, True)


def _out_of_place(module: fx.GraphModule) -> None:
    """Tensors by position; a call that changes its input becomes one whose result is read from there on.

    Programs and reruns of a part know no aliases. A change through a view, or by `+=` to a tensor that has
    another name, is not followed: the traced network then computes something else, and `trace` says so.
    """
    order = {node: k for k, node in enumerate(module.graph.nodes)}
    for node, k in order.items():
        for word in {"input", "tensors"} & node.kwargs.keys():
            node.args = (node.kwargs[word], *node.args)
            node.kwargs = {key: v for key, v in node.kwargs.items() if key != word}
        if _changes_input(module, node) and isinstance(node.args[0], fx.Node):
            node.args[0].replace_all_uses_with(node, lambda user, k=k: order[user] > k)  # type: ignore[misc]
            plain = str(node.target).rstrip("_")
            if node.op == "call_method" and hasattr(Tensor, plain):
                node.target = plain


def _changes_input(module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(module.get_submodule(str(node.target)), "inplace", False))
    name = str(getattr(node.target, "__name__", node.target))
    return node.op in ("call_function", "call_method") and (
        (name.endswith("_") and not name.endswith("__"))
        or bool(node.kwargs.get("inplace"))
        or (node.target in INPLACE_SECOND and node.args[1:] == (True,))
    )


def _drop_checks(module: fx.GraphModule) -> None:
    """Shape assertions are worked out already; they would keep dead shape arithmetic alive."""
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target is torch._assert:
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()


def _scope(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack.values()))[0] if stack else ""


def _free_name(module: nn.Module, wanted: str) -> str:
    taken = {name for name, _ in module.named_modules()}
    name, k = wanted, 0
    while name in taken:
        k += 1
        name = f"{wanted}_{k}"
    return name


def _functions_to_modules(module: fx.GraphModule) -> None:
    for node in list(module.graph.nodes):
        if node.op not in ("call_function", "call_method"):
            continue
        if node.target in WEIGHTED:
            new, word = WEIGHTED[node.target](module, node), "inner"
        elif node.target in FUNCTIONS:
            new = FUNCTIONS[node.target](*node.args[1:], **node.kwargs)
            word = KINDS[type(new)] if new is not None else ""
        else:
            continue
        if new is None:
            continue
        name = _free_name(module, f"{_scope(node)}.{word}".lstrip("."))
        module.add_submodule(name, new.eval())
        with module.graph.inserting_before(node):
            call = module.graph.call_module(name, (node.args[0],))
        node.replace_all_uses_with(call)
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()


def _attribute(module: nn.Module, node: Any) -> Any:
    known = isinstance(node, fx.Node) and node.op == "get_attr"
    return operator.attrgetter(str(node.target))(module) if known else None


def _batch_norm(module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """F.batch_norm over a module's own buffers (timm's norm-act layers) back into nn.BatchNorm2d."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    tensors = {k: _attribute(module, given.get(k)) for k in ("running_mean", "running_var", "weight", "bias")}
    if any(t is None for t in tensors.values()) or given.get("training"):
        return None
    norm = nn.BatchNorm2d(
        len(tensors["weight"]), eps=given.get("eps", 1e-5), momentum=given.get("momentum", 0.1)
    )
    norm.to(tensors["weight"])  # its device and type
    norm.load_state_dict({**tensors, "num_batches_tracked": torch.tensor(0)})
    return norm


def _linear(module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """F.linear over a module's own parameters (timm's Linear) back into nn.Linear."""
    given: dict[str, Any] = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
    weight, bias = _attribute(module, given.get("weight")), _attribute(module, given.get("bias"))
    if weight is None or (bias is None and given.get("bias") is not None):
        return None
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight, linear.bias = weight, bias
    return linear


WEIGHTED: dict[Any, Callable[[fx.GraphModule, fx.Node], nn.Module | None]] = {
    F.batch_norm: _batch_norm,
    F.linear: _linear,
}


def _one_module_per_call(module: fx.GraphModule) -> None:
    """Copy an activation that is called again; normalise Hardtanh(0, 6); nothing works in place."""
    seen: set[str] = set()
    for node in module.graph.nodes:
        if node.op != "call_module":
            continue
        target = str(node.target)
        old = module.get_submodule(target)
        new: nn.Module | None = None
        if isinstance(old, nn.Hardtanh) and (old.min_val, old.max_val) == (0, 6):
            new = nn.ReLU6()
        elif type(old) in KINDS:
            new = copy.deepcopy(old)
            if hasattr(new, "inplace"):
                new.inplace = False  # type: ignore[assignment]
        if new is None:
            continue
        name = _free_name(module, target) if target in seen else target
        module.add_submodule(name, new)
        node.target = name
        seen |= {target, name}
    module.recompile()


class _ShapeRecorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.now = ""

    def run_node(self, n: fx.Node) -> Any:
        self.now = n.name
        result = super().run_node(n)
        if isinstance(result, Tensor) and n.op != "get_attr":
            self.shapes[n.name] = tuple(result.shape[1:])
        return result


def _shapes(module: fx.GraphModule, example: Tensor) -> dict[str, tuple[int, ...]]:
    recorder = _ShapeRecorder(module)
    with torch.no_grad():
        recorder.run(example)
    return recorder.shapes


def _sites(module: fx.GraphModule, shapes: dict[str, tuple[int, ...]]) -> tuple[Site, ...]:
    sites = []
    for node in module.graph.nodes:
        if node.op == "call_module":
            kind = KINDS.get(type(module.get_submodule(str(node.target))))
            if kind is not None:
                sites.append(Site(str(node.target), kind, shapes[node.args[0].name], shapes[node.name]))
    return tuple(sites)
