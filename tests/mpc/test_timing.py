"""Predicted milliseconds: critical paths worked out by hand, and what must hold for any profile."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from small_networks import NETWORKS, network
from tightrope.errors import InputError
from tightrope.lower import lower
from tightrope.nn import BlockReLU
from tightrope.program import Program, Relu
from tightrope.runtimes.mpc import MPC, compile_program, costs, rehearsal
from tightrope.runtimes.mpc import calibrate as calibration
from tightrope.runtimes.mpc.network import NETWORKS as LINKS
from tightrope.runtimes.mpc.network import Network
from tightrope.runtimes.mpc.timing import CLIENT, UNITS, Profile, offline_ms, online_ms, shipped
from tightrope.runtimes.mpc.work import OFFLINE, ONLINE
from tightrope.runtimes.plain import ranges
from tightrope.types import Cost

FREE = Profile(**dict.fromkeys(UNITS, 0.0))


def body(profile: Profile, host: dict | None = None) -> dict:
    return {"host": host or {}, "rings": {"64": profile.units}}


def priced(network: str = "loopback", cores: int | None = None, **units: float):
    host = {} if cores is None else {"cores": cores}
    return MPC(network=network).pricing(profile=body(replace(FREE, **units), host))


def chain(patches: list[tuple[int, int]]) -> Program:
    """Convolution 2 -> 3 on 4x4, ReLU, flatten, linear to 5."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, 1, 1), BlockReLU(patches), nn.Flatten(), nn.Linear(48, 5))
    return ranges(lower(model.eval(), (2, 4, 4)), [torch.randn(16, 2, 4, 4)])


MIXED = [(1, 1), (2, 3), (0, 0)]


@pytest.mark.parametrize("name", NETWORKS)
def test_with_nothing_but_delay_the_time_is_that_of_the_rounds(name: str) -> None:
    program = network(name)
    rounds = costs(program, MPC()).total.rounds
    assert priced("1e18,10").exact(program).online_ms == pytest.approx(rounds * 5.0, rel=1e-6)
    assert priced(frame=7e6).exact(program).online_ms == pytest.approx(rounds * 7.0, rel=1e-9)


def test_units_of_work_are_those_on_the_critical_path() -> None:
    """One unit at a time, by hand; conv: 54 weights on 16 places, linear: 48 x 5, tiles 16 + 4, 48 elements.

    Steps: open, multiply, gate, (flatten of shares and masks), open, multiply, reveal.
    """
    program = chain(MIXED)
    steps = compile_program(program, MPC()).steps
    gate = next(step for step in steps if step.op == "1")
    levels = gate.bits - 8 + 1

    def ns(**units: float) -> float:
        return priced(**units).exact(program).online_ms * 1e6

    assert ns(mac=1.0) == 54 * 16 + 240
    assert ns(gathered=1.0) == 2 * 9 * 16
    assert ns(beside=1.0) == 54 * 3 * 2  # two columns of padding between four rows
    assert ns(gate=1.0) == 1
    assert ns(opened=1.0) == 48  # the identity channel is truncated too
    assert ns(selected=1.0) == 32
    assert ns(compared=1.0) == 20
    assert ns(level=1.0) == 20 * levels
    assert ns(step=1.0) >= 5  # client and server in turn: both openings, both layers, the result


def test_a_layer_has_a_price_and_shows_where_the_client_waits_for_it() -> None:
    """Conv: 54 weights on 16 places, at the ReLU after it; linear: 48 x 5, at the linear, which reveals."""
    program, pricing = chain(MIXED), priced(mac=1.0)
    spent = {name: round(cost.online_ms * 1e6) for name, cost in pricing.estimate(program).ops.items()}
    assert spent == {"0": 0, "1": 54 * 16, "2": 0, "3": 240}
    alone = {op.name: round(pricing.price(op).online_ms * 1e6) for op in program.ops}
    assert alone == {"0": 54 * 16, "1": 0, "2": 0, "3": 240}
    prices = {name: round(cost.online_ms * 1e6) for name, cost in pricing.prices(program).items()}
    assert prices == alone


