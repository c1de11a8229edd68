"""CKKS parameters: what a program's levels need, and the security table that they must stay within.

The secret is ternary and dense (N/2 nonzero coefficients). The largest moduli at 128 bits are those of the
HomomorphicEncryption.org standard (Albrecht et al. 2018, table 1) for ternary secrets; N = 2^16 is not in it,
its value is extrapolated (OpenFHE's table has 1747). The modulus counts all primes, those of key switching
and of bootstrapping included. Libraries of the field do not check it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tightrope.errors import InputError
from tightrope.runtimes.ckks import bootstrapping
from tightrope.types import Json

MAX_LOG_QP: Mapping[int, int] = {14: 438, 15: 881, 16: 1767}
PRIME_BITS = (
    0.2  # by how much a ring's primes, not quite powers of two, exceed their sizes together: up to 0.16
)
BASE_BITS = 10  # how much larger the last prime is than the scale: room for values beyond 1 at level 0
MAX_SPECIAL = 4  # primes of key switching; more of them make keys smaller and use up modulus
SCALE_BITS = (30, 50)


@dataclass(frozen=True)
class Parameters:
    """A ring of degree 2^log_n with primes of these sizes; `q_bits` has one more than there are levels.

    boot_p_bits: the key-switching primes of bootstrapping, which also adds primes of its own to the modulus;
    empty where nothing is bootstrapped.

    Raises InputError where the modulus may be larger than the table allows, unless `insecure`, which only
    `insecure_test_parameters` sets, and for sizes that no prime has, or none at all.
    """

    log_n: int
    q_bits: tuple[int, ...]
    p_bits: tuple[int, ...]
    scale_bits: int
    boot_p_bits: tuple[int, ...] = ()
    insecure: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if not self.q_bits or not self.p_bits or min(self.q_bits + self.p_bits + self.boot_p_bits) < 1:
            raise InputError(
                "these CKKS parameters have no primes of some kind",
                got=f"bits of Q {self.q_bits}, of P {self.p_bits}, of P for bootstrapping {self.boot_p_bits}",
                allowed="a prime or more in Q and in P, each of a positive number of bits",
            )
        if not self.insecure and (self.log_n not in MAX_LOG_QP or self.log_qp > room(self.log_n)):
            raise InputError(
                "these CKKS parameters are not secure",
                got=f"log2(QP) = {self.log_qp} for N = 2^{self.log_n}",
                allowed="; ".join(f"less than {most} for N = 2^{n}" for n, most in MAX_LOG_QP.items()),
                fix="fewer levels, a larger ring, or a smaller scale",
            )

    @classmethod
    def of(cls, numbers: Json) -> Parameters:
        """From JSON of `dataclasses.asdict`."""
        read: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in numbers.items()}
        return cls(**read)

    def __str__(self) -> str:
        limit = "insecure" if self.insecure else f"{MAX_LOG_QP[self.log_n]} allowed"
        return (
            f"ring degree 2^{self.log_n}, scale 2^{self.scale_bits}, {self.levels} levels, "
            f"log2(QP) = {self.log_qp} ({limit})" + (" with bootstrapping" if self.boot_p_bits else "")
        )

    @property
    def slots(self) -> int:
        return 1 << (self.log_n - 1)

    @property
    def levels(self) -> int:
        return len(self.q_bits) - 1

    @property
    def log_qp(self) -> int:
        """Of the largest modulus that keys have."""
        boot = sum(bootstrapping.PRIMES) + sum(self.boot_p_bits) if self.boot_p_bits else 0
        return sum(self.q_bits) + max(sum(self.p_bits), boot)

    @property
    def digits(self) -> int:
        """Parts into which key switching decomposes a ciphertext of the top level."""
        return -(-len(self.q_bits) // len(self.p_bits))

    @property
    def key_bytes(self) -> int:
        """The numbers of one evaluation key."""
        return self.digits * 2 * (len(self.q_bits) + len(self.p_bits)) * (8 << self.log_n)

    def during_bootstrap(self) -> Parameters:
        """The ring in which bootstrapping computes, and its keys are."""
        q_bits = (*self.q_bits, *bootstrapping.PRIMES)
        return Parameters(self.log_n, q_bits, self.boot_p_bits, self.scale_bits, insecure=self.insecure)

    def ciphertext_bytes(self, level: int) -> int:
        """The numbers of one ciphertext."""
        return 2 * (level + 1) * (8 << self.log_n)

    def library(self) -> dict[str, Json]:
        """As the evaluator's container names them."""
        return {
            "logn": self.log_n,
            "logq": list(self.q_bits),
            "logp": list(self.p_bits),
            "log_default_scale": self.scale_bits,
            "h": self.slots,
            "ring_type": "standard",
            "boot_logp": list(self.boot_p_bits) or None,
            "btp_logn": self.log_n if self.boot_p_bits else None,
        }


