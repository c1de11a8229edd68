"""Rows of measured bars: benchmark scripts write them here, `python benchmarks/_rows.py` prints them all.

A row says which bar of which issue was measured, the value, and where: host, versions and git state. The
files `benchmarks/results/NAME.json` are committed, one list of rows each.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import NoneType

RESULTS = Path(__file__).parent / "results"
MEASURED: dict[str, type | tuple[type, ...]] = {
    "issue": int,
    "bar": str,
    "value": (int, float),
    "unit": str,
    "holds": (bool, NoneType),
    "command": str,
}
PACKAGES = ("torch", "numpy", "scipy", "numba")


def row(bar: str, value: float, unit: str, holds: bool | None = None) -> dict[str, object]:
    """A row without its issue and command; `holds` is None for a measurement without a bar."""
    return {"bar": bar, "value": value, "unit": unit, "holds": holds}


def write(name: str, rows: Sequence[Mapping[str, object]]) -> Path:
    """Write `results/<name>.json`, all at once or not at all; returns its path.

    Each row holds exactly `issue, bar, value, unit, holds, command`; host, versions and commit are added.
    Raises ValueError on any other row, and for none at all.
    """
    if not rows:
        raise ValueError(f"nothing was measured: {name}.json stays as it is")
    for row in rows:
        if set(row) != set(MEASURED):
            raise ValueError(f"a row needs exactly {sorted(MEASURED)}, got {sorted(row)}")
        for key, kind in MEASURED.items():
            if not isinstance(row[key], kind):
                raise ValueError(f"{key} of {row['bar']!r} must be {kind}, got {row[key]!r}")
    made = {"host": _host(), "versions": _versions(), "commit": _commit()}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps([{**row, **made} for row in rows], indent=1, allow_nan=False) + "\n")
    temporary.replace(path)
    return path


def read() -> list[dict[str, object]]:
    """The rows of all result files, in order of issue and file; a file that is one record holds none."""
    files = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    rows: list[dict[str, object]] = [row for body in files if isinstance(body, list) for row in body]
    return sorted(rows, key=lambda row: int(str(row["issue"])))


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """The rows as aligned text, one line each, with the number of bars that hold below."""
    cells = [("issue", "bar", "value", "unit", "holds", "commit")]
    for row in rows:
        value = f"{row['value']:.4g}" if isinstance(row["value"], float) else str(row["value"])
        holds = {True: "yes", False: "NO", None: "-"}[row["holds"]]
        cells.append(
            (str(row["issue"]), str(row["bar"]), value, str(row["unit"]), holds, str(row["commit"])[:18])
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    bars = [row["holds"] for row in rows if row["holds"] is not None]
    return "\n".join([*lines, f"{sum(map(bool, bars))} of {len(bars)} bars hold; -: no bar"])


def trained_on() -> str:
    """The GPU that torch trains on, for rows written elsewhere; empty without one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def _host() -> str:
    """CPU model, cores and memory; no name and no path."""
    model = platform.processor() or platform.machine()
    cpu = Path("/proc/cpuinfo")
    if cpu.exists():
        named = [
            line.split(":", 1)[1] for line in cpu.read_text().splitlines() if line.startswith("model name")
        ]
        model = named[0].strip() if named else model
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {os.cpu_count()} cores, {memory_gib:.0f} GiB"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    """Commit hash, with "+dirty" when anything but the results differs from it; "none" outside git."""
    head = _git("rev-parse", "--verify", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return (head or "none") + ("+dirty" if changed else "")


def _git(*arguments: str) -> str:
    root = Path(__file__).parent.parent
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


if __name__ == "__main__":
    print(table(read()))
