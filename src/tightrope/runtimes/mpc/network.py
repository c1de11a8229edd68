"""Networks: what a link carries each way, and how long a message is under way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tightrope.errors import InputError


@dataclass(frozen=True)
class Network:
    """Every link of it: bits per second each way, and the round-trip time.

    Loopback adds nothing to what the machine itself takes.
    """

    bits_per_second: float = math.inf
    rtt_ms: float = 0.0

    @property
    def ns_per_byte(self) -> float:
        return 8e9 / self.bits_per_second

    @property
    def delay_s(self) -> float:
        """One way."""
        return self.rtt_ms / 2e3

    @property
    def piece_bytes(self) -> int:
        """What a link takes at a time, so that the receiver of a long message sees it come."""
        least, most = PIECE_BYTES
        return int(min(max(PIECE_S * self.bits_per_second / 8, least), most))

    @classmethod
    def parse(cls, text: str) -> Network:
        """`loopback`, `lan`, `wan`, or bits per second and milliseconds: `1e9,0.5`. Raises InputError."""
        if text in NETWORKS:
            return NETWORKS[text]
        try:
            bits, rtt = (float(part) for part in text.split(","))
        except ValueError:
            bits = rtt = math.nan
        if not (LEAST_BITS <= bits < math.inf and 0 <= rtt <= MOST_RTT_MS):
            raise InputError(
                "cannot read the network",
                got=repr(text),
                allowed=f"{', '.join(NETWORKS)}, or bits per second (from {LEAST_BITS:g}) and round-trip "
                f"milliseconds (up to {MOST_RTT_MS:g})",
                fix="--network 1e9,0.5",
            )
        return cls(bits, rtt)


PIECE_S = 0.05  # what a piece may take a slow link
PIECE_BYTES = (1 << 10, 1 << 16)  # the smallest and the largest piece
LEAST_BITS = 1e3
MOST_RTT_MS = 1e4
NETWORKS: Mapping[str, Network] = {
    "loopback": Network(),
    "lan": Network(1e9, 0.5),
    "wan": Network(1e8, 40.0),
}
