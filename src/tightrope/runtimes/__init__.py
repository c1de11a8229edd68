"""Runtimes execute Programs and know nothing of methods; each is a folder of the same shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from types import TracebackType
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from tightrope.errors import InputError, near
from tightrope.program import Op, Program
from tightrope.types import Cost, Json, Measurement

Mode = Literal["simulate", "execute"]


class Session(Protocol):
    """A context manager that owns whatever execution needs: processes, sockets, keys."""

    def run(self, x: NDArray[Any]) -> tuple[NDArray[np.float64], Measurement]:
        """(N, *input_shape) -> (N, *output shape), and what it really cost."""
        ...

    def __enter__(self) -> Session: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None: ...


@runtime_checkable
class Watchable(Protocol):
    """A session whose runs take long in this very process."""

    def watch(self, progress: Callable[[str, int, int], None]) -> None:
        """Call `progress(what, done, of)` in the course of every run from now on."""
        ...


class Runtime(Protocol):
    """A frozen dataclass. `ops` are the kinds it executes; another one is an error naming op and site."""

    @property
    def name(self) -> str: ...

    @property
    def ops(self) -> frozenset[str]: ...

    def price(self, op: Op) -> Cost:
        """What one op costs per sample, taken alone: how a method compares options."""
        ...

    def prices(self, program: Program) -> dict[str, Cost]:
        """What every op of a program costs per sample, what ops share counted once."""
        ...

    def pricing(self, **settings: Json) -> Pricing:
        """What it charges a method for its options, for one network and machine, say."""
        ...

    def calibrate(self, progress: Callable[[str, int, int], None]) -> Mapping[str, Json]:
        """Measure what this machine takes: the `profile` of `pricing`. Raises InputError if it has none."""
        ...

    def open(self, program: Program, mode: Mode = "execute") -> Session: ...


class Pricing(Protocol):
    """Prices per sample that add up over options, and the exact cost of what was chosen.

    `approximate`: the quantities in which the sum of prices is not the exact cost; `settings`: what
    `Runtime.pricing` makes it again from.
    """

    @property
    def approximate(self) -> frozenset[str]: ...

    @property
    def settings(self) -> Mapping[str, Json]: ...

    def price(self, op: Op) -> Cost: ...

    def prices(self, program: Program) -> dict[str, Cost]: ...

    def exact(self, program: Program) -> Cost:
        """Of a calibrated program, as a run of one sample counts it.

        Raises TraceError for an op that the runtime cannot execute, InputError where values do not fit.
        """
        ...

    def estimate(self, program: Program, batch: int = 1) -> Estimate:
        """Of a whole batch, milliseconds included. Raises like `exact`, and InputError where it cannot."""
        ...


class Estimate(Protocol):
    """What a batch will cost, by op and in all; `about`: what else there is to know before, if anything."""

    @property
    def ops(self) -> Mapping[str, Cost]: ...

    @property
    def total(self) -> Cost: ...

    @property
    def about(self) -> str: ...


RUNTIMES: dict[str, str] = {
    "plain": "tightrope.runtimes.plain:Plain",
    "mpc": "tightrope.runtimes.mpc:MPC",
    "ckks": "tightrope.runtimes.ckks:CKKS",
    "onnx": "tightrope.runtimes.onnx:Onnx",
    "openvino": "tightrope.runtimes.openvino:OpenVino",
}


def runtime_type(name: str) -> Any:
    """The configuration class of a runtime. Raises InputError naming the known ones."""
    if name not in RUNTIMES:
        raise InputError("unknown runtime", got=name, allowed=near(name, RUNTIMES))
    module, _, attribute = RUNTIMES[name].partition(":")
    return getattr(import_module(module), attribute)
