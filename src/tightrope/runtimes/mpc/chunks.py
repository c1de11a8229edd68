"""Work on many alike, shared among threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


def over_chunks(work: Callable[[int, int], None], count: int, step: int, threads: int) -> None:
    """Call work(start, stop) over 0..count, `step` at a time."""
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, k, min(k + step, count)) for k in range(0, count, step)]:
            done.result()
