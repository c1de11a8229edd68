"""A channel: numbered, typed, counted frames between two parties over some link (TLS socket or memory)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tightrope.errors import ProtocolError
from tightrope.runtimes.mpc.frame import BEAT, ENDED, HEADER_BYTES, Header, parse
from tightrope.runtimes.mpc.keys import Role

BEAT_S = 1.0
STEP_S = 3600.0  # the longest wait for one frame, whatever signs of life the peer gives
FAREWELL_BYTES = 500
FAREWELL_S = 0.5
U8 = NDArray[np.uint8]
Part = NDArray[np.generic] | bytes


class LinkError(Exception):
    """Why a link cannot carry on; a channel makes it a ProtocolError that names the peer and the step."""


class Link(Protocol):
    """An ordered stream of bytes in both directions."""

    def send(self, parts: list[memoryview]) -> None:
        """Queue parts for sending and return; raises LinkError if an earlier send failed."""

    def recv_into(self, target: memoryview, silence_s: float | None = None) -> None:
        """Fill `target`; raises LinkError if the peer closed, or nothing came for silence_s seconds (None:
        as long as the link was made for)."""

    def flush(self) -> None:
        """Return when everything queued has been handed over; raises LinkError if it could not be."""

    def close(self) -> None:
        """Release the link; both sides' waiting calls end."""


