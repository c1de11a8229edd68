"""Bootstraps: where they are placed, which keys they ask for, and what they do on toy rings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_packing import QUADRATIC, Block, calibrated
from torch import Tensor, nn

from ckks_toys import ToyCKKS
from networks import settle
from small_networks import network
from tightrope.errors import InputError, ProtocolError
from tightrope.nn import PolynomialActivation
from tightrope.program import Program
from tightrope.runtimes.ckks import CKKS, keymaker, lattigo
from tightrope.runtimes.ckks.circuit import Composite, Refresh, Square
from tightrope.runtimes.ckks.compiler import compile_program
from tightrope.runtimes.ckks.cost import estimate
from tightrope.runtimes.ckks.format import boot_key_size, check_boot_keys
from tightrope.runtimes.ckks.parameters import MAX_LOG_QP, choose_bootstrapping
from tightrope.runtimes.plain import evaluate

LEVELS = 6


def toy(ring: int = 11, levels: int = LEVELS) -> ToyCKKS:
    return ToyCKKS(ring=ring, bootstrap="always", refresh_levels=levels)


def residual(blocks: int = 3) -> nn.Module:
    return settle(nn.Sequential(nn.Conv2d(1, 4, 3, 1, 1), *(Block(False) for _ in range(blocks))))


@given(st.integers(1, 20), st.integers(30, 50))
def test_bootstrapping_stays_within_the_security_table(levels: int, scale_bits: int) -> None:
    chosen = choose_bootstrapping(levels, scale_bits)
    if chosen is None:
        assert scale_bits + 10 + levels * scale_bits + 821 + 61 >= MAX_LOG_QP[16]
        return
    ring = chosen.during_bootstrap()
    assert chosen.levels == levels and len(ring.q_bits) == 1 + levels + 3 + 8 + 4
    assert chosen.log_qp == ring.log_qp == sum(ring.q_bits) + sum(ring.p_bits) < MAX_LOG_QP[16]
    digit = max(sum(ring.q_bits[k : k + len(ring.p_bits)]) for k in range(len(ring.q_bits)))
    assert sum(ring.p_bits) > digit


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 4), st.integers(4, 9))
def test_simulated_bootstraps_change_nothing_but_noise(blocks: int, levels: int) -> None:
    program, x = calibrated(residual(blocks), (1, 8, 8))
    with toy(levels=levels).open(program, "simulate") as session:
        y, measured = session.run(x.numpy())
    want = evaluate(program, x).numpy()
    assert np.abs(y - want).max() < 1e-11 * max(1, np.abs(want).max())
    depth = 1 + 4 * blocks + 1  # the last quadratic is no square, since no sum follows
    assert measured.total.ckks_levels == measured.config["levels_planned"] == depth
    counted = measured.config["bootstraps"]
    assert counted == measured.config["bootstraps_planned"] >= (depth - levels) / (levels - 1)


def test_values_are_refreshed_where_it_takes_fewest() -> None:
    """Two levels after a bootstrap of 3 to spend before the next: one after every activation but the last."""
    layers = [part for _ in range(4) for part in (nn.Conv2d(1, 1, 3, 1, 1), quadratic())]
    program, _ = calibrated(nn.Sequential(*layers), (1, 6, 6))
    circuit = compile_program(program, toy(levels=4).parameters, squares=False)
    refreshed = [step.sources[0] for step in circuit.steps if isinstance(step, Refresh)]
    assert refreshed == [program.ops[k].name for k in (1, 3, 5)]
    assert circuit.bootstraps == 3
    public = compile_program(program.public(), toy(levels=4).parameters, squares=False)
    assert public.digest() == circuit.digest()


def quadratic() -> nn.Module:
    return PolynomialActivation(QUADRATIC, gated=False)


def test_a_step_too_deep_for_any_bootstrap_is_refused() -> None:
    deep = PolynomialActivation([[0.0, 0.5] + [1e-6] * 6] * 7, gated=True)
    program, _ = calibrated(nn.Sequential(deep), (1, 4, 4))
    with pytest.raises(InputError, match="cannot be bootstrapped often enough") as error:
        CKKS(bootstrap="always").open(program, "simulate")
    assert "20 levels after a bootstrap, a step that takes 22" in str(error.value)


def test_steps_of_16_levels_are_bootstrapped_between() -> None:
    """Each with a layer before it and a level left: 18 after the one bootstrap between them."""
    deep = PolynomialActivation([[0.0, 0.5] + [1e-6] * 6] * 5, gated=True)
    layers = [part for _ in range(2) for part in (nn.Conv2d(1, 1, 1), deep)]
    program, _ = calibrated(nn.Sequential(*layers, nn.Conv2d(1, 1, 1)), (1, 4, 4))
    circuit = compile_program(program, CKKS(bootstrap="always").parameters)
    assert circuit.levels == 35 and circuit.parameters.levels == 18
    assert [step.sources for step in circuit.steps if isinstance(step, Refresh)] == [(program.ops[1].name,)]


def test_levels_after_a_bootstrap_are_refused_where_none_is_needed() -> None:
    """With the options that lead to bootstraps, if there are any."""
    shallow, _ = calibrated(nn.Conv2d(1, 1, 1), (1, 4, 4))
    for how in ("auto", "always"):
        with pytest.raises(InputError, match="where none is needed") as error:
            CKKS(refresh_levels=5, bootstrap=how).estimate(shallow)
        assert "1 levels, N = 2^14" in str(error.value)
        assert "no --refresh-levels" in str(error.value) and "--bootstrap" not in str(error.value)
    deep, _ = narrow(4)
    with pytest.raises(InputError, match="where none is needed") as error:
        CKKS(refresh_levels=5).estimate(deep)
    assert "--bootstrap always" in str(error.value) and "7 levels, N = 2^14" in str(error.value)
    assert "1 bootstraps" in CKKS(refresh_levels=5, bootstrap="always").estimate(deep).about
    for program in (shallow, deep):
        assert "no bootstraps" in CKKS().estimate(program).about


@pytest.mark.parametrize("layers", [0, 1, 3, 9])
def test_bootstrap_always_does_so_from_three_levels_on(layers: int) -> None:
    """Two is the fewest to bootstrap to; what needs no more takes the parameters of one without."""
    parts = [part for _ in range(layers) for part in (quadratic(), nn.Linear(4, 4))]
    program, _ = calibrated(nn.Sequential(nn.Flatten(), nn.Linear(4, 4), *parts), (1, 2, 2))
    circuit = compile_program(program.public(), CKKS(bootstrap="always").parameters)
    assert circuit.levels == 1 + 2 * layers
    if layers:
        assert circuit.bootstraps > 0 and circuit.parameters.levels < circuit.levels
    else:
        assert circuit.parameters == compile_program(program.public(), CKKS().parameters).parameters


def test_bad_choices_are_refused() -> None:
    with pytest.raises(InputError, match="auto"):
        CKKS(bootstrap="sometimes")
    with pytest.raises(InputError, match="refresh_levels is out of range"):
        CKKS(refresh_levels=40)
    program, _ = calibrated(nn.Conv2d(1, 1, 1), (1, 4, 4))
    with pytest.raises(InputError, match="no room for bootstrapping"):
        CKKS(bootstrap="always", log_n=15).open(program, "simulate")


@pytest.fixture(scope="module")
def program() -> Program:
    return network("polynomials")


@pytest.mark.parametrize("log_slots", [10, 9, 6, 5])
def test_the_library_makes_the_keys_that_were_predicted(
    program: Program, log_slots: int, tmp_path: Path
) -> None:
    """For all slots and for few of them; its own key set is the oracle of every length and rotation."""
    pytest.importorskip("lattigo")
    circuit = compile_program(program, toy().parameters)
    steps = tuple(replace(s, slots=1 << log_slots) if isinstance(s, Refresh) else s for s in circuit.steps)
    circuit = replace(circuit, steps=steps)
    client, path = lattigo.Client(circuit), tmp_path / "boot"
    with path.open("wb") as out:
        lattigo.boot_keys(circuit.parameters, circuit.boot_slots, client.secret(), out)
    client.close()
    data = path.read_bytes()
    assert len(data) == boot_key_size(circuit)
    check_boot_keys(data, circuit, "here")
    for damaged in (data[:-1], data[: len(data) // 2], data[8:] + data[:8], bytes(len(data))):
        with pytest.raises(ProtocolError, match=r"truncated|asked for|length"):
            check_boot_keys(damaged, circuit, "here")


def test_an_encrypted_run_is_what_simulation_predicts() -> None:
    """A wide residual block: its second value is refreshed with half of the slots."""
    pytest.importorskip("lattigo")
    pytest.importorskip("orion_evaluator")
    program, x = calibrated(settle(nn.Sequential(Block(True), nn.Conv2d(8, 4, 1))), (4, 8, 8))
    x = x[:1]
    with toy(levels=4).open(program, "simulate") as simulated:
        _, predicted = simulated.run(x.numpy())
    with toy(levels=4).open(program) as session:
        y, measured = session.run(x.numpy())
        sent = session.setup_links
    error = float(np.abs(y - evaluate(program, x).numpy()).max())
    assert 0 < error < predicted.config["predicted_error"] < 1e-3
    assert measured.config["bootstraps"] == predicted.config["bootstraps_planned"] > 0
    assert measured.config["levels"] == 4  # after every bootstrap
    assert measured.total.ckks_levels == predicted.total.ckks_levels == measured.config["levels_planned"]
    assert sent == predicted.setup_links


@pytest.mark.parametrize("gated", [False, True])
def test_values_of_a_scale_that_is_off_are_refreshed(gated: bool) -> None:
    """Squares and gates leave s^2 / q; at 30 bits that is too far from s for the library's bootstrap."""
    pytest.importorskip("lattigo")
    pytest.importorskip("orion_evaluator")
    act = PolynomialActivation.relu([[0, 1.5, 0, -0.5]], scale=3.0) if gated else quadratic()
    layers = [part for _ in range(3) for part in (nn.Linear(64, 64), act)]
    torch.manual_seed(0)
    program, x = calibrated(nn.Sequential(nn.Flatten(), *layers, nn.Linear(64, 4)), (1, 8, 8))
    runtime = ToyCKKS(bootstrap="always", refresh_levels=5, scale_bits=30, threads=1)
    with runtime.open(program, "simulate") as simulated:
        _, predicted = simulated.run(x[:1].numpy())
    with runtime.open(program) as session:
        y, measured = session.run(x[:1].numpy())
    refreshed = [step.sources[0] for step in session.circuit.steps if isinstance(step, Refresh)]
    assert {type(step) for step in session.circuit.steps if step.name in refreshed} == {
        Composite if gated else Square
    }
    assert measured.config["bootstraps"] == len(refreshed) > 0
    assert 0 < np.abs(y - evaluate(program, x[:1]).numpy()).max() < predicted.config["predicted_error"] < 1e-4


