"""Certificates, their files, and pairwise seeds."""

from __future__ import annotations

import stat
import subprocess
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from tightrope.errors import InputError, ProtocolError
from tightrope.runtimes.mpc.keys import (
    ROLES,
    Credentials,
    KeyExchange,
    Role,
    make_credentials,
    peer_role,
    read_credentials,
    tls_context,
    write_credentials,
)


def test_files_are_private_one_directory_per_role_and_accepted_by_openssl(tmp_path: Path) -> None:
    home = tmp_path / "new" / "certs"
    write_credentials(home, make_credentials())
    assert {f.name for f in home.iterdir()} == set(ROLES)
    assert {stat.S_IMODE(f.stat().st_mode) for f in (home, *home.iterdir())} == {0o700}
    for role in ROLES:
        own = home / role
        assert {f.name for f in own.iterdir()} == {"authority.pem", f"{role}.pem", f"{role}.key"}
        assert {stat.S_IMODE(f.stat().st_mode) for f in own.iterdir()} == {0o600}
        files = ["-CAfile", own / "authority.pem", own / f"{role}.pem"]
        subprocess.run(["openssl", "verify", "-x509_strict", *files], check=True, capture_output=True)
        shown = ["openssl", "x509", "-noout", "-ext", "subjectAltName", "-fingerprint", "-sha256"]
        text = subprocess.run(
            [*shown, "-in", own / f"{role}.pem"], check=True, capture_output=True, text=True
        ).stdout
        assert f"URI:tightrope://mpc/{role}" in text
        assert read_credentials(own, role).fingerprint.upper() in text.replace(":", "")


def test_credentials_never_touch_the_disk_on_their_way_into_openssl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only pipes: with no directory that can be written, and every descriptor closed again."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    before = len(list(Path("/dev/fd").iterdir()))
    for own in make_credentials().values():
        assert b"PRIVATE" not in repr(own).encode()
        tls_context(own, accepts=True)
    assert len(list(Path("/dev/fd").iterdir())) == before


def test_used_directories_and_missing_files_are_named(tmp_path: Path) -> None:
    certs = make_credentials()
    write_credentials(tmp_path / "a", certs)
    with pytest.raises(InputError, match="not empty"):
        write_credentials(tmp_path / "a", certs)
    (tmp_path / "a" / "client" / "client.key").unlink()
    with pytest.raises(InputError, match=r"client\.key[\s\S]*tightrope certs"):
        read_credentials(tmp_path / "a" / "client", "client")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_credentials(tmp_path / "file" / "below", certs)


def test_credentials_that_cannot_work_are_refused_before_any_connection(tmp_path: Path) -> None:
    write_credentials(tmp_path / "a", make_credentials())
    home = tmp_path / "a" / "server"
    (home / "server.key").chmod(0o640)
    with pytest.raises(InputError, match=r"others may read[\s\S]*chmod 600"):
        read_credentials(home, "server")
    (home / "server.key").chmod(0o600)
    for end in ("pem", "key"):
        (home / f"dealer.{end}").write_bytes((home / f"server.{end}").read_bytes())
        (home / f"dealer.{end}").chmod(0o600)
    with pytest.raises(InputError, match="not one of a dealer"):
        read_credentials(home, "dealer")
    write_credentials(tmp_path / "old", make_credentials(start=datetime.now(UTC) - timedelta(days=60)))
    with pytest.raises(InputError, match="out of date"):
        read_credentials(tmp_path / "old" / "client", "client")
    (home / "server.pem").write_text("nothing")
    with pytest.raises(InputError, match="not a certificate"):
        read_credentials(home, "server")
    good, other = make_credentials(), make_credentials()
    mixed = Credentials(good["client"].authority, good["client"].certificate, other["client"].key)
    with pytest.raises(InputError, match="OpenSSL"):
        tls_context(mixed, accepts=False)


@pytest.mark.parametrize(
    ("names", "role"),
    [
        ((("URI", "tightrope://mpc/client"),), "client"),
        ((("DNS", "client"), ("URI", "tightrope://mpc/dealer")), "dealer"),
        ((("URI", "tightrope://mpc/auditor"),), None),
        ((("URI", "tightrope://mpc/client"), ("URI", "tightrope://mpc/server")), None),
        ((("DNS", "tightrope://mpc/client"),), None),
        ((), None),
    ],
)
def test_role_of_a_certificate(names: tuple[tuple[str, str], ...], role: str | None) -> None:
    assert peer_role({"subjectAltName": names}) == role
    assert peer_role(None) is None


def test_both_sides_get_one_seed_bound_to_session_and_roles() -> None:
    one, two = KeyExchange(), KeyExchange()
    first = one.seed(two.public, "client", "dealer", bytes(16))
    assert first == two.seed(one.public, "dealer", "client", bytes(16)) and len(first) == 32


def test_session_and_roles_change_the_seed() -> None:
    """The same two key pairs, so that only the session or the roles can make the difference."""
    client, dealer = X25519PrivateKey.generate(), KeyExchange()

    def seed(own: Role, peer: Role, session: bytes) -> bytes:
        exchange = KeyExchange()
        exchange._private, exchange.public = client, client.public_key().public_bytes_raw()
        return exchange.seed(dealer.public, own, peer, session)

    uses: list[tuple[Role, Role, bytes]] = [
        ("client", "dealer", bytes(16)), ("client", "server", bytes(16)), ("client", "dealer", b"1" * 16)
    ]  # fmt: skip
    assert len({seed(*use) for use in uses}) == 3
    assert seed(*uses[0]) == seed(*uses[0])


def test_an_exchange_serves_once_and_refuses_bad_points() -> None:
    one, two = KeyExchange(), KeyExchange()
    one.seed(two.public, "client", "dealer", bytes(16))
    with pytest.raises(ProtocolError, match="twice"):
        one.seed(two.public, "client", "dealer", bytes(16))
    reflected = KeyExchange()
    with pytest.raises(ProtocolError, match="our own public key"):
        reflected.seed(reflected.public, "client", "dealer", bytes(16))
    with pytest.raises(ProtocolError, match="bad public key"):
        KeyExchange().seed(bytes(32), "client", "dealer", bytes(16))  # the identity: a shared secret of zero
    with pytest.raises(ProtocolError, match="bad public key"):
        KeyExchange().seed(b"short", "client", "dealer", bytes(16))
