"""Who is who, and the secrets that pairs of parties share: certificates, TLS contexts, pairwise seeds.

Every link is TLS 1.3 with certificates on both sides, signed by one authority that the parties agreed on. A
party's role is a URI in its certificate, so a valid certificate of another role is refused too. The seed of a
pair for `prg.Streams` comes from an ephemeral X25519 exchange (RFC 7748) inside that link and HKDF-SHA256,
bound to the session, the roles and both public keys.
"""

from __future__ import annotations

import hashlib
import os
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tightrope.errors import InputError, ProtocolError
from tightrope.runtimes.mpc.prg import SEED_BYTES

Role = Literal["client", "server", "dealer"]
ROLES: tuple[Role, ...] = ("client", "server", "dealer")
ROLE_URI = "tightrope://mpc/"
AUTHORITY_FILE = "authority.pem"
PIPE_BYTES = 1 << 14  # less than any pipe holds, so that writing into one never blocks


@dataclass(frozen=True)
class Credentials:
    """What a party proves its role with, all PEM: the authority's certificate, its own, and its own key."""

    authority: bytes
    certificate: bytes
    key: bytes = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the own certificate, in hex: what peers know this party by."""
        return fingerprint(x509.load_pem_x509_certificate(self.certificate).public_bytes(Encoding.DER))


def fingerprint(der: bytes) -> str:
    return hashlib.sha256(der).hexdigest()


def make_credentials(*, days: float = 30, start: datetime | None = None) -> dict[Role, Credentials]:
    """A throw-away authority and the credentials (P-256) of every role that it signed, valid for `days`.

    The key of the authority is forgotten, so nobody can sign another certificate later.
    """
    begin = start or datetime.now(UTC) - timedelta(minutes=5)
    valid = (begin, begin + timedelta(days=days))
    authority_key = ec.generate_private_key(ec.SECP256R1())
    subject = _name("Tightrope test authority")
    authority = (
        _certificate(subject, subject, authority_key.public_key(), valid)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .sign(authority_key, SHA256())
    ).public_bytes(Encoding.PEM)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    made: dict[Role, Credentials] = {}
    for role in ROLES:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            _certificate(_name(f"Tightrope {role}"), subject, key.public_key(), valid)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(
                x509.SubjectAlternativeName([x509.UniformResourceIdentifier(ROLE_URI + role)]), critical=False
            )
            .add_extension(issuer, critical=False)
            .sign(authority_key, SHA256())
        )
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        made[role] = Credentials(authority, certificate.public_bytes(Encoding.PEM), private)
    return made


def write_credentials(directory: Path, credentials: Mapping[Role, Credentials]) -> None:
    """One directory per role below `directory`, so that each machine is given only its own.

    Files: authority.pem, ROLE.pem, ROLE.key, of mode 0600 in directories of mode 0700. Raises InputError if
    `directory` cannot be written or is not empty.
    """
    where = str(directory)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise InputError("the directory is not empty", where=where, fix="a new one for certificates")
        directory.chmod(0o700)
        for role, own in credentials.items():
            (directory / role).mkdir(mode=0o700)
            for name, content in zip(_files(role), (own.authority, own.certificate, own.key), strict=True):
                handle = os.open(directory / role / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(handle, "wb") as file:
                    file.write(content)
    except OSError as error:
        raise InputError("certificates cannot be written", where=where, got=error.strerror) from error


def read_credentials(directory: Path, role: Role) -> Credentials:
    """What `write_credentials` wrote for `role`; `directory` is that of the role.

    Raises InputError if a file is missing, the key may be read by others, or the certificate is for another
    role or out of date.
    """
    names = _files(role)
    try:
        mode = (directory / names[2]).stat().st_mode
        own = Credentials(*((directory / name).read_bytes() for name in names))
    except OSError as error:
        raise InputError(
            f"the certificates of {role} cannot be read",
            where=str(error.filename or directory),
            got=error.strerror,
            allowed=", ".join(names),
            fix="tightrope certs",
        ) from error
    key = str(directory / names[2])
    if mode & 0o077:
        raise InputError("others may read the private key", where=key, fix=f"chmod 600 {key}")
    _check_certificate(own.certificate, role, str(directory / names[1]))
    return own


def _check_certificate(pem: bytes, role: Role, where: str) -> None:
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = [("URI", uri) for uri in names.get_values_for_type(x509.UniformResourceIdentifier)]
    except (ValueError, x509.ExtensionNotFound) as error:
        raise InputError("not a certificate of a party", where=where, got=str(error)) from error
    if peer_role({"subjectAltName": uris}) != role:
        raise InputError(f"the certificate is not one of a {role}", where=where, got=uris)
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not begin <= datetime.now(UTC) <= end:
        raise InputError(
            "the certificate is out of date",
            where=where,
            got=f"valid {begin:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC",
            fix="tightrope certs",
        )


def _files(role: Role) -> tuple[str, str, str]:
    return AUTHORITY_FILE, f"{role}.pem", f"{role}.key"


def tls_context(own: Credentials, *, accepts: bool) -> ssl.SSLContext:
    """The TLS 1.3 context of a party: its own certificate, and every peer must show one of the authority's.

    accepts: True for the side that listens. Nothing is written to disk. Raises InputError for credentials
    that OpenSSL cannot use.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if accepts else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the peer is identified by its role, wherever it runs: see peer_role
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    if accepts:
        context.num_tickets = 0  # no session is resumed, and a link must carry nothing that is not counted
    try:
        context.load_verify_locations(cadata=own.authority.decode("ascii"))
        with _readable(own.certificate) as certificate, _readable(own.key) as key:
            context.load_cert_chain(certificate, key, password="")  # never asks for one at the terminal
    except (OSError, ValueError) as error:  # SSLError is an OSError
        raise InputError(
            "OpenSSL cannot use the certificates", got=getattr(error, "reason", None) or str(error)
        ) from error
    return context


