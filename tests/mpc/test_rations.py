"""How many images a client certificate may have classified in an hour."""

from __future__ import annotations

from pathlib import Path

import pytest
from deployment import deployed, wait_for

from small_networks import images
from tightrope.errors import ProtocolError
from tightrope.runtimes.mpc.rations import Rations


def test_a_client_gets_so_many_images_an_hour(tmp_path: Path) -> None:
    """Over all of its sessions; what would be more is refused before anything of it is revealed."""
    d = deployed(tmp_path)
    d.write("server", limits="images = 3")
    x = images(2).numpy()
    with d.service("server"), d.service("dealer"):
        with d.client().session(2) as session:
            session.run(x)
        with d.client().session(2) as session, pytest.raises(ProtocolError, match="images of this hour"):
            session.run(x)
        with d.client().session(1) as session:
            session.run(x[:1])
        wait_for(lambda: len(d.events("server", "session_end")) == 3)
        assert [line["images"] for line in d.events("server", "session_end")] == [2, 0, 1]


def test_rations_come_back_after_an_hour_and_are_of_one_certificate() -> None:
    now = [0.0]
    rations = Rations(5, lambda: now[0])
    rations.take("a", 3)
    now[0] = 1800.0
    rations.take("a", 2)
    for moment, left in ((3599.0, 0), (3600.0, 3), (5400.0, 5)):
        now[0] = moment
        with pytest.raises(ProtocolError, match=f"{left} more"):
            rations.take("a", left + 1)
    rations.take("b", 5)
    Rations(0).take("a", 10**9)
