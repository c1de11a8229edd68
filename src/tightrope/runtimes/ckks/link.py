"""Messages between client and server over TLS 1.3, each side pinned to the other's certificate.

    offset  size  field
    0       4     magic "TTCK"
    4       2     kind
    6       2     number of parts
    8       8     bytes of every part, so many times; then the parts

The first part is JSON, the others raw. A receiver states the kind and the largest parts that it takes, so a
peer can neither have a message taken for another nor make it allocate more.
"""

from __future__ import annotations

import json
import socket
import ssl
import struct
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from tightrope.errors import ProtocolError
from tightrope.forms import mismatch, parse
from tightrope.types import Json

MAGIC = b"TTCK"
HEAD = struct.Struct("<4sHH")
SIZE = struct.Struct("<Q")
HELLO, KEY, READY, EVALUATE, RESULT, FAILED, BOOT = range(1, 8)
MAX_HEAD_BYTES = 1 << 20
VALID = timedelta(days=2)


@dataclass(frozen=True)
class Identity:
    """A self-signed certificate and its key, PEM, made for one session."""

    certificate: bytes
    key: bytes = field(repr=False)


def make_identity(name: str) -> Identity:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Tightrope {name}")])
    begin = datetime.now(UTC) - timedelta(minutes=5)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + VALID)
        .sign(key, SHA256())
    )
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return Identity(certificate.public_bytes(Encoding.PEM), pem)


def tls_context(own: Identity, peer_certificate: bytes, *, accepts: bool) -> ssl.SSLContext:
    """TLS 1.3 where the peer must show exactly this certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if accepts else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the certificate itself is what is trusted
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=peer_certificate.decode())
    with tempfile.TemporaryDirectory() as folder:  # ssl reads keys from files only; it is private to the user
        path = Path(folder) / "identity.pem"
        path.touch(mode=0o600)
        path.write_bytes(own.key + own.certificate)
        context.load_cert_chain(path)
    return context


class Link:
    """A TLS connection to `peer` that carries messages. timeout_s: the longest wait without any progress.
    patient: for a message to begin it waits as long as the peer is there.

    `sent` and `received` count the raw parts: heads, which hold times, vary.
    """

    def __init__(
        self,
        raw: socket.socket,
        context: ssl.SSLContext,
        peer: str,
        timeout_s: float,
        *,
        patient: bool = False,
    ) -> None:
        self.peer = peer
        self._timeout_s, self._patient = timeout_s, patient
        self.sent = self.received = 0
        try:
            raw.settimeout(timeout_s)
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket = context.wrap_socket(raw, server_side=context.protocol == ssl.PROTOCOL_TLS_SERVER)
        except (OSError, ValueError) as error:
            raw.close()
            raise ProtocolError(f"no TLS 1.3 with {peer}", got=_reason(error)) from error

    def send(self, kind: int, head: Mapping[str, Json], parts: Sequence[bytes | memoryview] = ()) -> None:
        """Raises ProtocolError if the peer is gone."""
        parts = [json.dumps(head).encode(), *parts]
        try:
            self._socket.sendall(
                HEAD.pack(MAGIC, kind, len(parts)) + b"".join(SIZE.pack(len(part)) for part in parts)
            )
            for part in parts:
                self._socket.sendall(part)
        except (OSError, ValueError) as error:
            raise ProtocolError(f"lost {self.peer}", got=_reason(error)) from error
        self.sent += sum(len(part) for part in parts[1:])

    def receive(self, kind: int, count: int, part_bytes: int) -> tuple[dict[str, Json], list[bytes]] | None:
        """A message of this kind with at most `count` parts of at most `part_bytes`; None at the clean end.

        Raises ProtocolError for anything else, and with the peer's words if it failed.
        """
        self._socket.settimeout(None if self._patient else self._timeout_s)
        first = self._read(1, end=True)
        if not first:
            return None
        self._socket.settimeout(self._timeout_s)
        magic, got, number = HEAD.unpack(first + self._read(HEAD.size - 1))
        if magic != MAGIC or got not in (kind, FAILED) or not 1 <= number <= 1 + count:
            raise ProtocolError(
                f"{self.peer} sent another message than agreed",
                got=(magic, got, number),
                allowed=(kind, count),
            )
        sizes = [SIZE.unpack(self._read(SIZE.size))[0] for _ in range(number)]
        if sizes[0] > MAX_HEAD_BYTES or any(size > part_bytes for size in sizes[1:]):
            raise ProtocolError(
                f"{self.peer} sent too much", got=f"parts of {sizes} bytes", allowed=part_bytes
            )
        parts = [self._read(size) for size in sizes]
        self.received += sum(sizes[1:])
        try:
            about = parse(parts[0])
        except ValueError as error:
            raise ProtocolError(f"{self.peer} sent a head that is not JSON", got=str(error)[:200]) from None
        if fault := mismatch(about, {}):
            raise ProtocolError(f"{self.peer} sent a head that is no object", got=fault)
        if got == FAILED:
            raise ProtocolError(f"{self.peer} failed", got=str(about.get("text"))[:2000])
        return about, parts[1:]

    def _read(self, size: int, end: bool = False) -> bytes:
        data = bytearray(size)
        view = memoryview(data)
        try:
            while view:
                if not (count := self._socket.recv_into(view)):
                    if end and len(view) == size:
                        return b""
                    raise ProtocolError(f"lost {self.peer} in the middle of a message")
                view = view[count:]
        except (OSError, ValueError) as error:
            raise ProtocolError(f"lost {self.peer}", got=_reason(error)) from error
        return bytes(data)

    def close(self) -> None:
        self._socket.close()


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return getattr(error, "strerror", None) or str(error)
