"""The dealer makes the material of the next batch while this one is online; nothing else changes."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from small_networks import images, network
from tightrope.errors import ProtocolError
from tightrope.runtimes.mpc import MPC, costs, dealer, holders
from tightrope.runtimes.mpc.party import Party
from tightrope.runtimes.mpc.team import LocalTeam
from tightrope.runtimes.plain import evaluate

PROGRAM = network("patches")
ONE = MPC(timeout_s=20, material_bytes=int(costs(PROGRAM, MPC()).total.offline_bytes))  # one image a batch


def test_the_dealer_works_while_the_others_are_online(monkeypatch: pytest.MonkeyPatch) -> None:
    """No batch but the last ends before the next one's material is begun, and none is made for nobody."""
    begun = {number: threading.Event() for number in range(1, 6)}
    made, ran = dealer.offline, holders.online

    def offline(party: Party, size: int) -> Any:
        begun[party.counter + 1].set()
        return made(party, size)

    def online(party: Party, batch: Any, x: Any) -> Any:
        assert batch.counter in (3, 5) or begun[batch.counter + 1].wait(10)
        return ran(party, batch, x)

    monkeypatch.setattr(dealer, "offline", offline)
    monkeypatch.setattr(holders, "online", online)
    with ONE.open(PROGRAM, "simulate") as session:
        for count, done in ((3, 3), (2, 5)):
            y, _ = session.run(images(count).numpy())
            assert np.abs(y - evaluate(PROGRAM, images(count)).numpy()).max() < 2**-7
            assert isinstance(session._team, LocalTeam)
            assert session._team.workers["dealer"].party.counter == done


def test_a_dealer_that_fails_ahead_ends_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    made = dealer.offline

    def offline(party: Party, size: int) -> Any:
        if party.counter == 1:
            raise ProtocolError("no more today")
        return made(party, size)

    monkeypatch.setattr(dealer, "offline", offline)
    with (
        ONE.open(PROGRAM, "simulate") as session,
        pytest.raises(ProtocolError, match=r"no more today|lost dealer"),
    ):
        session.run(images(3).numpy())


@pytest.mark.slow
def test_processes_that_work_ahead_cost_what_was_predicted() -> None:
    predicted = costs(PROGRAM, ONE, 4)
    with ONE.open(PROGRAM, "execute") as session:
        for seed in (1, 2):
            x = images(4, seed)
            y, measured = session.run(x.numpy())
            assert np.abs(y - evaluate(PROGRAM, x).numpy()).max() < 2**-7
            assert (measured.links, measured.offline_links) == (predicted.links, predicted.offline_links)
            assert measured.total.rounds == predicted.total.rounds
