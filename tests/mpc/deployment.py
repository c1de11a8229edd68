"""Three parties with configurations, certificates and ports of their own, as threads of this process."""

from __future__ import annotations

import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from small_networks import network
from tightrope.program import Program
from tightrope.runtimes.mpc.duties import House
from tightrope.runtimes.mpc.keys import ROLES, Role, make_credentials, write_credentials
from tightrope.runtimes.mpc.remote import Client
from tightrope.runtimes.mpc.service import Log, Service
from tightrope.runtimes.mpc.settings import read_settings
from tightrope.types import Measurement

QUOTA = 1 << 30


def wait_for(happened: Callable[[], object], within_s: float = 10) -> None:
    deadline = time.monotonic() + within_s
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@dataclass
class Deployment:
    """Below `home`: certs/, server/ and public/ with the program, ROLE.toml. `logs`: what services wrote."""

    home: Path
    program: Program
    mpc: str = ""
    limits: str = "connect_s = 10"
    stock: str | None = None
    logs: dict[Role, io.StringIO] = field(default_factory=dict)

    def __post_init__(self) -> None:
        write_credentials(self.home / "certs", make_credentials())
        self.program.save(self.home / "server")
        self.program.public().save(self.home / "public")
        self.ports = dict(zip(("server", "dealer"), free_ports(2), strict=True))
        for role in ROLES:
            self.write(role)

    def write(self, role: Role, **changed: str) -> Path:
        """Write ROLE.toml, with some of its parts changed."""
        tables: Mapping[str, str | None] = {
            "mpc": self.mpc,
            "limits": self.limits,
            "stock": self.stock,
            **changed,
        }
        lines = [
            f'role = "{role}"',
            f'certificates = "certs/{changed.get("certificates", role)}"',
            f'program = "{"server" if role == "server" else "public"}"',
        ]
        for name, port in self.ports.items():
            lines += [f"[{name}]", 'host = "127.0.0.1"', f"port = {port}"]
        for name in ("mpc", "limits"):
            lines += [f"[{name}]", tables[name] or ""]
        if tables["stock"] is not None:
            lines += ["[stock]", f'directory = "stock-{role}"', f"quota_bytes = {QUOTA}", tables["stock"]]
        path = self.home / f"{role}.toml"
        path.write_text("\n".join(lines))
        return path

    @contextmanager
    def service(self, role: Role) -> Iterator[Service]:
        stream = self.logs[role] = io.StringIO()
        house = House.load(read_settings(self.home / f"{role}.toml"))
        service = Service(house, Log(role, stream))
        thread = threading.Thread(target=service.run)
        thread.start()
        try:
            yield service
        finally:
            service.stop()
            thread.join()
            house.close()

    def client(self) -> Client:
        return Client.load(read_settings(self.home / "client.toml"))

    def infer(self, x: NDArray[Any]) -> tuple[NDArray[np.float64], Measurement]:
        client = self.client()
        try:
            with client.session(len(x)) as session:
                return session.run(x)
        finally:
            client.close()

    def fetch(self, batch: int, batches: int) -> str:
        client = self.client()
        try:
            return client.fetch(batch, batches)
        finally:
            client.close()

    def events(self, role: Role, event: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.logs[role].getvalue().splitlines()]
        return [line for line in lines if line["event"] == event]


def deployed(home: Path, name: str = "patches", **options: Any) -> Deployment:
    return Deployment(home, network(name), **options)
