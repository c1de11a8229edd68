"""How a session talks to its worker processes over pipes: JSON heads with raw bodies, no pickle."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict
from typing import IO

from tightrope.runtimes.mpc.party import PhaseReport
from tightrope.types import Json

TRAFFIC = ("sent", "received")
SIZES = struct.Struct("<QQ")


def write(stream: IO[bytes], head: Mapping[str, Json], body: bytes | memoryview = b"") -> None:
    """Raises OSError or ValueError if the other side is gone."""
    data = json.dumps(head).encode()
    stream.write(SIZES.pack(len(data), len(body)))
    stream.write(data)
    stream.write(body)
    stream.flush()


def read(stream: IO[bytes]) -> tuple[dict[str, Json], bytes] | None:
    """The next head and body; None at the end of the stream, also in the middle of a message."""
    sizes = stream.read(SIZES.size)
    if len(sizes) < SIZES.size:
        return None
    head_bytes, body_bytes = SIZES.unpack(sizes)
    data, body = stream.read(head_bytes), stream.read(body_bytes)
    if len(data) < head_bytes or len(body) < body_bytes:
        return None
    head: dict[str, Json] = json.loads(data)
    return head, body


def report_to_json(report: PhaseReport) -> dict[str, Json]:
    traffic = {name: getattr(report, name) for name in TRAFFIC}
    return asdict(report) | {k: [[*key, size] for key, size in v.items()] for k, v in traffic.items()}


def report_from_json(body: Mapping[str, Json]) -> PhaseReport:
    """Raises TypeError, ValueError or KeyError for anything but what `report_to_json` gives."""
    sent, received = ({(peer, int(step)): int(size) for peer, step, size in body[k]} for k in TRAFFIC)
    milliseconds = {str(op): float(spent) for op, spent in body["milliseconds"].items()}
    drelus = {str(op): int(count) for op, count in body["drelus"].items()}
    rounds = tuple(int(r) for r in body["rounds"])
    return PhaseReport(sent, received, rounds, milliseconds, drelus, float(body["elapsed_ms"]))
