"""References to versions, and the expressions that `--apply` takes.

    sql   sql:prod   sql:v2   sql@blake3:9f2c…   owner/sql   0.7*sql + 0.3*humor   both - 0.5*humor

A weight is the IEEE double nearest to what was written, and its one text form is that of RFC 8785: ``0.70``
and ``7e-1`` are the same recipe. Names may hold a dash, so subtraction needs a space: ``a - b``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import NoReturn

import rfc8785

from loreg.errors import UsageError

_PART = r"[a-z0-9][a-z0-9._-]{0,127}"
_NAME = re.compile(rf"{_PART}(?:/{_PART})?")
_TAG = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_NUMBER_TAG = re.compile(r"v([1-9][0-9]{0,8})")
_DIGEST = re.compile(r"blake3:([0-9a-f]{8,64})")
# No two repeats of one kind meet: 100 kB of spaces or digits would otherwise take minutes.
_TERM = re.compile(
    r"\s*(?:(?P<sign>[+-])\s*)?(?:(?P<weight>(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?)\s*\*\s*)?(?P<reference>[^\s+*]+)\s*",
    re.ASCII | re.IGNORECASE,
)
_MAX_TERMS = 1024

_NAME_HELP = (
    "lower-case letters, digits, '.', '_' and '-', beginning with a letter or digit, at most 128 characters, "
    "optionally as 'owner/name'"
)


@dataclass(frozen=True, slots=True)
class Reference:
    """A name, and at most one of: a tag, a version number, a prefix (8 to 64 hex digits) of a digest."""

    name: str | None
    tag: str | None = None
    number: int | None = None
    digest_prefix: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Parse ``name``, ``name:tag``, ``name:vN``, ``name@blake3:hex`` or ``blake3:hex`` [E1, E2].

        Raises UsageError.
        """
        if bare := _DIGEST.fullmatch(text):
            return cls(None, digest_prefix=bare[1])
        name, at, digest = text.partition("@")
        if at:
            if not (match := _DIGEST.fullmatch(digest)):
                raise UsageError(f"{text!r}: expected '@blake3:' and 8 to 64 hex digits, found '@{digest}'.")
            return cls(check_name(name), digest_prefix=match[1])
        name, colon, tag = name.partition(":")
        if not colon:
            return cls(check_name(name))
        if match := _NUMBER_TAG.fullmatch(tag):
            return cls(check_name(name), number=int(match[1]))
        if not _TAG.fullmatch(tag):
            raise UsageError(f"{text!r}: {tag!r} is not a tag: expected {_NAME_HELP}.")
        return cls(check_name(name), tag=tag)

    def __str__(self) -> str:
        if self.digest_prefix is not None:
            return f"{self.name}@blake3:{self.digest_prefix}" if self.name else f"blake3:{self.digest_prefix}"
        if self.number is not None:
            return f"{self.name}:v{self.number}"
        return f"{self.name}:{self.tag}" if self.tag else str(self.name)


@dataclass(frozen=True, slots=True)
class Term:
    """One summand of an expression: a weight (finite double) times an adapter."""

    weight: float
    reference: Reference


def check_name(text: str) -> str:
    """The name itself, or UsageError [E1]."""
    if not _NAME.fullmatch(text):
        raise UsageError(f"{text!r} is not a name: expected {_NAME_HELP}.")
    return text


def check_tag(text: str) -> str:
    """A tag that a person may set [E2]: ``v3`` is refused, because it would hide version 3. UsageError."""
    if not _TAG.fullmatch(text):
        raise UsageError(f"{text!r} is not a tag: expected {_NAME_HELP.partition(', optionally')[0]}.")
    if _NUMBER_TAG.fullmatch(text):
        raise UsageError(f"{text!r} cannot be a tag: it means version number {text[1:]}; choose another word.")
    return text


def parse_expression(text: str) -> tuple[Term, ...]:
    """Parse a weighted sum [E3], terms in the order written. Raises UsageError naming the place."""

    def refuse(expected: str) -> NoReturn:
        found = repr(text[position : position + 12]) if position < len(text) else "the end"
        raise UsageError(f"In {text!r}, at character {position + 1}: expected {expected}, found {found}.")

    terms: list[Term] = []
    position, end = 0, len(text.rstrip())
    while position < end or not terms:
        match = _TERM.match(text, position)
        if match is None:
            refuse("an adapter such as 'sql' or '0.7*sql'")
        if terms and not match["sign"]:
            refuse("'+' or ' - ' between two terms")
        weight = float(match["weight"] or 1)
        if not math.isfinite(weight):
            refuse("a weight that a double can hold")
        reference = Reference.parse(match["reference"])
        terms.append(Term(-weight if match["sign"] == "-" else weight, reference))
        position = match.end()
    if len(terms) > _MAX_TERMS:
        raise UsageError(f"The expression has {len(terms):,} terms: expected at most {_MAX_TERMS:,}.")
    return tuple(terms)


def format_weight(weight: float) -> str:
    """The one text form of a finite double [R2]: that of RFC 8785. Raises UsageError for NaN and infinity."""
    if not math.isfinite(weight):
        raise UsageError(f"{weight} is not a weight: expected a finite number.")
    return rfc8785.dumps(float(weight)).decode("ascii")
