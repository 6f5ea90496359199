"""Limits of an engine, by the engine's own names: what each may be, from Python or from a command line."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, NoReturn

from loreg.errors import UsageError

Limit = Callable[[str, Any], Any]
"""(name, value as given) → the value. Raises UsageError."""


def count(name: str, value: Any) -> int:
    """A whole number of at least 1, or its digits."""
    number = int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value
    if type(number) is not int or number < 1:
        _refuse(name, "a whole number of at least 1", value)
    return number


def one_of(*allowed: int) -> Limit:
    """One of these numbers."""

    def check(name: str, value: Any) -> int:
        number = count(name, value)
        if number not in allowed:
            _refuse(name, f"one of {', '.join(map(str, allowed))}", value)
        return number

    return check


def names(name: str, value: Any) -> frozenset[str]:
    """Names of modules: a list, or a text with commas between them."""
    found: Collection[Any] = (
        value.split(",") if isinstance(value, str) else list(value) if isinstance(value, Iterable) else ()
    )
    if not found or not all(isinstance(item, str) and item.strip() for item in found):
        _refuse(name, "names with commas between them", value)
    return frozenset(item.strip() for item in found)


def flag(name: str, value: Any) -> bool:
    """True or false, also in words."""
    found = {"true": True, "false": False}.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(found, bool):
        _refuse(name, "true or false", value)
    return found


def _refuse(name: str, expected: str, value: Any) -> NoReturn:
    raise UsageError(f"The limit {name} has to be {expected}, found {str(value)[:60]!r}.")