def test_bytes_take_the_bandwidth_of_their_direction() -> None:
    """Both ways are used at once: only the longer of two simultaneous messages counts."""
    program = chain(MIXED)
    links = costs(program, MPC()).links
    slow = priced("8e3,0").exact(program).online_ms  # a byte a millisecond
    waited = 32 + math.ceil(20 / 8)  # the server's bits travel beside the client's
    assert slow == pytest.approx(sum(links.values()) - waited, rel=1e-9)


@pytest.mark.parametrize("name", NETWORKS)
def test_ops_add_up_and_nothing_is_negative(name: str) -> None:
    program = network(name)
    found = MPC(network="wan").pricing().estimate(program, 3)
    assert sum(c.online_ms for c in found.ops.values()) == pytest.approx(found.total.online_ms)
    assert sum(c.offline_ms for c in found.ops.values()) == pytest.approx(found.total.offline_ms)
    assert min(c.online_ms for c in found.ops.values()) >= 0 < found.total.online_ms
    assert min(c.offline_ms for c in found.ops.values()) >= 0 < found.total.offline_ms
    counted = costs(program, MPC(), 3)
    assert replace(found.total, online_ms=0, offline_ms=0) == counted.total
    assert found.links == counted.links and found.ops.keys() == counted.ops.keys()


def test_every_step_has_a_part_around_each_exchange() -> None:
    for name in NETWORKS:
        for config in (MPC(), MPC(reveal="label")):
            for step in compile_program(network(name), config).steps:
                assert len(ONLINE[type(step)](step, 2)) == len(step.online) + 1
                assert len(OFFLINE[type(step)](step, 2)) == 2


def test_slower_links_and_larger_batches_take_longer() -> None:
    program = network("residual")
    for phase in ("online_ms", "offline_ms"):
        times = [getattr(MPC().pricing(n).exact(program), phase) for n in ("loopback", "lan", "wan")]
        assert times == sorted(times) and len(set(times)) == 3
        found = [MPC().pricing("lan").estimate(program, n).total for n in (1, 2, 16)]
        batches = [getattr(total, phase) for total in found]
        assert batches == sorted(batches) and batches[2] < 16 * batches[0]


def test_prices_of_options_are_what_they_change() -> None:
    """What a patch saves by its price is what the whole network saves, widths of comparisons being equal."""
    pricing = MPC().pricing("lan")
    relu = Relu(name="1", inputs=("0",), shape=(3, 4, 4), patches=((1, 1),) * 3)
    plain, mixed = (replace(relu, patches=tuple(p)) for p in ([(1, 1)] * 3, MIXED))
    gain = pricing.price(plain).online_ms - pricing.price(mixed).online_ms
    whole, program = (chain(p) for p in ([(1, 1)] * 3, MIXED))
    program = replace(program, ranges=program.ranges | {"1:tiles": whole.ranges["1:tiles"]})
    exact = pricing.exact(whole).online_ms - pricing.exact(program).online_ms
    assert gain == pytest.approx(exact, rel=0.2)  # the width is guessed, bits fill bytes


def test_a_larger_patch_is_never_slower_and_channels_add_up() -> None:
    pricing = MPC().pricing("wan")
    relu = Relu(name="r", inputs=("x",), shape=(4, 8, 8), patches=((1, 1),) * 4)
    found = []
    for patch in [(1, 1), (1, 2), (2, 2), (4, 4), (8, 8), (0, 0)]:
        found.append(pricing.price(replace(relu, patches=(patch,) * 4)).online_ms)
        one = pricing.price(replace(relu, shape=(1, 8, 8), patches=(patch,))).online_ms
        assert 4 * one == pytest.approx(found[-1])
    assert found == sorted(found, reverse=True) and len(set(found)) == len(found)
    assert found[-1] > 0


