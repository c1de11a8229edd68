"""Encrypted runs on toy rings: a server process, real keys and ciphertexts, and what is refused."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_packing import calibrated
from torch import Tensor, nn

from ckks_toys import ToyCKKS
from small_networks import images, network
from tightrope.errors import InputError, ProtocolError
from tightrope.nn import PolynomialActivation
from tightrope.program import Program
from tightrope.runtimes.ckks import CKKS, execute, lattigo
from tightrope.runtimes.ckks.compiler import compile_program
from tightrope.runtimes.ckks.cost import estimate
from tightrope.runtimes.ckks.format import METADATA_BYTES, check_ciphertext, check_key
from tightrope.runtimes.ckks.memory import free_bytes
from tightrope.runtimes.ckks.simulated import MARGIN
from tightrope.runtimes.plain import evaluate

pytest.importorskip("lattigo")
pytest.importorskip("orion_evaluator")


@pytest.fixture(scope="module")
def program() -> Program:
    return network("polynomials")


@pytest.fixture(scope="module")
def session(program: Program) -> Iterator[Any]:
    with ToyCKKS().open(program, "execute") as opened:
        yield opened


@pytest.fixture(scope="module")
def client(program: Program) -> Iterator[lattigo.Client]:
    made = lattigo.Client(compile_program(program.public(), ToyCKKS().parameters))
    yield made
    made.close()


def test_an_encrypted_run_is_what_simulation_predicts(program: Program, session: Any) -> None:
    x = images(3)
    y, measured = session.run(x.numpy())
    with ToyCKKS().open(program, "simulate") as simulated:
        _, predicted = simulated.run(x.numpy())
    errors = np.abs(y - evaluate(program, x).numpy())
    drawn = predicted.config["predicted_error"] / MARGIN
    assert drawn / 20 < errors.max() < drawn < 1e-6
    assert np.sqrt((errors**2).mean()) < drawn / 4
    assert measured.total.ckks_levels == predicted.total.ckks_levels == measured.config["levels_planned"]
    assert measured.links == predicted.links
    assert sum(measured.links.values()) == measured.total.online_bytes
    assert measured.setup_links == session.setup_links == predicted.setup_links
    sent = session._link.sent - session.setup_links["client->server"]
    assert sent == measured.links["client->server"]
    assert session._link.received == measured.links["server->client"]
    for ours, theirs in zip(measured.ops, predicted.ops, strict=True):
        assert ours.op == theirs.op and ours.cost.ckks_levels == theirs.cost.ckks_levels


def test_every_step_can_be_inspected(program: Program) -> None:
    x = images(2)
    circuit = compile_program(program, ToyCKKS().parameters)
    with ToyCKKS(inspect=True, threads=1).open(program) as opened:
        y, measured = opened.run(x.numpy())
    found = measured.config["slots"]
    assert list(found) == [step.name for step in circuit.steps]
    for name, slots in found.items():
        assert 0 < slots["error"] < 2 * slots["predicted"], name  # early steps are near their deviations
        assert slots["level"] == circuit.values[name].level
    last = float(np.abs(y - evaluate(program, x).numpy()).max())
    assert 0 < last <= found[circuit.output]["error"] * 1.01  # slots beside the output count too


def test_the_server_knows_no_secret(session: Any) -> None:
    assert not session.program.tensors  # nor the client the weights
    assert "secret" not in vars(session._link)


def test_bad_inputs_are_refused_and_do_no_harm(session: Any) -> None:
    for wrong in (np.zeros((2, 7, 9)), np.full((1, 2, 7, 9), np.nan)):
        with pytest.raises(InputError, match="input"):
            session.run(wrong)
    with pytest.raises(InputError, match="larger than the calibration data"):
        session.run(100 * images(1).numpy())
    session.run(images(1).numpy())


def test_more_memory_than_allowed_is_refused_with_both_values(program: Program) -> None:
    with pytest.raises(InputError, match="needs more memory than allowed") as error:
        ToyCKKS(memory_bytes=10**8).open(program)
    assert "0.1 GB" in str(error.value) and "keys of" in str(error.value)
    assert "--bootstrap" not in str(error.value)  # nothing fits into that


def test_bootstraps_that_fit_are_named_where_memory_is_short() -> None:
    """19 layers and 18 squares: keys of a ring of 37 levels, or bootstraps to two."""
    act = PolynomialActivation([[0.1, 0.5, 0.25]], gated=False)
    layers = [part for _ in range(18) for part in (nn.Conv2d(4, 4, 1), act)]
    program, _ = calibrated(nn.Sequential(*layers, nn.Conv2d(4, 4, 1)), (4, 2, 2))
    deep, few = CKKS(), CKKS(bootstrap="always", refresh_levels=2)
    needs, fits = (
        estimate(compile_program(program, one.parameters), one.threads).memory_bytes for one in (deep, few)
    )
    assert fits < needs
    between = (fits + needs) // 2
    with pytest.raises(InputError, match="needs more memory than allowed") as error:
        CKKS(memory_bytes=between).open(program)
    assert f"--bootstrap always --refresh-levels 2, which takes {fits / 1e9:.3g} GB" in str(error.value)
    with pytest.raises(InputError, match="needs more memory than allowed") as error:
        CKKS(memory_bytes=fits - 1).open(program)
    assert "--bootstrap" not in str(error.value)
    assert (
        f"refused here: {between / 1e9:.3g} GB allowed" in CKKS(memory_bytes=between).estimate(program).about
    )
    assert "refused" not in CKKS(memory_bytes=needs).estimate(program).about


def wide(a: float, b: float) -> tuple[Program, Tensor]:
    """a x^2 + b x between two layers, on inputs up to thousands."""
    act = PolynomialActivation([[0.5, b, a]], gated=False)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), act, nn.Linear(8, 4))
    with torch.no_grad():
        net[1].weight *= 3000
    return calibrated(net, (1, 4, 4))


def test_a_client_refuses_no_quadratic_whose_weights_it_does_not_see() -> None:
    program, x = wide(2e-4, 0.5)
    assert ToyCKKS().prices(program) == ToyCKKS().estimate(program).ops
    with ToyCKKS(threads=1).open(program, "simulate") as simulated:
        _, predicted = simulated.run(x[:1].numpy())
    with ToyCKKS(threads=1).open(program) as opened:
        y, _ = opened.run(x[:1].numpy())
    assert 0 < np.abs(y - evaluate(program, x[:1]).numpy()).max() < predicted.config["predicted_error"]


def test_the_server_refuses_a_quadratic_that_has_hardly_a_square() -> None:
    program, _ = wide(1e-9, 0.5)
    with pytest.raises(InputError, match="hardly a square") as error:
        ToyCKKS().open(program)
    assert "1e-09 x^2" in str(error.value) and "--no-squares" in str(error.value)


class Cut:
    """A client that damages what it sends."""

    def __init__(self, inner: Any, **changes: Any) -> None:
        self._inner, self._changes = inner, changes

    def __getattr__(self, name: str) -> Any:
        return self._changes.get(name, getattr(self._inner, name))


LIES: dict[str, Callable[[Any], Any]] = {
    "unknown step": lambda spent: spent[0][0].update(step="no such"),
    "level": lambda spent: spent[1][-1].update(level=-1000),
    "order": lambda spent: spent[0].reverse(),
    "no steps": lambda spent: spent[1].clear(),
    "one step less": lambda spent: spent[0].pop(),
    "no images": lambda spent: spent.clear(),
    "more images": lambda spent: spent.extend(2 * spent),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_server_that_reports_other_steps_is_refused(
    session: Any, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    def receive(*asked: Any) -> Any:
        about, parts = honest.receive(*asked)
        LIES[lie](about["spent"])
        return about, parts

    honest, closed = session._link, []
    monkeypatch.setattr(session, "_link", Cut(honest, receive=receive))
    monkeypatch.setattr(session, "close", lambda: closed.append(lie))  # the others need it
    with pytest.raises(ProtocolError, match="other steps than planned") as error:
        session.run(images(2).numpy())
    assert "allowed: 2 images of the" in str(error.value) and closed == [lie]


def test_what_a_server_reports_besides_is_ignored(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def receive(*asked: Any) -> Any:
        about, parts = honest.receive(*asked)
        about["spent"][0][0]["more"] = 1
        return about, parts

    honest = session._link
    monkeypatch.setattr(session, "_link", Cut(honest, receive=receive))
    assert session.run(images(1).numpy())[1].batch == 1


@pytest.mark.slow
def test_a_truncated_ciphertext_is_named_and_ends_the_session(program: Program) -> None:
    with ToyCKKS().open(program) as opened:
        real = opened._client
        opened._client = Cut(real, encrypt=lambda slots, level: real.encrypt(slots, level)[:-100])
        with pytest.raises(ProtocolError, match="truncated"):
            opened.run(images(1).numpy())
        with pytest.raises(ProtocolError, match="closed"):
            opened.run(images(1).numpy())
        real.close()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["missing", "truncated"])
def test_a_bad_key_is_named(program: Program, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    honest = lattigo.Client.make_keys

    def keys(self: lattigo.Client) -> Iterator[tuple[int | None, bytes]]:
        first, second, *_ = made = list(honest(self))
        yield first
        if what == "missing":
            yield from made[2:]  # the server is told another key than the next one
        yield second[0], second[1][:-8]

    monkeypatch.setattr(lattigo.Client, "make_keys", keys)
    with pytest.raises(ProtocolError, match=r"for another rotation|truncated") as error:
        ToyCKKS().open(program)
    assert "Galois key of element" in str(error.value)


def test_lengths_inside_ciphertexts_are_checked(client: lattigo.Client) -> None:
    """The library's own reader does not return from some of these."""
    parameters = client._circuit.parameters
    data = client.encrypt(np.zeros(parameters.slots), 3)
    assert check_ciphertext(data, parameters, "here") == 3
    degree = 1 << parameters.log_n
    lengths = [METADATA_BYTES, METADATA_BYTES + 8, METADATA_BYTES + 16, METADATA_BYTES + 24 + 8 * degree]
    for at in lengths:
        for value in (0, 1 << 60):
            damaged = data[:at] + struct.pack("<Q", value) + data[at + 8 :]
            with pytest.raises(ProtocolError, match="length"):
                check_ciphertext(damaged, parameters, "here")
    for damaged in (b"", data[:20], data[:-1], data + b"x", data[8:] + data[:8], bytes(len(data))):
        with pytest.raises(ProtocolError, match="ciphertext"):
            check_ciphertext(damaged, parameters, "here")