def narrow(elements: int) -> tuple[Program, Tensor]:
    """Values of so many elements, more than a bootstrap to five levels can carry to the end."""
    layers = [part for _ in range(3) for part in (nn.Linear(elements, elements), quadratic())]
    torch.manual_seed(0)
    return calibrated(nn.Sequential(nn.Flatten(), *layers, nn.Linear(elements, 2)), (1, 1, elements))


@pytest.mark.parametrize("log_slots", [1, 2, 3, 4, 5])
def test_small_values_are_refreshed_with_slots_of_which_the_keys_are_known(log_slots: int) -> None:
    circuit = compile_program(narrow(1 << log_slots)[0], toy(levels=5).parameters)
    assert circuit.bootstraps == 1 and circuit.boot_slots == 32


def test_a_value_of_few_elements_is_bootstrapped() -> None:
    pytest.importorskip("lattigo")
    pytest.importorskip("orion_evaluator")
    program, x = narrow(4)
    runtime = toy(levels=5)
    with runtime.open(program, "simulate") as simulated:
        _, predicted = simulated.run(x[:1].numpy())
    with runtime.open(program) as session:
        y, measured = session.run(x[:1].numpy())
    assert measured.config["bootstraps"] == 1
    assert np.abs(y - evaluate(program, x[:1]).numpy()).max() < predicted.config["predicted_error"] < 1e-3


