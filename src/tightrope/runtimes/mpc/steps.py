"""What the parties do, step by step, and every message they send: public, the same for all three.

A wire is a value that client and server hold as additive shares in Z_2^ring_bits; what it stands for is
ring * 2^-scale * mu. A wire X that was opened to the server has a mask: the client and the dealer hold the
one-time A, the server X - A. Public linear maps of wires apply to their masks just the same.

Wires of one program may have different rings. Shares modulo 2^40 are shares modulo 2^32 too, so a step reads
its inputs in the ring of its output, which is never the larger one; only what is truncated may go on in a
larger ring, because the dealer shares the parts of a truncation in whichever ring is asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from typing import Literal

from tightrope.program import Conv2d, Linear, Op, Relu
from tightrope.runtimes.mpc.fss import HASH_KEY_BYTES, word_levels
from tightrope.runtimes.mpc.keys import Role
from tightrope.runtimes.mpc.terms import Term

Phase = Literal["setup", "offline", "online"]
Unit = Literal["byte", "block", "word", "word48", "word40", "half", "bit"]
UNIT_BITS: dict[Unit, int] = {
    "byte": 8, "block": 128, "word": 64, "word48": 48, "word40": 40, "half": 32, "bit": 1,
}  # fmt: skip
HALF_BITS = UNIT_BITS["half"]
ELEMENTS: dict[int, Unit] = {64: "word", 48: "word48", 40: "word40", 32: "half"}  # of the rings


@dataclass(frozen=True)
class Wire:
    """`limit`: the largest calibrated magnitude of the value; `static`: the client's share does not depend on
    the input of this inference, so the client knows it before the online phase."""

    name: str
    shape: tuple[int, ...]
    scale: int
    mu: float
    limit: float
    static: bool
    ring_bits: int = 64

    @property
    def unit(self) -> Unit:
        """What one element takes."""
        return ELEMENTS[self.ring_bits]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def ring_limit(self) -> float:
        """The calibrated magnitude in units of the ring."""
        return self.limit / self.mu * 2.0**self.scale


@dataclass(frozen=True)
class Field:
    """`count` units per sample, or in all if `fixed`."""

    name: str
    unit: Unit
    count: int
    fixed: bool = False

    def items(self, batch: int) -> int:
        return self.count * (1 if self.fixed else batch)

    def bytes(self, batch: int) -> int:
        return -(-self.items(batch) * UNIT_BITS[self.unit] // 8)


class Tag(IntEnum):
    """What a frame holds, as its header says."""

    HELLO = 1
    WEIGHTS = 2
    PRODUCT = 3
    MATERIAL = 4
    OPENED = 5
    MASKED = 6
    BITS = 7
    RESULT = 8


@dataclass(frozen=True)
class Message:
    """One frame; its fields follow one another."""

    phase: Phase
    tag: Tag
    sender: Role
    receiver: Role
    fields: tuple[Field, ...]

    def payload_bytes(self, batch: int) -> int:
        return sum(f.bytes(batch) for f in self.fields)


@dataclass(frozen=True, kw_only=True)
class Step:
    """Abstract. `op` is the Program op that the step is accounted to, `index` its place in the schedule."""

    index: int
    op: str

    @property
    def setup(self) -> tuple[Message, ...]:
        return ()

    @property
    def offline(self) -> tuple[Message, ...]:
        return ()

    @property
    def online(self) -> tuple[tuple[Message, ...], ...]:
        """Exchanges in order; the messages of one are sent before any of them is awaited."""
        return ()

    @property
    def drelus(self) -> int:
        """Per sample."""
        return 0


@dataclass(frozen=True, kw_only=True)
class Local(Step):
    """A public linear map of the inputs, each first multiplied by its integer factor; of masks if `masks`.

    `constant`: what the result gets along its last axis; the server adds it to its share, or to X - A.
    """

    kernel: Op
    inputs: tuple[Wire, ...]
    output: Wire
    factors: tuple[int, ...]
    masks: bool = False
    constant: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Open(Step):
    """The client sends X0 - A, so the server has X - A: any number of linear layers can read the wire."""

    wire: Wire

    @property
    def online(self) -> tuple[tuple[Message, ...], ...]:
        opened = Field("opened", self.wire.unit, self.wire.size)
        return ((Message("online", Tag.OPENED, "client", "server", (opened,)),),)


@dataclass(frozen=True, kw_only=True)
class Multiply(Step):
    """The server's linear layer on an opened wire (one-sided Beaver product), weights with `weight_bits`.

    Setup: F = W - B to the client, B known to the dealer. Offline: the dealer's C0 = A*B - C1 to the client.
    """

    kernel: Conv2d | Linear | Term
    input: Wire
    output: Wire
    weight_bits: int

    @property
    def setup(self) -> tuple[Message, ...]:
        weights = Field("weights", self.output.unit, math.prod(self.kernel.weight_shape), fixed=True)
        return (Message("setup", Tag.WEIGHTS, "server", "client", (weights,)),)

    @property
    def offline(self) -> tuple[Message, ...]:
        product = Field("product", self.output.unit, self.output.size)
        return (Message("offline", Tag.PRODUCT, "dealer", "client", (product,)),)


def exchange(tag: Tag, field: Field) -> tuple[Message, Message]:
    """Client and server send each other the same field at the same time."""
    return (
        Message("online", tag, "client", "server", (field,)),
        Message("online", tag, "server", "client", (field,)),
    )


def masked_opening(wire: Wire, size: int) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """(offline, online) messages that open z + r: a static share of the client's goes ahead of time."""
    to_server, to_client = exchange(Tag.MASKED, Field("masked", wire.unit, size))
    if wire.static:
        return (replace(to_server, phase="offline"),), (to_client,)
    return (), (to_server, to_client)


