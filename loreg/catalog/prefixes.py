"""Digests by their first digits, as people type them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from sqlalchemy import Text, type_coerce
from sqlalchemy.orm import InstrumentedAttribute

from loreg.digest import Digest
from loreg.errors import UsageError

Row = TypeVar("Row")


def starts_with(column: InstrumentedAttribute[Digest], prefix: str) -> tuple[Any, Any]:
    """Conditions that an index answers, as LIKE does not. 'g' comes after every hex digit.

    Raises UsageError for anything but lower-case hex digits, with or without ``blake3:``.
    """
    digits = prefix.removeprefix("blake3:")
    if not digits or digits.strip("0123456789abcdef"):
        raise UsageError(f"{prefix!r} is not the start of a digest: expected lower-case hex digits.")
    text = type_coerce(column, Text)
    return text >= f"blake3:{digits}", text < f"blake3:{digits}g"


def only(prefix: str, what: str, found: Sequence[Row], names: Sequence[str]) -> Row:
    """The one that was found, else UsageError with the names of those that were."""
    if len(found) > 1:
        raise UsageError(f"{prefix!r} fits several {what}: {', '.join(names)}; give more digits.")
    return found[0]
