"""ReLU of random values under SPU or CrypTen; run by `bench_relu_peers.py`, with the peer's own interpreter.

    PYTHON peers_relu.py {aby3,semi2k,crypten} COUNT REPEATS

Prints one JSON line: seconds and bytes of the loopback interface per repetition, and the largest error. The
first repetition warms up and is not in it. Parties are processes; values are |x| < 6 with 16 fractional bits.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

import numpy as np

FRACTION_BITS = 16


def loopback_bytes() -> int:
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.strip().startswith("lo:"))


def inputs(count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=count).clip(-6, 6)


def timed(work, wait, repeats: int) -> list[tuple[float, int]]:
    """(seconds, bytes) of `work`, from when all parties begin until all are done."""
    found = []
    for _ in range(repeats + 1):
        wait()
        before, begun = loopback_bytes(), time.perf_counter()
        wait()  # nobody starts before everybody has read the counter
        work()
        wait()
        found.append((time.perf_counter() - begun, loopback_bytes() - before))
        wait()
    return found[1:]


def spu_config(protocol: str):
    import spu

    kind = {"aby3": spu.ProtocolKind.ABY3, "semi2k": spu.ProtocolKind.SEMI2K}[protocol]
    config = spu.RuntimeConfig(protocol=kind, field=spu.FieldType.FM64)
    config.fxp_fraction_bits = FRACTION_BITS
    return config


def spu_party(rank: int, ports: list[int], protocol: str, share, count, barrier, repeats, replies) -> None:
    import jax.numpy as jnp
    import spu
    from spu.utils import frontend

    executable, _ = frontend.compile(
        frontend.Kind.JAX, lambda v: jnp.maximum(v, 0), (np.zeros(count, np.float32),), {}, ["x"],
        [spu.Visibility.VIS_SECRET], lambda out: ["y"],
    )  # fmt: skip
    desc = spu.link.Desc()
    for k, port in enumerate(ports):
        desc.add_party(f"party{k}", f"127.0.0.1:{port}")
    runtime = spu.Runtime(spu.link.create_brpc(desc, rank), spu_config(protocol))
    runtime.set_var("x", unpacked(share))
    found = timed(lambda: runtime.run(executable), barrier.wait, repeats)
    replies.put((rank, found, packed(runtime.get_var("y"))))
    barrier.wait()
    os._exit(0)  # brpc's threads need not be waited for


def packed(share) -> tuple[bytes, list[bytes]]:
    return bytes(share.meta), [bytes(chunk) for chunk in share.share_chunks]


def unpacked(parts: tuple[bytes, list[bytes]]):
    import spu.libspu as libspu

    share = libspu.Share()
    share.meta, share.share_chunks = parts
    return share


def spu_relu(protocol: str, count: int, repeats: int) -> dict:
    import spu

    parties = {"aby3": 3, "semi2k": 2}[protocol]
    x = inputs(count)
    io = spu.Io(parties, spu_config(protocol))
    shares = io.make_shares(x.astype(np.float32), spu.Visibility.VIS_SECRET)
    context = multiprocessing.get_context("spawn")
    barrier, replies, ports = context.Barrier(parties), context.SimpleQueue(), free_ports(parties)
    family = [
        context.Process(
            target=spu_party, args=(k, ports, protocol, packed(shares[k]), count, barrier, repeats, replies)
        )
        for k in range(parties)
    ]
    for process in family:
        process.start()
    answers = {rank: (found, share) for rank, found, share in (replies.get() for _ in family)}
    for process in family:
        process.join()
    y = io.reconstruct([unpacked(answers[k][1]) for k in range(parties)])
    return {"runs": answers[0][0], "error": float(np.abs(y - np.maximum(x, 0)).max())}


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def crypten_relu(count: int, repeats: int) -> dict:
    import torch
    from torch.onnx._internal.torchscript_exporter import registration

    sys.modules["torch.onnx._internal.registration"] = registration  # where CrypTen 0.4.1 looks for it
    import crypten
    import crypten.mpc as mpc

    x = inputs(count)

    @mpc.run_multiprocess(world_size=2)
    def party():
        torch.set_num_threads(1)
        import crypten.communicator as comm

        shared = crypten.cryptensor(torch.from_numpy(x).float(), src=0)
        found = timed(lambda: found_y.append(shared.relu()), comm.get().barrier, repeats)
        y = found_y[-1].get_plain_text().double().numpy()
        return found, float(np.abs(y - np.maximum(x, 0)).max())

    found_y: list = []
    answers = party()
    return {"runs": answers[0][0], "error": answers[0][1]}


def main() -> None:
    peer, count, repeats = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    result = crypten_relu(count, repeats) if peer == "crypten" else spu_relu(peer, count, repeats)
    print(json.dumps(result), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