@dataclass(frozen=True, kw_only=True)
class Truncate(Step):
    """Drop `shift` low bits by a masked opening: floor, or floor + 1 with probability of the dropped part."""

    input: Wire
    output: Wire
    shift: int

    @property
    def share_fields(self) -> tuple[Field, ...]:
        return truncation_fields(self, self.input.size)

    @property
    def offline(self) -> tuple[Message, ...]:
        opening, _ = masked_opening(self.input, self.input.size)
        return (Message("offline", Tag.MATERIAL, "dealer", "server", self.share_fields), *opening)

    @property
    def online(self) -> tuple[tuple[Message, ...], ...]:
        return (masked_opening(self.input, self.input.size)[1],)


@dataclass(frozen=True, kw_only=True)
class Product(Step):
    """left * right of two secret wires (Beaver); one may be (C, 1, 1), and is opened as small as it is."""

    left: Wire
    right: Wire
    output: Wire

    def _openings(self) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
        fields = {
            name: Field(name, wire.unit, wire.size)
            for name, wire in (("left", self.left), ("right", self.right))
        }
        static = tuple(f for name, f in fields.items() if getattr(self, name).static)
        fresh = tuple(f for name, f in fields.items() if not getattr(self, name).static)
        ahead = (Message("offline", Tag.MASKED, "client", "server", static),) if static else ()
        to_server = (Message("online", Tag.MASKED, "client", "server", fresh),) if fresh else ()
        to_client = Message("online", Tag.MASKED, "server", "client", tuple(fields.values()))
        return ahead, (*to_server, to_client)

    @property
    def offline(self) -> tuple[Message, ...]:
        product = Field("product", self.output.unit, self.output.size)
        return (Message("offline", Tag.MATERIAL, "dealer", "server", (product,)), *self._openings()[0])

    @property
    def online(self) -> tuple[tuple[Message, ...], ...]:
        return (self._openings()[1],)


def wrap_unit(step: Truncate | Gate) -> Unit:
    """The wrap bit counts in multiples of 2^(ring_bits - shift): its shares need the output's bits above."""
    bits = step.output.ring_bits - (step.input.ring_bits - step.shift)
    return "half" if bits <= HALF_BITS else "word"


def truncation_fields(step: Truncate | Gate, size: int) -> tuple[Field, ...]:
    """Shares of r >> shift and of MSB(r) for `size` elements, in the ring of the output, whichever that is;
    nothing where nothing is dropped (u = r)."""
    if not step.shift:
        return ()
    return Field("trunc", step.output.unit, size), Field("wrap", wrap_unit(step), size)


@dataclass(frozen=True)
class Piece:
    """Tiles whose sum is above `threshold` (units of the input's ring) times their elements get
    square * x^2 + linear * x + constant: integers, in units of the output, of the truncated input x."""

    threshold: int = 0
    square: int = 0
    linear: int = 1
    constant: int = 0


