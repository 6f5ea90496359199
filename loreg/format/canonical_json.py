"""Canonical JSON: RFC 8785 out, a strict subset of RFC 8259 in.

Two parsers that disagree about a document are a way to make one digest mean two things, so everything on
which parsers are known to disagree is refused: duplicate keys, integers that a double cannot hold, lone
surrogates, byte order marks, NaN, and nesting that overflows somebody's stack.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

import rfc8785

from loreg.errors import BadInput

Json = dict[str, Any] | list[Any] | str | int | float | bool | None

MAX_BYTES = 64 << 20
MAX_DEPTH = 64
MAX_INTEGER = 2**53 - 1

# Possessive, and a string may lack its end: 40 kB of `\"` took 30 s to backtrack through, and 20 MB of text 2 GB.
_BRACKETS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)
_QUOTE = ord('"')
_SURROGATE = re.compile("[\ud800-\udfff]")


def dumps(value: Json) -> bytes:
    """The canonical form of ``value`` as UTF-8 [J6]. Raises BadInput for what ``loads`` would not read back."""
    try:
        # In C, where that writes the same: a manifest has thousands of values, and a push writes it, a resolve again.
        return json.dumps(_plain(value), ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
    except _NotPlain:
        pass
    try:
        _check_writable(value)
        return rfc8785.dumps(value)
    except (rfc8785.CanonicalizationError, UnicodeEncodeError, RecursionError) as error:
        raise BadInput(f"A value has no canonical JSON form: {error}.") from error


def loads(data: bytes, *, what: str = "JSON document", max_bytes: int = MAX_BYTES) -> Json:
    """Parse strictly [J1–J5]. ``what`` names the document in errors. Raises BadInput."""

    def refuse(reason: str) -> NoReturn:
        raise BadInput(f"The {what} is not acceptable JSON: {reason}.")

    if len(data) > max_bytes:  # [J5]
        refuse(f"it has {len(data):,} bytes, and at most {max_bytes:,} are read")
    if data.startswith(b"\xef\xbb\xbf"):  # [J1]
        refuse("it begins with a byte order mark")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:  # [J1]
        refuse(f"byte {error.start} is not UTF-8")
    if _depth(data) > MAX_DEPTH:  # [J5]
        refuse(f"it nests deeper than {MAX_DEPTH} levels")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):  # [J2]; also finds "a" beside "\u0061", as keys arrive unescaped
            seen: set[str] = set()
            for key, _ in items:
                if key in seen:
                    refuse(f"the key {key!r} occurs twice in one object")
                seen.add(key)
        for key in result:
            if _SURROGATE.search(key):
                refuse(f"the key {key!r} holds half of a surrogate pair")
        return result

    def integer(digits: str) -> int:
        if digits == "-0":  # [J3]: the integer 0 to some parsers, the double -0 to others
            refuse("-0 is not an integer")
        # The length test comes first: int() of a million digits takes minutes.
        if len(digits) > 17 or abs(int(digits)) > MAX_INTEGER:  # [J3]
            refuse(f"the integer {digits[:24]} does not fit a double exactly")
        return int(digits)

    def real(digits: str) -> float:
        value = float(digits)
        if value in (float("inf"), float("-inf")):  # [J3]
            refuse(f"the number {digits[:24]} is larger than a double can hold")
        return value

    def constant(name: str) -> NoReturn:
        refuse(f"{name} is not a JSON number")  # [J3]

    try:
        value: Json = json.loads(
            text, object_pairs_hook=pairs, parse_int=integer, parse_float=real, parse_constant=constant
        )
    except json.JSONDecodeError as error:
        refuse(f"{error.msg} at byte {len(text[: error.pos].encode())}")
    if "\\u" in text and _holds_surrogate(value):  # [J4]: only an escape can smuggle one in
        refuse("a string holds half of a surrogate pair")
    return value


def loads_canonical(data: bytes, *, what: str = "JSON document") -> Json:
    """Parse, and require that the bytes are the canonical form of what they say [J6]."""
    value = loads(data, what=what)
    if dumps(value) != data:
        raise BadInput(f"The {what} is not in canonical form (RFC 8785): its digest is not its identity.")
    return value


def _depth(data: bytes) -> int:
    depth = deepest = 0
    for token in _BRACKETS.finditer(data):
        first = data[token.start()]
        if first != _QUOTE:
            depth += 1 if first in b"[{" else -1
            deepest = max(deepest, depth)
    return deepest


class _NotPlain(Exception):
    """A value that the standard library writes otherwise than RFC 8785, or that has to be looked at more closely."""


def _plain(value: Any, depth: int = 0) -> Any:
    """The same with whole numbers as integers. Raises _NotPlain, for numbers with an exponent among others."""
    kind = type(value)
    if kind is str:
        if not value.isascii() and _SURROGATE.search(value):
            raise _NotPlain
        return value
    if kind is dict and depth < MAX_DEPTH:
        # Of other keys the order is another one by UTF-16.
        if not all(type(key) is str and key.isascii() for key in value):
            raise _NotPlain
        return {key: _plain(item, depth + 1) for key, item in value.items()}
    if kind in (list, tuple) and depth < MAX_DEPTH:
        return [_plain(item, depth + 1) for item in value]
    if value is None or kind is bool:
        return value
    if kind is float and value.is_integer():
        kind, value = int, int(value)
    if kind is int and -MAX_INTEGER <= value <= MAX_INTEGER:
        return value
    if kind is float and 1e-4 <= abs(value) < 1e15:
        return value
    raise _NotPlain


def _check_writable(value: Json, depth: int = 0) -> None:
    if isinstance(value, float) and MAX_INTEGER < abs(value) < 1e21 and value.is_integer():  # [J3]
        raise BadInput(f"The number {value} has no canonical JSON form: as an integer it is beyond 2^53 - 1.")
    if isinstance(value, dict | list | tuple):
        if depth == MAX_DEPTH:  # [J5]
            raise BadInput(f"A value has no canonical JSON form: it nests deeper than {MAX_DEPTH} levels.")
        for item in value.values() if isinstance(value, dict) else value:
            _check_writable(item, depth + 1)


def _holds_surrogate(value: Json) -> bool:
    if isinstance(value, str):
        return _SURROGATE.search(value) is not None
    if isinstance(value, list):
        return any(_holds_surrogate(item) for item in value)
    if isinstance(value, dict):
        return any(_holds_surrogate(item) for item in value.values())
    return False
