"""The protocol, run by three threads over real frames: every step against the integer model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from small_networks import INPUT, NETWORKS, images, network
from tightrope.errors import InputError, ProtocolError
from tightrope.program import Program
from tightrope.runtimes.mpc import MPC, compile_program, costs, holders, oracle
from tightrope.runtimes.mpc.channel import Clock
from tightrope.runtimes.mpc.keys import ROLES
from tightrope.runtimes.mpc.local import local_channels
from tightrope.runtimes.mpc.packing import packed
from tightrope.runtimes.mpc.party import Party, introduce
from tightrope.runtimes.mpc.steps import UNIT_BITS, Gate, Local, Message, Multiply, Step, Truncate, Wire
from tightrope.runtimes.mpc.team import LocalTeam
from tightrope.runtimes.mpc.terms import Term
from tightrope.runtimes.plain import ranges


class Recorder:
    """Keeps every share that a handler leaves behind, before it is forgotten."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shares: dict[str, dict[str, Tensor]] = {"client": {}, "server": {}}
        for phase in (holders.OFFLINE, holders.ONLINE):
            for role in ("client", "server"):
                spied = {kind: self._spy(handler) for kind, handler in phase[role].items()}
                monkeypatch.setitem(phase, role, spied)

    def _spy(self, handler: Callable[..., None]) -> Callable[..., None]:
        def spied(party: Party, step: Step, batch: Any) -> None:
            handler(party, step, batch)
            self.shares[party.role] |= {name: share.clone() for name, share in batch.wires.items()}

        return spied

    def value(self, wire: Wire) -> Tensor:
        """What both shares stand for, signed."""
        total = self.shares["client"][wire.name] + self.shares["server"][wire.name]
        unused = 8 * total.element_size() - wire.ring_bits
        return total << unused >> unused


RINGS = {
    64: MPC(noise_bits=0),
    32: MPC(noise_bits=0, ring_bits=32, fraction_bits=11, weight_bits=11, margin=2.0),
}


