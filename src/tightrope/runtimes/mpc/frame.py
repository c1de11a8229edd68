"""The frame: a fixed little-endian header and one raw payload.

    offset  size  field
    0       4     magic "TTMP"
    4       2     version
    6       2     tag: what the payload is
    8       4     step: index in the schedule
    12      4     round: length of the longest chain of messages that ends with this one
    16      8     sequence: 0, 1, 2, ... in each direction of a link
    24      8     payload bytes

A receiver states step, tag and size before it reads; anything else is refused before a payload byte is read,
so a peer can neither make it allocate memory nor have a late, early or repeated message taken for another.
"""

from __future__ import annotations

import struct
from dataclasses import astuple, dataclass

from tightrope.errors import ProtocolError

MAGIC = b"TTMP"
VERSION = 1
LAYOUT = struct.Struct("<4sHHIIQQ")
HEADER_BYTES = LAYOUT.size
MAX_PAYLOAD_BYTES = 1 << 36
MAX_ROUND = 1 << 30
# Tags from here on belong to no step of a schedule: they are not counted, and a beat has no number either.
CONTROL = 0xFF00
ASK, ANSWER, STOCK, ENDED, BEAT = range(CONTROL, CONTROL + 5)


@dataclass(frozen=True)
class Header:
    tag: int
    step: int
    round: int
    sequence: int
    payload_bytes: int

    def pack(self) -> bytes:
        """The 32 bytes of the header. Raises ProtocolError if a field does not fit."""
        try:
            packed = LAYOUT.pack(MAGIC, VERSION, *astuple(self))
        except struct.error as error:
            raise ProtocolError("a frame field is out of range", got=self, allowed=LAYOUT.format) from error
        if self.payload_bytes > MAX_PAYLOAD_BYTES:
            raise ProtocolError("a frame is too large", got=self, allowed=f"{MAX_PAYLOAD_BYTES} bytes")
        return packed


def parse(data: bytes | bytearray | memoryview, peer: str) -> Header:
    """The header in 32 bytes from `peer`. Raises ProtocolError if they are not one of this version."""
    magic, version, *fields = LAYOUT.unpack(data)
    if magic != MAGIC:
        raise ProtocolError("not a frame of this protocol", where=f"from {peer}", got=magic, allowed=MAGIC)
    if version != VERSION:
        raise ProtocolError(
            "another version of the frame format",
            where=f"from {peer}",
            got=version,
            allowed=VERSION,
            fix="run the same release of tightrope on all machines",
        )
    header = Header(*fields)
    if not 1 <= header.round <= MAX_ROUND:
        raise ProtocolError(
            "impossible round", where=f"from {peer}", got=header.round, allowed=f"1 to {MAX_ROUND}"
        )
    return header
