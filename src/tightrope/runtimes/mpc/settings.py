"""`party.toml`: what one party on its own machine has to know. Unknown keys are refused with near ones.

    role = "server"                  # or --role; one file can serve all three machines
    certificates = "certs/server"    # authority.pem, server.pem, server.key
    program = "runs/mine"            # server: a bundle; client and dealer: what export-public wrote

    [server]                         # where the others reach it, and the port it listens on
    host = "server.example.org"
    port = 7701
    [dealer]
    host = "dealer.example.org"
    port = 7702

Paths are relative to the file. Optional: `listen`, the tables [mpc], [limits] and [stock], as below.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from tightrope.errors import InputError, near
from tightrope.runtimes.mpc.config import MPC
from tightrope.runtimes.mpc.keys import ROLES, Role
from tightrope.types import Json

T = TypeVar("T")
PORTS = (1, 65535)


@dataclass(frozen=True, kw_only=True)
class Address:
    host: str
    port: int


@dataclass(frozen=True, kw_only=True)
class Limits:
    """connect_s: how long a peer that is not up yet is awaited; idle_s: how long a session may wait for its
    client's next command; stop_s: what running sessions are given when a service is told to stop; sessions:
    how many a service runs at a time; images: how many a client certificate may have classified in an hour, 0
    for any number."""

    connect_s: float = 30.0
    idle_s: float = 300.0
    stop_s: float = 30.0
    sessions: int = 4
    images: int = 0


@dataclass(frozen=True, kw_only=True)
class StockSettings:
    """Material made ahead, on disk. quota_bytes: of the directory; keep_days: older lots are deleted. The
    dealer keeps `ready` lots of `batches` batches of `batch` images; client and server ignore these."""

    directory: Path
    quota_bytes: int
    keep_days: float = 30.0
    batch: int = 1
    batches: int = 16
    ready: int = 1


@dataclass(frozen=True, kw_only=True)
class Settings:
    """listen: the address that the own port is bound to, None for the own host. See the module."""

    role: Role
    certificates: Path
    program: Path
    server: Address
    dealer: Address
    listen: str | None
    mpc: MPC
    limits: Limits
    stock: StockSettings | None

    def address(self, role: Role) -> Address:
        return {"server": self.server, "dealer": self.dealer}[role]


RANGES: Mapping[str, tuple[float, float]] = {
    "connect_s": (0.1, 86400.0),
    "idle_s": (0.1, 30 * 86400.0),
    "stop_s": (0.0, 86400.0),
    "sessions": (1, 1024),
    "images": (0, 2**40),
    "quota_bytes": (1, 2**60),
    "keep_days": (0.001, 36500.0),
    "batch": (1, 2**20),
    "batches": (1, 2**20),
    "ready": (0, 2**20),
    "port": PORTS,
}
TOP: Mapping[str, type] = {
    "role": str,
    "certificates": str,
    "program": str,
    "listen": str,
    "server": dict,
    "dealer": dict,
    "mpc": dict,
    "limits": dict,
    "stock": dict,
}
NEEDED = ("certificates", "program", "server", "dealer")


def read_settings(path: Path, role: str | None = None) -> Settings:
    """The settings of a party. `role` may be given here or in the file.

    Raises InputError, naming file and key, for anything missing, unknown, of another type or out of range.
    """
    where = str(path)
    try:
        body = tomllib.loads(path.read_text())
    except OSError as error:
        raise InputError("no such configuration", where=where, got=error.strerror) from error
    except (ValueError, RecursionError) as error:  # TOML and UTF-8
        raise InputError("the configuration is not TOML", where=where, got=str(error)) from error
    _check_keys(body, TOP, NEEDED, where)
    own = _role(body.get("role"), role, where)
    base = path.resolve().parent
    stock = body.get("stock")
    return Settings(
        role=own,
        certificates=base / body["certificates"],
        program=base / body["program"],
        server=_table(Address, body["server"], f"{where} [server]"),
        dealer=_table(Address, body["dealer"], f"{where} [dealer]"),
        listen=body.get("listen"),
        mpc=_mpc(body.get("mpc", {}), f"{where} [mpc]"),
        limits=_table(Limits, body.get("limits", {}), f"{where} [limits]"),
        stock=None if stock is None else _table(StockSettings, stock, f"{where} [stock]", base),
    )


def _role(in_file: str | None, given: str | None, where: str) -> Role:
    if in_file is not None and given is not None and in_file != given:
        raise InputError("two roles", where=where, got=f"role = {in_file!r}, --role {given}")
    name = given if in_file is None else in_file
    role = next((r for r in ROLES if r == name), None)
    if role is None:
        what = "no role" if name is None else "unknown role"
        raise InputError(what, where=where, got=name, allowed=", ".join(ROLES), fix="--role ROLE")
    return role


def _mpc(body: Mapping[str, Json], where: str) -> MPC:
    if "port" in body:
        raise InputError("ports belong to [server] and [dealer]", where=where, got="port")
    return _table(MPC, body, where)


def _table(kind: type[T], body: Mapping[str, Json], where: str, base: Path | None = None) -> T:
    """A dataclass from a table of the file; `base`: what its paths are relative to."""
    hints = get_type_hints(kind)
    own = fields(kind)  # type: ignore[arg-type]
    needed = tuple(f.name for f in own if f.default is MISSING)
    types = {f.name: str if hints[f.name] is Path else _plain(hints[f.name]) for f in own}
    _check_keys(body, types, needed, where)
    values: dict[str, Any] = {}
    for key, value in body.items():
        low, high = RANGES.get(key, (value, value))
        if not low <= value <= high:
            raise InputError(f"{key} is out of range", where=where, got=value, allowed=f"{low} to {high}")
        values[key] = base / value if base is not None and hints[key] is Path else value
    return kind(**values)


def _plain(hint: Any) -> type:
    """The type that a value of the file must have; a Literal's is that of its values, and nothing is None."""
    if isinstance(hint, UnionType):
        hint = next(kind for kind in get_args(hint) if kind is not NoneType)
    found: type = type(get_args(hint)[0]) if get_origin(hint) is Literal else hint
    return found


def _check_keys(
    body: Mapping[str, Json], types: Mapping[str, type], needed: tuple[str, ...], where: str
) -> None:
    for key, value in body.items():
        if key not in types:
            raise InputError("unknown key", where=where, got=key, allowed=near(key, types))
        wanted = (int, float) if types[key] is float else (types[key],)
        if not isinstance(value, wanted) or (isinstance(value, bool) and types[key] is not bool):
            raise InputError(
                f"{key} has another type", where=where, got=repr(value), allowed=types[key].__name__
            )
        if isinstance(value, str) and not value:
            raise InputError(f"{key} is empty", where=where)
    for key in needed:
        if key not in body:
            raise InputError(f"{key} is missing", where=where, allowed=", ".join(types))
