"""Measure a `Profile`: the inner loops of a party alone, then small sessions for the rest.

A loop runs on inputs that no cache holds, as a party does: its material came some time ago. Each repetition
is short enough to be undisturbed on a busy machine now and then. What a step, a gate, a frame and a byte
take, and a frame over a network, is what makes the predicted times of sessions the measured ones (least
squares of logarithms), and so is how much longer the loops take there: beside two other processes caches are
shared, and a machine is not as fast all the time as it is at best.
"""

from __future__ import annotations

import os
import platform
import secrets
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import least_squares, nnls

from tightrope.program import Conv2d, Program, Relu
from tightrope.runtimes.mpc import fss, gates
from tightrope.runtimes.mpc.config import MPC, RINGS
from tightrope.runtimes.mpc.cost import frame_bytes
from tightrope.runtimes.mpc.fixed import INTEGERS, multiply
from tightrope.runtimes.mpc.network import Network
from tightrope.runtimes.mpc.prg import SEED_BYTES, SESSION_BYTES, Stream, Streams
from tightrope.runtimes.mpc.rehearsal import conv, session_program
from tightrope.runtimes.mpc.schedule import Schedule, compile_program
from tightrope.runtimes.mpc.steps import Gate, Multiply, Piece, Wire
from tightrope.runtimes.mpc.team import threads_of
from tightrope.runtimes.mpc.timing import CLIENT, Profile, offline_ms, online_ms
from tightrope.runtimes.mpc.work import OFFLINE, ONLINE
from tightrope.types import Cost, Json, Measurement

LAYERS = ("mac", "row", "gathered", "beside", "group")
SESSION = ("frame", "late", "byte", "step", "gate")
LOOPS = (*LAYERS, "element", "drawn", "opened", "selected", "compared", "level", "shared", "keyed")
SLOWER = (0.2, 10.0)  # they are in a session, at least and at most
GUESS = {"frame": 2e5, "late": 1e5, "byte": 2.0, "step": 2e4, "gate": 2e5}
DEALT = ("deal", "shared", "keyed")  # what only the dealer's times in the session tell
NEAR, FAR = "loopback", "lan"
CASES = ((NEAR, 1), (NEAR, 4), (NEAR, 16), (FAR, 1), (FAR, 4))  # networks and batches
WIDTHS = (12, 16, 20, 24, 28, 32)  # bits of comparisons
REPEATS = 60
RUNS = 36  # of every case
ROUNDS = 6  # over the sessions: a machine may be slower for seconds
CACHES_BYTES = 1 << 26  # more than caches hold
MIDDLE = 0.5  # the share of the repetitions, neither the fastest nor the slowest, that counts as usual
SMALL = {"fraction_bits": 11, "weight_bits": 11, "margin": 2.0}  # what the small ring has room for
Progress = Callable[[str, int, int], None]
Units = dict[str, float]
Inputs = tuple[Any, ...]  # arrays or tensors
Loop = Callable[..., object]
Case = tuple[str, int]
Times = Mapping[Case, Mapping[str, Cost]]  # case -> group of ops -> milliseconds; offline the dealer's own
Whole = Mapping[int, float]  # batch -> milliseconds of everything offline, without a network


def calibrate(config: MPC, progress: Progress) -> dict[str, Json]:
    """The profile of this machine for both rings: see `Profile.read`."""
    rings = {}
    for k, ring_bits in enumerate(RINGS):
        narrow = SMALL if ring_bits < 64 else {}
        here = MPC(ring_bits=ring_bits, threads=config.threads, **narrow)  # type: ignore[arg-type]

        def done(what: str, parts: int, k: int = k) -> None:
            progress(what, 3 * k + parts, 3 * len(RINGS))

        rings[str(ring_bits)] = measured(here, done)
    return {"host": _host(threads_of(config)), "rings": rings}


