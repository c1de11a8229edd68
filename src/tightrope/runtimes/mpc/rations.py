"""How many images a client may have classified: what it learns of the weights grows with their number."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable

from tightrope.errors import ProtocolError

HOUR_S = 3600.0


class Rations:
    """At most `most` images within an hour for each client certificate, over all of its sessions; 0: any.

    What was used is forgotten with the process. `clock` in seconds.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._lock = threading.Lock()
        self._used: defaultdict[str, deque[tuple[float, int]]] = defaultdict(deque)

    def take(self, certificate: str, count: int) -> None:
        """Raises ProtocolError, and counts nothing, where that would be more than the client may have."""
        if not self._most:
            return
        with self._lock:
            used, now = self._used[certificate], self._clock()
            while used and used[0][0] <= now - HOUR_S:
                used.popleft()
            left = self._most - sum(n for _, n in used)
            if count > left:
                raise ProtocolError(
                    "the client has had its images of this hour", got=f"{count} more", allowed=f"{left} more"
                )
            used.append((now, count))
