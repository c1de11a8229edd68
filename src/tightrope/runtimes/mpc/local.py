"""The in-process twin of a TLS link: two queues of bytes, for simulation and tests."""

from __future__ import annotations

from queue import Empty, Queue

from tightrope.runtimes.mpc.channel import Channel, Clock, LinkError
from tightrope.runtimes.mpc.keys import Role


class LocalLink:
    """One end; data is copied at `send`, as a socket would, and None marks the end of the stream.

    No SimpleQueue: where the time is up while its lock is taken, CPython 3.11 waits for ever.
    """

    def __init__(
        self, outgoing: Queue[bytes | None], incoming: Queue[bytes | None], timeout_s: float
    ) -> None:
        self._outgoing = outgoing
        self._incoming = incoming
        self._timeout_s = timeout_s
        self._rest = memoryview(b"")

    def send(self, parts: list[memoryview]) -> None:
        self._outgoing.put(b"".join(parts))

    def recv_into(self, target: memoryview, silence_s: float | None = None) -> None:
        filled = 0
        while filled < len(target):
            if not self._rest:
                self._rest = memoryview(self._receive(self._timeout_s if silence_s is None else silence_s))
            size = min(len(self._rest), len(target) - filled)
            target[filled : filled + size] = self._rest[:size]
            self._rest = self._rest[size:]
            filled += size

    def _receive(self, silence_s: float) -> bytes:
        try:
            data = self._incoming.get(timeout=silence_s)
        except Empty:
            raise LinkError(f"nothing came for {silence_s:g} s") from None
        if data is None:
            self._incoming.put(None)  # the end stays the end
            raise LinkError("closed the connection")
        return data

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._outgoing.put(None)
        self._incoming.put(None)


def local_links(timeout_s: float) -> tuple[LocalLink, LocalLink]:
    """Two ends of one connection."""
    there: Queue[bytes | None] = Queue()
    back: Queue[bytes | None] = Queue()
    return LocalLink(there, back, timeout_s), LocalLink(back, there, timeout_s)


def local_channels(
    one: tuple[Role, Clock], other: tuple[Role, Clock], *, timeout_s: float = 60.0
) -> tuple[Channel, Channel]:
    """The two ends of a channel between threads of this process, each with its party's role and clock."""
    first, second = local_links(timeout_s)
    return Channel(one[0], other[0], first, one[1]), Channel(other[0], one[0], second, other[1])
