"""Certificates, their files, and pairwise seeds."""

from __future__ import annotations

import stat
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from tightrope.errors import InputError, ProtocolError
from tightrope.runtimes.mpc.keys import ROLES, KeyExchange, Role, make_certificates, peer_role, tls_context


def test_files_are_private_and_accepted_by_openssl(tmp_path: Path) -> None:
    home = tmp_path / "new" / "certs"
    make_certificates(home)
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    own = {f"{role}.{end}" for role in ROLES for end in ("pem", "key")}
    assert {f.name for f in home.iterdir()} == {"authority.pem"} | own
    assert {stat.S_IMODE(f.stat().st_mode) for f in home.iterdir()} == {0o600}
    for role in ROLES:
        files = ["-CAfile", home / "authority.pem", home / f"{role}.pem"]
        subprocess.run(["openssl", "verify", "-x509_strict", *files], check=True, capture_output=True)
        text = subprocess.run(
            ["openssl", "x509", "-noout", "-ext", "subjectAltName", "-in", home / f"{role}.pem"],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        assert f"URI:tightrope://mpc/{role}" in text


def test_used_directories_and_missing_files_are_named(tmp_path: Path) -> None:
    make_certificates(tmp_path / "a")
    with pytest.raises(InputError, match="not empty"):
        make_certificates(tmp_path / "a")
    (tmp_path / "a" / "client.key").unlink()
    with pytest.raises(InputError, match=r"client\.key"):
        tls_context(tmp_path / "a", "client", accepts=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        make_certificates(tmp_path / "file" / "below")


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
    with pytest.raises(ProtocolError, match="bad public key"):
        KeyExchange().seed(bytes(32), "client", "dealer", bytes(16))  # the identity: a shared secret of zero
    with pytest.raises(ProtocolError, match="bad public key"):
        KeyExchange().seed(b"short", "client", "dealer", bytes(16))
