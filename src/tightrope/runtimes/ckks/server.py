"""The server as a process, `python -m tightrope.runtimes.ckks.server`, started by a session through pipes.

It reads one JSON line and the weights from its standard input, answers with its port, and then speaks with
the client over TLS only. It ends with its standard input or its client. It sees ciphertexts and evaluation
keys.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tightrope.errors import ProtocolError, TightropeError
from tightrope.program import Program
from tightrope.runtimes.ckks import lattigo
from tightrope.runtimes.ckks.circuit import Circuit
from tightrope.runtimes.ckks.compiler import compile_program
from tightrope.runtimes.ckks.evaluate import Outcome, evaluate
from tightrope.runtimes.ckks.format import boot_key_size, check_ciphertext, check_key, key_size
from tightrope.runtimes.ckks.link import (
    BOOT,
    EVALUATE,
    FAILED,
    HELLO,
    KEY,
    READY,
    RESULT,
    Identity,
    Link,
    tls_context,
)
from tightrope.runtimes.ckks.parameters import Parameters

HOST = "127.0.0.1"
CONNECT_S = 60.0


def main() -> int:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not get between the replies
    torch.set_num_threads(1)
    about = json.loads(sys.stdin.buffer.readline())
    weights = sys.stdin.buffer.read(about["weights_bytes"])
    threading.Thread(target=_end_with_input, daemon=True).start()
    try:
        program = Program.decode(about["structure"], weights, Path("server"))
        parameters = Parameters.of(about["parameters"])
        circuit = compile_program(program, lambda *_: parameters, about["squares"])
        own = Identity(about["certificate"].encode(), about["key"].encode())
        context = tls_context(own, about["client_certificate"].encode(), accepts=True)
        listener = socket.create_server((HOST, about["port"]))
    except (OSError, TightropeError) as error:
        replies.write(json.dumps({"error": type(error).__name__, "text": str(error)}) + "\n")
        replies.flush()
        return 1
    replies.write(json.dumps({"port": listener.getsockname()[1]}) + "\n")
    replies.flush()
    listener.settimeout(CONNECT_S)
    raw, _ = listener.accept()
    listener.close()
    link = Link(raw, context, "the client", about["timeout_s"], patient=True)
    try:
        serve(link, circuit, about["threads"], inspect=about["inspect"])
    except Exception as error:
        text = str(error) if isinstance(error, TightropeError) else f"{type(error).__name__}: {error}"
        with suppress(ProtocolError):
            link.send(FAILED, {"text": text})
        return 1
    finally:
        link.close()
    return 0


def _end_with_input() -> None:
    """No server outlives the session that started it."""
    sys.stdin.buffer.read()
    os._exit(2)


def serve(link: Link, circuit: Circuit, threads: int, *, inspect: bool) -> None:
    """Take the keys of one client and answer it until it leaves; with the results of all steps to `inspect`.

    Raises ProtocolError for whatever is not as it must be.
    """
    hello = link.receive(HELLO, 0, 0)
    if hello is None or hello[0].get("digest") != circuit.digest():
        raise ProtocolError(
            "client and server have compiled different circuits",
            got=None if hello is None else str(hello[0].get("digest"))[:12],
            allowed=circuit.digest()[:12],
            fix="the same program and the same release of tightrope on both sides",
        )
    with tempfile.TemporaryDirectory(prefix="tightrope-keys-") as folder:
        path, boot = Path(folder) / "keys", Path(folder) / "boot" if circuit.boot_slots else None
        if boot is not None:
            _receive_boot_keys(link, boot_key_size(circuit), boot)
        lattigo.write_keys(path, _keys(link, circuit), len(circuit.galois_elements()))
        backend = lattigo.Server.load(circuit, path, boot)
    link.send(READY, {"peak_memory_bytes": peak_memory_bytes()})
    with ThreadPoolExecutor(threads) as pool:
        size = threads * circuit.values[circuit.input].layout.ciphertexts
        limit = circuit.parameters.ciphertext_bytes(circuit.parameters.levels) + (1 << 12)
        while (message := link.receive(EVALUATE, size, limit)) is not None:
            link.send(RESULT, *_answer(message[1], circuit, backend, pool, inspect=inspect))


def _receive_boot_keys(link: Link, left: int, path: Path) -> None:
    """Into a file; what is in it is checked when it is read."""
    with path.open("wb") as file:
        while left:
            message = link.receive(BOOT, 1, left)
            if message is None or len(message[1]) != 1 or not message[1][0]:
                raise ProtocolError("keys of bootstrapping are missing", got=f"{left} bytes too few")
            file.write(message[1][0])
            left -= len(message[1][0])


def _keys(link: Link, circuit: Circuit) -> Iterator[tuple[int | None, bytes]]:
    """The keys as they come in, each checked before a byte of it is kept."""
    wanted = (None, *circuit.galois_elements())
    for count, element in enumerate(wanted):
        message = link.receive(KEY, 1, key_size(circuit.parameters, element=element is not None))
        if message is None or len(message[1]) != 1:
            raise ProtocolError("an evaluation key is missing", got=f"{count} of {len(wanted)} keys")
        data = message[1][0]
        name = "the relinearisation key" if element is None else f"the Galois key of element {element}"
        check_key(data, circuit.parameters, element, name)
        yield element, data


def _answer(
    parts: list[bytes],
    circuit: Circuit,
    backend: lattigo.Server,
    pool: ThreadPoolExecutor,
    *,
    inspect: bool,
) -> tuple[dict[str, Any], list[bytes]]:
    value = circuit.values[circuit.input]
    each = value.layout.ciphertexts
    if not parts or len(parts) % each:
        raise ProtocolError("not whole images", got=f"{len(parts)} ciphertexts", allowed=f"{each} per image")
    for k, data in enumerate(parts):
        level = check_ciphertext(data, circuit.parameters, f"ciphertext {k} from the client")
        if level != value.level:
            raise ProtocolError("an input is at another level", got=level, allowed=value.level)
    images = [parts[k : k + each] for k in range(0, len(parts), each)]
    cpu, wall = time.process_time(), time.perf_counter()
    returned: list[list[bytes]] = [[] for _ in images]

    def one(k: int) -> Outcome[bytes]:
        def keep(name: str, made: list[bytes]) -> None:
            if inspect or name == circuit.output:
                returned[k].extend(made)

        return evaluate(circuit, backend, images[k], keep)

    outcomes = list(pool.map(one, range(len(images))))
    about = {
        "spent": [[asdict(spent) for spent in outcome.spent] for outcome in outcomes],
        "elapsed_ms": (time.perf_counter() - wall) * 1e3,
        "cpu_ms": (time.process_time() - cpu) * 1e3,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    return about, [data for image in returned for data in image]


def peak_memory_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # at once: the thread that watches the input is inside a read
