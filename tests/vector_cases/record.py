"""What one vector looks like, and how bytes stand in it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

Vector = dict[str, Any]


def valid(
    name: str, description: str, clauses: str, given: Any, result: Any = None, flags: Sequence[str] = ()
) -> Vector:
    """A vector that is accepted; ``clauses`` is a list separated by spaces."""
    return _vector(name, description, clauses, given, flags, {"expected": "valid", "result": result})


def rejected(name: str, description: str, clauses: str, given: Any, flags: Sequence[str] = ()) -> Vector:
    """A vector that is refused."""
    return _vector(name, description, clauses, given, flags, {"expected": "rejected"})


def _vector(
    name: str, description: str, clauses: str, given: Any, flags: Sequence[str], outcome: dict[str, Any]
) -> Vector:
    return {
        "id": name,
        "description": description,
        "clauses": clauses.split(),
        "flags": list(flags),
        "input": given,
        **outcome,
    }


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def document(data: bytes) -> dict[str, str]:
    """Bytes of a text: as text where they are UTF-8, else in base64."""
    try:
        return {"utf8": data.decode("utf-8")}
    except UnicodeDecodeError:
        return {"base64": b64(data)}
