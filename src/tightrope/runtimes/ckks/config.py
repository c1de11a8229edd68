"""CKKS: the configuration of the homomorphic runtime, which is also the runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from tightrope.errors import InputError
from tightrope.program import Op, Program, base_cost
from tightrope.runtimes.ckks.compiler import Nodes
from tightrope.runtimes.ckks.parameters import (
    MAX_LOG_QP,
    Parameters,
    choose,
    choose_bootstrapping,
    max_levels,
    max_refresh,
)
from tightrope.runtimes.ckks.placement import choose_levels
from tightrope.runtimes.ckks.planning import OPS, alone, check, merge
from tightrope.types import Cost, Json, Merge

if TYPE_CHECKING:
    from tightrope.runtimes.ckks.execute import CKKSSession
    from tightrope.runtimes.ckks.predicting import Predicted
    from tightrope.runtimes.ckks.seal import CrosscheckSession
    from tightrope.runtimes.ckks.session import SimulatedSession


BOOTSTRAP = ("auto", "always", "never")


@dataclass(frozen=True, kw_only=True)
class CKKS:
    """A client that holds the key and a server that holds the weights and computes on ciphertexts.

    scale_bits: of the fixed point, and of every level: fewer leave room for more levels and less precision.
    log_n: the ring's degree as a power of two, 0 for the smallest one that is secure and has the levels.
    bootstrap: whether ciphertexts are refreshed on the way: `auto`, where no secure ring has the levels,
    `always`, wherever there is something to refresh, `never`. refresh_levels: levels after each, 0 for what
    makes them cheapest; refused where there are none.
    squares: whether a quadratic between two layers takes one level instead of two, by completing the square.
    memory_bytes: what both processes together may take, 0 for four fifths of what is free; a session whose
    estimate is larger is refused. threads: images that the server works on at a time. timeout_s: how long the
    client waits for an answer, and either side for the rest of a message, while the server waits for the next
    one as long as the client is there; port: of the server on the loopback, 0 for a free one. inspect: the
    server also returns the result of every step, and the measurement's config says as `slots` the largest
    error in each one's, bytes counted as without; for a machine of one's own, since a client learns the
    weights so.

    Raises InputError for a value out of range or no whole number.
    """

    scale_bits: int = 40
    log_n: int = 0
    bootstrap: str = "auto"
    refresh_levels: int = 0
    squares: bool = True
    memory_bytes: int = 0
    threads: int = 2
    timeout_s: float = 3600.0
    port: int = 0
    inspect: bool = False

    name: ClassVar[str] = "ckks"
    ops: ClassVar[frozenset[str]] = OPS
    approximate: ClassVar[frozenset[str]] = frozenset()  # of `prices`, but for levels, which follow a path
    settings: ClassVar[Mapping[str, Json]] = {}

    def __post_init__(self) -> None:
        for key in ("scale_bits", "log_n", "memory_bytes", "refresh_levels", "threads", "port"):
            if type(value := getattr(self, key)) is not int:
                raise InputError(f"{key} must be a whole number", where="CKKS", got=value)
        choose(1, self.scale_bits, self.log_n or None)
        limits = {
            "memory_bytes": (0, 2**50),
            "refresh_levels": (0, max_refresh(self.scale_bits)),
            "threads": (1, 64),
            "timeout_s": (0.1, 1e6),
            "port": (0, 65535),
        }
        for key, (low, high) in limits.items():
            value = getattr(self, key)
            if not low <= value <= high:
                raise InputError(
                    f"{key} is out of range", where="CKKS", got=value, allowed=f"{low} to {high}"
                )
        if self.bootstrap not in BOOTSTRAP:
            raise InputError("unknown choice of bootstraps", got=self.bootstrap, allowed=BOOTSTRAP)
        if self.refresh_levels and self.bootstrap == "never":
            raise InputError(
                "levels after a bootstrap, where there is none",
                got=f"refresh_levels={self.refresh_levels}, bootstrap={self.bootstrap!r}",
                fix="bootstrap='always', or no refresh_levels",
            )

    def parameters(self, levels: int, nodes: Nodes) -> Parameters:
        """For a program of so many levels, or for bootstraps on its nodes.

        Raises InputError where no secure ring has the levels, bootstrapped or not, and for `refresh_levels`
        where no value is bootstrapped.
        """
        largest = self.log_n or max(MAX_LOG_QP)
        wanting = largest == max(MAX_LOG_QP) and levels > max_levels(largest, self.scale_bits)
        bootstrap = self.bootstrap == "always" or (self.bootstrap == "auto" and wanting)
        if bootstrap and (found := self._bootstrapped(largest, nodes)) is not None:
            return found
        chosen = choose(levels, self.scale_bits, self.log_n or None)
        if self.refresh_levels:
            always = "--bootstrap always (bootstrap='always'), or " * (self.refresh_levels < levels)
            raise InputError(
                "levels after a bootstrap, where none is needed",
                got=f"refresh_levels={self.refresh_levels}; {levels} levels, N = 2^{chosen.log_n}",
                fix=f"{always}no --refresh-levels",
            )
        return chosen

    def _bootstrapped(self, log_n: int, nodes: Nodes) -> Parameters | None:
        """None where nothing is bootstrapped with any number of levels."""
        if log_n < max(MAX_LOG_QP):
            raise InputError(
                "this ring has no room for bootstrapping",
                got=f"log_n={log_n}",
                allowed=f"{max(MAX_LOG_QP)}",
            )
        offer = partial(choose_bootstrapping, scale_bits=self.scale_bits)
        return choose_levels(
            nodes(1 << (log_n - 1)), offer, max_refresh(self.scale_bits), self.refresh_levels
        )

    def price(self, op: Op) -> Cost:
        """Of one op alone; its levels are those between two layers. How they add up among others: `merge`."""
        check(op)
        return replace(base_cost(op), ckks_levels=alone(op, self.squares))

    def merge(self, op: Op) -> Merge:
        """How the op shares levels with those beside it, for whoever counts them along a path."""
        return merge(op, self.squares)

    def prices(self, program: Program) -> dict[str, Cost]:
        """What every op adds per sample among the others: a merged op is free, the last of a step pays."""
        return dict(self.estimate(program.public()).ops)

    def pricing(self, **settings: Json) -> CKKS:
        """Its own. Raises InputError for any setting: prices depend on no network or machine."""
        if settings:
            raise InputError("the ckks runtime prices for one machine only", got=", ".join(settings))
        return self

    def calibrate(self, progress: Callable[[str, int, int], None]) -> Mapping[str, Json]:
        raise InputError("the ckks runtime has nothing to calibrate")

    def exact(self, program: Program) -> Cost:
        """Levels, bytes and the structural part of one sample as a run counts them, ms as predicted."""
        return self.estimate(program).total

    def estimate(self, program: Program, batch: int = 1) -> Predicted:
        """What a batch will cost, op by op; levels of the whole follow the longest path. `about` says too
        whether a session here would be refused for its memory.

        A program without ranges counts as within 1, its weights as 1. Raises TraceError and InputError as
        `open` does, memory aside; what depends on weights only where the program has them.
        """
        from tightrope.runtimes.ckks.predicting import predict

        return predict(program, self, batch)

    def open(
        self, program: Program, mode: Literal["simulate", "execute", "crosscheck"] = "execute"
    ) -> CKKSSession | SimulatedSession | CrosscheckSession:
        """Start the server and make keys (`execute`), run on simulated ciphertexts (`simulate`), or let a
        second library, Microsoft SEAL, compute a shallow network in this process (`crosscheck`).

        Raises TraceError or InputError if the program cannot be executed, needs more levels than a secure
        ring has, or more memory than allowed; ProtocolError if the server fails.
        """
        from tightrope.runtimes.ckks.session import open_session

        return open_session(program, self, mode)
