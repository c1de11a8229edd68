"""The published files that say which blocks keep their ReLU: JSON `{"default_1": 1, "default_2": 0, ...}`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from tightrope.errors import InputError
from tightrope.forms import parse
from tightrope.methods.seesaw.space import Space
from tightrope.types import Json, atomic_write

FORM = '{"default_1": 0 or 1, "default_2": ...}'
_KEY = re.compile(r"default_([1-9][0-9]{0,5})")


def from_json(body: Json, space: Space, where: str = "ReLU map") -> tuple[bool, ...]:
    """Whether each block of `space`, in order, has a ReLU.

    Raises InputError unless there is exactly one key a block: the published loader ignored the others, and so
    took maps of other networks.
    """
    count = sum(space.blocks)
    if not isinstance(body, dict) or not body:
        raise InputError("not a ReLU map", where=where, allowed=FORM)
    numbers = {}
    for key, value in body.items():
        match = _KEY.fullmatch(key)
        if match is None or isinstance(value, bool) or value not in (0, 1):
            got = f"{key[:40]}: {json.dumps(value)[:40]}"
            raise InputError("not an entry of a ReLU map", where=where, got=got, allowed=FORM)
        numbers[int(match.group(1))] = value == 1
    if set(numbers) != set(range(1, count + 1)):
        raise InputError(
            "the ReLU map belongs to another network",
            where=where,
            got=f"{len(numbers)} entries up to default_{max(numbers)}",
            allowed=f"default_1 to default_{count}, for the blocks of {space.name}",
        )
    return tuple(numbers[k] for k in range(1, count + 1))


def read(path: Path, space: Space) -> tuple[bool, ...]:
    """See `from_json`. Raises InputError also for a file that is missing or no JSON."""
    try:
        body = parse(path.read_bytes())
    except OSError as error:
        raise InputError("cannot read the ReLU map", where=str(path), got=error.strerror) from None
    except ValueError as error:
        got = "no text" if isinstance(error, UnicodeDecodeError) else error
        raise InputError("the ReLU map is no JSON", where=str(path), got=got, allowed=FORM) from None
    return from_json(body, space, str(path))


def write(path: Path, on: Sequence[bool]) -> None:
    """Keep whether each block, in order, has a ReLU, as `read` takes it; a file that is there is replaced."""
    body = {f"default_{k}": int(enabled) for k, enabled in enumerate(on, 1)}
    atomic_write(path, lambda f: f.write((json.dumps(body, indent=1) + "\n").encode()))
