"""The deployment section of docs/runtimes/mpc.md, followed to the letter: three directories play machines,
with real processes and real signals."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tightrope import cli, deploy
from tightrope.bundle import Bundle
from tightrope.data import ASSETS, load, read_image
from tightrope.runtimes.plain import evaluate

PAGE = Path(__file__).parents[1] / "docs" / "runtimes" / "mpc.md"
SECTION = PAGE.read_text().split("\n## Deployment\n")[1].split("\n## ")[0]
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", SECTION, re.S) for line in block.splitlines()]
CONFIGS = {
    found.group(1): block
    for block in re.findall(r"```toml\n(.*?)```", SECTION, re.S)
    if (found := re.match(r'role = "(\w+)"', block))
}
OPTIONS = re.search(r"```toml\n(\[mpc\].*?)```", SECTION, re.S)
IMAGE = sorted(ASSETS.glob("sample_*.png"))[0]
SOON_S = 30.0
Expect = Callable[..., str]


@pytest.fixture
def expect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Expect:
    """Run a command line in a directory; what it wrote, if it ended with that status."""

    def run(status: int, where: Path, line: str) -> str:
        monkeypatch.chdir(where)
        monkeypatch.setattr("sys.argv", shlex.split(line))
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        assert int(stop.value.code or 0) == status, captured
        assert "Traceback" not in captured.err
        return captured.out if status == 0 else captured.err + captured.out

    return run


@pytest.fixture
def home(tmp_path: Path, searched: Path, expect: Expect) -> Path:
    """Below it the machines server, dealer and client, with what steps 1 and 2 of the page put there."""
    (tmp_path / "runs").mkdir()
    shutil.copytree(searched, tmp_path / "runs" / "mine")
    for line in COMMANDS[:2]:
        expect(0, tmp_path, line)
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    for role, text in CONFIGS.items():
        machine = tmp_path / role
        machine.mkdir()
        (tmp_path / "certs" / role).rename(machine / "certs")
        shutil.copy(IMAGE, machine / "photo.png")
        (machine / "paths.txt").write_text("photo.png\nnone.png\nphoto.png\n")
        shutil.copytree(tmp_path / "public", machine / "public")
        for old, new in (
            ("server.example.org", "localhost"), ("dealer.example.org", "localhost"),
            ("7701", str(ports[0])), ("7702", str(ports[1])), ("0.0.0.0", "127.0.0.1"),
        ):  # fmt: skip
            text = text.replace(old, new)
        (machine / "party.toml").write_text(text + "[limits]\nconnect_s = 200\n")  # this machine may be busy
    shutil.rmtree(tmp_path / "server" / "public")
    (tmp_path / "runs" / "mine").rename(tmp_path / "server" / "bundle")
    return tmp_path


@contextmanager
def serving(machine: Path) -> Iterator[subprocess.Popen[str]]:
    log = (machine / "log").open("a")
    command = [sys.executable, "-m", "tightrope.cli", *shlex.split(COMMANDS[2])[1:]]
    process = subprocess.Popen(command, cwd=machine, stderr=log, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        log.close()


def events(machine: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (machine / "log").read_text().splitlines()]


def numbers(machine: Path) -> list[int]:
    """The numbers of the batches that are left."""
    return sorted(int(f.name) for f in (machine / "stock").rglob("0*") if f.name.isdigit() and f.is_file())


def test_the_page_shows_these_commands_and_three_configurations() -> None:
    assert COMMANDS == [
        "tightrope certs --out certs",
        "tightrope export-public runs/mine --out public",
        "tightrope serve --config party.toml",
        "tightrope health --config party.toml",
        "tightrope infer photo.png --config party.toml",
        "tightrope prefetch --config party.toml --batches 16",
        "tightrope infer photo.png --config party.toml",
        "tightrope serve --config party.toml < paths.txt",
    ]
    assert set(CONFIGS) == {"server", "dealer", "client"}


def test_the_options_on_the_page_are_the_defaults(tmp_path: Path) -> None:
    from tightrope.runtimes.mpc.settings import read_settings

    assert OPTIONS is not None
    for name, text in (("plain", CONFIGS["client"]), ("full", CONFIGS["client"] + OPTIONS.group(1))):
        (tmp_path / f"{name}.toml").write_text(text)
    assert read_settings(tmp_path / "plain.toml") == read_settings(tmp_path / "full.toml")


def test_a_service_that_fails_does_not_look_as_if_it_had_been_stopped() -> None:
    class Broken:
        def run(self) -> None:
            raise OSError("no more files")

        def stop(self) -> None:
            raise AssertionError

    with pytest.raises(OSError, match="no more files"):
        deploy._until({signal.SIGUSR1}, Broken())


SLEEPER = """
import signal, threading
from tightrope import deploy
class Sleeper:
    def __init__(self): self.told = threading.Event()
    def run(self):
        print("up", flush=True)
        self.told.wait(60)
    def stop(self): self.told.set()
