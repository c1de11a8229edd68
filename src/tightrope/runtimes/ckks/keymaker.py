"""The client's second process, `python -m tightrope.runtimes.ckks.keymaker`: makes the keys of bootstrapping.

They are made all at once and take three times their size; a process of their own gives that back when it
ends. It reads one JSON line and the secret key from its standard input and writes the keys, as the library
does, to its standard output.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict

from tightrope.errors import ProtocolError
from tightrope.runtimes.ckks.circuit import Circuit
from tightrope.runtimes.ckks.format import boot_key_size
from tightrope.runtimes.ckks.lattigo import boot_keys
from tightrope.runtimes.ckks.parameters import Parameters

CHUNK = 1 << 26
GARBAGE_PERCENT = "20"  # how far the library's heap grows before it is collected


def made(circuit: Circuit, secret: bytes) -> Iterator[bytes]:
    """The keys in parts of at most CHUNK. Raises ProtocolError if the process fails."""
    size = left = boot_key_size(circuit)
    with tempfile.TemporaryFile() as errors:  # not a pipe: nobody would read it meanwhile
        process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=os.environ | {"GOGC": GARBAGE_PERCENT},
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            about = {"parameters": asdict(circuit.parameters), "slots": circuit.boot_slots}
            process.stdin.write(json.dumps(about).encode() + b"\n" + secret)
            process.stdin.close()
            while left and (part := process.stdout.read(min(left, CHUNK))):
                left -= len(part)
                yield part
            if more := process.stdout.read(1):
                process.kill()  # it waits for a reader of the rest
            if process.wait() or left:
                errors.seek(0)
                words = errors.read().decode(errors="replace").strip().splitlines()[-1:]
                made = f"more than {size} bytes" if more else f"{size - left} of {size} bytes"
                raise ProtocolError(
                    "the keys of bootstrapping could not be made",
                    got="; ".join([made, *words])[-300:],
                    where="ckks client",
                )
        finally:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()


def main() -> None:
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not get between the keys
    about = json.loads(sys.stdin.buffer.readline())
    parameters = Parameters.of(about["parameters"])
    boot_keys(parameters, about["slots"], sys.stdin.buffer.read(), out)
    out.flush()


if __name__ == "__main__":
    main()
