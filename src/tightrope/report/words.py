"""What the report and the model card say in words: headline, provenance, limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tightrope.report import commands, formats
from tightrope.report.facts import Facts
from tightrope.types import Budget, Json, Plan

RUNTIME_NAMES = {"mpc": "secure run (mpc)", "ckks": "secure run (ckks)", "plain": "run in the clear (plain)"}
RUNTIME_LIMITS: dict[str, tuple[str, ...]] = {
    "mpc": (
        "Security holds against parties (client, server, dealer) that follow the protocol and do not "
        "collude. The structure of the network, its patches included, is public; weights and inputs are not.",
        "The parties ran on one machine. Latency and bandwidth of a real network: not measured.",
    ),
}
TIME_NOTES = {
    "mpc": "Time per op is the client's online and the dealer's offline, waiting for the others included; "
    "the totals are wall time.",
}


@dataclass(frozen=True)
class Tile:
    """One number of the headline."""

    name: str
    value: str
    sub: str
    measured: bool = True


def title(facts: Facts) -> str:
    name = formats.name(str(facts.about.get("model", facts.plan.base)))
    return f"{name}, {formats.budget(Budget.parse(facts.plan.budget))}"


def lead(facts: Facts) -> str:
    about = facts.about
    return (
        f"Data {about.get('data', 'not recorded')}, {about.get('num_classes', '?')} classes, "
        f"input {formats.shape(facts.plan.input_shape)}; method {facts.plan.method}, "
        f"{len(facts.sites)} sites decided."
    )


def run_name(facts: Facts) -> str:
    runtime = facts.run["runtime"] if facts.run is not None else commands.private(facts)
    return RUNTIME_NAMES.get(runtime, f"run ({runtime})")


def headline(facts: Facts) -> list[Tile]:
    return [
        _kept(facts),
        _accuracy(facts, "Test accuracy", "test", "test_base"),
        _accuracy(facts, "Validation accuracy", "validation", "validation_base"),
        _gap(facts),
        _agreement(facts),
        _spent(facts),
    ]


def _kept(facts: Facts) -> Tile:
    what = facts.decided
    after, before = getattr(facts.plan.predicted, what), getattr(facts.plan.baseline, what)
    share = formats.percent(after / before) if before else "none"
    sub = f"{formats.count(after)} of {formats.count(before)} per image"
    return Tile(f"{formats.metric(what)} {formats.left(what)}", share, sub)


def _accuracy(facts: Facts, name: str, key: str, base_key: str) -> Tile:
    value, base = facts.accuracy.get(key), facts.accuracy.get(base_key)
    if value is None:
        return Tile(name, formats.ABSENT, "tightrope finetune --test", measured=False)
    untuned = facts.accuracy.get(f"{key}_untuned")
    parts = [] if base is None else [f"original {formats.percent(base, 2)} ({formats.points(value - base)})"]
    parts += [] if untuned is None else [f"before fine-tuning {formats.percent(untuned, 2)}"]
    return Tile(name, formats.percent(value, 2), "; ".join(parts))


def _gap(facts: Facts) -> Tile:
    plan = facts.plan
    loss, bound = formats.significant(plan.loss, 4), formats.significant(plan.bound, 4)
    if plan.gap == 0:
        return Tile(
            "Proved gap to the optimum", "0 %", f"predicted loss {loss}: no plan in the budget is better"
        )
    sub = f"predicted loss {loss}; no plan in the budget below {bound}"
    return Tile("Proved gap to the optimum", formats.percent(plan.gap, 3), sub)


def _agreement(facts: Facts) -> Tile:
    name = "Secure and plain agree"
    if facts.run is None or not facts.secure or "same_class" not in facts.run:
        return Tile(name, formats.ABSENT, _run_it(facts), measured=False)
    same, batch = facts.run["same_class"], facts.run["batch"]
    sub = "same class; the client saw the label only"
    if "max_abs_error" in facts.run:
        difference = formats.significant(facts.run["max_abs_error"], 2)
        sub = f"same class; outputs differ by at most {difference}"
    return Tile(name, f"{same} of {batch} images", sub)


def _run_it(facts: Facts) -> str:
    return f"tightrope run --runtime {commands.private(facts)}"


def _spent(facts: Facts) -> Tile:
    if facts.run is None or not facts.secure:
        return Tile("Secure run, per image", formats.ABSENT, _run_it(facts), measured=False)
    total, batch = facts.run["total"], facts.run["batch"]
    online = formats.size(total.get("online_bytes", 0) / batch)
    parts = [f"in {formats.duration(total['online_ms'] / batch)}"] if "online_ms" in total else []
    parts += [f"{formats.size(total.get('offline_bytes', 0) / batch)} offline", f"batch of {batch}"]
    return Tile("Secure run, per image", f"{online} online", "; ".join(parts))


def origin(plan: Plan) -> list[tuple[str, str]]:
    """The network that the search started from; if of a bundle, the searches before it, the latest first."""
    earlier = [
        ("found by", f"{k.method} within {k.budget}, from {k.base}, SHA-256 {k.base_sha256}; in {k.bundle}")
        for k in reversed(plan.chain)
    ]
    return [("model", f"{plan.base}, SHA-256 {plan.base_sha256}"), *earlier]


def provenance(facts: Facts) -> list[tuple[str, str]]:
    """Name and value of everything that went into the bundle."""
    about, plan, run = facts.about, facts.plan, facts.run
    notes = "; ".join(plan.notes) or "none: the network was taken as it came"
    return [
        *origin(plan),
        ("data", str(about.get("data", "not recorded"))),
        ("budget", plan.budget),
        ("notes of the plan", notes),
        ("method", f"{plan.method}: {settings(plan.config)}"),
        ("costs priced by", _priced_by(about)),
        ("fine-tuning", settings(facts.accuracy.get("recipe", {})) or "none recorded"),
        (
            "runtime",
            f"{run['runtime']}: {settings(run.get('config', {})) or 'default settings'}"
            if run
            else "not run",
        ),
        ("host of the run", settings(run.get("host", {})) or "not recorded" if run else "not run"),
        ("versions", settings(about.get("versions", {})) or "not recorded"),
    ]


def _priced_by(about: Mapping[str, Json]) -> str:
    """Times are those of a machine and a network."""
    runtime, pricing = str(about.get("runtime", "not recorded")), about.get("pricing", {})
    network, host = pricing.get("network"), pricing.get("profile", {}).get("host", {})
    return runtime + (f", network {network}, times of {settings(host)}" if network and host else "")


def settings(values: Mapping[str, Json]) -> str:
    """Names and values as people write them; what is not set is none."""
    unset: tuple[Json, ...] = (None, "", [], {})
    return ", ".join(
        f"{name.replace('_', ' ')} {'none' if value in unset else value}" for name, value in values.items()
    )


def limits(facts: Facts) -> list[str]:
    """What the numbers do not say. What was not measured is called so."""
    found = [
        "The proved gap is about the predicted loss: the sum over sites or channels of the mean squared "
        "change of the outputs, each changed alone. It is not a bound on the accuracy."
    ]
    if "validation" in facts.accuracy:
        seed = facts.accuracy.get("recipe", {}).get("seed", "not recorded")
        found.append(
            f"Accuracies after fine-tuning are of one run (seed {seed}). Spread over seeds: not measured."
        )
    else:
        found.append("Accuracy after fine-tuning: not measured.")
    if "test" not in facts.accuracy:
        found.append("Accuracy on the test split: not measured.")
    if facts.run is None or not facts.secure:
        return [*found, "Secure execution, its bytes and its time: not measured."]
    run = facts.run
    found += RUNTIME_LIMITS.get(run["runtime"], ())
    if run.get("host", {}).get("mode") == "simulate":
        found.append("The parties were threads of one process: no sockets, no separate memories.")
    found.append(f"Times are of one batch of {run['batch']}. Their spread over repeated runs: not measured.")
    if "same_class" in run:
        found.append(f"Agreement of secure and plain was checked on {run['batch']} images.")
    if not run.get("setup_links"):
        found.append("Bytes of the set-up, once per session: not measured.")
    if not run.get("peak_memory_bytes"):
        found.append("Peak memory: not measured.")
    return found
