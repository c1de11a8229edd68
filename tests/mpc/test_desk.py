"""The client as a service."""

from __future__ import annotations

import io
import json
import os
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from deployment import deployed
from test_deployment import wait_for

from small_networks import INPUT, images
from tightrope.data import ImageSpec
from tightrope.desk import Desk
from tightrope.runtimes.mpc.service import Log
from tightrope.runtimes.plain import evaluate


def test_a_serving_client_answers_paths_and_opens_a_new_session_when_one_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lot is used up, then the server ends an idle session, then the dealer is gone."""
    d = deployed(tmp_path, stock="ready = 0", limits="connect_s = 1\nidle_s = 1")
    monkeypatch.setattr("tightrope.desk.read_image", lambda path, spec: images(1, seed=int(path.stem)))
    reader, writer = os.pipe()
    with d.service("server"), ExitStack() as dealing:
        dealing.enter_context(d.service("dealer"))
        d.fetch(1, 2)
        client, log = d.client(), io.StringIO()
        spec = ImageSpec(INPUT, (0.0, 0.0), (1.0, 1.0))
        desk = Desk(client, [f"class {k}" for k in range(5)], spec, Log("client", log), reader)
        thread = threading.Thread(target=desk.run)
        thread.start()
        answers: list[dict[str, Any]] = []

        def told(text: str, count: int) -> None:
            os.write(writer, text.encode())

            def answered() -> bool:
                answers.extend(map(json.loads, capsys.readouterr().out.splitlines()))
                return len(answers) == count

            wait_for(answered)

        told("1\n2\n3", 2)
        told("\n", 3)
        wait_for(lambda: len(d.events("server", "session_end")) == 3)  # it waited for a client in vain
        told("4\n", 4)
        dealing.close()
        told("5\n", 5)
        desk.stop()
        thread.join(20)
        assert not thread.is_alive()
        client.close()
    want = [f"class {int(evaluate(d.program, images(1, seed)).argmax())}" for seed in (1, 2, 3, 4)]
    assert [a.get("prediction") for a in answers] == [*want, None]
    assert "dealer" in answers[4]["error"]
    events = [json.loads(line) for line in log.getvalue().splitlines()]
    assert [e["mode"] for e in events if e["event"] == "session"] == ["stock", "remote", "remote"]
    assert events[-1]["event"] == "stopped" and events[-1]["served"] == 5


def test_lines_are_served_until_they_end_and_none_is_endless(tmp_path: Path, capsys: Any) -> None:
    d = deployed(tmp_path)
    client = d.client()
    for text, says in ((b"none.png\n\nno", ["none.png", "no"]), (b"x" * 70000, None)):
        reader, writer = os.pipe()
        thread = threading.Thread(target=lambda fd=writer, text=text: (os.write(fd, text), os.close(fd)))
        thread.start()
        log = io.StringIO()
        desk = Desk(client, [], ImageSpec(INPUT, (0.0, 0.0), (1.0, 1.0)), Log("client", log), reader)
        desk.run()
        thread.join(10)
        answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        if says is not None:
            assert [a["image"] for a in answers] == says and all(a["error"] for a in answers)
        else:
            assert not answers and "too long" in log.getvalue()
    client.close()
