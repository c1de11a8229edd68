"""Measure a `Profile`: the inner loops of a party alone, then a small session for the rest.

The loops are timed by their fastest repetition, each short enough to run undisturbed on a busy machine now
and then. What a step, a gate, a frame and a byte take is what makes the predicted times of the session the
measured ones (least squares of logarithms).
"""

from __future__ import annotations

import os
import platform
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import least_squares, nnls

from tightrope.program import Add, Conv2d, Program, Relu
from tightrope.runtimes.mpc import fss, gates
from tightrope.runtimes.mpc.config import MPC
from tightrope.runtimes.mpc.cost import frame_bytes
from tightrope.runtimes.mpc.fixed import multiply
from tightrope.runtimes.mpc.prg import SEED_BYTES, SESSION_BYTES, Stream, Streams
from tightrope.runtimes.mpc.schedule import Schedule, compile_program
from tightrope.runtimes.mpc.steps import Gate, Multiply, Piece, Wire
from tightrope.runtimes.mpc.team import threads_of
from tightrope.runtimes.mpc.timing import PARTS, Network, Profile, online_ms

SESSION = ("frame", "byte", "step", "gate")
GUESS = {"frame": 3e5, "byte": 2.0, "step": 5e4, "gate": 3e5}
BATCHES = (1, 64)  # of the session: what does not depend on size, and what does
LINKS = 6  # of each kind in the session's program
REPEATS = 30
QUIET = 3  # so many of the repetitions, the fastest ones, count as undisturbed
Progress = Callable[[str, int, int], None]
Times = Mapping[int, Mapping[str, float]]  # batch size -> group of ops -> milliseconds