def room(log_n: int) -> int:
    """Bits that the sizes of a secure ring's primes may have together."""
    return math.floor(MAX_LOG_QP[log_n] - PRIME_BITS)


def choose(levels: int, scale_bits: int, log_n: int | None = None) -> Parameters:
    """The smallest secure ring (or the given one) with so many levels, and as few key bytes as it allows.

    Raises InputError for a scale out of range, an unknown ring, and levels that do not fit.
    """
    if not SCALE_BITS[0] <= scale_bits <= SCALE_BITS[1]:
        raise InputError(
            "scale_bits is out of range", got=scale_bits, allowed=f"{SCALE_BITS[0]} to {SCALE_BITS[1]}"
        )
    if log_n is not None and log_n not in MAX_LOG_QP:
        raise InputError("no such ring", got=f"log_n={log_n}", allowed=tuple(map(str, MAX_LOG_QP)))
    for n in MAX_LOG_QP if log_n is None else (log_n,):
        fitting = [p for p in _candidates(levels, scale_bits, n) if sum(p[0] + p[1]) <= room(n)]
        if fitting:
            return min((Parameters(n, q, p, scale_bits) for q, p in fitting), key=lambda c: c.key_bytes)
    largest = max(MAX_LOG_QP) if log_n is None else log_n
    raise InputError(
        "the program needs more levels than a secure ring has",
        got=f"{levels} levels of {scale_bits} bits",
        allowed=f"{max_levels(largest, scale_bits)} levels for N = 2^{largest}",
        fix="activations of lower degree, fewer of them, or a smaller scale_bits",
    )


def choose_bootstrapping(levels: int, scale_bits: int) -> Parameters | None:
    """So many levels after every bootstrap, in the only secure ring with room for it; None if it has none."""
    log_n = max(MAX_LOG_QP)
    return with_bootstrapping(levels, scale_bits, log_n, room(log_n))


def with_bootstrapping(
    levels: int, scale_bits: int, log_n: int, most: int, *, insecure: bool = False
) -> Parameters | None:
    candidates = _candidates(levels, scale_bits, log_n)
    special = bootstrapping.special_primes(sum(candidates[0][0]), most)
    if not special:
        return None
    made = (Parameters(log_n, q, p, scale_bits, special, insecure=insecure) for q, p in candidates)
    return min(made, key=lambda c: c.key_bytes)


def max_levels(log_n: int, scale_bits: int) -> int:
    """How many levels a secure ring has, with one prime for key switching."""
    base = scale_bits + BASE_BITS
    return (room(log_n) - base - (base + 1)) // scale_bits


def max_refresh(scale_bits: int) -> int:
    """How many levels a bootstrap can give in a secure ring: those that its own primes leave room for."""
    left = room(max(MAX_LOG_QP)) - sum(bootstrapping.PRIMES) - bootstrapping.SPECIAL_BITS
    return (left - scale_bits - BASE_BITS) // scale_bits


def insecure_test_parameters(
    levels: int, *, log_n: int = 12, scale_bits: int = 40, bootstrap: bool = False
) -> Parameters:
    """Small rings for tests: they protect nothing, and no option of the runtime leads here."""
    if bootstrap:
        made = with_bootstrapping(levels, scale_bits, log_n, room(16), insecure=True)
        assert made is not None
        return made
    q, p = _candidates(levels, scale_bits, log_n)[1]
    return Parameters(log_n, q, p, scale_bits, insecure=True)


Primes = tuple[int, ...]


def _candidates(levels: int, scale_bits: int, log_n: int) -> list[tuple[Primes, Primes]]:
    """Prime sizes by number of special primes: each set exceeds the largest digit by a bit a prime."""
    q = (scale_bits + BASE_BITS, *(scale_bits,) * levels)
    counts = range(1, min(MAX_SPECIAL, max(2, levels)) + 1)
    return [(q, (math.ceil(sum(q[:k]) / k) + 1,) * k) for k in counts]
