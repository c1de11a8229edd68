"""party.toml: what it may say, and how what it may not say is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tightrope.errors import InputError
from tightrope.runtimes.mpc import MPC
from tightrope.runtimes.mpc.settings import Address, Limits, StockSettings, read_settings

WHOLE = """
certificates = "certs/server"
program = "/abs/bundle"
listen = "0.0.0.0"
[server]
host = "server.example.org"
port = 7701
[dealer]
host = "10.0.0.3"
port = 7702
[mpc]
fraction_bits = 20
margin = 3
timeout_s = 5.5
[limits]
sessions = 2
[stock]
directory = "stock"
quota_bytes = 1_000_000
"""


def read(tmp_path: Path, text: str, role: str | None = "server"):  # type: ignore[no-untyped-def]
    path = tmp_path / "party.toml"
    path.write_text(text)
    return read_settings(path, role)


def test_a_whole_file(tmp_path: Path) -> None:
    found = read(tmp_path, WHOLE)
    assert found.role == "server" and found.listen == "0.0.0.0"
    assert found.certificates == tmp_path / "certs" / "server"  # relative to the file
    assert found.program == Path("/abs/bundle")
    assert found.address("dealer") == Address(host="10.0.0.3", port=7702)
    assert found.mpc == MPC(fraction_bits=20, margin=3, timeout_s=5.5)
    assert found.limits == Limits(sessions=2)
    assert found.stock == StockSettings(directory=tmp_path / "stock", quota_bytes=1_000_000)


def test_optional_tables_and_the_role_in_the_file(tmp_path: Path) -> None:
    text = 'role = "client"\n' + WHOLE.split("[mpc]")[0]
    found = read(tmp_path, text, None)
    assert (found.role, found.mpc, found.limits, found.stock) == ("client", MPC(), Limits(), None)
    assert read(tmp_path, text, "client") == found
    with pytest.raises(InputError, match="two roles"):
        read(tmp_path, text, "dealer")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("[limits]", "[limit]", "unknown key(.|\n)*limit(.|\n)*limits"),
        ("fraction_bits", "fractionbits", r"\[mpc\](.|\n)*fractionbits(.|\n)*fraction_bits"),
        ("sessions", "session", r"\[limits\](.|\n)*sessions"),
        ("quota_bytes", "quota", "unknown key(.|\n)*quota_bytes"),
        ("port = 7701", 'port = "7701"', "another type(.|\n)*'7701'(.|\n)*int"),
        ("port = 7701", "port = true", "another type"),
        ("port = 7701", "port = 0", "out of range(.|\n)*1 to 65535"),
        ("port = 7701\n", "", r"\[server\](.|\n)*|port is missing"),
        ('host = "10.0.0.3"', 'host = ""', "host is empty"),
        ("timeout_s = 5.5", "timeout_s = nan", "out of range"),
        ("timeout_s = 5.5", "timeout_s = -1", "out of range"),
        ("timeout_s = 5.5", "port = 7000", "ports belong to"),
        ("sessions = 2", "sessions = 0", "out of range"),
        ("sessions = 2", "sessions = 1.5", "another type"),
        ("sessions = 2", "idle_s = inf", "out of range"),
        ("quota_bytes = 1_000_000", "", "quota_bytes is missing"),
        ('program = "/abs/bundle"', "", "program is missing"),
        ("[mpc]", "[mpc", "not TOML"),
        ('listen = "0.0.0.0"', "listen = 3", "another type"),
        ('listen = "0.0.0.0"', 'role = "sever"', "unknown role|two roles"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert old in WHOLE
    with pytest.raises(InputError, match=says) as error:
        read(tmp_path, WHOLE.replace(old, new))
    assert "party.toml" in str(error.value) or "MPC" in str(error.value)


def test_no_file_no_role_no_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such configuration"):
        read_settings(tmp_path / "none.toml")
    with pytest.raises(InputError, match="no role"):
        read(tmp_path, WHOLE, None)
    (tmp_path / "party.toml").write_bytes(b"\xff")
    with pytest.raises(InputError, match="not TOML"):
        read_settings(tmp_path / "party.toml")
