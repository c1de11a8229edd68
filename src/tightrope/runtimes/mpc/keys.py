"""Who is who, and the secrets that pairs of parties share: certificates, TLS contexts, pairwise seeds.

Every link is TLS 1.3 with certificates on both sides, signed by one authority that the parties agreed on. A
party's role is a URI in its certificate, so a valid certificate of another role is refused too. The seed of a
pair for `prg.Streams` comes from an ephemeral X25519 exchange (RFC 7748) inside that link and HKDF-SHA256,
bound to the session, the roles and both public keys.
"""

from __future__ import annotations

import os
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tightrope.errors import InputError, ProtocolError
from tightrope.runtimes.mpc.prg import SEED_BYTES

Role = Literal["client", "server", "dealer"]
ROLES: tuple[Role, ...] = ("client", "server", "dealer")
ROLE_URI = "tightrope://mpc/"
AUTHORITY_FILE = "authority.pem"
PUBLIC_KEY_BYTES = 32


def make_certificates(directory: Path, *, days: float = 30, start: datetime | None = None) -> None:
    """Write a throw-away authority and one certificate and key per role into `directory`.

    Files: authority.pem, ROLE.pem, ROLE.key (P-256), all of mode 0600 in a directory of mode 0700. The key of
    the authority is never written, so nobody can sign another certificate later. In a deployment each machine
    gets authority.pem and its own two files only. Raises InputError if the directory cannot be written or is
    not empty.
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
    )
    files = {AUTHORITY_FILE: authority.public_bytes(serialization.Encoding.PEM)}
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
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
        files[f"{role}.pem"] = certificate.public_bytes(serialization.Encoding.PEM)
        files[f"{role}.key"] = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    where = str(directory)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise InputError("the directory is not empty", where=where, fix="a new one for certificates")
        directory.chmod(0o700)
        for name, content in files.items():
            handle = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
    except OSError as error:
        raise InputError("certificates cannot be written", where=where, got=error.strerror) from error


def tls_context(directory: Path, role: Role, *, accepts: bool) -> ssl.SSLContext:
    """The TLS 1.3 context of a party: its own certificate, and every peer must show one of the authority's.

    accepts: True for the side that listens. Raises InputError if a file is missing or unreadable.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if accepts else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the peer is identified by its role, wherever it runs: see peer_role
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    if accepts:
        context.num_tickets = 0  # no session is resumed, and a link must carry nothing that is not counted
    try:
        context.load_verify_locations(directory / AUTHORITY_FILE)
        context.load_cert_chain(directory / f"{role}.pem", directory / f"{role}.key")
    except (OSError, ssl.SSLError) as error:
        raise InputError(
            f"the certificates of {role} cannot be read",
            where=str(directory),
            got=error.strerror or str(error),
            allowed=f"{AUTHORITY_FILE}, {role}.pem, {role}.key",
            fix="tightrope certs",
        ) from error
    return context


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
