"""What queries are asked by: digests by their first digits, as people type them, and many values at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from loreg.errors import UsageError

Row = TypeVar("Row")

AT_ONCE = 1000
"""How many values a statement is given at once: databases bound that."""


def portions(values: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """``AT_ONCE`` at a time."""
    return (values[start : start + AT_ONCE] for start in range(0, len(values), AT_ONCE))


def between(prefix: str) -> tuple[str, str]:
    """The digests that start so are at least the first and less than the second, which an index answers, as
    LIKE is not. 'g' comes after every hex digit.

    Raises UsageError for anything but lower-case hex digits, with or without ``blake3:``.
    """
    digits = prefix.removeprefix("blake3:")
    if not digits or digits.strip("0123456789abcdef"):
        raise UsageError(f"{prefix!r} is not the start of a digest: expected lower-case hex digits.")
    return f"blake3:{digits}", f"blake3:{digits}g"


def only(prefix: str, what: str, found: Sequence[Row], names: Sequence[str]) -> Row:
    """The one that was found, else UsageError with the names of those that were."""
    if len(found) > 1:
        raise UsageError(f"{prefix!r} fits several {what}: {', '.join(names)}; give more digits.")
    return found[0]
