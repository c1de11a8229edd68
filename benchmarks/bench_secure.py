"""Issue 1, bars 1 and 3: secure against plain logits of the demo bundle, and predicted against counted cost.

tightrope demo --out runs/demo && python benchmarks/bench_secure.py runs/demo
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from _rows import row, write
from tightrope.bundle import Bundle
from tightrope.pipeline import test_images
from tightrope.runtimes.mpc import MPC, costs
from tightrope.runtimes.plain import Plain

IMAGES = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle", type=Path)
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle)
    program, plan = bundle.program(), bundle.plan()
    x, _ = test_images(bundle.data(), IMAGES)
    plain, _ = Plain().open(program).run(x)
    with MPC().open(program, "execute") as session:
        session.run(x[:1])
        secure, measured = session.run(x)
        _, single = session.run(x[:1])
    predicted = costs(program, MPC(), IMAGES)
    error = float(np.abs(secure - plain).max())
    top = np.sort(plain, 1)
    clear = top[:, -1] - top[:, -2] > 2**-6
    wrong = int((secure.argmax(1) != plain.argmax(1))[clear].sum())
    total = measured.total
    online, offline = (
        getattr(total, k) - getattr(predicted.total, k) for k in ("online_bytes", "offline_bytes")
    )
    rounds = total.rounds - predicted.total.rounds
    drelus = single.total.drelus - plan.predicted.drelus
    rows = [
        row(
            f"secure and plain logits of {IMAGES} images differ by at most 2^-6",
            error,
            "logits",
            error <= 2**-6,
        ),
        row("other class than plain where the top-two margin exceeds 2^-6", wrong, "images", wrong == 0),
        row(
            "online bytes on the sockets minus predicted", online, "bytes", measured.links == predicted.links
        ),
        row(
            "offline bytes on the sockets minus predicted",
            offline,
            "bytes",
            measured.offline_links == predicted.offline_links,
        ),
        row("rounds measured minus predicted", rounds, "rounds", rounds == 0),
        row("DReLUs executed minus planned, per image", drelus, "DReLUs", drelus == 0),
        row(f"online time of a batch of {IMAGES} (no bar)", total.online_ms, "ms"),
        row("online time of one image (no bar)", single.total.online_ms, "ms"),
        row("online bytes of one image (no bar)", single.total.online_bytes, "bytes"),
    ]
    command = f"python benchmarks/bench_secure.py {options.bundle}"
    write("secure", [{"issue": 1, "command": command, **measured} for measured in rows])


if __name__ == "__main__":
    main()