def calibrate(config: MPC | None = None, progress: Progress = lambda *_: None) -> Profile:
    """A profile of this machine, in some ten seconds if nothing else runs on it."""
    config = config or MPC()
    threads = threads_of(config)
    with _torch_threads(threads):
        progress("loops", 0, 3)
        found = _layers() | _elements()
        progress("loops", 1, 3)
        found |= _gates(threads)
    progress("session", 2, 3)
    guess = Profile(**{**GUESS, **found}, host=_host(threads))
    program = session_program()
    times = _session(config, program)
    progress("session", 3, 3)
    return fitted(guess, compile_program(program, config), times)


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fastest(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Nanoseconds."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter_ns()
        work()
        times.append(time.perf_counter_ns() - start)
    return float(min(times))


def _conv(
    i: int, o: int, k: int, n: int, groups: int = 1, name: str = "conv", source: str = "input"
) -> Conv2d:
    return Conv2d(
        name=name, inputs=(source,), shape=(o, n, n), kernel=(k, k), padding=(k // 2,) * 4, in_channels=i,
        groups=groups,
    )  # fmt: skip


def _wire(shape: tuple[int, ...], scale: int = 44) -> Wire:
    return Wire("", shape, scale, 1.0, 1.0, static=True)


def _layers() -> dict[str, float]:
    """Products and collected values, from layers of different shapes: the best fit of relative errors."""
    shapes = (
        _conv(16, 16, 3, 28), _conv(32, 32, 3, 14), _conv(64, 64, 3, 7), _conv(64, 64, 1, 14),
        _conv(16, 16, 3, 28, groups=16),
    )  # fmt: skip
    rows = []
    for op in shapes:
        weight = torch.randint(-(2**40), 2**40, op.weight_shape)
        x = torch.randint(-(2**62), 2**62, (1, op.in_channels, *op.shape[1:]))
        spent = _fastest(lambda op=op, weight=weight, x=x: multiply(op, weight, x))  # type: ignore[misc]
        step = Multiply(
            index=0, op="", kernel=op, input=_wire(x.shape[1:]), output=_wire(op.shape), weight_bits=22
        )
        work = PARTS[Multiply](step, 1)[0].server
        rows.append([work["mac"] / spent, work["gathered"] / spent])
    mac, gathered = nnls(np.array(rows), np.ones(len(rows)))[0]
    return {"mac": float(mac), "gathered": float(gathered)}


def _elements() -> dict[str, float]:
    """An addition reads two values and makes one."""
    a, b = (torch.randint(-(2**62), 2**62, (1 << 15,)) for _ in range(2))
    return {"element": _fastest(lambda: a + b) / (3 << 15)}


def _gates(threads: int) -> dict[str, float]:
    """A gate with small tiles and one with large ones; comparisons of few and of many levels."""
    streams = Streams(secrets.token_bytes(SEED_BYTES), secrets.token_bytes(SESSION_BYTES))
    stream = streams.open("calibration", 0, 0)
    narrow, wide = (_comparison(stream, bits, threads) for bits in (16, 32))
    level = max(0.0, (wide - narrow) / 16)
    compared = max(0.0, narrow - level * fss.word_levels(16))
    relu = Relu(name="", inputs=("",), shape=(16, 28, 28), patches=((2, 2),) * 16)
    step = Gate(
        index=0, op="", kernel=relu, input=_wire(relu.shape), output=_wire(relu.shape, 22), shift=22, trim=22,
        bits=20, pieces=(Piece(),),
    )  # fmt: skip
    opened = stream.ring(step.opened_size)
    z = stream.ring((1, *relu.shape))
    shares = {f.name: gates.draw(stream, f, 1) for f in step.share_fields}
    bits = stream.bits(step.drelus)
    truncation = _fastest(lambda: gates.truncate(0, opened, shares, step.shift))
    points = _fastest(lambda: gates.compared_points(step, opened))
    whole = _fastest(lambda: gates.select(0, step, opened, z, shares, bits))
    size = step.opened_size
    return {
        "opened": (points + truncation) / size,
        "selected": max(0.0, whole - truncation) / size,
        "compared": compared,
        "level": level,
    }


def _comparison(stream: Stream, bits: int, threads: int, count: int = 1 << 13) -> float:
    """Nanoseconds of one party's evaluation of one comparison; the keys' contents do not matter."""
    key = stream.raw(fss.HASH_KEY_BYTES)
    words = stream.blocks(fss.word_levels(bits) * count).reshape(-1, count, 2)
    points, roots, constant = stream.ring(count), stream.blocks(count), stream.bits(count)
    spent = _fastest(lambda: fss.evaluate(0, points, bits, roots, words, constant, key, threads=threads))
    return spent / count


def session_program() -> Program:
    """Layers after layers, layers after ReLUs, and additions: three groups of ops, by the first letter."""
    channels, n = 4, 8
    ops: list[Any] = []
    last = Program.INPUT
    for k in range(LINKS):
        ops.append(_conv(channels, channels, 1, n, name=f"linear{k}", source=last))
        last = ops[-1].name
    for k in range(LINKS):
        relu = Relu(name=f"gate{k}", inputs=(last,), shape=(channels, n, n), patches=((2, 2),) * channels)
        ops += [relu, _conv(channels, channels, 1, n, name=f"gate_conv{k}", source=relu.name)]
        last = ops[-1].name
    ops.append(replace(relu, name="gate_last", inputs=(last,)))
    last = "gate_last"
    for k in range(4 * LINKS):
        ops.append(Add(name=f"add{k}", inputs=(last, last), shape=(channels, n, n)))
        last = ops[-1].name
    generator = np.random.default_rng(0)
    tensors = {}
    for op in ops:
        if isinstance(op, Conv2d):
            tensors[f"{op.name}.weight"] = generator.standard_normal(op.weight_shape) / channels
            tensors[f"{op.name}.bias"] = np.zeros(channels)
    names = [Program.INPUT, *(op.name for op in ops)]
    ranges = dict.fromkeys([*names, *(f"{name}:tiles" for name in names)], 8.0)
    return Program(tuple(ops), (channels, n, n), last, tensors, ranges)


def _session(config: MPC, program: Program) -> Times:
    """What the parties took: the mean of the fastest runs, by batch size and group."""
    x = np.zeros((max(BATCHES), *program.input_shape))
    times = {}
    with config.open(program, "execute") as session:
        for batch in BATCHES:
            session.run(x[:batch])
            runs = [session.run(x[:batch])[1] for _ in range(REPEATS)]
            quiet = sorted(runs, key=lambda run: run.total.online_ms)[:QUIET]
            spent = [groups({trace.op: trace.cost.online_ms for trace in run.ops}) for run in quiet]
            times[batch] = {group: float(np.mean([s[group] for s in spent])) for group in spent[0]}
    return times


def fitted(guess: Profile, schedule: Schedule, times: Times) -> Profile:
    """The profile whose predictions are nearest to `times`, the units of the loops as guessed."""

    def profile(logarithms: NDArray[np.float64]) -> Profile:
        return replace(guess, **dict(zip(SESSION, np.exp(logarithms).tolist(), strict=True)))

    def residuals(logarithms: NDArray[np.float64]) -> list[float]:
        found = []
        for batch, spent in times.items():
            size = partial(frame_bytes, batch=batch)
            predicted = groups(online_ms(schedule.steps, batch, size, profile(logarithms), Network()))
            found += [float(np.log(predicted[group] / spent[group])) for group in spent]
        return found

    start = np.log([GUESS[unit] for unit in SESSION])
    return profile(least_squares(residuals, start, bounds=(np.log(1e-3), np.log(1e8))).x)


def groups(by_op: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds by the first letter of the op."""
    found: dict[str, float] = {}
    for name, ms in by_op.items():
        found[name[0]] = found.get(name[0], 0.0) + ms
    return found


def _host(threads: int) -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    with open("/proc/cpuinfo") as file:
        named = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return {
        "cpu": named[0] if named else model,
        "cores": len(os.sched_getaffinity(0)),
        "threads_per_party": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
