"""Write unicode_tables.h: letters, numbers and canonical composition, as `unicode.cpp` reads them.

python runtimes/src/make_unicode_tables.py        (pip install unicodedata2 for a newer Unicode than Python's)
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

try:
    import unicodedata2 as unicodedata
except ImportError:
    import unicodedata  # type: ignore[no-redef]

EVERY = range(sys.maxunicode + 1)
HANGUL = range(0xAC00, 0xD7A4)  # composed by arithmetic


def ranges(points: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Runs of neighbours as (first, last)."""
    first = last = -2
    for point in points:
        if point != last + 1:
            if first >= 0:
                yield first, last
            first = point
        last = point
    yield first, last


def decomposed(point: int) -> list[int]:
    """Full canonical decomposition."""
    return [ord(c) for c in unicodedata.normalize("NFD", chr(point))]


def compositions() -> Iterator[tuple[int, int, int]]:
    """(first, second, composed), without those that normalization never composes."""
    for point in EVERY:
        parts = unicodedata.decomposition(chr(point)).split()
        if point in HANGUL or len(parts) != 2 or parts[0].startswith("<"):
            continue
        if unicodedata.normalize("NFC", chr(point)) == chr(point):
            yield int(parts[0], 16), int(parts[1], 16), point


def classes() -> Iterator[tuple[int, int, int]]:
    """Runs of one canonical combining class: (first, last, class)."""
    for wanted in sorted({unicodedata.combining(chr(p)) for p in EVERY} - {0}):
        for first, last in ranges(p for p in EVERY if unicodedata.combining(chr(p)) == wanted):
            yield first, last, wanted


def braced(value: int | Iterable[int]) -> str:
    """A number or a list in C++."""
    return f"{value:#x}" if isinstance(value, int) else "{" + ",".join(map(braced, value)) + "}"


def table(name: str, kind: str, rows: Iterable[Iterable[int | Iterable[int]]]) -> str:
    """One C++ array, as many rows a line as fit."""
    lines, line = [f"constexpr {kind} {name}[] = {{"], "   "
    for row in rows:
        cell = f" {braced(row)},"
        if len(line) + len(cell) > 118:
            lines.append(line)
            line = "   "
        line += cell
    return "\n".join([*lines, line, "};"])


def main() -> None:
    """All tables, beside this file."""
    category = {p: unicodedata.category(chr(p))[0] for p in EVERY if not 0xD800 <= p < 0xE000}
    nfd = {p: decomposed(p) for p in category if p not in HANGUL}
    parts = [
        f"// Written by make_unicode_tables.py from Unicode {unicodedata.unidata_version}.",
        "// clang-format off",
        "#pragma once",
        "",
        "namespace liger::unicode {",
        "",
        "struct Range { char32_t first, last; };",
        "struct Class { char32_t first, last, value; };",
        "struct Parts { char32_t whole, parts[4]; };",
        "struct Pair { char32_t first, second, whole; };",
        "",
        table("kLetters", "Range", ranges(p for p, kind in category.items() if kind == "L")),
        table("kNumbers", "Range", ranges(p for p, kind in category.items() if kind == "N")),
        table("kClasses", "Class", sorted(classes())),
        table("kParts", "Parts", ((p, to) for p, to in nfd.items() if to != [p])),
        table("kPairs", "Pair", sorted(compositions())),
        "",
        "}  // namespace liger::unicode",
        "// clang-format on",
    ]
    Path(__file__).with_name("unicode_tables.h").write_text("\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
