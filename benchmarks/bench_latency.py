"""Latency tables of the published space on this machine, and the six published networks in their order.

    python benchmarks/bench_latency.py [onnx|openvino ...]      about a minute each on an idle core

Times are of one thread's processor time (`--clock cpu`): the machine may do other work. The tables are
kept in benchmarks/tables/, from where an interrupted run goes on; delete them to measure anew. The networks
A to F are run in turns, so that what changes on the machine meets all of them; the least median of the turns
counts, and ratios to A are reported.
"""

from __future__ import annotations

import sys
from pathlib import Path

import _rows
from tightrope.device import open_device, time_ms, torch_threads
from tightrope.measure import measure
from tightrope.methods.binas.space import PRESETS
from tightrope.models.arch import Architecture
from tightrope.models.mobilenet import mobilenet

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from published import BINAS

TABLES = Path(__file__).parent / "tables"
COMMAND = "python benchmarks/bench_latency.py"
TURNS, RUNS = 15, 9


def in_turns(device: str) -> dict[str, float]:
    """The least median of each published network, in ms."""
    space, engine = PRESETS["imagenet"], open_device(device, 1)
    nets = {name: mobilenet(Architecture.parse(text)).eval() for name, text in BINAS.items()}
    runs = {name: engine.load(net, space.input_shape, 1) for name, net in nets.items()}
    least = dict.fromkeys(runs, float("inf"))
    for _ in range(TURNS):
        for name, run in runs.items():
            least[name] = min(least[name], time_ms(run, RUNS, "cpu").median_ms)
    return least


def main() -> None:
    devices = sys.argv[1:] or ["onnx", "openvino"]
    space, rows = PRESETS["imagenet"], []
    TABLES.mkdir(exist_ok=True)
    for device in devices:
        table = measure(
            space, device, TABLES / f"imagenet-{device}.json", clock="cpu", runs=15,
            progress=lambda what, done, of: print(f"\r{what}: {done} of {of}", end="", file=sys.stderr),
        )  # fmt: skip
        fit = table.calibration(space)
        error = f"{device}, imagenet space: mean error of the latency formula, held-out networks: at most 8 %"
        rows.append(_rows.row(error, fit.held_out_error, "share", fit.held_out_error <= 0.08))
        rows.append(_rows.row(f"{device}, the worst of {fit.held_out} networks", fit.held_out_worst, "share"))
        with torch_threads(1):
            ms = in_turns(device)
        rising = list(ms.values()) == sorted(ms.values())
        ratios = ", ".join(f"{name} {v / ms['A']:.3f}" for name, v in ms.items())
        rows.append(
            _rows.row(f"{device}: A < B < ... < F, ratios to A: {ratios}", ms["F"] / ms["A"], "F/A", rising)
        )
        rows.append(_rows.row(f"{device}: network A", ms["A"], "ms"))
        choice = {name: space.choice(Architecture.parse(text)) for name, text in BINAS.items()}
        apart = max(abs(table.predict(space, choice[name]) / v - 1) for name, v in ms.items())
        rows.append(_rows.row(f"{device}: formula and measured, worst of A to F", apart, "share"))
    _rows.write("latency", [r | {"issue": 5, "command": COMMAND} for r in rows])
    print(_rows.table([r for r in _rows.read() if r["command"] == COMMAND]))


if __name__ == "__main__":
    main()