def measured(config: MPC, done: Callable[[str, int], None]) -> Units:
    """The units of a `Profile` in one ring. A machine may be slower for a minute: loops are measured before
    and after the sessions, and the faster ones count."""
    program = session_program()
    schedule = compile_program(program, config)
    done("loops", 0)
    before = _loops(config)
    done("session", 1)
    times, offline = _session(config, program)
    done("loops", 2)
    guess = min(before, _loops(config), key=partial(_alone_ns, schedule))
    done("loops", 3)
    known = fitted(dealt(guess, schedule, times), schedule, times)
    return ahead(known, schedule, offline).units


def _alone_ns(schedule: Schedule, profile: Profile) -> float:
    """Of all that the parties compute for a sample, one after the other."""
    parts = (part for step in schedule.steps for part in ONLINE[type(step)](step, 1))
    return sum(profile.ns(work) for part in parts for work in part.values())


def _loops(config: MPC) -> Profile:
    threads = threads_of(config)
    with _torch_threads(threads):
        found = _layers(config.ring_bits) | _elements(config.ring_bits) | _gates(config)
    units: dict[str, Any] = {**GUESS, **dict.fromkeys((*DEALT, "bulk"), 0.0), **found}
    return Profile(**units, host=_host(threads))


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cold(loop: Loop, make: Callable[[], Inputs]) -> float:
    """Nanoseconds of `loop` on inputs that lie in no cache: it goes round more of them than caches hold.
    The first quartile, so that a busy machine does not show."""
    first = make()
    count = max(2, -(-CACHES_BYTES // max(1, sum(x.nbytes for x in first))))
    inputs = [first, *(make() for _ in range(count - 1))]
    times = []
    for turn in range(max(2, -(-REPEATS // count))):
        for given in inputs:
            start = time.perf_counter_ns()
            loop(*given)
            spent = time.perf_counter_ns() - start
            if turn:  # the first one warms up whatever is no input
                times.append(spent)
    return float(np.quantile(times, 0.25))


def _wire(shape: tuple[int, ...], scale: int, ring_bits: int) -> Wire:
    return Wire("", shape, scale, 1.0, 1.0, static=True, ring_bits=ring_bits)


def _random(shape: tuple[int, ...], ring_bits: int) -> torch.Tensor:
    drawn = np.random.default_rng(0).integers(-(2**30), 2**30, shape, INTEGERS[ring_bits])
    return torch.from_numpy(drawn)


def _layers(ring_bits: int) -> dict[str, float]:
    """Products and what comes with them: the best fit of relative errors to many shapes."""
    shapes = (
        conv(16, 16, 3, 28), conv(32, 32, 3, 14), conv(64, 64, 3, 7), conv(64, 64, 1, 14),
        conv(128, 128, 3, 4), conv(64, 64, 3, 28), conv(16, 16, 3, 28, groups=16),
        conv(64, 64, 3, 7, groups=64), conv(8, 8, 1, 14), conv(16, 16, 3, 32), conv(16, 16, 9, 14),
        conv(32, 32, 7, 7),
    )  # fmt: skip
    rows = []
    for op in shapes:
        x_shape = (1, op.in_channels, *op.shape[1:])

        def make(op: Conv2d = op, x_shape: tuple[int, ...] = x_shape) -> Inputs:
            return _random(op.weight_shape, ring_bits), _random(x_shape, ring_bits)

        spent = _cold(partial(multiply, op), make)
        step = Multiply(
            index=0, op="", kernel=op, input=_wire(x_shape[1:], 0, ring_bits),
            output=_wire(op.shape, 0, ring_bits), weight_bits=22,
        )  # fmt: skip
        work = ONLINE[Multiply](step, 1)[0]["server"]
        rows.append([work.get(unit, 0.0) / spent for unit in LAYERS])
    found = nnls(np.array(rows), np.ones(len(rows)))[0]
    return dict(zip(LAYERS, found.tolist(), strict=True))


def _elements(ring_bits: int) -> dict[str, float]:
    """An addition reads two values and makes one; a keystream makes bytes."""
    size = 1 << 15
    added = _cold(torch.add, lambda: (_random((size,), ring_bits), _random((size,), ring_bits)))
    stream = _stream()
    drawn = _cold(stream.fill, lambda: (np.empty(1 << 18, np.uint8),)) / (1 << 18)
    return {"element": added / (3 * size), "drawn": drawn}


def _stream() -> Stream:
    streams = Streams(secrets.token_bytes(SEED_BYTES), secrets.token_bytes(SESSION_BYTES))
    return streams.open("calibration", 0, 0)


def _gates(config: MPC) -> dict[str, float]:
    """A gate with small tiles and one with large ones; comparisons of few and of many levels."""
    stream, ring_bits, shift = _stream(), config.ring_bits, config.weight_bits
    compared, level = _comparisons(stream, threads_of(config))
    relu = Relu(name="", inputs=("",), shape=(16, 28, 28), patches=((2, 2),) * 16)
    step = Gate(
        index=0, op="", kernel=relu, input=_wire(relu.shape, 2 * shift, ring_bits),
        output=_wire(relu.shape, shift, ring_bits), shift=shift, trim=shift, bits=20, pieces=(Piece(),),
    )  # fmt: skip
    names = [f.name for f in step.share_fields]

    def material() -> Inputs:
        opened = stream.ring(step.opened_size, ring_bits)
        z = stream.ring((1, *relu.shape), ring_bits)
        return opened, z, stream.bits(step.drelus), *(gates.draw(stream, f, 1) for f in step.share_fields)

    def truncated(opened: Any, z: Any, bits: Any, *shares: Any) -> None:
        gates.truncate(0, step, opened, dict(zip(names, shares, strict=True)))

    def points(opened: Any, *rest: Any) -> None:
        gates.compared_points(step, opened)

    def selected(opened: Any, z: Any, bits: Any, *shares: Any) -> None:
        gates.select(0, step, opened, z, dict(zip(names, shares, strict=True)), bits)

    truncation, compared_points, whole = (_cold(loop, material) for loop in (truncated, points, selected))
    size = step.opened_size
    return {
        "opened": (compared_points + truncation) / size,
        "selected": max(0.0, whole - truncation) / size,
        "compared": compared,
        "level": level,
    }


def _comparisons(stream: Stream, threads: int) -> tuple[float, float]:
    """What each takes whatever its width, and a level: the best fit of relative errors."""
    spent = np.array([_comparison(stream, bits, threads) for bits in WIDTHS])
    rows = np.array([[1.0, fss.word_levels(bits)] for bits in WIDTHS])
    compared, level = nnls(rows / spent[:, None], np.ones(len(spent)))[0]
    return float(compared), float(level)


def _comparison(stream: Stream, bits: int, threads: int, count: int = 1 << 13) -> float:
    """Nanoseconds of one party's evaluation of one comparison; the keys' contents do not matter."""
    hash_key = stream.raw(fss.HASH_KEY_BYTES)

    def key() -> Inputs:
        words = stream.blocks(fss.word_levels(bits) * count).reshape(-1, count, 2)
        return stream.ring(count), stream.blocks(count), words, stream.bits(count)

    def evaluate(points: Any, roots: Any, words: Any, constant: Any) -> None:
        fss.evaluate(0, points, bits, roots, words, constant, hash_key, threads=threads)

    return _cold(evaluate, key) / count


def _session(config: MPC, program: Program) -> tuple[Times, Whole]:
    """What the parties usually took, by case and group; offline the dealer. All cases take turns."""
    with ExitStack() as stack:
        sessions = {
            network: stack.enter_context(replace(config, network=network).open(program, "execute"))
            for network in (NEAR, FAR)
        }
        runs: dict[Case, list[Measurement]] = {case: [] for case in CASES}
        for _ in range(ROUNDS):
            for network, batch in CASES:
                x = np.zeros((batch, *program.input_shape))
                sessions[network].run(x)
                runs[network, batch] += [sessions[network].run(x)[1] for _ in range(max(1, RUNS // ROUNDS))]
    times = {}
    for case, found in runs.items():
        online, dealer = _usual(found), groups(_fastest_ops(found))
        times[case] = {group: Cost(online_ms=online[group], offline_ms=dealer[group]) for group in online}
    offline = {
        batch: statistics.median(run.total.offline_ms for run in found)
        for (network, batch), found in runs.items()
        if network == NEAR
    }
    return times, offline


def _fastest_ops(runs: Sequence[Measurement]) -> dict[str, float]:
    """The dealer waits for nobody, so each op may have its own fastest run."""
    return {
        traces[0].op: min(trace.cost.offline_ms for trace in traces)
        for traces in zip(*(run.ops for run in runs), strict=True)
    }


def _usual(runs: Sequence[Measurement]) -> dict[str, float]:
    """Online, by group, the mean over the runs that took neither long nor short in all: waiting moves
    between ops, and nobody meets the fastest run."""
    spent = [groups({trace.op: trace.cost.online_ms for trace in run.ops}) for run in runs]
    spent.sort(key=lambda by_group: sum(by_group.values()))
    aside = int(len(spent) * (1 - MIDDLE) / 2)
    middle = spent[aside : len(spent) - aside]
    return {group: float(np.mean([s[group] for s in middle])) for group in middle[0]}


def dealt(guess: Profile, schedule: Schedule, times: Times) -> Profile:
    """`guess` with what the dealer's times say beyond the known units: the best fit of relative errors."""
    rows, known, seen = [], [], []
    for (network, batch), spent in times.items():
        if network != NEAR:  # no message has to come before the dealer works
            continue
        work: dict[str, dict[str, float]] = {}
        for step in schedule.steps:
            units = work.setdefault(step.op[0], {})
            for part in OFFLINE[type(step)](step, batch):
                for unit, count in part.get("dealer", {}).items():
                    units[unit] = units.get(unit, 0.0) + count
        for group, units in work.items():
            if spent[group].offline_ms and any(units.get(unit) for unit in DEALT):
                rows.append([units.get(unit, 0.0) for unit in DEALT])
                known.append(guess.ns({u: n for u, n in units.items() if u not in DEALT}))
                seen.append(spent[group].offline_ms * 1e6)
    ns, total_ = np.array(rows), np.array(seen)
    found = nnls(ns / total_[:, None], np.maximum(0.0, 1 - np.array(known) / total_))[0]
    return replace(guess, **dict(zip(DEALT, found.tolist(), strict=True)))


def fitted(guess: Profile, schedule: Schedule, times: Times) -> Profile:
    """The profile whose online predictions are nearest to `times`, its loops in proportion as guessed."""

    def profile(logarithms: NDArray[np.float64]) -> Profile:
        *session, slower = np.exp(logarithms).tolist()
        loops = {unit: slower * getattr(guess, unit) for unit in LOOPS}
        return replace(guess, **loops, **dict(zip(SESSION, session, strict=True)))

    def residuals(logarithms: NDArray[np.float64]) -> list[float]:
        found = []
        for (network, batch), spent in times.items():
            size, link = partial(frame_bytes, batch=batch), Network.parse(network)
            predicted = groups(online_ms(schedule.steps, batch, size, profile(logarithms), link, CLIENT))
            found += [float(np.log(predicted[group] / spent[group].online_ms)) for group in spent]
        return found

    start = np.log([*(GUESS[unit] for unit in SESSION), 1.0])
    low, high = zip(*[(1e-3, 1e8)] * len(SESSION), SLOWER, strict=True)
    return profile(least_squares(residuals, start, bounds=(np.log(low), np.log(high))).x)


def ahead(guess: Profile, schedule: Schedule, whole: Whole) -> Profile:
    """`guess` with the step and the byte offline that make predictions of whole offline phases nearest: the
    parties' steps wait for each other, and long messages are moved faster than short ones."""

    def profile(logarithms: NDArray[np.float64]) -> Profile:
        deal, bulk = np.exp(logarithms).tolist()
        return replace(guess, deal=deal, bulk=bulk)

    def residuals(logarithms: NDArray[np.float64]) -> list[float]:
        found = []
        for batch, ms in whole.items():
            size = partial(frame_bytes, batch=batch)
            predicted = offline_ms(schedule.steps, batch, size, profile(logarithms), Network())
            found.append(float(np.log(sum(predicted.values()) / ms)))
        return found

    start = np.log([max(1.0, guess.deal), guess.byte])
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
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "numpy": np.__version__,
    }
