"""Issue 3: the small residual network, encrypted, by our compiler and by orion-v2-compiler on one library.

    python benchmarks/bench_ckks_orion.py BUNDLE --orion /path/to/venv/bin/python

BUNDLE: of `train_paf.py --network small --budget 'ckks_levels<=13'`. The peer's venv has `orion-v2-compiler`
and everything of ours. Both networks are trained with the same ReLU network as teacher; the peer's has x^2,
its only activation that fits into this memory; what its others take is compiled and reported. Server CPU
seconds of one image at a time, medians, each server in a process of its own, one after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import _rows
from tightrope.data import load
from tightrope.program import Program
from tightrope.runtimes.ckks import CKKS, lattigo
from tightrope.runtimes.ckks.parameters import Parameters, choose
from tightrope.runtimes.plain import evaluate

IMAGES = 3
OTHERS = {
    "SiLU, degree 7": 20,
    "SiLU, degree 31": 30,
}  # levels that they take, which must be there to compile


def ask(python: Path, **line: Any) -> dict[str, Any]:
    """One answer of `peers_orion.py`."""
    here = Path(__file__).resolve().parent
    path = os.pathsep.join([str(here.parent / "src"), str(here)])
    done = subprocess.run(
        [python, here / "peers_orion.py"], input=json.dumps(line) + "\n", stdout=subprocess.PIPE, text=True,
        check=True, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def ours(path: Path) -> dict[str, Any]:
    program = Program.load(path)
    batches = load("fashion-mnist").batches("test", IMAGES, limit=IMAGES)
    x = torch.cat([images for images, _ in batches])
    want, seconds, got = evaluate(program, x).numpy(), [], []
    runtime = CKKS(bootstrap="never", threads=1, timeout_s=1e5)
    predicted_s = runtime.estimate(program).total.online_ms / 1e3
    with runtime.open(program, "execute") as session:
        for image in x.numpy():
            y, measured = session.run(image[None])
            got.append(y[0])
            seconds.append(measured.config["server_cpu_ms"] / 1e3)
    return {
        "seconds": statistics.median(seconds),
        "predicted": predicted_s / statistics.median(seconds),
        "levels": measured.total.ckks_levels,
        "keys": measured.config["keys"],
        "peak_bytes": measured.peak_memory_bytes,
        "error": float(np.abs(np.stack(got) - want).max()),
    }


def peer(
    python: Path, parameters: Parameters, made: dict[str, Any], model: Path, folder: Path
) -> dict[str, Any]:
    """Keys and ciphertexts by the client of ours, in files; the evaluation in a process of the peer."""
    elements: Sequence[int] = made["galois_elements"]
    circuit: Any = SimpleNamespace(parameters=parameters, galois_elements=lambda: tuple(elements))
    client = lattigo.Client(circuit)
    lattigo.write_keys(folder / "keys", client.make_keys(), len(elements))
    names = []
    for k, pixels in enumerate(made["images"]):
        slots = np.zeros(parameters.slots)
        slots[: len(pixels)] = pixels
        names.append(str(folder / f"image{k}"))
        Path(names[-1]).write_bytes(client.encrypt(slots, made["levels"]))
    library = parameters.library()
    found = ask(
        python, do="serve", model=str(model), keys=str(folder / "keys"), ciphertexts=names, library=library
    )
    got = np.stack([client.decrypt(Path(name + ".out").read_bytes())[:10] for name in names])
    client.close()
    found["error"] = float(np.abs(got - np.array(made["outputs"])).max())
    return found | {"seconds": statistics.median(found["cpu_s"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--orion", type=Path, required=True, help="python of the peer's venv")
    parser.add_argument("--weights", type=Path, default=Path("runs/small.safetensors"))
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--work", type=Path, default=Path("runs/ckks-orion"), help="keeps the peer's network")
    parser.add_argument("--train-only", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    accuracy = json.loads((asked.bundle / "accuracy.json").read_text())
    parameters = choose(12, 40, None)
    rows = []
    asked.work.mkdir(parents=True, exist_ok=True)
    model, record = asked.work / "model", asked.work / "trained.json"
    if not record.exists():
        made = ask(
            asked.orion, do="train", weights=str(asked.weights.resolve()), model=str(model.resolve()),
            epochs=asked.epochs, images=IMAGES, library=parameters.library(),
        )  # fmt: skip
        record.write_text(json.dumps(made))
    made = json.loads(record.read_text())
    print("orion", {k: made[k] for k in ("levels", "validation", "test")}, flush=True)
    if asked.train_only:
        return
    with tempfile.TemporaryDirectory() as folder:
        theirs = peer(asked.orion, parameters, made, model.resolve(), Path(folder))
    print(theirs, flush=True)
    mine = ours(asked.bundle)
    print(mine, flush=True)
    ratio, lead = mine["seconds"] / theirs["seconds"], 100 * (accuracy["test"] - made["test"])
    keys = len(made["galois_elements"]) + 1
    name = "small residual network"
    rows += [
        _rows.row(f"{name}: our server CPU over orion's <= 0.67", ratio, "x", ratio <= 0.67),
        _rows.row(f"{name}: our test accuracy minus orion's >= 0", lead, "points", lead >= 0),
    ]
    rows.append(_rows.row(f"{name}, tightrope: predicted over server CPU", mine["predicted"], "x"))
    for who, found, levels, count, test in (
        ("tightrope", mine, mine["levels"], mine["keys"], accuracy["test"]),
        ("orion, x^2", theirs, made["levels"], keys, made["test"]),
    ):
        rows += [
            _rows.row(f"{name}, {who}: server CPU an image", found["seconds"], "s"),
            _rows.row(f"{name}, {who}: test accuracy", 100 * test, "%"),
            _rows.row(f"{name}, {who}: levels", levels, "levels"),
            _rows.row(f"{name}, {who}: keys", count, "keys"),
            _rows.row(f"{name}, {who}: peak memory of the server", found["peak_bytes"] / 2**30, "GiB"),
            _rows.row(f"{name}, {who}: largest error of an output", found["error"], "logit"),
        ]
    for activation, levels in OTHERS.items():
        ring = choose(levels, 40, None)
        needs = ask(asked.orion, do="compile", activation=activation, library=ring.library())
        size = needs["keys"] * ring.key_bytes / 2**30
        rows += [
            _rows.row(f"{name}, orion, {activation}: levels", needs["levels"], "levels"),
            _rows.row(f"{name}, orion, {activation}: keys, N = 2^{ring.log_n}", size, "GiB"),
        ]
    command = "python benchmarks/bench_ckks_orion.py BUNDLE --orion PYTHON"
    _rows.write("ckks_orion", [{"issue": 3, **row, "command": command} for row in rows])
    print(_rows.table([row for row in _rows.read() if row["command"] == command]))


if __name__ == "__main__":
    main()
