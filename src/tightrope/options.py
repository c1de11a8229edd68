"""Options of `run` that belong to one runtime, and of `search` to some methods, as settings of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
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
            option = flag(name)
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


def method_settings(method: str, asked: Mapping[str, Json], words: Sequence[str]) -> dict[str, Json]:
    """What the configuration of `method` is made with: options of `search` that were given (not None), and
    the words of --set.

    Raises InputError for an option that other methods have, and for two values of one setting.
    """
    from tightrope.methods import METHODS, method_type, parse_settings

    def known(name: str) -> set[str]:
        return {field.name for field in fields(method_type(name))}

    made = {name: value for name, value in asked.items() if value is not None}
    own = known(method)
    for name, value in made.items():
        if name not in own:
            raise InputError(
                f"{flag(name, value)} is no option of the method {method}",
                got=f"{_given(name, value)} with --method {method}",
                allowed="--method " + " or ".join(other for other in METHODS if name in known(other)),
            )
    for name, value in parse_settings(words, method_type(method)).items():
        if made.setdefault(name, value) != value:
            raise InputError(
                "a setting has two values", got=f"{_given(name, made[name])} and --set {name}={value}"
            )
    return made


def flag(name: str, value: Json = None) -> str:
    """The option of a setting; `value` False is that of a switch turned off."""
    return ("--no-" if value is False else "--") + name.replace("_", "-")


def _given(name: str, value: Json) -> str:
    return flag(name, value) if isinstance(value, bool) else f"{flag(name)} {value}"
