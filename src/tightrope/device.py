"""Where networks are timed in the clear: torch on this processor or a GPU, ONNX Runtime, OpenVINO."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn
from torch.fx.experimental.optimization import fuse

from tightrope.engine import Engine
from tightrope.errors import InputError, near
from tightrope.export import to_onnx
from tightrope.lower import lower
from tightrope.methods.binas.latency import Conditions, Timing
from tightrope.runtimes import runtime_type

Shape = tuple[int, int, int]
Run = Callable[[], object]
WARM_UP = 5
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class Device(Protocol):
    """`load` gives a function that runs a network once, batch-norm folded, on a batch of random images."""

    @property
    def runtime(self) -> str:
        """What runs it, with its version."""
        ...

    def load(self, net: nn.Module, input_shape: Shape, batch: int) -> Run: ...


@dataclass(frozen=True)
class TorchDevice:
    """`kind`: cpu or cuda; a run ends when its result is there."""

    kind: str

    @property
    def runtime(self) -> str:
        return f"torch {torch.__version__}"

    def load(self, net: nn.Module, input_shape: Shape, batch: int) -> Run:
        if self.kind == "cuda" and not torch.cuda.is_available():
            raise InputError("this machine has no such device", got="cuda", allowed="cpu, onnx, openvino")
        fused = fuse(net.eval()).to(self.kind)
        fused = fused.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = torch.randn((batch, *input_shape), generator=torch.Generator().manual_seed(0))
        x = x.to(self.kind, memory_format=torch.channels_last)

        def run() -> None:
            with torch.inference_mode():
                fused(x)
            if self.kind == "cuda":
                torch.cuda.synchronize()

        return run


@dataclass(frozen=True)
class EngineDevice:
    """An engine that loads ONNX."""

    engine: Engine
    package: str

    @property
    def runtime(self) -> str:
        return f"{self.package} {version(self.package)}"

    def load(self, net: nn.Module, input_shape: Shape, batch: int) -> Run:
        infer = self.engine.load(to_onnx(lower(net.eval(), input_shape)))
        x = np.random.default_rng(0).standard_normal((batch, *input_shape)).astype(np.float32)
        return lambda: infer(x)


PACKAGES = {"onnx": "onnxruntime", "openvino": "openvino"}
NAMES = ("cpu", "cuda", *PACKAGES)


def open_device(name: str, threads: int) -> Device:
    """Raises InputError for an unknown name."""
    if name not in NAMES:
        raise InputError("unknown device", got=name, allowed=near(name, NAMES))
    if name in PACKAGES:
        return EngineDevice(runtime_type(name)(threads=threads), PACKAGES[name])
    return TorchDevice(name)


def conditions(name: str, device: Device, *, threads: int, batch: int, clock: str) -> Conditions:
    """Raises InputError for what cannot be timed so."""
    if clock not in CLOCKS:
        raise InputError("unknown clock", got=clock, allowed=tuple(CLOCKS))
    if clock == "cpu" and (threads > 1 or name == "cuda"):
        raise InputError(
            "the processor's time is that of a run only on one thread of it",
            got=f"--clock cpu, {threads} threads, device {name}",
            fix="--clock wall",
        )
    if threads < 1 or batch < 1:
        raise InputError("threads and batch are 1 or more", got=f"{threads} and {batch}")
    return Conditions(name, device.runtime, threads, batch, clock, host(name))


def host(name: str) -> dict[str, str | int]:
    """What makes times of one machine unlike another's; no name of it."""
    if name == "cuda" and torch.cuda.is_available():
        return {"gpu": torch.cuda.get_device_name()}
    model, file = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if file.exists():
        lines = file.read_text().splitlines()
        model = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), model)
    return {"processor": model, "cores": os.cpu_count() or 1}


def time_ms(run: Run, runs: int, clock: str, *, rows: int = 1, row_seconds: float = 0.0) -> Timing:
    """The least median of `rows` rows, after some runs that are not counted: other work may slow a machine
    for longer than runs take. A row is at least `runs` single runs, and more while `row_seconds` have not
    passed: short runs get no more rows than long ones, of which the least would be less."""
    for _ in range(WARM_UP):
        run()
    timed = [_row(run, runs, CLOCKS[clock], row_seconds) for _ in range(rows)]
    return min(timed, key=lambda timing: timing.median_ms)


def _row(run: Run, runs: int, now: Callable[[], float], seconds: float) -> Timing:
    spent: list[float] = []
    end = time.perf_counter() + seconds
    while len(spent) < runs or time.perf_counter() < end:
        start = now()
        run()
        spent.append((now() - start) * 1e3)
    low, _, high = statistics.quantiles(spent, n=4)
    return Timing(statistics.median(spent), high - low, len(spent))


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
