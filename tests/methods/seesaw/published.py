"""What the release of Seesaw says of its networks: blocks, floors and maxima, rows of its table."""

from __future__ import annotations

# name: blocks per stage, blocks, ReLU floor, ReLU maximum
COUNTS = {
    "cifarsupermodel16": ((2, 2, 2, 2), 8, 28_672, 274_432),
    "cifarsupermodel22": ((2, 2, 2), 6, 24_576, 253_952),
    "cifarsupermodel26": ((2, 2), 4, 16_384, 212_992),
    "cifarsupermodel50": ((3, 4, 6, 3), 16, 28_672, 479_232),
    "cifarsupermodel80": ((3, 4, 16, 3), 26, 28_672, 643_072),
    "cifarsupermodel101": ((3, 4, 23, 3), 33, 28_672, 757_760),
    "cifarsupermodel152": ((3, 8, 36, 3), 50, 28_672, 1_101_824),
    "supermodel50": ((3, 4, 6, 3), 16, 87_808, 1_467_648),
    "supermodel101": ((3, 4, 23, 3), 33, 87_808, 2_320_640),
    "supermodel8": ((2, 2, 2), 6, 75_264, 777_728),
    "supermodel16": ((2, 4), 6, 50_176, 852_992),
}
# name, blocks with a ReLU counted from 1, total
MAPS = [
    ("cifarsupermodel50", (16,), 36_864),
    ("cifarsupermodel50", (4, 15, 16), 77_824),
    ("cifarsupermodel50", (4, 8, 9, 10, 16), 118_784),
    ("supermodel50", (16,), 112_896),
    ("supermodel50", (4, 11, 13, 14, 15, 16), 363_776),
    ("supermodel50", (1, 4, 11, 13, 14, 15, 16), 564_480),
    ("supermodel50", tuple(range(1, 17)), 1_467_648),
]
LONG = (16, (15, 16), 45_056)  # keys, enabled, total: published for cifarsupermodel16
SHORT = (33, (15, 18, 20, 23, 25, 28, 29, 30, 31, 32), 147_456)  # published for cifarsupermodel101


def entries(count: int, enabled: tuple[int, ...]) -> dict[str, int]:
    return {f"default_{k}": int(k in enabled) for k in range(1, count + 1)}
