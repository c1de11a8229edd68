"""What runtimes share that hand a whole Program to an engine in the clear: prices, times and a session."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from tightrope.errors import InputError
from tightrope.export import to_onnx
from tightrope.program import OPS, Op, Program, base_cost, deepest
from tightrope.types import Cost, Json, Measurement, OpTrace, total

Infer = Callable[[NDArray[np.float32]], NDArray[Any]]
WARM_UP, REPEATS = 5, 25
NO_SETTINGS = "an engine in the clear is timed where it runs: it has no network and no profile"
E = TypeVar("E", bound="Engine")


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A runtime that loads an ONNX model: `threads` within an op; ops run one after the other.

    Times are not predicted but measured, of the whole network: engines fuse ops. `batch`: images per run
    behind the price of one.
    """

    threads: int = 1
    batch: int = 1

    name: ClassVar[str]
    ops: ClassVar[frozenset[str]] = frozenset(OPS)
    approximate: ClassVar[frozenset[str]] = frozenset({"online_ms"})
    settings: ClassVar[Mapping[str, Json]] = {}

    def __post_init__(self) -> None:
        for key in ("threads", "batch"):
            if getattr(self, key) < 1:
                raise InputError(f"{key} must be positive", got=getattr(self, key))

    def load(self, model: bytes) -> Infer:
        """The function that runs a model. Raises InputError without the library."""
        raise NotImplementedError

    def price(self, op: Op) -> Cost:
        """What every runtime counts; no time of an op alone."""
        return base_cost(op)

    def prices(self, program: Program) -> dict[str, Cost]:
        return {op.name: base_cost(op) for op in program.ops}

    def pricing(self: E, **settings: Json) -> E:
        """Its own. Raises InputError for any setting."""
        if settings:
            raise InputError(NO_SETTINGS, got=", ".join(settings))
        return self

    def calibrate(self, progress: Callable[[str, int, int], None]) -> Mapping[str, Json]:
        raise InputError(NO_SETTINGS)

    def exact(self, program: Program) -> Cost:
        """Of one image among `batch`."""
        spent = self.estimate(program, self.batch).total
        per_image = spent.scaled(1 / self.batch)
        return replace(per_image, weights=spent.weights, ckks_levels=spent.ckks_levels)

    def estimate(self, program: Program, batch: int = 1) -> Timed:
        """Of a batch of random images, with random weights where there are none.

        The time is the fastest of some runs: what else the machine does only adds to it.
        """
        rng = np.random.default_rng(0)
        shapes = {f"{op.name}.{part}": kinds[0] for op in program.ops for part, kinds in op.parts.items()}
        filled = {name: rng.standard_normal(shape) / 16 for name, shape in shapes.items()}
        ms = self.times_ms(replace(program, tensors={**filled, **program.tensors}), batch)
        ops = {op.name: _spent(op, batch) for op in program.ops}
        spent = replace(total(ops.values()), online_ms=min(ms), ckks_levels=_levels(program))
        return Timed(ops, spent)

    def times_ms(self, program: Program, batch: int = 1, repeats: int = REPEATS) -> list[float]:
        """Milliseconds of single runs of random images, after some that are not counted."""
        x = np.random.default_rng(0).standard_normal((batch, *program.input_shape))
        with self.open(program) as session:
            runs = [session.run(x)[1].total.online_ms for _ in range(WARM_UP + repeats)]
        return runs[WARM_UP:]

    def open(self, program: Program, mode: Literal["simulate", "execute"] = "execute") -> EngineSession:
        """Raises TraceError for a ReLU with patches, InputError without the libraries."""
        return EngineSession(program, self.name, {"threads": self.threads}, self.load(to_onnx(program)))


def _spent(op: Op, batch: int) -> Cost:
    base = base_cost(op)
    return replace(base.scaled(batch), weights=base.weights, ckks_levels=base.ckks_levels)


def _levels(program: Program) -> float:
    return deepest(program, {op.name: base_cost(op).ckks_levels for op in program.ops})


@dataclass(frozen=True)
class Timed:
    """What a batch takes; only the whole has a time."""

    ops: Mapping[str, Cost]
    total: Cost
    about: str = "the engine fuses the ops: only the whole has a time"


@dataclass(frozen=True)
class EngineSession:
    program: Program
    runtime: str
    config: Mapping[str, Json]
    infer: Infer = field(repr=False)

    def run(self, x: NDArray[Any]) -> tuple[NDArray[np.float64], Measurement]:
        """(N, *input_shape) -> (N, *output shape). The time is of all ops together: the engine fuses them."""
        self.program.check_input(x)
        batch = np.ascontiguousarray(x, dtype=np.float32)
        start = time.perf_counter()
        y = self.infer(batch)
        ms = (time.perf_counter() - start) * 1e3
        traces = [OpTrace(op.name, op.kind, _spent(op, len(x))) for op in self.program.ops]
        whole = replace(total(t.cost for t in traces), online_ms=ms, ckks_levels=_levels(self.program))
        return y.astype(np.float64), Measurement(
            runtime=self.runtime, batch=len(x), ops=tuple(traces), total=whole, config=self.config
        )

    def __enter__(self) -> EngineSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        return None
