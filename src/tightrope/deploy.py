"""Verbs for parties on machines of their own: certs, export-public, serve, health, prefetch, infer."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from tightrope.errors import InputError, TightropeError
from tightrope.view import View, measurement

if TYPE_CHECKING:
    from tightrope.runtimes.mpc.keys import Role
    from tightrope.runtimes.mpc.settings import Settings

Json = dict[str, Any]
ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="party.toml, see docs/runtimes/mpc.md.")]
RoleName = Annotated[str | None, typer.Option("--role", help="client, server or dealer, if not in the file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


LOOK_S = 0.2  # so often a service looks for a signal
Resize = Annotated[
    bool, typer.Option("--resize", help="Scale images of another size, and cut out the centre.")
]


def register(verb: Callable[[Callable[..., Json | None]], object]) -> None:
    """Make commands of the verbs; `verb` is the command line's decorator."""
    for function in (certs, export_public, serve, health, prefetch, infer):
        verb(function)


def certs(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="A new directory; one directory per role below it.")
    ],
    days: Annotated[float, typer.Option(help="How long they are valid.")] = 30.0,
    as_json: AsJson = False,
) -> Json:
    """Make a test authority and a certificate per role. Give each machine the directory of its role only."""
    from tightrope.runtimes.mpc.keys import make_credentials, write_credentials

    if not 0 < days <= 3650:
        raise InputError("days is out of range", got=days, allowed="above 0, to 3650")
    credentials = make_credentials(days=days)
    write_credentials(out, credentials)
    written: Json = {role: str(out / role) for role in credentials}
    View(as_json).say("\n".join(written.values()))
    return written


def export_public(
    bundle: Annotated[Path, typer.Argument(help="Directory of the bundle.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write.")],
    as_json: AsJson = False,
) -> Json:
    """Write what client and dealer may know of a bundle: the network's structure, how images are read."""
    from tightrope.bundle import Bundle
    from tightrope.desk import write_input

    opened = Bundle.open(bundle)
    program, data = opened.program(weights=False), opened.data()
    if out.exists() and any(out.iterdir()):
        raise InputError("the directory is not empty", where=str(out), fix="a new one")
    program.save(out)
    write_input(out, data)
    View(as_json).say(f"{out}: program {program.sha256()}")
    return {"out": str(out), "program": program.sha256()}


class Runs(Protocol):
    """What `serve` serves."""

    def run(self) -> None:
        """Serve until told to stop."""

    def stop(self) -> None:
        """End `run` in good order, from another thread."""


def serve(config: ConfigFile, role: RoleName = None) -> None:
    """Run a party until SIGTERM or SIGINT; one JSON object per line on stderr.

    The client takes paths of images, one a line, on standard input, and answers each with a JSON object.
    """
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # for all threads, also the libraries'; awaited below
    try:
        from tightrope.runtimes.mpc.settings import read_settings
        from tightrope.runtimes.mpc.worker import tune_process

        tune_process()
        settings = read_settings(config, role)
        with _desk(settings) if settings.role == "client" else _service(settings) as served:
            _until(signals, served)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)


@contextmanager
def _service(settings: Settings) -> Iterator[Runs]:
    from tightrope.runtimes.mpc.duties import House
    from tightrope.runtimes.mpc.service import Log, Service

    house = House.load(settings)
    try:
        yield Service(house, Log(settings.role))
    finally:
        house.close()


@contextmanager
def _desk(settings: Settings) -> Iterator[Runs]:
    from tightrope.desk import Desk, read_input
    from tightrope.runtimes.mpc.remote import Client
    from tightrope.runtimes.mpc.service import Log

    client = Client.load(settings)
    try:
        yield Desk(client, *read_input(settings.program, client.program), Log(settings.role))
    finally:
        client.close()