@pytest.mark.parametrize("ring_bits", RINGS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_step_equals_the_integer_model(
    name: str, ring_bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linear maps and products exactly, truncations within one unit, gates with an input within one unit."""
    recorder = Recorder(monkeypatch)
    program, x, config = network(name), images(8, seed=3), RINGS[ring_bits]
    schedule = compile_program(program, config)
    with config.open(program, "simulate") as session:
        session.run(x.numpy())
    values = {Program.INPUT: recorder.value(schedule.input)}
    assert torch.equal(values[Program.INPUT], torch.round(x.double() * 2**config.fraction_bits).long())
    for step in schedule.steps:
        if not isinstance(step, oracle.Calculation):
            continue
        inputs = [values[w.name] for w in oracle.sources(step)]
        want = oracle.apply(step, program, *inputs)
        if isinstance(step, Local) and step.masks:
            values.setdefault(step.output.name, want)  # a wire that only has a mask
            continue
        got = values[step.output.name] = recorder.value(step.output)
        assert got.dtype == (torch.int32 if step.output.ring_bits == 32 else torch.int64)
        assert step.output.ring_bits in ((ring_bits,) if ring_bits == 64 else (32, 40))
        unused = isinstance(getattr(step, "kernel", None), Term) and not want.any()  # a coefficient of 0
        assert unused or want.abs().max() > 100  # else one unit would say nothing
        if not isinstance(step, Truncate | Gate):
            assert torch.equal(got, want)
            continue
        made = [want, want + 1]  # rounded down or up
        if isinstance(step, Gate):
            made = [oracle.gate(step, *inputs, carry=c, unit=u) for u in (False, True) for c in (0, 1)]
            made = made if step.shift else made[::2]
        assert torch.stack([got == m for m in made]).any(0).all()
        if step.shift:
            up = (got == made[1])[made[0] != made[1]].float().mean()
            assert 0.02 < up < 0.98  # rounds up as often as the dropped bits say, not always


@pytest.mark.parametrize("size", [1, 3, 8, 17])
def test_outputs_and_counts_for_any_batch_size(size: int) -> None:
    """Odd sizes leave the last byte of packed bits partly empty."""
    program, x = network("patches"), images(size, seed=size)
    config = MPC(noise_bits=0)
    with config.open(program, "simulate") as session:
        y, measured = session.run(x.numpy())
    assert y.shape == (size, 5)
    want = oracle.evaluate(program, compile_program(program, config), x.numpy())
    assert np.abs(y - want).max() < 2**-16
    predicted = costs(program, config, size)
    for trace in measured.ops:
        assert replace(trace.cost, online_ms=0, offline_ms=0) == predicted.ops[trace.op]


def test_a_large_batch_is_run_in_pieces_and_costs_what_was_predicted() -> None:
    program, x = network("patches"), images(7)
    config = MPC(noise_bits=0, material_bytes=3 * int(costs(program, MPC(noise_bits=0)).total.offline_bytes))
    with config.open(program, "simulate") as session:
        y, measured = session.run(x.numpy())
    assert (
        np.abs(y - oracle.evaluate(program, compile_program(program, MPC(noise_bits=0)), x.numpy())).max()
        < 2**-16
    )
    predicted = costs(program, config, 7)
    assert (
        predicted.total.rounds == 3 * costs(program, MPC(noise_bits=0)).total.rounds == measured.total.rounds
    )
    assert (
        predicted.total.weights == measured.total.weights == costs(program, MPC(noise_bits=0)).total.weights
    )
    assert (predicted.links, predicted.offline_links) == (measured.links, measured.offline_links)


def test_executed_comparisons_are_those_of_the_plan() -> None:
    program = network("patches")
    with MPC(noise_bits=0).open(program, "simulate") as session:
        _, measured = session.run(images(2).numpy())
    planned = {op.name: 2 * op.drelus for op in program.ops if op.kind == "relu"}
    assert {t.op: t.cost.drelus for t in measured.ops if t.kind == "relu"} == planned
    assert sum(planned.values()) == measured.total.drelus > 0


def test_each_batch_has_new_masks_and_the_same_result() -> None:
    program, x = network("residual"), images(4)
    team = LocalTeam(program, MPC(noise_bits=0), bytes(16))
    team.call("setup", 0)
    frames: dict[str, list[bytes]] = {"client": [], "server": []}  # both get the same words of a key
    outputs = []
    for _ in range(2):
        seen = received(team)
        team.call("offline", 4)
        outputs.append(team.call("online", 4, x.numpy())["client"][1])
        for role, got in frames.items():
            got += [a.tobytes() for a in seen[role] if a.nbytes >= 32]
    team.close()
    assert all(len(got) == len(set(got)) > 30 for got in frames.values())
    assert np.abs(outputs[0] - outputs[1]).max() < 2**-16


def received(team: LocalTeam) -> dict[str, list[np.ndarray]]:
    """What the parties get from now on, field by field."""
    seen: dict[str, list[np.ndarray]] = {role: [] for role in ROLES}
    for role, worker in team.workers.items():
        party = worker.party

        def receive(
            step: Step, message: Message, batch: int, party: Party = party, sink: Any = seen[role]
        ) -> Any:
            arrays = Party.receive(party, step, message, batch)
            for f in message.fields:
                bits, whole = UNIT_BITS[f.unit], arrays[f.name]
                sink.append(packed(whole, bits) if bits in (40, 48) else whole)  # as it was sent
            return arrays

        party.receive = receive  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("name", ["residual", "pools", "squeeze", "whole maps"])
@pytest.mark.parametrize("ring_bits", RINGS)
@pytest.mark.parametrize("value", [0.0, 1.5])
def test_what_a_party_sees_is_uniform_whatever_the_input(name: str, value: float, ring_bits: int) -> None:
    """Chi-square over the bytes of all frames, weights and images constant; the dealer gets no frame."""
    program = network(name)
    constant = {k: np.full_like(v, value / 8) for k, v in program.tensors.items()}
    team = LocalTeam(replace(program, tensors=constant), RINGS[ring_bits], bytes(16))
    seen = received(team)
    team.call("setup", 0)
    team.call("offline", 16)
    team.call("online", 16, np.full((16, *INPUT), value))
    team.close()
    assert not seen["dealer"]
    for role in ("client", "server"):
        data = np.concatenate([a.reshape(-1).view(np.uint8) for a in seen[role] if a.max() > 1])
        counts = np.bincount(data, minlength=256)
        expected = data.size / 256
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert data.size > 100_000 and chi_square < 400  # 255 degrees of freedom: 1 in 10^8 is above
        bits = np.concatenate([a for a in seen[role] if a.max() <= 1])
        assert abs(bits.mean() - 0.5) < 6 * 0.5 / np.sqrt(bits.size)


def test_prepared_material_is_used_once() -> None:
    team = LocalTeam(network("patches"), MPC(timeout_s=5), bytes(16))
    team.call("setup", 0)
    team.call("offline", 2)
    team.call("online", 2, images(2).numpy())
    with pytest.raises(ProtocolError, match="no material"):
        team.call("online", 2, images(2).numpy())


def test_a_batch_of_another_size_than_prepared_is_refused() -> None:
    team = LocalTeam(network("patches"), MPC(timeout_s=5), bytes(16))
    team.call("setup", 0)
    team.call("offline", 2)
    with pytest.raises(ProtocolError, match="no material"):
        team.call("online", 3, images(3).numpy())


def test_an_input_beyond_calibration_is_refused() -> None:
    """By its own margin, not the larger one of the values inside."""
    program = network("patches")
    seen = program.ranges[Program.INPUT]
    with MPC(noise_bits=0).open(program, "simulate") as session:
        with pytest.raises(InputError, match=r"calibration[\s\S]*input_margin 1.25"):
            session.run(np.full((1, *INPUT), 1.3 * seen))
        session.run(np.full((1, *INPUT), 1.2 * seen))
        with pytest.raises(InputError, match="shape"):
            session.run(np.zeros((1, 3, 3)))
        session.run(images(1).numpy())


def test_a_result_beyond_calibration_is_refused() -> None:
    program, x = network("residual"), images(4)
    last = program.output
    small = replace(program, ranges=program.ranges | {last: program.ranges[last] / 100})
    with MPC(noise_bits=0).open(small, "simulate") as session, pytest.raises(InputError, match="result"):
        session.run(x.numpy())
    with MPC(noise_bits=0, reveal="label").open(small, "simulate") as session:
        session.run(x.numpy())  # a label has no size


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(InputError, match="mode"):
        MPC(noise_bits=0).open(network("patches"), "emulate")  # type: ignore[arg-type]


OTHER = {
    "program": (network("residual"), MPC(noise_bits=0), bytes(16)),
    "fraction_bits": (network("patches"), MPC(noise_bits=0, fraction_bits=20), bytes(16)),
    "session": (network("patches"), MPC(noise_bits=0), bytes(15) + b"x"),
}


@pytest.mark.parametrize("what", OTHER)
def test_parties_that_disagree_refuse_each_other_with_both_values(what: str) -> None:
    usual = (network("patches"), MPC(noise_bits=0), bytes(16))
    clocks = {role: Clock() for role in ROLES}
    channels: dict[str, dict[str, Any]] = {role: {} for role in ROLES}
    for one, other in combinations(ROLES, 2):
        pair = local_channels((one, clocks[one]), (other, clocks[other]), timeout_s=2)
        channels[one][other], channels[other][one] = pair

    def meet(role: str) -> None:
        program, config, session = OTHER[what] if role == "server" else usual
        introduce(role, channels[role], session, program, config)  # type: ignore[arg-type]

    with ThreadPoolExecutor(3) as pool:
        meetings = {role: pool.submit(meet, role) for role in ROLES}
    shown = {"program": usual[0].sha256(), "fraction_bits": "22", "session": bytes(16).hex()}
    theirs = {"program": OTHER[what][0].sha256(), "fraction_bits": "20", "session": (bytes(15) + b"x").hex()}
    for role in ROLES:
        error = str(meetings[role].exception())
        assert f"disagree about the {what}" in error
        assert shown[what] in error and theirs[what] in error


@pytest.mark.parametrize(
    "data",
    [
        b"[1, 2]",
        b"[" * 4096,
        b'{"agreed":' * 400,
        b"\xff",
        b"",
        b'{"agreed": {}}',
        b'{"agreed": [[[], 1]], "key": ""}',
        b'{"agreed": {}, "key": "xyz"}',
        b'{"agreed": {}, "key": 3}',
        b'{"agreed": {"protocol version": %s}, "key": ""}' % (b"9" * 4040),
        b" " * 4097,
    ],
)
def test_a_damaged_hello_is_refused(data: bytes) -> None:
    one, other = local_channels(("client", Clock()), ("server", Clock()), timeout_s=2)
    other.send(0, 1, data)
    with pytest.raises(ProtocolError) as error:
        introduce("client", {"server": one}, bytes(16), network("patches"), MPC(noise_bits=0))
    assert len(str(error.value)) < 1000


def test_a_hostile_hello_cannot_reach_the_terminal() -> None:
    one, other = local_channels(("client", Clock()), ("server", Clock()), timeout_s=2)
    evil = "\x1b[2J\nerror: all is well"
    hello = {"agreed": {"protocol version": evil, evil: 1}, "key": "00"}
    other.send(0, 1, json.dumps(hello).encode())
    with pytest.raises(ProtocolError, match="protocol version") as error:
        introduce("client", {"server": one}, bytes(16), network("patches"), MPC(noise_bits=0))
    assert "\x1b" not in str(error.value) and "\nerror" not in str(error.value)


def test_a_certificate_that_only_one_of_them_saw_is_refused() -> None:
    """The server's client must be the dealer's client too."""
    one, other = local_channels(("dealer", Clock()), ("server", Clock()), timeout_s=2)
    third, _ = local_channels(("dealer", Clock()), ("client", Clock()), timeout_s=2)
    fourth, _ = local_channels(("server", Clock()), ("client", Clock()), timeout_s=2)
    third.certificate, fourth.certificate = "one client", "another client"
    program = network("patches")
    with ThreadPoolExecutor(2) as pool:
        meetings = [
            pool.submit(introduce, own, {peer: channel, "client": client}, bytes(16), program, MPC())  # type: ignore[arg-type]
            for own, peer, channel, client in (
                ("dealer", "server", one, third),
                ("server", "dealer", other, fourth),
            )
        ]
    for meeting in meetings:
        assert "certificate of client" in str(meeting.exception())


def test_a_step_may_take_longer_than_the_peers_wait_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = holders.OFFLINE["client"][Multiply]

    def slow(party: Party, step: Step, batch: Any) -> None:
        time.sleep(1.0 if step.index < 3 else 0)
        usual(party, step, batch)

    monkeypatch.setitem(holders.OFFLINE["client"], Multiply, slow)
    with MPC(timeout_s=0.4).open(network("residual"), "simulate") as session:
        session.run(images(1).numpy())


@pytest.mark.parametrize("command", ["setup", "offline", "online"])
def test_links_on_which_the_two_ends_counted_differently_end_the_session(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = LocalTeam.call

    def call(team: LocalTeam, now: Any, size: int, x: Any = None) -> Any:
        replies = usual(team, now, size, x)
        if now == command:
            report, result = replies["client"]
            key = next(iter(report.received))
            received = {**report.received, key: report.received[key] + 1}
            replies["client"] = replace(report, received=received), result
        return replies

    monkeypatch.setattr(LocalTeam, "call", call)
    said = rf"counted different bytes[\s\S]*->client, {command} phase"
    config, program = MPC(noise_bits=0), network("patches")
    with pytest.raises(ProtocolError, match=said), config.open(program, "simulate") as session:
        session.run(images(2).numpy())


def test_a_refused_result_leaves_the_session_as_it_was() -> None:
    """With batches under way, too: what the dealer has begun is used before the refusal."""
    program = network("residual")
    low = replace(program, ranges={**program.ranges, program.output: program.ranges[program.output] / 100})
    x = images(4, seed=1).numpy()
    with MPC(material_bytes=1).open(low, "simulate") as session:
        for _ in range(2):
            with pytest.raises(InputError, match="far larger"):
                session.run(x)
        with pytest.raises(InputError, match="far larger"):
            session.run(x[:1])


def test_what_was_calibrated_on_is_not_refused_for_its_rounding() -> None:
    """With the least margin, and no noise that would cover it."""
    x = images(64, seed=3)
    for name in ("residual", "patches"):
        program = ranges(network(name), [x])
        with MPC(margin=1, noise_bits=0).open(program, "simulate") as session:
            y, _ = session.run(x.numpy())
        assert np.abs(y).max() == pytest.approx(program.ranges[program.output], rel=1e-4)
