"""Issue 2: ReLU over 2^20 values between processes on loopback, here and in SPU and CrypTen, in one run.

    python benchmarks/bench_relu_peers.py --spu VENV --crypten VENV [--count N]

    python -m venv SPU && SPU/bin/pip install spu==0.9.5
    python -m venv CRYPTEN && CRYPTEN/bin/pip install torch==2.13.0 omegaconf onnx pandas pyyaml scipy \\
        && CRYPTEN/bin/pip install --no-deps crypten==0.4.1

As root it runs in a network namespace of its own, where the loopback interface carries nothing else. A peer
without its environment is left out, and said to be. The peers are given their favour: SEMI2K and CrypTen make
their triples for free ("trusted first party"), where ours come from a dealer, whose phase is reported apart.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import socket
import statistics
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from _rows import row, write
from peers_relu import FRACTION_BITS, inputs
from tightrope.program import Flatten, Program, Relu
from tightrope.runtimes.mpc import MPC
from tightrope.types import Cost, Measurement

REPEATS = 5
PEER_REPEATS = 3
BAR_S, FASTER, FEWER = 0.5, 10, 5
LARGEST = 6.0
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
PEERS = (("aby3", "SPU ABY3", "spu"), ("semi2k", "SPU SEMI2K", "spu"), ("crypten", "CrypTen", "crypten"))
Rows = list[dict[str, object]]
Measured = tuple[NDArray[np.float64], Measurement]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--spu", type=Path, help="virtual environment with spu 0.9.5")
    parser.add_argument("--crypten", type=Path, help="virtual environment with crypten 0.4.1")
    parser.add_argument("--count", type=int, default=1 << 20, help="a multiple of 1024")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.inside:
        enter_namespace()
    raise_loopback()
    what = f"ReLU over {options.count} values, {FRACTION_BITS} fractional bits"
    program, x = relu_alone(options.count)
    config = MPC(fraction_bits=FRACTION_BITS, noise_bits=0, margin=1.0)  # no value is beyond the range
    with config.open(program, "execute") as session:
        session.run(x)

        def ours() -> list[Measured]:
            return [session.run(x) for _ in range(REPEATS)]

        measured = before = ours()
        found: Rows = []
        for name, title, package in PEERS:
            python = getattr(options, package) and getattr(options, package) / "bin" / "python"
            if python is None or not python.exists():
                print(f"{title}: left out, no --{package} with bin/python", file=sys.stderr)
                continue
            result = peer(title, [str(python), name, str(options.count)])
            after = ours()
            found += compared(what, title, result, before + after, options.count)
            measured, before = measured + after, after
    found = own(what, measured, x) + found
    for line in found:
        print(f"{line['bar']}: {line['value']} {line['unit']}")
    command = "python benchmarks/bench_relu_peers.py --spu VENV --crypten VENV"
    write("mpc_relu", [{"issue": 2, "command": command, **line} for line in found])


def enter_namespace() -> None:
    """Run this command again inside a network namespace, where possible."""
    again = [sys.executable, *sys.argv, "--inside"]
    unshare = shutil.which("unshare")
    if unshare and os.geteuid() == 0:
        os.execv(unshare, [unshare, "--net", *again])
    print("not root: other traffic on the loopback interface is counted too", file=sys.stderr)
    os.execv(sys.executable, again)


def raise_loopback() -> None:
    """A new namespace has its loopback interface down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(handle, SIOCGIFFLAGS, request))[1]
        if not flags & IFF_UP:
            fcntl.ioctl(handle, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))


def relu_alone(count: int) -> tuple[Program, NDArray[np.float64]]:
    """A program whose op `relu` is the ReLU and nothing else: the result is revealed by the op after it."""
    shape = (count // 1024, 32, 32)
    relu = Relu(name="relu", inputs=(Program.INPUT,), shape=shape, patches=((1, 1),) * shape[0])
    last = Flatten(name="out", inputs=("relu",), shape=(count,))
    ranges = dict.fromkeys((Program.INPUT, "relu", "relu:tiles", "out"), LARGEST)
    return Program((relu, last), shape, "out", ranges=ranges), inputs(count).reshape(1, *shape)


def relu_of(measured: Measured) -> Cost:
    return next(trace.cost for trace in measured[1].ops if trace.op == "relu")


def online_s(runs: Sequence[Measured]) -> float:
    """The client's time from its masked input to its share of the ReLU, waiting for the server included."""
    return statistics.median(relu_of(run).online_ms for run in runs) / 1e3


def own(what: str, runs: Sequence[Measured], x: NDArray[np.float64]) -> Rows:
    outputs, last = runs[-1]
    error = float(np.abs(outputs - np.maximum(x, 0).reshape(1, -1)).max())
    spent_s, spent = online_s(runs), relu_of(runs[-1])
    offline_s = statistics.median(measured.total.offline_ms for _, measured in runs) / 1e3
    return [
        row(f"{what}, TLS: online <= {BAR_S} s", round(spent_s, 3), "s", spent_s <= BAR_S),
        row(f"{what}, TLS: online bytes a value, frames", round(spent.online_bytes / x.size, 3), "bytes"),
        row(f"{what}, TLS: material a value, all links", last.total.offline_bytes / x.size, "bytes"),
        row(f"{what}, TLS: offline phase", round(offline_s, 3), "s"),
        row(f"{what}, TLS: largest error", error, "", error <= 2 ** (1 - FRACTION_BITS)),
    ]


def peer(title: str, command: Sequence[str]) -> dict[str, Any]:
    python, name, count = command
    script = Path(__file__).with_name("peers_relu.py")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [python, str(script), name, count, str(PEER_REPEATS)],
        capture_output=True, text=True, env=environment, timeout=600,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise SystemExit(f"{title} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def compared(what: str, title: str, result: dict[str, Any], around: Sequence[Measured], count: int) -> Rows:
    """A peer against our runs just before and after it, since the machine may be shared."""
    seconds = statistics.median(s for s, _ in result["runs"])
    per_value = statistics.median(b for _, b in result["runs"]) / count
    faster = seconds / online_s(around)
    fewer = per_value / (relu_of(around[0]).online_bytes / count)
    return [
        row(f"{what}, {title}: time", round(seconds, 2), "s"),
        row(f"{what}, {title}: bytes a value on the loopback interface", round(per_value, 1), "bytes"),
        row(f"{what}, {title}: largest error", result["error"], ""),
        row(f"{what}: {FASTER} times faster than {title}", round(faster, 1), "times", faster >= FASTER),
        row(f"{what}: {FEWER} times fewer bytes than {title}", round(fewer, 1), "times", fewer >= FEWER),
    ]


if __name__ == "__main__":
    main()
