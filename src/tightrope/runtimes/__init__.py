"""Runtimes execute Programs and know nothing of methods; each is a folder of the same shape."""

from __future__ import annotations

from importlib import import_module
from types import TracebackType
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from tightrope.errors import InputError, near
from tightrope.program import Op, Program
from tightrope.types import Cost, Measurement

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

    def open(self, program: Program, mode: Mode = "execute") -> Session: ...


RUNTIMES: dict[str, str] = {
    "plain": "tightrope.runtimes.plain:Plain",
    "mpc": "tightrope.runtimes.mpc:MPC",
    "ckks": "tightrope.runtimes.ckks:CKKS",
}


def runtime_type(name: str) -> Any:
    """The configuration class of a runtime. Raises InputError naming the known ones."""
    if name not in RUNTIMES:
        raise InputError("unknown runtime", got=name, allowed=near(name, RUNTIMES))
    module, _, attribute = RUNTIMES[name].partition(":")
    return getattr(import_module(module), attribute)
