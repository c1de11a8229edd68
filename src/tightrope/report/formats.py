"""Numbers as people read them: grouped thousands, decimal prefixes, always a unit; and text for Markdown."""

from __future__ import annotations

import math
import re

from tightrope.types import Budget

_METRICS = {
    "drelus": "DReLUs", "online_bytes": "online bytes", "offline_bytes": "offline bytes",
    "online_ms": "online milliseconds", "offline_ms": "offline milliseconds", "macs": "MACs",
    "ckks_levels": "CKKS levels",
}  # fmt: skip
ABSENT = "not measured"
LONG = 60  # characters of a network in a title
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_BYTES = ("B", "kB", "MB", "GB", "TB")


def count(x: float) -> str:
    """12,345; at most one decimal."""
    return f"{x:,.0f}" if float(x).is_integer() else f"{x:,.1f}"


def amount(x: float) -> str:
    """Of any quantity: counts in full, fractions to three digits."""
    return f"{x:,.0f}" if x >= 1000 or float(x).is_integer() else f"{x:.3g}"


def percent(x: float, digits: int = 1) -> str:
    """Of a fraction: 0.12 -> 12.0 %. Below the last digit shown, `< 0.1 %` rather than a false zero."""
    least = 10.0**-digits
    if 0 < abs(x) * 100 < least / 2:
        return f"< {least:g} %"
    return f"{x * 100:.{digits}f} %"


def points(difference: float) -> str:
    """A difference of two fractions in percentage points, with its sign."""
    sign = "+" if difference > 0 else "−" if difference < 0 else "±"
    return f"{sign}{abs(difference) * 100:.2f} points"


def significant(x: float, digits: int = 3) -> str:
    """0.531, 12,300, 5.3×10⁻⁶, 10⁻⁴."""
    if x == 0 or 1e-3 <= abs(x) < 1e6:
        return f"{x:.{digits}g}" if abs(x) < 10**digits else f"{x:,.0f}"
    mantissa, _, exponent = f"{x:.{digits - 1}e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    power = "10" + str(int(exponent)).translate(_RAISED)
    return power if mantissa == "1" else f"{mantissa}×{power}"


def metric(name: str) -> str:
    return _METRICS.get(name, name.replace("_", " "))


def left(metric: str) -> str:
    """What a plan does with a quantity: DReLUs of the network are kept, others are used."""
    return "kept" if metric == "drelus" else "used"


def plural(noun: str) -> str:
    return f"{noun}es" if noun.endswith("ch") else f"{noun}s"


def different(count: int, noun: str) -> str:
    """1 different patch, 2 different patches."""
    return f"{count} different {noun if count == 1 else plural(noun)}"


def budget(limits: Budget) -> str:
    """drelus<=12% -> DReLUs ≤ 12 %."""
    return ", ".join(
        f"{metric(x.metric)} ≤ {significant(x.value * 100) + ' %' if x.relative else count(x.value)}"
        for x in limits.limits
    )


def size(n: float) -> str:
    """Bytes with a decimal prefix and three digits: 9.76 MB."""
    power = 0
    while n >= 999.5 and power < len(_BYTES) - 1:
        n, power = n / 1000, power + 1
    return f"{n:.0f} B" if power == 0 else f"{n:.{_decimals(n)}f} {_BYTES[power]}"


def duration(ms: float) -> str:
    """Milliseconds, or seconds from one second on."""
    value, unit = (ms, "ms") if ms < 999.5 else (ms / 1000, "s")
    return f"{value:.{_decimals(value)}f} {unit}"


def milliseconds(ms: float) -> str:
    """For columns that name the unit: one decimal."""
    return f"{ms:,.1f}"


def _decimals(x: float) -> int:
    """How many decimals show three digits."""
    return 2 if x < 9.995 else 1 if x < 99.95 else 0


def shape(sides: tuple[int, ...] | list[int]) -> str:
    return " × ".join(map(str, sides))


def patch(sides: tuple[int, int]) -> str:
    return "identity" if sides == (0, 0) else f"{sides[0]}×{sides[1]}"


def gap(relative: float | None) -> str:
    """|measured - predicted| / predicted; infinite where nothing was predicted."""
    if relative is None:
        return "not predicted"
    return "predicted 0" if math.isinf(relative) else percent(relative, 2) if relative else "0 %"


def name(spec: str) -> str:
    """Of a network, for a title: of a path the last two parts, and not longer than a line."""
    shown = "/".join(spec.split("/")[-2:]) if spec.startswith("/") else spec
    return shown if len(shown) <= LONG else shown[:LONG] + "…"


def markdown(text: object) -> str:
    """Text that Markdown and the HTML made of it show literally, also inside a table.

    A `<` that cannot begin a tag, as in `drelus<=12%`, stays as it is: the text itself is read, too.
    """
    flat = " ".join(str(text).split()).replace("&", "&amp;").replace(">", "&gt;")
    flat = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", flat)
    return "".join(f"\\{c}" if c in "\\`*_{}[]#|!" else c for c in flat)
