"""Another plan for a network whose options are measured: for another budget, or after fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tightrope.bundle import Bundle
from tightrope.choose import Chooser
from tightrope.errors import BundleError, InputError
from tightrope.graph import trace
from tightrope.methods import Remeasures
from tightrope.rewrite import measuring_method_of, method_of, tunable
from tightrope.runtimes import Pricing, runtime_type
from tightrope.types import Budget, Problem


def solve(source: Bundle, budget: str, out: Path, *, overwrite: bool = False) -> Bundle:
    """Solve the saved problem of `source` for another budget.

    Only a budget in a quantity whose prices do not add up exactly (bytes, milliseconds) touches network and
    data, to count exact costs. `out` may be a bundle with a fine-tuned network or measurements only with
    `overwrite`.
    """
    limits = Budget.parse(budget)
    _check_another(source, out, overwrite=overwrite)
    measuring_method_of(source.plan())
    return _planned(source, source.problem(), limits, out, overwrite=overwrite)


def refine(
    source: Bundle,
    out: Path,
    *,
    budget: str | None = None,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Bundle:
    """Measure the options again in the fine-tuned network of `source`, and solve once more.

    What an option costs depends on the others, which the first measurement did not know. The budget is that
    of `source`, or `budget`. Fine-tuning the new bundle starts from the fine-tuned weights. Raises InputError
    when `source` is not fine-tuned, or its method has only one way to measure.
    """
    _check_another(source, out, overwrite=overwrite)
    plan, data = source.plan(), source.data()
    limits, method = Budget.parse(plan.budget if budget is None else budget), method_of(plan)
    if not isinstance(method, Remeasures):
        raise InputError(
            "this method does not measure a second time",
            got=plan.method,
            fix=f"tightrope finetune {source.path}"
            if tunable(plan)
            else "the command that searched, with another --budget and --out",
        )
    if not source.accuracy():
        raise InputError(
            "the bundle is not fine-tuned", where=str(source.path), fix=f"tightrope finetune {source.path}"
        )
    tuned, graph = source.model(), trace(source.base(), plan.input_shape)
    problem = method.remeasure(source.problem(), graph, tuned, data, progress=progress)
    bundle = _planned(source, problem, limits, out, overwrite=overwrite)
    bundle.save_start(tuned)
    return bundle


def _check_another(source: Bundle, out: Path, *, overwrite: bool) -> None:
    """Raise InputError unless a bundle that is made from `source` may be written at `out`."""
    if out.resolve() == source.path.resolve():
        raise InputError("the new bundle needs a directory of its own", where=str(out), fix="another --out")
    Bundle.check_target(out, overwrite=overwrite)


def _planned(source: Bundle, problem: Problem, limits: Budget, out: Path, *, overwrite: bool) -> Bundle:
    """A bundle for another problem or budget of the network of `source`."""
    old, base = source.plan(), source.base()
    about = {k: v for k, v in source.about.items() if k not in ("schema", "versions")}
    chooser = Chooser(
        measuring_method_of(old),
        pricing_of(source),
        limits,
        lambda: (trace(base, old.input_shape), source.data()),
    )
    plan = chooser.plan(problem, old.base, old.base_sha256, old.input_shape, exact=False)
    plan = replace(plan, chain=old.chain)
    bundle = Bundle.create(out, about, base, overwrite=overwrite)
    problem.save(out / "problem.npz")
    bundle.save_plan(plan)
    return bundle


def pricing_of(bundle: Bundle) -> Pricing:
    """What the options of a bundle were priced with."""
    about = bundle.about
    try:
        found: Pricing = runtime_type(about.get("runtime", "mpc"))().pricing(**about.get("pricing", {}))
    except TypeError as error:
        where = str(bundle.path / "bundle.json")
        raise BundleError("a file of the bundle is damaged", where=where, got=error) from error
    return found
