"""A trained ResNet-20 on a 28x28 image, encrypted, with real bootstrapping, two processes.

    python benchmarks/train_paf.py --network resnet20
    python benchmarks/bench_ckks_bootstrap.py runs/paf-resnet20

The fewest bootstraps to 5, 13 and 20 levels are counted, and one run is made with --refresh-levels. The first
test image; classes and values are compared with those of the plain polynomial network. With
--inspect the server returns every step's ciphertext, and the rows are the errors in their slots instead.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import _rows
from tightrope.errors import InputError
from tightrope.program import Program
from tightrope.runtimes.ckks import CKKS
from tightrope.types import Measurement

LIMIT_BYTES, LIMIT_MINUTES = 20 << 30, 30
CHOSEN = "the chosen polynomials"
UNIFORM = ("degree 2", "f2 g2", "a7")
SHOWN = (5, 13, 20)  # levels after a bootstrap: few keys, fewer bootstraps, what the ring has room for


@dataclass(frozen=True)
class Encrypted:
    """What the client found. `peak_bytes`: of its process and its children, the server and the key maker."""

    y: NDArray[np.float64]
    measured: Measurement
    setup_s: float
    peak_bytes: int


class Together:
    """Samples the resident memory of this process and its children; keys mapped from files count."""

    def __init__(self) -> None:
        self.peak_bytes, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        own = os.getpid()
        while not self._done.wait(0.2):
            children = Path(f"/proc/{own}/task/{own}/children").read_text().split()
            pages = 0
            for pid in (own, *children):
                with suppress(OSError):
                    pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            self.peak_bytes = max(self.peak_bytes, pages * os.sysconf("SC_PAGE_SIZE"))

    def end(self) -> int:
        self._done.set()
        self._thread.join()
        return self.peak_bytes


def encrypted(path: Path, runtime: CKKS, x: NDArray[np.float64]) -> Encrypted:
    memory, start = Together(), time.monotonic()
    with runtime.open(Program.load(path), "execute") as session:
        setup_s = time.monotonic() - start
        print(f"keys after {setup_s:.0f} s", flush=True)
        y, measured = session.run(x)
    return Encrypted(y, measured, setup_s, memory.end())


def simulated(path: Path, runtime: CKKS, x: NDArray[np.float64]) -> Measurement:
    with runtime.open(Program.load(path), "simulate") as session:
        return session.run(x)[1]


def plain(path: Path) -> tuple[NDArray[np.float64], int, NDArray[np.float64]]:
    """The first test image, its label and the outputs of the network."""
    from tightrope.data import load
    from tightrope.runtimes.plain import evaluate

    x, y = next(iter(load("fashion-mnist").batches("test", 1, limit=1)))
    return x.double().numpy(), int(y), evaluate(Program.load(path), x).numpy()


def bootstraps(path: Path, refresh_levels: Sequence[int]) -> dict[int, dict[str, int | None]]:
    """The fewest at each of these levels after every one, of this network and with one polynomial everywhere;
    None where a polynomial does not fit between two."""
    from tightrope.bundle import Bundle
    from tightrope.graph import trace
    from tightrope.lower import lower
    from tightrope.methods.paf.options import structure
    from tightrope.place import place
    from tightrope.rewrite import measuring_method_of
    from tightrope.runtimes.ckks.compiler import compile_program

    def counted(program: Program, levels: int) -> int | None:
        names = (Program.INPUT, *(op.name for op in program.ops))
        program = replace(program.public(), ranges=dict.fromkeys(names, 1.0))
        runtime = CKKS(bootstrap="always", refresh_levels=levels)
        try:
            return compile_program(program, runtime.parameters).bootstraps
        except InputError:
            return None

    bundle = Bundle.open(path)
    method, problem = measuring_method_of(bundle.plan()), bundle.problem()
    graph = trace(bundle.base(), bundle.plan().input_shape)
    programs = {CHOSEN: bundle.program()}
    for name in UNIFORM:
        degrees, gated = structure(name)
        stages = [[0.0] * (degree + 1) for degree in degrees]
        choice = {"polynomial": name, "stages": stages, "gated": gated, "scale": 1.0}
        net = place(graph, {t.site: choice for t in problem.tables}, method.rewrite).module
        programs[f"{name} everywhere"] = lower(net, graph.input_shape)
    return {n: {what: counted(one, n) for what, one in programs.items()} for n in refresh_levels}


def accuracy(path: Path) -> float:
    """Of the polynomial network on the test images, as `train_paf.py` found it."""
    from tightrope.bundle import Bundle

    return float(Bundle.open(path).accuracy()["test"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--refresh-levels", type=int, default=5, help="after every bootstrap")
    parser.add_argument("--inspect", action="store_true")
    asked = parser.parse_args()
    runtime = CKKS(
        bootstrap="always", refresh_levels=asked.refresh_levels, threads=1, memory_bytes=LIMIT_BYTES,
        timeout_s=1e5, inspect=asked.inspect,
    )  # fmt: skip
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        x, label, want = pool.submit(plain, asked.bundle).result()
        predicted = pool.submit(simulated, asked.bundle, runtime, x).result()
        print(predicted.config, flush=True)
        levels = sorted({asked.refresh_levels, *SHOWN})
        fewest = pool.submit(bootstraps, asked.bundle, levels).result()
        for n, counts in fewest.items():
            shown = ", ".join(f"{what} {'do not fit' if k is None else k}" for what, k in counts.items())
            print(f"fewest bootstraps to {n} levels: {shown}", flush=True)
        found = pool.submit(encrypted, asked.bundle, runtime, x).result()
    for op in found.measured.ops:
        print(f"{op.op:32} {op.cost.online_ms / 1e3:8.1f} s", flush=True)
    name = f"trained ResNet-20, bootstraps to {found.measured.config['levels']} levels"
    if asked.inspect:
        rows = slots(name, found)
    else:
        rows = whole(name, found, predicted, want, label)
        rows += [one for levels, counts in fewest.items() for one in planned(levels, counts)]
        rows.append(_rows.row(f"{name}: test accuracy", accuracy(asked.bundle), "share"))
    command = f"python benchmarks/bench_ckks_bootstrap.py BUNDLE --refresh-levels {asked.refresh_levels}"
    command += " --inspect" * asked.inspect
    stem = "ckks_slots" if asked.inspect else "ckks_bootstrap"
    _rows.write(stem, [{"issue": 3, **row, "command": command} for row in rows])
    print(_rows.table([row for row in _rows.read() if row["command"] == command]))


def whole(
    name: str,
    found: Encrypted,
    predicted: Measurement,
    want: NDArray[np.float64],
    label: int,
) -> list[dict[str, object]]:
    measured, config = found.measured, found.measured.config
    memory, share = found.peak_bytes, predicted.peak_memory_bytes / found.peak_bytes
    minutes, cpu_ms = measured.total.online_ms / 6e4, config["server_cpu_ms"]
    error, limit = float(np.abs(found.y - want).max()), predicted.config["predicted_error"]
    spent = config["bootstraps"] - config["bootstraps_planned"]
    row = _rows.row
    return [
        row(f"{name}: bootstraps per image", config["bootstraps"], "bootstraps"),
        row(f"{name}: bootstraps used minus planned", spent, "bootstraps", spent == 0),
        row(f"{name}: minutes per image, elapsed <= 30", minutes, "min", minutes <= LIMIT_MINUTES),
        row(f"{name}: minutes per image, server CPU", cpu_ms / 6e4, "min"),
        row(f"{name}: minutes for the keys, elapsed", found.setup_s / 60, "min"),
        row(f"{name}: peak memory <= 20 GiB", memory / 2**30, "GiB", memory <= LIMIT_BYTES),
        row(f"{name}: predicted over measured memory >= 1", share, "x", share >= 1),
        row(f"{name}: predicted over server CPU time", predicted.total.online_ms / cpu_ms, "x"),
        row(f"{name}: largest error below the predicted {limit:.1e}", error, "logit", error < limit),
        row(f"{name}: largest logit", float(np.abs(want).max()), "logit"),
        row(f"{name}: same class as plain", float(found.y.argmax() == want.argmax()), "share"),
        row(f"{name}: the right class", float(int(found.y.argmax()) == label), "share"),
    ]


def planned(levels: int, fewest: dict[str, int | None]) -> list[dict[str, object]]:
    """The fewest to so many levels; the chosen polynomials are compared with each that fits everywhere."""
    name, ours = f"trained ResNet-20, bootstraps to {levels} levels", fewest[CHOSEN]
    others = {what: n for what, n in fewest.items() if what != CHOSEN and n is not None}
    rows = [
        _rows.row(f"{name}: fewest with {what}", n, "bootstraps")
        for what, n in fewest.items()
        if n is not None
    ]
    if ours is None or not others:
        return rows
    compared = f"fewer with {CHOSEN} than with {', '.join(others)}"
    if unfit := [what for what, n in fewest.items() if n is None]:
        compared += f" ({', '.join(unfit)} do not fit)"
    return [*rows, _rows.row(f"{name}: {compared}", ours, "bootstraps", ours < min(others.values()))]


def slots(name: str, found: Encrypted) -> list[dict[str, object]]:
    return [
        _rows.row(
            f"{name}: largest error in the slots of {step}, of values up to {about['range']:.3g}, "
            f"below the predicted {about['predicted']:.1e}",
            about["error"],
            "",
            about["error"] < about["predicted"],
        )
        for step, about in found.measured.config["slots"].items()
    ]


if __name__ == "__main__":
    main()
