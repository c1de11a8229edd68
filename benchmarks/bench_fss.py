"""Issue 2: time per DReLU of the function-secret-sharing core, one core; checks every result it times.

python benchmarks/bench_fss.py            # under a minute
"""

from __future__ import annotations

import secrets
import statistics
import time
from collections.abc import Callable

import numpy as np

from _rows import write
from tightrope.runtimes.mpc import fss
from tightrope.runtimes.mpc.prg import Streams

COUNT = 1 << 18
REPEATS = 7
BAR_US = 0.2
WIDTHS = (8, 12, 16, 20, 32, 64)
COMMAND = "python benchmarks/bench_fss.py"


def main() -> None:
    rows: list[dict[str, object]] = []
    for n in WIDTHS:
        for what, value_us in per_drelu(n).items():
            barred = n == 20 and what == "evaluation"
            rows.append(
                {
                    "bar": f"DReLU {what}, n={n}, one core, per party" + (f" <= {BAR_US}" if barred else ""),
                    "value": round(value_us, 4),
                    "unit": "microseconds",
                    "holds": not barred or value_us <= BAR_US,
                }
            )
    rows.append({"bar": "AES-CTR stream, one core", "value": stream_rate(), "unit": "GB/s", "holds": True})
    print(write("fss", [{"issue": 2, "command": COMMAND, **row} for row in rows]))


def per_drelu(n: int) -> dict[str, float]:
    """Median microseconds per DReLU of the dealer's generation and of the slower party's evaluation."""
    streams = Streams(secrets.token_bytes(32), secrets.token_bytes(16)).open("benchmark", n, 0)
    r, x = streams.ring(COUNT), streams.ring(COUNT)
    roots, c, bit0 = (streams.blocks(COUNT), streams.blocks(COUNT)), streams.bits(COUNT), streams.bits(COUNT)
    key, xhat = streams.raw(fss.HASH_KEY_BYTES), x + r
    words, bit1 = fss.gen(r, c, n, *roots, bit0, key)
    shares = [fss.evaluate(p, xhat, n, roots[p], words, (bit0, bit1)[p], key) for p in (0, 1)]
    wanted = (x << np.uint64(64 - n)).view(np.int64) >= 0
    if not np.array_equal(shares[0] ^ shares[1] ^ c, wanted):
        raise SystemExit(f"wrong signs at n = {n}")
    return {
        "key generation": median_us(lambda: fss.gen(r, c, n, *roots, bit0, key, out=words)),
        "evaluation": max(
            median_us(lambda: fss.evaluate(0, xhat, n, roots[0], words, bit0, key)),
            median_us(lambda: fss.evaluate(1, xhat, n, roots[1], words, bit1, key)),
        ),
    }


def median_us(work: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times) / COUNT * 1e6


def stream_rate() -> float:
    out = np.empty(1 << 24, np.uint64)
    stream = Streams(secrets.token_bytes(32), secrets.token_bytes(16)).open("benchmark", 0, 0)
    stream.fill(out)
    began = time.perf_counter()
    stream.fill(out)
    return round(out.nbytes / (time.perf_counter() - began) / 1e9, 2)


if __name__ == "__main__":
    main()
