"""A link as slow as a network: a token bucket and a delay in the sender. Bytes and rounds stay as they are.

A thread hands every piece to the link below when it would have arrived.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from queue import SimpleQueue

from tightrope.runtimes.mpc.channel import STEP_S, Link, LinkError
from tightrope.runtimes.mpc.network import Network

PR_SET_TIMERSLACK = 29  # of Linux's prctl
LINGER_S = 2.0  # what closing waits beyond the delay for the last frames
Piece = list[memoryview]


class ShapedLink:
    """`link`, of which each direction is shaped by whoever sends there."""

    def __init__(self, link: Link, network: Network) -> None:
        self._link = link
        self._network = network
        self._queue: SimpleQueue[tuple[float, Piece] | threading.Event | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._pending = 0  # pieces that the thread has not passed on
        self._free_s = 0.0  # when the line has taken all that was sent
        self._failure: str | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._pass_on, name="tightrope-shape", daemon=True)
        self._thread.start()

    def send(self, parts: list[memoryview]) -> None:
        self._check()
        with self._lock:
            for piece in _pieces(parts, self._network.piece_bytes):
                size = sum(view.nbytes for view in piece)
                start_s = max(self._free_s, time.monotonic())
                self._free_s = start_s + size * self._network.ns_per_byte / 1e9
                self._pending += 1
                self._queue.put((self._free_s + self._network.delay_s, piece))

    def recv_into(self, target: memoryview, silence_s: float | None = None) -> None:
        self._link.recv_into(target, silence_s)

    def flush(self) -> None:
        with self._lock:
            waiting = self._pending > 0
        if waiting:  # waking the thread takes longer than some steps
            done = threading.Event()
            self._queue.put(done)
            if not done.wait(STEP_S):
                raise LinkError(f"frames still unsent after {STEP_S:g} s")
        self._check()
        self._link.flush()

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(self._network.delay_s + LINGER_S)
        self._closed.set()
        self._link.close()

    def _check(self) -> None:
        if self._failure is not None:
            raise LinkError(self._failure)

    def _pass_on(self) -> None:
        """The thread. After a failure it only releases those who wait."""
        with suppress(OSError, AttributeError):  # another system wakes it a little later
            ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
                continue
            if self._failure is None:
                self._deliver(*item)
            with self._lock:
                self._pending -= 1

    def _deliver(self, due_s: float, piece: Piece) -> None:
        self._closed.wait(max(0.0, due_s - time.monotonic()))
        if self._closed.is_set():
            self._failure = "closed on this side"
            return
        try:
            self._link.send(piece)
        except LinkError as error:
            self._failure = str(error)


def _pieces(parts: list[memoryview], most_bytes: int) -> Iterator[Piece]:
    """Cut into lists of at most `most_bytes` each, in order, nothing copied."""
    piece: Piece = []
    room = most_bytes
    for view in parts:
        while view.nbytes:
            taken, view = view[:room], view[room:]
            piece.append(taken)
            room -= taken.nbytes
            if not room:
                yield piece
                piece, room = [], most_bytes
    if piece:
        yield piece
