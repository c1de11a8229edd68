"""JSON that may have been damaged: read without surprises, and compared with the form it must have."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

DEPTH = 64  # nothing that Tightrope writes nests half as deep
LARGEST = sys.float_info.max


class Amount:
    """The form of a finite number, 0 or more."""


def parse(text: str | bytes) -> Any:
    """`json.loads`, with ValueError also for what nests too deeply to be worked with, and for a key twice."""
    try:
        body = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(f"nested deeper than {DEPTH} levels") from None
    level = [body]
    for _ in range(DEPTH):
        level = [child for value in level for child in _children(value)]
        if not level:
            return body
    raise ValueError(f"nested deeper than {DEPTH} levels")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in found if keys.count(key) > 1)} is given twice")
    return found


def mismatch(value: Any, form: Any, at: str = "") -> str | None:
    """Where and how `value`, as `parse` gives it, departs from `form`; None when it fits.

    A form is a type or several in a tuple (`float`: any finite number, `Amount`: one that is not negative,
    `object`: anything), `[form]` for a list, or a dict of forms by key: a key that ends in `?` may be
    absent, and the key `str` speaks for all keys that are not named, which otherwise may be anything.
    """
    if isinstance(form, list):
        if not isinstance(value, list):
            return _unlike(value, "a list", at)
        return _first(mismatch(v, form[0], f"{at}[{k}]") for k, v in enumerate(value))
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return _unlike(value, "an object", at)
        named = {k.removesuffix("?"): f for k, f in form.items() if k is not str}
        lacking = [k for k in form if k is not str and not k.endswith("?") and k not in value]
        if lacking:
            return f"{at or 'it'} lacks {', '.join(lacking)}"
        rest = form.get(str, object)
        return _first(mismatch(v, named.get(k, rest), f"{at}.{k}".lstrip(".")) for k, v in value.items())
    kinds = form if isinstance(form, tuple) else (form,)
    if any(_is(value, kind) for kind in kinds):
        return None
    return _unlike(value, " or ".join(_NAMES.get(kind, kind.__name__) for kind in kinds), at)


_NAMES: dict[type, str] = {
    float: "a number",
    Amount: "a number, 0 or more",
    int: "a whole number",
    str: "a text",
    dict: "an object",
    type(None): "null",
}


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind in (bool, object)
    if kind in (float, Amount):  # NaN lies in no interval
        lowest = 0.0 if kind is Amount else -LARGEST
        return isinstance(value, int | float) and lowest <= value <= LARGEST
    return isinstance(value, kind)


def _unlike(value: Any, wanted: str, at: str) -> str:
    return f"{at or 'it'} is {json.dumps(value)[:40]}, not {wanted}"


def _first(found: Iterator[str | None]) -> str | None:
    return next((text for text in found if text is not None), None)


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