@contextmanager
def _readable(content: bytes) -> Iterator[str]:
    """A path that reads as `content` and is a pipe: the ssl module takes certificates from paths only."""
    if len(content) > PIPE_BYTES:
        raise ValueError(f"{len(content)} bytes are too many for a certificate or key")
    reader, writer = os.pipe()
    try:
        os.write(writer, content)
        os.close(writer)
        yield f"/dev/fd/{reader}"
    finally:
        os.close(reader)


def peer_role(certificate: Any) -> str | None:
    """The role that a verified certificate (`SSLSocket.getpeercert()`) was issued for, or None."""
    names = certificate.get("subjectAltName", ()) if certificate else ()
    roles = [uri.removeprefix(ROLE_URI) for kind, uri in names if kind == "URI" and uri.startswith(ROLE_URI)]
    return roles[0] if len(roles) == 1 and roles[0] in ROLES else None


class KeyExchange:
    """One side of an ephemeral X25519 exchange: send `public`, receive the peer's, call `seed` once."""

    def __init__(self) -> None:
        self._private: X25519PrivateKey | None = X25519PrivateKey.generate()
        self.public: bytes = self._private.public_key().public_bytes_raw()

    def seed(self, peer_public: bytes, own: Role, peer: Role, session: bytes) -> bytes:
        """The pair's 32-byte seed for this session; equal on both sides, and the private key is dropped.

        Raises ProtocolError if the peer's key is not a proper X25519 point or the exchange was used before.
        """
        private, self._private = self._private, None
        if private is None:
            raise ProtocolError("a key exchange was used twice", where=f"link to {peer}")
        if peer_public == self.public:
            raise ProtocolError("the peer sent our own public key back", where=f"link to {peer}")
        try:
            shared = private.exchange(X25519PublicKey.from_public_bytes(peer_public))
        except ValueError as error:
            raise ProtocolError("bad public key", where=f"link to {peer}", got=str(error)) from error
        halves = sorted([(own, self.public), (peer, peer_public)])
        info = b"tightrope mpc seed v1" + b"".join(role.encode() + b"=" + public for role, public in halves)
        return HKDF(algorithm=SHA256(), length=SEED_BYTES, salt=session, info=info).derive(shared)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    valid: tuple[datetime, datetime],
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(valid[0])
        .not_valid_after(valid[1])
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