def test_networks_are_read() -> None:
    assert Network.parse("wan") is LINKS["wan"] == Network(1e8, 40.0)
    assert Network.parse("2.5e8,12") == Network(2.5e8, 12.0)
    for wrong in (
        "wann",
        "1e9",
        "1e9,0.5,3",
        "0,1",
        "-1,1",
        "1e9,-1",
        "nan,1",
        "inf,1",
        "10,1",
        "1e9,1e9",
        "",
    ):
        with pytest.raises(InputError, match=r"network(.|\n)*loopback"):
            MPC().pricing(wrong)
        with pytest.raises(InputError, match="network"):
            MPC(network=wrong)


def test_profiles_are_read() -> None:
    for ring_bits in (64, 32):
        profile = Profile.read(shipped(), ring_bits, "here")
        assert all(getattr(profile, unit) >= 0 for unit in UNITS) and profile.host["cores"] >= 1
    whole = body(FREE, {"cpu": "none"})
    assert Profile.read(json.loads(json.dumps(whole)), 64, "here") == replace(FREE, host={"cpu": "none"})
    units = FREE.units
    earlier = {unit: 2.0 for unit in UNITS if unit not in ("group", "beside", "bulk")}
    read = Profile.read({"host": {}, "rings": {"64": earlier}}, 64, "a bundle")
    assert (read.group, read.beside, read.bulk) == (0.0, 0.0, 2.0)
    with pytest.raises(InputError, match="missing or unknown: mac"):
        Profile.read({"host": {}, "rings": {"64": {k: 1.0 for k in UNITS if k != "mac"}}}, 64, "here")
    wrong = [
        [], None, {}, {"host": {}}, whole | {"host": "here"}, {"host": {}, "rings": {"32": units}},
        *({"host": {}, "rings": {"64": bad}} for bad in (
            [], {k: v for k, v in units.items() if k != "mac"}, units | {"more": 1.0}, units | {"mac": -1.0},
            units | {"mac": "1"}, units | {"mac": math.nan}, units | {"mac": True},
        )),
    ]  # fmt: skip
    for profile in wrong:
        with pytest.raises(InputError):
            Profile.read(profile, 64, "here")
        with pytest.raises(InputError):
            MPC().pricing(profile=profile if profile is not None else {})


def test_offline_bytes_take_the_bandwidth_of_the_busiest_link() -> None:
    """The dealer's link to the server carries the most, and nothing waits for anything else."""
    program = chain(MIXED)
    links = costs(program, MPC()).offline_links
    slow = priced("8e3,0").exact(program).offline_ms  # a byte a millisecond
    busiest = max(links.values())
    assert links["dealer->server"] == busiest and busiest <= slow <= sum(links.values())
    assert slow == pytest.approx(busiest, rel=0.02)  # what the client sends ahead begins a little later


def test_offline_delay_is_paid_once_for_each_link_in_a_row() -> None:
    program = chain(MIXED)
    assert priced("1e18,10").exact(program).offline_ms == pytest.approx(10.0)  # dealer, client, server


def test_offline_units_of_work_are_those_of_the_dealer() -> None:
    """By hand: keys of 20 comparisons, shares of what the gate opens, steps that the dealer takes part in."""
    program = chain(MIXED)
    gate = next(step for step in compile_program(program, MPC()).steps if step.op == "1")

    def ns(**units: float) -> float:
        return priced(**units).exact(program).offline_ms * 1e6

    assert ns(keyed=1.0) == pytest.approx(20 * (gate.bits - 8 + 2))
    elements = 32 + 20 + 48 + 48 + 32  # choice_trunc, choice, trunc, wrap, choice_wrap
    assert ns(shared=1.0) == pytest.approx(elements)
    layers = 54 * 16 + 240
    assert ns(mac=1.0) == pytest.approx(layers)  # the client's own product begins no later


def test_offline_three_parties_share_the_cores_there_are() -> None:
    """By hand: a step's fixed part at each party that has one, on one core one after the other."""
    program = chain(MIXED)
    parts = [
        len([role for part in OFFLINE[type(step)](step, 1) for role, work in part.items() if "deal" in work])
        for step in compile_program(program, MPC()).steps
    ]
    alone = priced(cores=1, deal=1e6).exact(program).offline_ms
    assert alone == pytest.approx(sum(parts))
    by_ops = priced(cores=1, deal=1e6).estimate(program).ops
    assert sum(cost.offline_ms for cost in by_ops.values()) == pytest.approx(sum(parts))
    assert priced(cores=64, deal=1e6).exact(program).offline_ms < alone


