"""Reading a JSON object field by field: every field is taken once, and none may be left over.

A field that a reader does not know is refused [M2], as it may change what the known ones mean. What is free
goes into ``annotations``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NoReturn, Self

from loreg.digest import Digest
from loreg.errors import BadInput

_SHA256 = re.compile(r"[0-9a-f]{64}")


class Fields:
    """A JSON object at ``path`` of a document. As a context it refuses, on leaving, fields nobody took."""

    def __init__(self, value: object, path: str) -> None:
        self.path = path
        if not isinstance(value, dict):
            raise BadInput(f"{path}: expected an object, found {_kind(value)}.")
        self._rest: dict[str, Any] = dict(value)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._rest:
            raise BadInput(f"{self.path}: unknown field {min(self._rest)!r}; a newer format, or a mistake.")

    def refuse(self, key: str, expected: str, found: object) -> NoReturn:
        raise BadInput(f"{self.path}.{key}: expected {expected}, found {_kind(found)}.")

    def take(self, key: str) -> Any:
        if key not in self._rest:
            raise BadInput(f"{self.path}: the field {key!r} is missing.")
        return self._rest.pop(key)

    def has(self, key: str) -> bool:
        """Whether the field is there: for one that is left out where it would say nothing."""
        return key in self._rest

    def text(self, key: str) -> str:
        value = self.take(key)
        return value if isinstance(value, str) else self.refuse(key, "text", value)

    def choice(self, key: str, *allowed: str) -> str:
        value = self.take(key)
        return str(value) if value in allowed else self.refuse(key, f"one of {', '.join(allowed)}", value)

    def optional_text(self, key: str) -> str | None:
        value = self.take(key)
        return value if value is None or isinstance(value, str) else self.refuse(key, "text or null", value)

    def flag(self, key: str) -> bool:
        value = self.take(key)
        return value if isinstance(value, bool) else self.refuse(key, "true or false", value)

    def natural(self, key: str, minimum: int = 0) -> int:
        value = self.take(key)
        if type(value) is not int or value < minimum:
            self.refuse(key, f"a whole number of at least {minimum}", value)
        return value

    def optional_natural(self, key: str, minimum: int = 0) -> int | None:
        if self._rest.get(key, 0) is None:
            self.take(key)
            return None
        return self.natural(key, minimum)

    def real(self, key: str) -> float:
        """A finite double. An integer stands for the same double: RFC 8785 writes 2.0 as 2."""
        value = self.take(key)
        try:
            number = float(value) if type(value) in (int, float) else math.nan
        except OverflowError:  # an integer of hundreds of digits
            number = math.inf
        return number if math.isfinite(number) else self.refuse(key, "a finite number", value)

    def optional_real(self, key: str) -> float | None:
        if self._rest.get(key, 0) is None:
            self.take(key)
            return None
        return self.real(key)

    def digest(self, key: str) -> Digest:
        try:
            return Digest.parse(self.take(key))
        except BadInput as error:
            raise BadInput(f"{self.path}.{key}: {error}") from None

    def sha256(self, key: str) -> str:
        value = self.text(key)
        return value if _SHA256.fullmatch(value) else self.refuse(key, "64 lower-case hex digits", value)

    def shape(self, key: str) -> tuple[int, ...]:
        value = self.take(key)
        if not isinstance(value, list) or not all(type(size) is int and size >= 0 for size in value):
            self.refuse(key, "a list of whole numbers", value)
        return tuple(value)

    def items(self, key: str) -> Iterator[Fields]:
        """The objects of a list."""
        value = self.take(key)
        if not isinstance(value, list):
            self.refuse(key, "a list", value)
        return (Fields(item, f"{self.path}.{key}[{index}]") for index, item in enumerate(value))

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.take(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.refuse(key, "a list of texts", value)
        return tuple(value)

    def object(self, key: str) -> Fields:
        return Fields(self.take(key), f"{self.path}.{key}")

    def optional_object(self, key: str) -> Fields | None:
        value = self.take(key)
        return None if value is None else Fields(value, f"{self.path}.{key}")

    def mapping(self, key: str) -> Iterator[tuple[str, Fields]]:
        """The named objects of an object."""
        for name, value in self.raw_object(key).items():
            yield name, Fields(value, f"{self.path}.{key}[{name!r}]")

    def digests(self, key: str) -> dict[str, Digest]:
        """An object from names to digests."""
        value = self.raw_object(key)
        try:
            return {name: Digest.parse(text) for name, text in value.items()}
        except BadInput as error:
            raise BadInput(f"{self.path}.{key}: {error}") from None

    def raw_object(self, key: str) -> dict[str, Any]:
        value = self.take(key)
        return value if isinstance(value, dict) else self.refuse(key, "an object", value)


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return repr(value[:60])
    if isinstance(value, bool | int | float):
        return str(value)
    return "an object" if isinstance(value, dict) else "a list"
