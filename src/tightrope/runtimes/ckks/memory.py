"""What a session may take, what is said where it needs more, and what would fit instead."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tightrope.errors import InputError
from tightrope.program import Program
from tightrope.runtimes.ckks import bootstrapping, cost
from tightrope.runtimes.ckks.circuit import Circuit
from tightrope.runtimes.ckks.compiler import compile_program

if TYPE_CHECKING:
    from tightrope.runtimes.ckks.config import CKKS

FREE_SHARE = 0.8


def allowed(config: CKKS) -> int:
    """Bytes of both processes together."""
    return config.memory_bytes or int(FREE_SHARE * free_bytes())


def check(program: Program, config: CKKS, circuit: Circuit, estimate: cost.Estimate) -> None:
    """Raise InputError where the session of this circuit needs more; it names bootstraps that would fit."""
    free = allowed(config)
    if estimate.memory_bytes <= free:
        return
    fix = "activations of fewer levels, or a larger --memory-gb (memory_bytes)"
    if fitting := _fitting(program, config, circuit, free):
        fix += f"; or {fitting}"
    raise InputError(
        "the session needs more memory than allowed",
        where=f"ckks, {estimate.keys} keys of {circuit.parameters.key_bytes / 1e6:.0f} MB each",
        got=f"{estimate.memory_bytes / 1e9:.3g} GB",
        allowed=f"{free / 1e9:.3g} GB",
        fix=fix,
    )


def _fitting(program: Program, config: CKKS, circuit: Circuit, free: int) -> str:
    """The options of bootstraps to as few levels as the deepest step allows, which take the least memory;
    empty where these need too much as well."""
    least = max(step.depth for step in circuit.steps) + bootstrapping.LEAST_LEVEL
    if circuit.bootstraps and circuit.parameters.levels <= least:
        return ""
    try:
        other = replace(config, bootstrap="always", refresh_levels=least, log_n=0)
        made = compile_program(program.public(), other.parameters, other.squares)
    except InputError:  # no room for so many levels, or no bootstrap between them
        return ""
    needed = cost.estimate(made, other.threads).memory_bytes
    options = f"--bootstrap always --refresh-levels {least}"
    if config.log_n not in (0, made.parameters.log_n):
        options += " without --log-n"
    return f"{options}, which takes {needed / 1e9:.3g} GB" if needed <= free else ""


def free_bytes(root: Path = Path("/")) -> int:
    """What Linux says is available, within the limit of a container; elsewhere all the memory there is."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    group = root / "sys/fs/cgroup"
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cache = int(stat["inactive_file"])  # given back when it is needed
    except (OSError, ValueError, KeyError):  # no limit: the file is not there, or says "max"
        return free
    return max(0, min(free, limit - used + cache))
