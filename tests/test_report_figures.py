"""The pieces of the report: tile pictures, axes, classes of patches, numbers."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tightrope.nn.block_relu import tile_gate
from tightrope.report import figures, formats, svg, words


@given(st.integers(1, 20), st.integers(1, 20), st.data())
def test_the_picture_has_as_many_tiles_as_the_layer(H: int, W: int, data: st.DataObject) -> None:
    patch = (data.draw(st.integers(1, H)), data.draw(st.integers(1, W)))
    drawn = svg.tiled_map(patch, (H, W), "a0", "")
    rows = len(re.findall(r"M0 \d+H", drawn)) + 1
    columns = len(re.findall(r"M\d+ 0V", drawn)) + 1
    expected = tuple(tile_gate(torch.zeros(H, W), patch).shape)
    assert (rows, columns) == (expected if patch != (1, 1) else (1, 1))


@given(st.floats(1e-12, 1e12), st.floats(1e-12, 1e12), st.booleans())
def test_an_axis_holds_its_values_and_has_few_ticks(a: float, b: float, log: bool) -> None:
    axis = svg.axis("x", [a, b], str, log=log)
    places = [axis.place(v) for v in (a, b)]
    assert all(-1e-9 <= p <= 1 + 1e-9 for p in places)
    ticks = axis.ticks()
    assert len(ticks) <= svg.MOST_TICKS and ticks == sorted(set(ticks))
    assert log or len(ticks) >= 3


def test_an_axis_may_start_at_zero() -> None:
    assert svg.axis("x", [0.0, 0.0], str).ticks()[0] == 0


@pytest.mark.parametrize(
    ("patch", "style"),
    [((1, 1), "a0"), ((2, 2), "a1"), ((5, 1), "a2"), ((8, 8), "a3"), ((13, 5), "a4"), ((0, 0), "a-none")],
)
def test_patch_classes(patch: tuple[int, int], style: str) -> None:
    assert figures.area_style(patch) == style
    assert style in {known for known, _ in figures.area_legend()}


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (formats.size(999), "999 B"),
        (formats.size(999.9), "1.00 kB"),
        (formats.size(9_762_668), "9.76 MB"),
        (formats.size(3.2e15), "3200 TB"),
        (formats.duration(0.047), "0.05 ms"),
        (formats.duration(999.7), "1.00 s"),
        (formats.percent(0.12), "12.0 %"),
        (formats.percent(0.0001), "< 0.1 %"),
        (formats.percent(0.0), "0.0 %"),
        (formats.points(-0.0123), "−1.23 points"),
        (formats.significant(5.3e-6, 2), "5.3×10⁻⁶"),
        (formats.significant(1e-4), "10⁻⁴"),
        (formats.significant(12_345.0), "12,345"),
        (formats.gap(0.0), "0 %"),
        (formats.gap(None), "not predicted"),
        (formats.markdown("a|b <i>\n`c`"), "a\\|b &lt;i&gt; \\`c\\`"),
        (formats.markdown("drelus<=12%, a < b, </i <!-- <?"), "drelus<=12%, a < b, &lt;/i &lt;\\!-- &lt;?"),
        (formats.name("/home/me/work/runs/s1"), "runs/s1"),
        (
            words.settings({"relu_map": "", "limit": None, "keep": 0, "free": False, "sizes": []}),
            "relu map none, limit none, keep 0, free False, sizes none",
        ),
        (formats.name("/net.py:tiny"), "/net.py:tiny"),
        (formats.name("torchvision:resnet18"), "torchvision:resnet18"),
        (formats.name("arch:" + "x" * 60), "arch:" + "x" * 55 + "…"),
    ],
)
def test_numbers_as_people_read_them(shown: str, expected: str) -> None:
    assert shown == expected
