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

import numpy as np

from _mpc import runs
from _rows import row, write
from peers_relu import FRACTION_BITS, inputs
from tightrope.program import Flatten, Program, Relu
from tightrope.runtimes.mpc import MPC

REPEATS = 9
PEER_REPEATS = 3
BAR_S, FASTER, FEWER = 0.5, 10, 5
LARGEST = 6.0
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
PEERS = (("aby3", "SPU ABY3", "spu"), ("semi2k", "SPU SEMI2K", "spu"), ("crypten", "CrypTen", "crypten"))
Rows = list[dict[str, object]]


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
    found, own_s, own_bytes = own(what, options.count)
    for name, title, package in PEERS:
        python = getattr(options, package) and getattr(options, package) / "bin" / "python"
        if python is None or not python.exists():
            print(f"{title}: left out, no --{package} with bin/python", file=sys.stderr)
            continue
        found += peer(what, title, [str(python), name, str(options.count)], own_s, own_bytes)
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


def own(what: str, count: int) -> tuple[Rows, float, float]:
    """The ReLU alone (input shared before, result revealed after): rows, seconds, bytes a value."""
    shape = (count // 1024, 32, 32)
    relu = Relu(name="relu", inputs=(Program.INPUT,), shape=shape, patches=((1, 1),) * shape[0])
    last = Flatten(name="out", inputs=("relu",), shape=(count,))
    ranges = dict.fromkeys((Program.INPUT, "relu", "relu:tiles", "out"), LARGEST)
    program = Program((relu, last), shape, "out", ranges=ranges)
    x = inputs(count).reshape(1, *shape)
    measured = runs(program, MPC(fraction_bits=FRACTION_BITS, noise_bits=0), x, REPEATS, of="relu")
    spent = measured.online_of("relu")
    error = float(np.abs(measured.outputs - np.maximum(x, 0).reshape(1, -1)).max())
    per_value, fast = spent.online_bytes / count, measured.online_s <= BAR_S
    return [
        row(f"{what}, TLS: online <= {BAR_S} s", round(measured.online_s, 3), "s", fast),
        row(f"{what}, TLS: online bytes a value, frames", round(per_value, 3), "bytes"),
        row(f"{what}, TLS: material a value, all links", measured.last.total.offline_bytes / count, "bytes"),
        row(f"{what}, TLS: offline phase", round(measured.offline_s, 3), "s"),
        row(f"{what}, TLS: largest error", error, "", error <= 2 ** (1 - FRACTION_BITS)),
    ], measured.online_s, per_value  # fmt: skip


def peer(what: str, title: str, command: Sequence[str], own_s: float, own_bytes: float) -> Rows:
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
    result = json.loads(lines[-1])
    seconds = statistics.median(s for s, _ in result["runs"])
    per_value = statistics.median(b for _, b in result["runs"]) / int(count)
    faster, fewer = seconds / own_s, per_value / own_bytes
    return [
        row(f"{what}, {title}: time", round(seconds, 2), "s"),
        row(f"{what}, {title}: bytes a value on the loopback interface", round(per_value, 1), "bytes"),
        row(f"{what}, {title}: largest error", result["error"], ""),
        row(f"{what}: {FASTER} times faster than {title}", round(faster, 1), "times", faster >= FASTER),
        row(f"{what}: {FEWER} times fewer bytes than {title}", round(fewer, 1), "times", fewer >= FEWER),
    ]


if __name__ == "__main__":
    main()