@dataclass(frozen=True, kw_only=True)
class Gate(Step):
    """Truncation by `shift` and a sum of pieces from one opening, then one opened bit per comparison.

    One piece (x above 0) is ReLU with the patches of `kernel`, which gives the geometry. A tile's sum loses
    `trim` low bits before it is compared, and `bits` more are compared. Identity channels are truncated only.
    """

    kernel: Relu
    input: Wire
    output: Wire
    shift: int
    trim: int
    bits: int
    pieces: tuple[Piece, ...] = (Piece(),)

    @property
    def squares(self) -> bool:
        return any(piece.square for piece in self.pieces)

    @cached_property
    def map_shape(self) -> tuple[int, int, int]:
        shape = self.kernel.shape
        return (shape[0], shape[1], shape[2]) if len(shape) == 3 else (shape[0], 1, 1)

    @cached_property
    def gated(self) -> tuple[int, ...]:
        """Channels that are not the identity."""
        return tuple(c for c, patch in enumerate(self.kernel.patches) if patch != (0, 0))

    @cached_property
    def opened(self) -> tuple[int, ...]:
        """Channels in the opening: an identity channel only needs it to be truncated."""
        return tuple(range(len(self.kernel.patches))) if self.shift else self.gated

    @cached_property
    def opened_size(self) -> int:
        return len(self.opened) * math.prod(self.map_shape[1:])

    @cached_property
    def gated_size(self) -> int:
        return len(self.gated) * math.prod(self.map_shape[1:])

    @cached_property
    def tiles(self) -> int:
        return sum(self.kernel.tiles)

    @property
    def drelus(self) -> int:
        return self.tiles * len(self.pieces)

    @property
    def key_fields(self) -> tuple[Field, ...]:
        """What both parties need of the comparison keys, one a tile (their roots come from their streams)."""
        words = Field("words", "block", word_levels(self.bits) * self.tiles)
        return (Field("hash_key", "byte", HASH_KEY_BYTES, fixed=True), words)

    @cached_property
    def share_fields(self) -> tuple[Field, ...]:
        """What the dealer shares: the client draws its part from its stream, the server is sent the rest.

        With t = r >> shift, w = MSB(r) and c the output mask of a comparison: t and w of every opened
        element, c, c * t and c * w; for squares t^2, t * w and the same times c. Where nothing is truncated
        t = r, of which both have a share, and no w is needed. Last, the constant bit of the comparison key.
        """
        products = self.gated_size * len(self.pieces)
        word, half = self.output.unit, wrap_unit(self)
        fields = [Field("choice_trunc", word, products), Field("choice", word, self.drelus)]
        if self.shift:
            fields += truncation_fields(self, self.opened_size)
            fields += [Field("choice_wrap", half, products)]
        if self.squares:
            fields += [Field("square", word, self.gated_size), Field("choice_square", word, products)]
            if self.shift:
                fields += [Field("cross", half, self.gated_size), Field("choice_cross", half, products)]
        return (*fields, Field("bit", "bit", self.drelus))

    @property
    def offline(self) -> tuple[Message, ...]:
        opening, _ = masked_opening(self.input, self.opened_size)
        return (
            Message("offline", Tag.MATERIAL, "dealer", "client", self.key_fields),
            Message("offline", Tag.MATERIAL, "dealer", "server", self.key_fields + self.share_fields),
            *opening,
        )

    @cached_property
    def online(self) -> tuple[tuple[Message, ...], ...]:
        bits = exchange(Tag.BITS, Field("bits", "bit", self.drelus))
        return (masked_opening(self.input, self.opened_size)[1], bits)


@dataclass(frozen=True, kw_only=True)
class Reveal(Step):
    """The server sends its share of the result to the client."""

    wire: Wire

    @property
    def online(self) -> tuple[tuple[Message, ...], ...]:
        result = Field("result", self.wire.unit, self.wire.size)
        return ((Message("online", Tag.RESULT, "server", "client", (result,)),),)


@dataclass(frozen=True, kw_only=True)
class RevealLabel(Step):
    """The server sends the low bits of its share, which say where the largest of `classes` values was."""

    wire: Wire
    classes: int

    @property
    def bits(self) -> int:
        return (self.classes - 1).bit_length()

    @property
    def online(self) -> tuple[tuple[Message, ...], ...]:
        label = Field("label", "half", 1)
        return ((Message("online", Tag.RESULT, "server", "client", (label,)),),)
