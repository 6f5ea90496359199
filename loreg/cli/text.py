"""Values as people read them. Nothing here is for programs: those get ``--json``."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TextIO

import click

_DIGEST = re.compile(r"(blake3:[0-9a-f]{12})[0-9a-f]{52}")
_AGES = ((365 * 86400, "y"), (30 * 86400, "mo"), (7 * 86400, "w"), (86400, "d"), (3600, "h"), (60, "min"))
_GAP = "  "


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person looks at it. A program that was started without a stream has None in its place."""
    return stream is not None and stream.isatty()


def shorten(text: str) -> str:
    """Digests to twelve digits, which a reference to one may have too."""
    return _DIGEST.sub(r"\1", text)


def legible(text: str) -> str:
    """Control characters and lone surrogates escaped: names come out of files, and a terminal obeys some."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def size(count: float) -> str:
    """Bytes in decimal units: 999 B, 1.2 kB, 34 MB."""
    units = iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while count >= 999.5 and (larger := next(units, None)):
        count, unit = count / 1000, larger
    return f"{count:.0f} {unit}" if unit == "B" or count >= 9.95 else f"{count:.1f} {unit}"


def age(then: datetime, now: datetime | None = None) -> str:
    """The time since ``then`` in its largest whole unit: ``5 min``, ``3 w``."""
    seconds = ((now or datetime.now(UTC)) - then).total_seconds()
    return next((f"{seconds // length:.0f} {unit}" for length, unit in _AGES if seconds >= length), "now")


def moment(then: datetime) -> str:
    return f"{then.astimezone(UTC):%Y-%m-%d %H:%M} UTC ({age(then)})"


def plural(count: int, thing: str, things: str | None = None) -> str:
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {things or thing + 's'}"


def fields(pairs: Iterable[tuple[str, object]]) -> str:
    """``name  value`` lines, aligned; a value of several lines is indented, one that is empty or None left out."""
    kept = [(name, str(value)) for name, value in pairs if value is not None and value != ""]
    width = max((len(name) for name, _ in kept), default=0)
    lines = []
    for name, value in kept:
        first, *others = [legible(line) for line in value.split("\n")]
        lines.append(f"{click.style(name.ljust(width), dim=True)}{_GAP}{first}")
        lines += [f"{' ' * width}{_GAP}{line}" for line in others]
    return "\n".join(lines)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[int] = (), give: int) -> str:
    """Aligned columns; those in ``right`` to the right. On a terminal, column ``give`` is cut until a line fits."""
    cells = [[legible(shorten(cell)) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    if is_terminal(sys.stdout):
        excess = sum(widths) + len(_GAP) * (len(widths) - 1) - shutil.get_terminal_size().columns
        widths[give] = max(min(widths[give], len(header[give]), 8), widths[give] - max(0, excess))
    rightwards = frozenset(right)
    lines = []
    for row in cells:
        cut = [
            cell if len(cell) <= width else cell[: width - 1] + "…" for cell, width in zip(row, widths, strict=True)
        ]
        aligned = (
            cell.rjust(width) if column in rightwards else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cut, widths, strict=True))
        )
        lines.append(_GAP.join(aligned).rstrip())
    return "\n".join([click.style(lines[0], bold=True), *lines[1:]])
