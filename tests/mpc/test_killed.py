"""Each party killed in each phase: the others stop soon and say why, and the next session succeeds.

With material in stock, no number of a batch that a party had begun is ever used again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deployment import Deployment, deployed, wait_for
from parties import PHASES, infer, serve, start

from small_networks import images
from tightrope.runtimes.mpc.keys import Role
from tightrope.runtimes.plain import evaluate

pytestmark = pytest.mark.slow
STOP_S = 5.0
SERVICES: tuple[Role, ...] = ("server", "dealer")


class Machines:
    """Three machines. What runs on the two services stays from test to test, unless it is killed."""

    def __init__(self, home: Path) -> None:
        self.d: Deployment = deployed(home, limits="connect_s = 10", stock="ready = 0")
        self.running: dict[Role, BaseProcess] = {}

    def log(self, role: Role) -> Path:
        return self.d.home / f"{role}.log"

    def events(self, role: Role, event: str) -> list[dict[str, Any]]:
        text = self.log(role).read_text() if self.log(role).exists() else ""
        lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
        return [line for line in lines if line["event"] == event]

    def up(self, role: Role, dies: str | None = None) -> None:
        """Start a service, or start it again as one that will die; returns when it is ready."""
        before = len(self.events(role, "ready"))
        self.down(role)
        self.running[role] = start(serve, self.d.home / f"{role}.toml", self.log(role), dies)
        wait_for(lambda: len(self.events(role, "ready")) > before, 60)

    def down(self, role: Role) -> None:
        process = self.running.pop(role, None)
        if process is not None:
            process.terminate()
            process.join(20)
            assert process.exitcode is not None

    def client(self, x: np.ndarray, dies: str | None = None) -> BaseProcess:
        (self.d.home / "answer").unlink(missing_ok=True)
        return start(infer, self.d.home / "client.toml", x, self.d.home / "answer", dies)

    def answer(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.d.home / "answer").read_text())
        return found

    def check(self) -> str:
        """A session must succeed; how it got its material."""
        x = images(1, seed=7)
        process = self.client(x.numpy())
        process.join(60)
        said = self.answer()
        assert "error" not in said, said
        assert np.abs(np.array(said["result"]) - evaluate(self.d.program, x).numpy()).max() < 2**-7
        return str(said["mode"])

    def following(self, role: Role) -> int:
        """The number of the first batch that `role` has not begun."""
        (found,) = (self.d.home / f"stock-{role}").glob("*/next")
        return int(found.read_text())


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    made = Machines(tmp_path_factory.mktemp("machines"))
    for role in SERVICES:
        made.up(role)
    yield made
    for role in SERVICES:
        made.down(role)
        assert not made.events(role, "bug")


def kill(machines: Machines, victim: Role, phase: str, mode: str) -> None:
    """Run a session in which `victim` dies in `phase`; the others must have ended theirs STOP_S later."""
    others = [role for role in SERVICES if role != victim and (mode == "remote" or role == "server")]
    if victim != "client":
        machines.up(victim, dies=phase)
    ended = {role: len(machines.events(role, "session_end")) for role in others}
    client = machines.client(images(1).numpy(), dies=phase if victim == "client" else None)
    dying = client if victim == "client" else machines.running.pop(victim)
    dying.join(30)
    assert dying.exitcode == -9
    wait_for(lambda: all(len(machines.events(r, "session_end")) > ended[r] for r in others), STOP_S)
    if victim != "client":
        client.join(STOP_S)
        assert client.exitcode == 0
        error = machines.answer()["error"]
        assert (
            f"lost {victim}" in error or "ended the session" in error or f"cannot send to {victim}" in error
        )
    for role in others:
        failed = machines.events(role, "failed")[-1]["why"]
        assert failed and failed[0].startswith(("lost ", "cannot send ", f"{victim} ", "client ", "server "))
    if victim != "client":
        machines.up(victim)


@pytest.mark.parametrize(
    ("victim", "phase"),
    [*product(("client", "server"), PHASES), *product(["dealer"], PHASES[:2])],  # then it has done its part
)
def test_a_killed_party_ends_the_session_and_the_next_succeeds(
    machines: Machines, victim: Role, phase: str
) -> None:
    kill(machines, victim, phase, "remote")
    assert machines.check() == "remote"


def test_a_dealer_killed_when_it_has_done_its_part_is_not_missed(machines: Machines) -> None:
    """Its material has been taken: the batch ends well without it."""
    x = images(1)
    client = machines.d.client()
    try:
        with client.session(1) as session:
            session._team.call("offline", 1)
            dealer = machines.running.pop("dealer")
            dealer.kill()
            dealer.join(10)
            y = session._team.call("online", 1, x.numpy())["client"][1]
    finally:
        client.close()
    assert y is not None and np.abs(y - evaluate(machines.d.program, x).numpy()).max() < 2**-7
    machines.up("dealer")
    assert machines.check() == "remote"


@pytest.mark.parametrize("phase", PHASES[1:])
@pytest.mark.parametrize("victim", ["client", "server"])
def test_what_a_killed_party_had_begun_is_not_used_again(
    machines: Machines, victim: Role, phase: str
) -> None:
    machines.d.fetch(1, 2)
    try:
        kill(machines, victim, phase, "stock")
        other: Role = "server" if victim == "client" else "client"
        assert machines.following(victim) == 2  # on disk before it was used
        assert machines.following(other) in (1, 2)
        assert machines.check() == "stock"
        assert machines.following("client") == machines.following("server") == 3
    finally:
        machines.up("dealer")
    assert machines.check() == "remote"  # nothing is left