signals = {signal.SIGTERM}
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
deploy._until(signals, Sleeper())
"""


def test_a_machine_that_sleeps_and_wakes_up_goes_on_serving() -> None:
    process = subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    for _ in range(3):
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.4)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.3)
    assert process.poll() is None
    process.terminate()
    assert process.wait(SOON_S) == 0
    process.stdout.close()


@pytest.mark.slow
def test_three_machines_from_certificates_to_a_prediction_and_a_crash(home: Path, expect: Expect) -> None:
    data, bundle = load("embedded"), Bundle.open(home / "server" / "bundle")
    logits = evaluate(bundle.program(), read_image(IMAGE, data).to(torch.float64))
    want = data.classes[int(logits.argmax())]
    server, dealer, client = (home / role for role in ("server", "dealer", "client"))
    health, infer, prefetch = COMMANDS[3], COMMANDS[4], COMMANDS[5]
    assert "unreachable" in expect(2, client, health)  # at once, whatever connect_s is
    with serving(dealer) as dealing, serving(server) as service:
        out = expect(0, client, infer)  # waits until both are up
        assert f"photo.png: {want}" in out and "online phase" in out and "offline phase" in out
        said = json.loads(expect(0, client, f"{health} --json"))
        assert {peer: facts["status"] for peer, facts in said.items()} == {
            "server": "ready",
            "dealer": "ready",
        }
        expect(0, client, prefetch)
        assert numbers(client) == numbers(server) == list(range(1, 17))
        dealing.send_signal(signal.SIGTERM)
        assert dealing.wait(SOON_S) == 0
        assert f"photo.png: {want}" in expect(0, client, COMMANDS[6])
        body = json.loads(expect(0, client, "tightrope infer photo.png photo.png -c party.toml --json"))
        assert body["predictions"] == [want, want] and body["mode"] == "stock"
        with (client / "paths.txt").open() as paths:
            said = subprocess.run(
                [sys.executable, "-m", "tightrope.cli", *shlex.split(COMMANDS[7])[1:4]],
                cwd=client, stdin=paths, capture_output=True, text=True, timeout=60,
            )  # fmt: skip
        answers = [json.loads(line) for line in said.stdout.splitlines()]
        assert [a.get("prediction") for a in answers] == [want, None, want], said
        assert "no such image" in answers[1]["error"] and said.returncode == 0
        assert numbers(client) == numbers(server) == list(range(6, 17))
        # the server dies at a random point of an inference
        running = subprocess.Popen(
            [sys.executable, "-m", "tightrope.cli", *shlex.split(infer)[1:]], cwd=client,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while numbers(server)[0] == 6 and running.poll() is None:
            time.sleep(0.001)
        os.kill(service.pid, signal.SIGKILL)
        _, error = running.communicate(timeout=SOON_S)
        assert "Traceback" not in error
        assert numbers(server) == numbers(client) == list(range(7, 17))
    with serving(server) as service:
        assert "ahead of time" in expect(0, client, infer)
        assert numbers(client) == numbers(server) == list(range(8, 17))
        config = client / "party.toml"
        config.write_text(config.read_text().replace("connect_s = 200", "connect_s = 0.5"))
        many = " ".join(["photo.png"] * 10)
        assert "cannot reach dealer" in expect(2, client, f"tightrope infer {many} -c party.toml")
        service.send_signal(signal.SIGINT)
        assert service.wait(SOON_S) == 0
    for machine in (dealer, server):
        names = [e["event"] for e in events(machine)]
        assert "stopping" in names and names[-1] == "stopped"
    assert not [e for machine in (server, dealer) for e in events(machine) if e["event"] == "bug"]


@pytest.mark.slow
def test_bad_input_ends_with_status_2_and_a_word(home: Path, expect: Expect) -> None:
    client, server = home / "client", home / "server"
    assert "not empty" in expect(2, home, "tightrope certs --out server")
    assert "not empty" in expect(2, home, "tightrope export-public server/bundle --out public")
    assert "days is out of range" in expect(2, home, "tightrope certs --out c --days 0")
    assert "no such configuration" in expect(2, home, "tightrope serve -c none.toml")
    assert "two roles" in expect(2, client, "tightrope serve -c party.toml --role server")
    assert "at least one image" in expect(2, client, "tightrope prefetch -c party.toml --batches 0")
    assert "no such image" in expect(2, client, "tightrope infer none.png -c party.toml")
    assert "not a bundle" in expect(2, home, "tightrope export-public dealer --out x")
    (server / "certs" / "server.key").chmod(0o644)
    assert "others may read" in expect(2, server, COMMANDS[2])
    path = client / "public" / "input.json"
    body = json.loads(path.read_text())
    for damaged, says in (
        (body | {"classes": body["classes"][:9]}, "does not fit the network"),
        (body | {"mean": [0.1, 0.2, 0.3]}, "does not fit the network"),
        (body | {"std": "0.5"}, "std is"),
        ([], "not an object"),
    ):
        path.write_text(json.dumps(damaged))
        assert says in expect(2, client, COMMANDS[4])
    path.unlink()
    assert "export-public" in expect(2, client, COMMANDS[4])


def test_what_is_exported_holds_no_weights(home: Path) -> None:
    for role in ("client", "dealer"):
        assert {f.name for f in (home / role / "public").iterdir()} == {"program.json", "input.json"}
        assert {f.name for f in (home / role / "certs").iterdir()} == {
            "authority.pem", f"{role}.pem", f"{role}.key",
        }  # fmt: skip