def _until(signals: set[signal.Signals], served: Runs) -> None:
    """Serve until a signal comes, then end in good order; a second signal cuts that short. What `run` raises
    is raised here, so that a supervisor sees another exit status than 0."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            served.run()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="tightrope-serve", daemon=True)
    thread.start()
    stopping = False
    while thread.is_alive():
        thread.join(LOOK_S)
        # Not sigtimedwait, which returns without a signal when a stopped process goes on (Python 3.11).
        if signal.sigpending() & signals:
            signal.sigwait(signals)
            if stopping:
                os._exit(1)
            stopping = True
            served.stop()
    if failed:
        raise failed[0]


def health(config: ConfigFile, role: RoleName = None, as_json: AsJson = False) -> Json:
    """Ask the services that this configuration is about; exit status 2 unless all are ready and agree.

    A client asks server and dealer, a server itself and the dealer, a dealer itself.
    """
    from tightrope.program import Program
    from tightrope.runtimes.mpc.keys import read_credentials
    from tightrope.runtimes.mpc.party import terms
    from tightrope.runtimes.mpc.remote import ask_health
    from tightrope.runtimes.mpc.settings import read_settings

    settings = read_settings(config, role)
    read_credentials(settings.certificates, settings.role)  # what is wrong with these is not the peers' fault
    own = terms(Program.load(settings.program, weights=False), settings.mpc)
    peers: tuple[Role, ...] = ("dealer",) if settings.role == "dealer" else ("server", "dealer")
    found: Json = {peer: _asked(ask_health, settings, peer, own) for peer in peers}
    view = View(as_json)
    for name, said in found.items():
        view.say(f"{name}: {said['status']}" + "".join(f"\n  {line}" for line in said["why"]))
    if any(said["status"] != "ready" for said in found.values()):
        if as_json:
            print(json.dumps(found))
        raise typer.Exit(2)
    return found


def _asked(ask: Callable[[Settings, Role], Json], settings: Settings, peer: Role, own: Json) -> Json:
    """What a service answers, with a `status` and a `why` that are ours to print."""
    try:
        said = ask(settings, peer)
    except TightropeError as error:
        return {"status": "unreachable", "why": str(error).splitlines()}
    theirs = said.get("terms")
    theirs = theirs if isinstance(theirs, dict) else {}
    why = [
        f"{k}: {json.dumps(theirs.get(k))} there, {json.dumps(v)} here"
        for k, v in own.items()
        if theirs.get(k) != v
    ]
    ready = "ready" if said.get("status") == "ready" else "stopping"
    return said | {"status": "disagrees" if why else ready, "why": why}


def prefetch(
    config: ConfigFile,
    batches: Annotated[int, typer.Option(help="How many batches, each for one use.")] = 16,
    batch: Annotated[int, typer.Option(help="Images per batch.")] = 1,
    as_json: AsJson = False,
) -> Json:
    """At the client: have the dealer give material to client and server, who can then do without it."""
    from tightrope.runtimes.mpc.remote import Client
    from tightrope.runtimes.mpc.settings import read_settings

    if batches < 1 or batch < 1:
        raise InputError("a lot has at least one image", got=f"{batches} batches of {batch}")
    client = Client.load(read_settings(config, "client"))
    try:
        lot = client.fetch(batch, batches)
    finally:
        client.close()
    View(as_json).say(f"{batches} batches of {batch} in stock")
    return {"lot": lot, "batches": batches, "batch": batch}


def infer(
    images: Annotated[list[Path], typer.Argument(help="PNG or JPEG files.", show_default=False)],
    config: ConfigFile,
    resize: Resize = False,
    as_json: AsJson = False,
) -> Json:
    """At the client: classify images with the server's network; without the dealer if stock is enough."""
    import torch

    from tightrope.data import read_image
    from tightrope.desk import read_input
    from tightrope.runtimes.mpc.remote import Client
    from tightrope.runtimes.mpc.settings import read_settings
    from tightrope.runtimes.mpc.worker import tune_process

    tune_process()
    settings = read_settings(config, "client")
    client = Client.load(settings)
    try:
        classes, spec = read_input(settings.program, client.program)
        x = torch.cat([read_image(image, spec, resize=resize) for image in images]).numpy()
        with client.session(len(x)) as session:
            outputs, measured = session.run(x)
    finally:
        client.close()
    names, view = [classes[k] for k in outputs.argmax(-1)], View(as_json)
    for image, name in zip(images, names, strict=True):
        view.say(f"{image}: {name}")
    measurement(view, measured)
    made = "ahead of time" if session.mode == "stock" else "by the dealer in this session"
    view.say(f"online phase: {measured.total.online_ms:,.0f} ms; material: {made}")
    return {"predictions": names, "mode": session.mode, "measurement": measured.to_dict()}