class Clock:
    """A party's Lamport clock (Lamport, CACM 1978), shared by its channels.

    `round` is the length of the longest chain of dependent messages known to this party. The rounds of a
    protocol run are the maximum over the parties at its end.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.round = 0

    def saw(self, round_: int) -> None:
        with self._lock:
            self.round = max(self.round, round_)

    def reset(self) -> None:
        """Start counting again. All parties must do it at the same point, with no frame under way."""
        with self._lock:
            self.round = 0


@dataclass
class Count:
    """Frames, their bytes (header and payload, what enters TLS) and the highest round stamped on them."""

    frames: int = 0
    bytes: int = 0
    round: int = 0

    def add(self, size_bytes: int, round_: int) -> None:
        self.frames += 1
        self.bytes += size_bytes
        self.round = max(self.round, round_)


@dataclass
class Traffic:
    """What a party sent and received on one channel, by (step, tag)."""

    sent: dict[tuple[int, int], Count] = field(default_factory=dict)
    received: dict[tuple[int, int], Count] = field(default_factory=dict)

    @property
    def sent_bytes(self) -> int:
        return sum(count.bytes for count in self.sent.values())

    def take(self) -> Traffic:
        """Everything since the last call; counting starts again at zero."""
        taken = Traffic(self.sent, self.received)
        self.sent, self.received = {}, {}
        return taken


class Channel:
    """Frames to and from one peer. Sends return at once; receives block until the frame is complete.

    After any failure the channel stays unusable: the stream's position is no longer known. One thread may
    send while another receives, and a third may beat. `certificate`: the peer's, by its fingerprint.
    """

    def __init__(self, own: Role, peer: Role, link: Link, clock: Clock, certificate: str = "") -> None:
        self.own = own
        self.peer = peer
        self.clock = clock
        self.certificate = certificate
        self.traffic = Traffic()
        self._link = link
        self._sent = 0
        self._received = 0
        self._last_sent = time.monotonic()
        self._failure: ProtocolError | None = None

    def through(self, wrap: Callable[[Link], Link]) -> None:
        """Put another link around this one, before anything is sent."""
        self._link = wrap(self._link)

    def send(self, step: int, tag: int, *parts: Part) -> None:
        """Queue one frame whose payload is the raw bytes of the contiguous `parts`, one after the other.

        Nothing is copied: leave the arrays unchanged until the peer has answered, or until `flush`. Raises
        ProtocolError if the link is broken.
        """
        self._check_usable()
        views = [_bytes_of(part) for part in parts]
        payload_bytes = sum(view.nbytes for view in views)
        round_ = self.clock.round + 1
        header = Header(tag, step, round_, self._sent, payload_bytes)
        try:
            self._link.send([memoryview(header.pack()), *views])
        except LinkError as error:
            self._failure = self._last_words(step)
            raise self._failure or self._fail(f"cannot send to {self.peer}", step, str(error)) from error
        self._sent += 1
        self._last_sent = time.monotonic()
        self.traffic.sent.setdefault((step, tag), Count()).add(HEADER_BYTES + payload_bytes, round_)

    def beat(self, every_s: float) -> None:
        """Unless something was sent within every_s, a sign of life: a header that the peer skips and nobody
        counts. A party beats while it works, so that a step may take longer than its peers wait in silence.
        """
        if self._failure is None and time.monotonic() - self._last_sent >= every_s:
            self._last_sent = time.monotonic()
            with suppress(LinkError):  # whoever sends or receives next will say so
                self._link.send([memoryview(Header(BEAT, 0, 1, 0, 0).pack())])

    def farewell(self, text: str) -> None:
        """Tell the peer why no more will come, as far as the link still carries it. Nothing secret in it!"""
        data = text.encode()[:FAREWELL_BYTES]
        with suppress(LinkError):
            self._link.send([memoryview(Header(ENDED, 0, 1, 0, len(data)).pack()), memoryview(data)])

    def recv(self, step: int, tag: int, payload_bytes: int) -> U8:
        """The payload of the next frame, uint8[payload_bytes], in fresh memory aligned for any dtype.

        Raises ProtocolError if the next frame is not (step, tag, payload_bytes), or none comes.
        """
        out = np.empty((payload_bytes + 7) // 8, np.uint64).view(np.uint8)[:payload_bytes]
        self.recv_into(step, tag, out)
        return out

    def recv_into(self, step: int, tag: int, *outs: NDArray[np.generic]) -> None:
        """Like `recv`, filling the contiguous arrays `outs` one after the other."""
        views = [_bytes_of(out) for out in outs]
        size_bytes = sum(view.nbytes for view in views)
        header = self._next(step, tag, size_bytes, size_bytes)
        self._finish(header, views)

    def recv_bounded(self, step: int, tag: int, max_bytes: int, *, within_s: float | None = None) -> bytes:
        """The payload of the next frame when only its largest size is known, as in a handshake.

        within_s: the longest wait for its header; None: as long as the peer gives signs of life.
        """
        header = self._next(step, tag, 0, max_bytes, within_s)
        out = np.empty(header.payload_bytes, np.uint8)
        self._finish(header, [out.data])
        return out.tobytes()

    def flush(self) -> None:
        """Wait until all queued frames have left. Raises ProtocolError if they could not."""
        self._check_usable()
        try:
            self._link.flush()
        except LinkError as error:
            raise self._fail(f"cannot send to {self.peer}", None, str(error)) from error

    def close(self) -> None:
        """Send what is queued, as far as the peer takes it, and release the link. Can be called again."""
        self._link.close()

    def _next(
        self, step: int, tag: int, min_bytes: int, max_bytes: int, within_s: float | None = None
    ) -> Header:
        self._check_usable()
        try:
            header = self._header(within_s)
            if header.tag == ENDED:
                raise self._ended(header, step)
        except LinkError as error:
            raise self._fail(f"lost {self.peer}", step, str(error)) from error
        except ProtocolError as error:
            self._failure = error
            raise
        fits = min_bytes <= header.payload_bytes <= max_bytes
        if (header.step, header.tag, header.sequence) != (step, tag, self._received) or not fits:
            size = f"{min_bytes} to {max_bytes}" if min_bytes != max_bytes else f"{max_bytes}"
            got = f"step {header.step}, tag {header.tag}, frame {header.sequence}"
            raise self._fail(
                f"unexpected frame from {self.peer}",
                step,
                f"{got}, {header.payload_bytes} bytes",
                f"step {step}, tag {tag}, frame {self._received}, {size} bytes",
            )
        return header

    def _header(self, within_s: float | None) -> Header:
        """The next header that is not a beat."""
        deadline = time.monotonic() + (STEP_S if within_s is None else within_s)
        data = bytearray(HEADER_BYTES)
        while True:
            left_s = None if within_s is None else max(0.001, deadline - time.monotonic())
            self._link.recv_into(memoryview(data), left_s)
            header = parse(data, self.peer)
            if header.tag != BEAT or header.payload_bytes:
                return header
            if time.monotonic() > deadline:
                raise LinkError("signs of life, but no frame in time")

    def _last_words(self, step: int) -> ProtocolError | None:
        """The farewell of a peer that is gone, if that is what comes next."""
        with suppress(LinkError, ProtocolError):
            header = self._header(FAREWELL_S)
            if header.tag == ENDED:
                return self._ended(header, step)
        return None

    def _ended(self, header: Header, step: int) -> ProtocolError:
        """What the peer's farewell says, made safe to print."""
        data = bytearray(min(header.payload_bytes, FAREWELL_BYTES))
        self._link.recv_into(memoryview(data))
        text = "".join(c if c.isprintable() else "?" for c in data.decode(errors="replace"))
        return ProtocolError(f"{self.peer} ended the session", where=f"{self.own}, step {step}", got=text)

    def _finish(self, header: Header, views: list[memoryview]) -> None:
        try:
            for view in views:
                self._link.recv_into(view)
        except LinkError as error:
            raise self._fail(f"lost {self.peer} in the middle of a frame", header.step, str(error)) from error
        self._received += 1
        self.clock.saw(header.round)
        count = self.traffic.received.setdefault((header.step, header.tag), Count())
        count.add(HEADER_BYTES + header.payload_bytes, header.round)

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _fail(self, what: str, step: int | None, got: str, allowed: str | None = None) -> ProtocolError:
        at = "" if step is None else f", step {step}"
        self._failure = ProtocolError(what, where=f"{self.own}{at}", got=got, allowed=allowed)
        return self._failure


def _bytes_of(part: Part) -> memoryview:
    """The memory of a contiguous array, or bytes, as a flat view."""
    if isinstance(part, bytes):
        return memoryview(part)
    if not part.flags.c_contiguous:
        raise ProtocolError("only contiguous arrays can be sent", got=f"{part.dtype}{list(part.shape)}")
    return part.reshape(-1).view(np.uint8).data