def test_lengths_inside_keys_are_checked(client: lattigo.Client) -> None:
    parameters = client._circuit.parameters
    keys = client.make_keys()
    (none, first), (element, second) = next(keys), next(keys)
    assert none is None
    check_key(first, parameters, None, "here")
    check_key(second, parameters, element, "here")
    for data, of in ((first, None), (second, element)):
        with pytest.raises(ProtocolError, match="truncated"):
            check_key(data[:-8], parameters, of, "here")
        at = 8 if of is None else 24
        damaged = data[:at] + struct.pack("<Q", 1 << 50) + data[at + 8 :]
        with pytest.raises(ProtocolError, match="length"):
            check_key(damaged, parameters, of, "here")
    with pytest.raises(ProtocolError, match="another rotation"):
        check_key(second, parameters, 3, "here")


def test_a_truncated_key_file_is_named(client: lattigo.Client, tmp_path: Path) -> None:
    """Before the library opens it, which would never return."""
    circuit, path = client._circuit, tmp_path / "keys"
    lattigo.write_keys(path, client.make_keys(), len(circuit.galois_elements()))
    whole = path.read_bytes()
    for part in (b"", whole[: len(whole) // 2], whole[:-1], whole + b"x"):
        path.write_bytes(part)
        with pytest.raises(ProtocolError, match="key file is truncated") as error:
            lattigo.Server.load(circuit, path)
        assert f"{len(part)} bytes" in str(error.value)


@pytest.mark.slow
def test_a_server_that_dies_is_noticed_at_once(program: Program) -> None:
    with ToyCKKS().open(program) as opened:
        opened._process.kill()
        with pytest.raises(ProtocolError, match="server") as error:
            opened.run(images(1).numpy())
    assert "status -9" in str(error.value)


def test_a_session_outlives_pauses_and_its_server_ends_with_the_client(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = execute._start
    hurried = lambda program, config, *more: start(program, replace(config, timeout_s=2.0), *more)  # noqa: E731
    monkeypatch.setattr(execute, "_start", hurried)
    with ToyCKKS(threads=1).open(program) as opened:
        opened.run(images(1).numpy())
        time.sleep(3.0)
        opened.run(images(1).numpy())
        opened._link.close()
        assert opened._process.wait(20) == 0


def test_free_memory_is_what_the_kernel_and_the_container_leave(tmp_path: Path) -> None:
    everything = free_bytes(tmp_path)  # neither says anything, as on macOS
    assert everything > 2**28
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    assert free_bytes(tmp_path) == 8000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("3000000\n")
    (group / "memory.stat").write_text("anon 2000000\ninactive_file 500000\n")
    (group / "memory.max").write_text("max\n")
    assert free_bytes(tmp_path) == 8000 * 1024
    (group / "memory.max").write_text("5000000\n")
    assert free_bytes(tmp_path) == 2_500_000
