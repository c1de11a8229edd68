"""binas end to end on full Fashion-MNIST: estimators, networks at five latency limits, random controls.

    python benchmarks/bench_binas.py [FOLDER] [--reduced]        about 60 minutes on two idle cores

One supernet of the space `fashion` (default recipes); estimators on 100 held-out networks. At five limits
between the smallest and the largest network, the best of ten candidates is fine-tuned beside ten random
networks that cost as much (between 90 % of the limit and the limit), all by one recipe on 20,000 training
images with the largest network, trained alone, as teacher. Accuracies are of the test split, read once per
network, at the end. FOLDER (runs/bench-binas) keeps everything: the same call goes on, does what is missing
and adds its minutes. `--reduced` trains for minutes only and shows that it works; its rows are not written.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import _rows
from tightrope import data as datasets
from tightrope import nas
from tightrope.bundle import write_json
from tightrope.evaluate import accuracy
from tightrope.finetune import finetune
from tightrope.measure import ROWS, VISITS
from tightrope.methods.binas import accuracies, oneshot, resolve
from tightrope.methods.binas.choosing import candidates, pick
from tightrope.methods.binas.extract import extract
from tightrope.methods.binas.method import BinasMethod
from tightrope.methods.binas.objective import problem
from tightrope.place import model_sha256
from tightrope.report import explain
from tightrope.solve.staged import Choice

COMMAND = "python benchmarks/bench_binas.py"
REDUCED = "--reduced" in sys.argv
PAUSE_S = 1.0 if REDUCED else 10.0
LIMITS, RANDOM = (2, 2) if REDUCED else (5, 10)
SPACE, TARGET = resolve("fashion"), nas.Target(device="onnx", clock="cpu")
USUAL = oneshot.OneShot()
SHORT = oneshot.OneShot(
    heaviest=replace(USUAL.heaviest, epochs=1, limit=5000),
    elastic=replace(USUAL.elastic, epochs=1, limit=5000),
)
METHOD = BinasMethod(passes=2, held_out=20) if REDUCED else BinasMethod()
TUNE = replace(nas.TUNING, epochs=1, limit=1000 if REDUCED else 20_000)
CORES = 2  # each fine-tunes one network: two threads on one take 1.7 times as long


def say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {what}", flush=True)


class Tuned:
    """Test accuracies of fine-tuned networks, kept in a file as they come; CORES networks at once. The file
    is of these weights and this recipe.
    """

    def __init__(self, studied: nas.Studied, work: Path) -> None:
        both = (model_sha256(studied.supernet), model_sha256(studied.heaviest), repr(TUNE))
        self.studied = studied
        self.path = work / f"tuned-{hashlib.sha256(repr(both).encode()).hexdigest()[:12]}.json"
        path = self.path
        self.found: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(CORES, context, torch.set_num_threads, (1,))

    def __call__(self, choices: Sequence[Choice]) -> np.ndarray:
        networks = {json.dumps(choice): extract(self.studied.supernet, choice) for choice in choices}
        running = {
            self.pool.submit(tuned, net, self.studied.heaviest): key
            for key, net in networks.items()
            if key not in self.found
        }
        for future in as_completed(running):
            self.found[running[future]] = future.result()
            write_json(self.path, self.found)
        return np.array([self.found[json.dumps(choice)] for choice in choices])


def tuned(net: nn.Module, teacher: nn.Module) -> float:
    """In a process of its own: % of the test split once fine-tuned."""
    data = datasets.load("fashion-mnist")
    return 100 * accuracy(finetune(net, data, teacher=teacher, recipe=TUNE), data, "test")


def at_limit(table: Any, limit: float, generator: np.random.Generator) -> list[Choice]:
    """Random networks that cost about as much as is allowed."""
    found: list[Choice] = []
    while len(found) < RANDOM:
        choice = SPACE.random(generator)
        if 0.9 * limit <= table.predict(SPACE, choice) <= limit:
            found.append(choice)
    return found


def times_ms(nets: list[nn.Module]) -> list[float]:
    """Of the networks in turns: as many visits and rows as a latency table has of each part, apart as those
    are, since this machine is slowed for up to minutes."""
    visits = []
    for visit in range(VISITS):
        if visit:
            time.sleep(PAUSE_S)
        visits.append([nas.time_network(SPACE, net, TARGET, ROWS) for net in nets])
    return [min(times) for times in zip(*visits, strict=True)]


class Minutes:
    """Of all calls together, in a file, those of an interrupted one too."""

    def __init__(self, work: Path) -> None:
        self.path, self.start = work / "minutes.json", time.monotonic()
        self.before = json.loads(self.path.read_text()) if self.path.exists() else 0.0
        atexit.register(self)

    def __call__(self) -> float:
        minutes = float((time.monotonic() - self.start) / 60 + self.before)
        write_json(self.path, minutes)
        return minutes


def main() -> None:
    named = [word for word in sys.argv[1:] if not word.startswith("-")]
    work = Path(named[0] if named else "runs/bench-binas")
    work.mkdir(parents=True, exist_ok=True)
    spent, data = Minutes(work), datasets.load("fashion-mnist")
    table = nas.latency_table(SPACE, TARGET, work, lambda *_: None)
    say("latency table")
    studied = nas.study(
        SPACE, data, METHOD, SHORT if REDUCED else USUAL, work, log=lambda entry: say(str(entry))
    )
    assert studied is not None
    page = explain.render(SPACE, studied.contributions, studied.errors, studied.compared)
    (work / "explain.html").write_text(page)
    for c in studied.compared:
        say(f"{c.estimator.name}: {c.agreement}")
    usable = [c for c in studied.compared if c.estimator.formula is not None]
    best = max(usable, key=lambda c: c.agreement.spearman)
    held = len(studied.held_out.choices)
    bar = f"Spearman of {best.estimator.name}, {held} held-out networks: at least 0.85"
    rows = [_rows.row(bar, best.agreement.spearman, "rank correlation", best.agreement.spearman >= 0.85)]
    rows += [
        _rows.row(
            f"Spearman of {c.estimator.name}, {c.images:,} images", c.agreement.spearman, "rank correlation"
        )
        for c in studied.compared
    ]
    low, high = (table.predict(SPACE, c) for c in (SPACE.smallest(), SPACE.largest()))
    generator, tune = np.random.default_rng(1), Tuned(studied, work)
    gain = pick(METHOD, studied.compared)
    answers_ms: list[tuple[Choice, float]] = []
    for limit in np.linspace(low, high, LIMITS + 2)[1:-1]:
        staged = problem(SPACE, gain, {"online_ms": float(limit)}, priced={"online_ms": table.priced(SPACE)})
        answers = candidates(METHOD, staged)
        scored = accuracies.measure(
            studied.supernet, data, [a.choice for a in answers], file=work / "networks.hits"
        )
        choice = answers[int(scored.mean.argmax())].choice
        mine, *rest = tune([choice, *at_limit(table, float(limit), generator)])
        others = np.array(rest)
        answers_ms.append((choice, table.predict(SPACE, choice)))
        ahead, error = mine - others.mean(), others.std(ddof=1) / len(others) ** 0.5
        bar = (
            f"limit {limit:.3g} ms: {mine:.2f} % against {others.mean():.2f} % of {RANDOM} random "
            f"networks: ahead by 0.5 points or two standard errors ({2 * error:.2f})"
        )
        rows.append(_rows.row(bar, float(ahead), "points", bool(ahead >= min(0.5, 2 * error))))
        say(bar)
    ends = {"smallest": SPACE.smallest(), "largest": SPACE.largest()}
    for (name, choice), end in zip(ends.items(), tune(list(ends.values())), strict=True):
        rows.append(_rows.row(f"{name} network, {table.predict(SPACE, choice):.3g} ms", float(end), "% test"))
    seen = times_ms([extract(studied.supernet, choice) for choice, _ in answers_ms])
    off = [abs(ms / predicted - 1) for ms, (_, predicted) in zip(seen, answers_ms, strict=True)]
    say(f"measured {np.round(seen, 4)} ms, predicted {np.round([p for _, p in answers_ms], 4)}")
    bar = f"measured and predicted latency of the {LIMITS} networks found, worst: at most 10 %"
    rows.append(_rows.row(bar, float(max(off)), "share", max(off) <= 0.1))
    minutes = spent()
    rows.append(_rows.row("end to end, at most 60 minutes", minutes, "minutes", minutes <= 60))
    rows = [row | {"issue": 5, "command": COMMAND} for row in rows]
    if REDUCED:
        print(_rows.table([row | {"commit": "reduced"} for row in rows]))
    else:
        _rows.write("binas", rows)
        print(_rows.table([r for r in _rows.read() if r["command"] == COMMAND]))


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
