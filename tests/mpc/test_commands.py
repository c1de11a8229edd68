"""Random commands to a service and random reports to a client: in order, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from deployment import deployed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tightrope.errors import InputError, ProtocolError
from tightrope.runtimes.mpc.duties import Duty, House
from tightrope.runtimes.mpc.keys import Role
from tightrope.runtimes.mpc.rations import Rations
from tightrope.runtimes.mpc.remote import read_report
from tightrope.runtimes.mpc.settings import read_settings

SESSION = "00" * 16
SERVICES: tuple[Role, ...] = ("server", "dealer")
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["setup", "offline", "online", "fetch", "lots", "open", SESSION]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
ORDER = st.fixed_dictionaries(
    {"command": st.sampled_from(["setup", "offline", "online", "fetch", "lots", "open"]) | JSON},
    optional=dict.fromkeys(("size", "batches", "number", "owner", "lots", "lot"), JSON),
)


@pytest.fixture(scope="module")
def houses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Role, House]]:
    d = deployed(tmp_path_factory.mktemp("houses"), stock="ready = 0")
    found = {role: House.load(read_settings(d.home / f"{role}.toml")) for role in SERVICES}
    yield found
    for house in found.values():
        house.close()


@pytest.mark.slow
@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(SERVICES), ORDER, st.booleans(), st.booleans())
def test_any_command_is_obeyed_or_refused(
    houses: dict[Role, House], role: Role, order: dict[str, Any], dealer: bool, shared: bool
) -> None:
    """As it comes off the wire; what is obeyed reaches a worker that only says so."""

    class ObeyedError(Exception):
        """The command was found to be in order."""

    class Worker:
        prepared = party = None

        def obey(self, command: str, size: int, x: None) -> Any:
            raise ObeyedError(command, size)

    names: tuple[Role, ...] = ("client", "server", "dealer") if dealer else ("client", "server")
    idle = {"beat": lambda every_s: None}  # on a slow machine a transfer shows that it is alive
    channels: Any = {name: SimpleNamespace(certificate=name, **idle) for name in names if name != role}
    worker: Any = Worker()
    duty = Duty(houses[role], worker, channels, Rations(0), shared_weights=shared)
    body = json.loads(json.dumps(order))
    try:
        duty.obey(body)
    except ProtocolError:
        return
    except ObeyedError as obeyed:
        command, size = obeyed.args
        assert command == body["command"] and shared == (command != "setup")
        assert command == "setup" or (type(body["size"]) is int and 1 <= size == body["size"])
        return
    except InputError as error:
        assert body["command"] == "fetch" and dealer and "the stock would exceed its quota" in str(error)
        return
    except AttributeError:  # a transfer in order, and there is nobody to transfer from or to
        assert body["command"] == "fetch" and dealer
        return
    assert body["command"] == "lots" and role == "server"


REPORT = {
    "sent": [["client", 1, 40]], "received": [["dealer", 0, 32]], "rounds": [0, 1],
    "milliseconds": {"a": 1.5}, "drelus": {"a": 3}, "elapsed_ms": 2.5,
}  # fmt: skip


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.sampled_from(list(REPORT)), JSON, st.booleans())
def test_a_report_is_read_or_refused(key: str, value: Any, inside: bool) -> None:
    body = {**REPORT, key: [value] if inside else value}
    try:
        report = read_report(json.loads(json.dumps(body)), 2, "server")
    except ProtocolError:
        return
    assert len(report.rounds) == 2 and isinstance(report.elapsed_ms, float)
    assert all(isinstance(n, int) for n in (*report.sent.values(), *report.received.values()))