@pytest.mark.parametrize("off", [-1000, 1 << 20])
def test_keys_of_another_size_end_the_key_maker(off: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that makes more than is read would wait for its reader for ever."""
    pytest.importorskip("lattigo")
    circuit = compile_program(narrow(4)[0], toy(levels=5).parameters)
    size = boot_key_size(circuit)
    monkeypatch.setattr(keymaker, "boot_key_size", lambda _: size - off)
    client = lattigo.Client(circuit)
    with pytest.raises(ProtocolError, match="could not be made") as error:
        list(keymaker.made(circuit, client.secret()))
    client.close()
    assert (
        f"more than {size - off} bytes" in str(error.value) if off > 0 else f"{size} of" in str(error.value)
    )


def test_the_memory_of_a_bootstrapped_session_counts_bootstraps_that_are_at_work() -> None:
    """What hoisting holds has the primes of bootstrapping; one image in work more takes so much more."""
    circuit = compile_program(narrow(64)[0], CKKS(bootstrap="always").parameters).bare()
    ring = circuit.parameters.during_bootstrap()
    hoisted = 2 * (len(ring.q_bits) + len(ring.p_bits)) * (8 << ring.log_n)
    one, two = (estimate(circuit, threads).server_bytes for threads in (1, 2))
    assert (
        two - one > 1.4 * 40 * hoisted > 40 * circuit.parameters.ciphertext_bytes(circuit.parameters.levels)
    )


def test_the_librarys_heap_is_held_below_what_is_estimated_of_the_server() -> None:
    """It grows into whatever it is left: with the estimate as its limit, it took more than the estimate."""
    program = narrow(64)[0]
    boots, none = (
        estimate(compile_program(program, CKKS(bootstrap=choice).parameters).bare(), 1)
        for choice in ("always", "never")
    )
    for found in (boots, none):
        assert found.key_bytes + found.boot_key_bytes < found.limit_bytes < found.server_bytes
        assert found.limit_bytes >= 2 * found.key_bytes  # while it reads them
    assert boots.server_bytes - boots.limit_bytes > 0.1 * boots.server_bytes