def test_over_a_network_the_end_of_a_message_is_handled_when_it_is_there() -> None:
    """Input there, result back, shorter than a piece: the bytes take the link, and then the parties."""
    layer = ranges(lower(nn.Sequential(nn.Linear(32, 5)).eval(), (32,)), [torch.randn(16, 32)])
    link = priced("1e6,0").exact(layer).online_ms
    assert priced("1e6,0", byte=1e3).exact(layer).online_ms == pytest.approx(link * (1 + 1 / 8))
    program = chain(MIXED)
    rounds = costs(program, MPC()).total.rounds
    assert priced("1e18,0", late=1e6).exact(program).online_ms == pytest.approx(rounds)
    assert priced(late=1e6).exact(program).online_ms == 0.0  # loopback waits for no timer


def made_up(truth: Profile, alone: Profile, schedule) -> dict[tuple[str, int], dict[str, Cost]]:
    """The times of a machine that takes exactly what a profile predicts; offline the dealer's own, who is
    not disturbed."""
    times = {}
    for link, batch in calibration.CASES:
        size = calibration.partial(calibration.frame_bytes, batch=batch)
        online = calibration.groups(
            online_ms(schedule.steps, batch, size, truth, Network.parse(link), CLIENT)
        )
        dealer = dict.fromkeys(online, 0.0)
        for step in schedule.steps:
            for part in OFFLINE[type(step)](step, batch):
                dealer[step.op[0]] += alone.ns(part.get("dealer", {})) / 1e6
        times[link, batch] = {g: Cost(online_ms=online[g], offline_ms=dealer[g]) for g in online}
    return times


def test_a_fit_finds_the_profile_that_made_the_times() -> None:
    truth = replace(
        Profile.read(shipped(), 64, "here"), frame=90e3, late=40e3, byte=1.7, bulk=1.1,
        step=25e3, group=400.0, beside=0.04, gate=210e3, deal=60e3, shared=3.0, keyed=20.0,
    )  # fmt: skip
    schedule = compile_program(rehearsal.session_program(), MPC())
    loops = {unit: getattr(truth, unit) / 1.4 for unit in calibration.LOOPS}
    alone = replace(truth, **loops)
    times = made_up(truth, alone, schedule)
    guess = replace(alone, **calibration.GUESS, **dict.fromkeys(calibration.DEALT, 0.0))
    found = calibration.fitted(calibration.dealt(guess, schedule, times), schedule, times)
    whole = {}
    for batch in (1, 4, 16):
        size = calibration.partial(calibration.frame_bytes, batch=batch)
        whole[batch] = sum(offline_ms(schedule.steps, batch, size, truth, Network()).values())
    found = calibration.ahead(found, schedule, whole)
    for unit in (*calibration.SESSION, *loops, *calibration.DEALT, "bulk"):
        assert getattr(found, unit) == pytest.approx(getattr(truth, unit), rel=0.02), unit


@pytest.mark.slow
def test_calibration_measures_every_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "REPEATS", 3)
    monkeypatch.setattr(calibration, "RUNS", 6)
    monkeypatch.setattr(calibration, "CACHES_BYTES", 1 << 20)
    seen: list[int] = []
    whole = MPC().calibrate(lambda what, done, of: seen.append(done))
    assert seen == sorted(seen) and whole["host"]["cores"] >= 1
    for ring_bits in (64, 32):
        profile = Profile.read(json.loads(json.dumps(whole)), ring_bits, "here")
        assert all(np.isfinite(getattr(profile, unit)) for unit in UNITS)
        found = profile.frame, profile.mac, profile.element, profile.opened, profile.level, profile.bulk
        assert min(found) > 0
