"""The pipe between a session and a party's process."""

from __future__ import annotations

import io
import json
import time

from tightrope.runtimes.mpc import control
from tightrope.runtimes.mpc.party import PhaseReport
from tightrope.runtimes.mpc.team import beating
from tightrope.runtimes.mpc.worker import Replies


def test_beats_come_while_a_step_works_and_never_inside_a_reply() -> None:
    stream = io.BytesIO()
    replies = Replies(stream)
    with beating(0.001, replies.beat):
        time.sleep(0.2)
        for k in range(200):
            replies.write({"k": k}, bytes([k]) * 5000)
            time.sleep(0.0005)
    stream.seek(0)
    beats, answers = 0, []
    while (message := control.read(stream)) is not None:
        if "beat" in message[0]:
            beats += 1
        else:
            answers.append(message)
    assert beats > 5
    assert answers == [({"k": k}, bytes([k]) * 5000) for k in range(200)]


def test_reports_survive_the_pipe() -> None:
    report = PhaseReport({("server", 3): 40}, {("dealer", 0): 7}, (1, 2), {"conv": 0.5}, {"relu": 9}, 1.25)
    assert control.report_from_json(json.loads(json.dumps(control.report_to_json(report)))) == report
