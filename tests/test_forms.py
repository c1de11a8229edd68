"""Damaged JSON: what nests too deeply, and what departs from its form."""

from __future__ import annotations

import json
import re

import pytest

from tightrope.forms import DEPTH, Amount, mismatch, parse


@pytest.mark.parametrize("depth", [DEPTH + 1, 900, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_deep_nesting_is_a_value_error(depth: int, opening: str, closing: str) -> None:
    with pytest.raises(ValueError, match="nested deeper"):
        parse(opening * depth + "1" + closing * depth)


def test_what_is_nested_as_usual_is_read() -> None:
    body = {"a": [[[{"b": [1, None]}]]], "c": "x"}
    assert parse(json.dumps(body)) == body
    with pytest.raises(ValueError, match="Expecting"):
        parse("{")


def test_a_key_given_twice_is_a_value_error() -> None:
    for text in ('{"a": 1, "b": 2, "b": 2}', '[{"c": {"b": 1, "b": 3, "d": 4}}]'):
        with pytest.raises(ValueError, match="the key b is given twice"):
            parse(text)


FORM = {
    "name": str,
    "size": int,
    "rate?": float,
    "spent?": Amount,
    "parts": [{"k": (int, type(None)), str: float}],
}
GOOD = {"name": "x", "size": 1, "parts": [{"k": None, "w": 1}, {"k": 2, "w": 0.5}], "other": [1]}


def test_what_fits_has_no_mismatch() -> None:
    assert mismatch(GOOD, FORM) is None
    assert mismatch(GOOD | {"rate": -3, "spent": 0}, FORM) is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": 3}, "name is 3, not a text"),
        ({"size": "x"}, 'size is "x", not a whole number'),
        ({"size": 1.5}, "size is 1.5"),
        ({"size": True}, "size is true"),
        ({"rate": "fast"}, "rate is .*not a number"),
        ({"rate": float("nan")}, "rate is NaN"),
        ({"rate": None}, "rate is null"),
        ({"rate": 10**400}, "rate is 1000"),
        ({"spent": -1}, "spent is -1, not a number, 0 or more"),
        ({"parts": {}}, "parts is {}, not a list"),
        ({"parts": [3]}, r"parts\[0\] is 3, not an object"),
        ({"parts": [{}]}, r"parts\[0\] lacks k"),
        ({"parts": [{"k": "x"}]}, r"parts\[0\]\.k is .*not a whole number or null"),
        ({"parts": [{"k": 1, "w": []}]}, r"parts\[0\]\.w is \[\]"),
    ],
)
def test_what_departs_is_named(change: dict[str, object], says: str) -> None:
    found = mismatch(GOOD | change, FORM)
    assert found is not None and re.search(says, found)
