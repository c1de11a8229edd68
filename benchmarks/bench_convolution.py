"""Convolutions in Z_2^64 on one core: the runtime's loop, torch's int64, float64 in three limbs of 22 bits.

The last is what a float BLAS allows: six products of limbs, as many columns as torch makes. Every result is
compared with torch's before it is timed; the three take turns, as a machine may be slower for seconds.

    python benchmarks/bench_convolution.py            # under a minute
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from _rows import row, write
from tightrope.program import Conv2d
from tightrope.runtimes.mpc.convolution import by_torch, direct
from tightrope.runtimes.mpc.rehearsal import conv

COMMAND = "python benchmarks/bench_convolution.py"
REPEATS = 21
LIMB_BITS = 22
SHAPES = (
    conv(16, 16, 3, 28), conv(16, 16, 3, 32), conv(64, 64, 3, 8), conv(32, 32, 7, 7), conv(64, 64, 3, 28),
    conv(256, 256, 1, 14), conv(32, 64, 3, 28, stride=2), conv(64, 64, 3, 14, groups=64),
)  # fmt: skip


def limbs(x: Tensor) -> list[Tensor]:
    """x = a + b 2^22 + c 2^44 modulo 2^64, each signed: products of 22 bits add up exactly in float64."""
    found = []
    for bits in (LIMB_BITS, LIMB_BITS, 64 - 2 * LIMB_BITS):
        low = x << (64 - bits) >> (64 - bits)
        found.append(low.double())
        x = (x - low) >> bits
    return found


def in_limbs(op: Conv2d, weight: Tensor, x: Tensor) -> Tensor:
    parts, weights = limbs(F.pad(x, op.padding)), limbs(weight)
    total = torch.zeros((len(x), *op.shape), dtype=torch.int64)
    for i, part in enumerate(parts):
        for j in range(3 - i):
            product = F.conv2d(part, weights[j], None, op.stride, 0, op.dilation, op.groups)
            total += product.long() << (LIMB_BITS * (i + j))
    return total


WAYS = {"the runtime's loop": direct, "torch int64": by_torch, "float64 in limbs": in_limbs}


def main() -> None:
    torch.set_num_threads(1)
    rng, found = np.random.default_rng(0), []
    instructions = torch.backends.cpu.get_cpu_capability()
    for op in SHAPES:
        k = op.kernel[0]
        x_shape = (1, op.in_channels, *(n * op.stride[0] for n in op.shape[1:]))
        w, x = (
            torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, shape)) for shape in (op.weight_shape, x_shape)
        )
        for way in WAYS.values():
            if not torch.equal(way(op, w, x), by_torch(op, w, x)):
                raise SystemExit(f"wrong results: {op}")
        spent: dict[str, list[float]] = {name: [] for name in WAYS}
        for _ in range(REPEATS):
            for name, way in WAYS.items():
                start = time.perf_counter()
                way(op, w, x)
                spent[name].append(1e3 * (time.perf_counter() - start))
        groups = f", {op.groups} groups" if op.groups > 1 else ""
        what = (
            f"conv {k}x{k}, {op.in_channels} to {op.shape[0]} channels of {op.shape[1]}x{op.shape[2]}{groups}"
        )
        found += [
            row(f"{what}: {name}, {instructions}", statistics.median(ms), "ms") for name, ms in spent.items()
        ]
        ms = {name: statistics.median(times) for name, times in spent.items()}
        print(what, {name: round(value, 3) for name, value in ms.items()}, flush=True)
    print(write("convolution", [{"issue": 2, "command": COMMAND, **r} for r in found]))


if __name__ == "__main__":
    main()
