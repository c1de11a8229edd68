"""The options of `tightrope run` that belong to one runtime, as settings of its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tightrope.errors import InputError
from tightrope.types import Json

if TYPE_CHECKING:
    from tightrope.bundle import Bundle

OWNERS: Mapping[str, str] = {
    "port": "mpc",
    "reveal": "mpc",
    "ring": "mpc",
    "network": "mpc",
    "profile": "mpc",
    "mode": "ckks",
    "log_n": "ckks",
    "scale_bits": "ckks",
    "memory_gb": "ckks",
    "bootstrap": "ckks",
    "refresh_levels": "ckks",
    "squares": "ckks",
}
NO_SETTINGS = ("profile", "mode")  # of predictions and of sessions


def settings(bundle: Bundle, runtime: str, asked: Mapping[str, Json]) -> dict[str, Json]:
    """What the configuration of `runtime` is made with; options that were not given (None) are left out.

    Raises InputError for an option of another runtime.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    for name in given:
        if OWNERS[name] != runtime:
            option = "--" + name.replace("_", "-")
            raise InputError(
                f"{option} is an option of the {OWNERS[name]} runtime",
                got=f"{option} with --runtime {runtime}",
            )
    made = {name: value for name, value in given.items() if name not in NO_SETTINGS}
    if "ring" in made:
        from tightrope import ring

        made |= ring.settings(bundle, made.pop("ring"))
    if "memory_gb" in made:
        gigabytes = made.pop("memory_gb")
        if not 1e-9 <= gigabytes < 1e6:  # 0 bytes would mean: as much as is free
            raise InputError("--memory-gb is out of range", got=gigabytes, allowed="positive, below 1e6")
        made["memory_bytes"] = int(gigabytes * 1e9)
    return made
