"""A stranger's regular expressions, matched with module paths in a number of steps that is bounded.

Python's ``re`` tries one way after another, and takes years for ``(a|a)*b`` or, on a long path, for ``.*.*.*x``. Here
all ways are followed at once (Thompson, "Regular expression search algorithm", CACM 11(6), 1968): what is kept is the
set of places that the expression can have come to, as the bits of an integer, bit i for the place before character i.
A run over one character class is an addition, whose carry goes through the run (Myers, "A fast bit-vector algorithm
for approximate string matching", J. ACM 46(3), 1999). Whether an expression fits is the same as for ``re``, whose own
parser reads it. What is not regular, such as a reference to a group, is refused, as are flags.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from re import _parser  # type: ignore[attr-defined]  # has the syntax tree; what it may have new is refused by name
from typing import Any, TypeAlias

from loreg.errors import BadInput, Unsupported

_PATTERN_LENGTH = 4096
_PATH_LENGTH = 512  # the longest path of a model in transformers has 90 characters or so
_STEPS = 20_000  # of one expression with one path; the longest in use take a few hundred

_LITERAL = re.compile(r"(?:[\w/-]|\\[.\-])+", re.ASCII)
_DOTTED = re.compile(r"[\w./-]+", re.ASCII)
_WORD = re.compile(r"\w")
_CATEGORIES: Mapping[str, re.Pattern[str]] = {
    "CATEGORY_DIGIT": re.compile(r"\d"),
    "CATEGORY_NOT_DIGIT": re.compile(r"\D"),
    "CATEGORY_SPACE": re.compile(r"\s"),
    "CATEGORY_NOT_SPACE": re.compile(r"\S"),
    "CATEGORY_WORD": _WORD,
    "CATEGORY_NOT_WORD": re.compile(r"\W"),
}

Node: TypeAlias = tuple[Any, Any]
"""An operation of ``re``'s syntax tree, and what it is about."""


def check(pattern: str, where: str) -> None:
    """Raises BadInput, naming ``where``, for what is no regular expression, Unsupported for one not handled here."""
    try:
        _tree(pattern)
        _tree(_as_end(pattern))  # as it is used: flags, for one, are no more at its beginning
    except BadInput as error:
        raise type(error)(f"{where}: {error}") from error


def fits(pattern: str, path: str) -> bool:
    """Whether the expression matches all of the path. Raises what ``check`` does, and Unsupported for too many steps
    or too long a path."""
    text = _Text(_checked(path), pattern)
    return bool(_after(_tree(pattern), 1, text) >> len(path) & 1)


def fits_end(pattern: str, path: str) -> bool:
    """Whether the expression matches the path, or what follows one of its dots: as ``(.*\\.)?(PATTERN)$``. Raises as
    ``fits`` does."""
    _checked(path)
    lines = "\n" in path  # to ``.`` and ``$`` a character of its own
    if _LITERAL.fullmatch(pattern) and not lines:  # nearly all are names, and there may be one for each module
        name = pattern.replace("\\", "")
        return path == name or path.endswith(f".{name}")
    if _DOTTED.fullmatch(pattern) and not lines:
        end = path[-len(pattern) :]
        begins = len(path) == len(pattern) or path[: -len(pattern)].endswith(".")
        return begins and len(end) == len(pattern) and all(a in (b, ".") for a, b in zip(pattern, end, strict=True))
    return bool(_after(_tree(_as_end(pattern)), 1, _Text(path, pattern)))


def _as_end(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _checked(path: str) -> str:
    if len(path) > _PATH_LENGTH:
        raise BadInput(
            f"The module path {path[:60]!r}… has {len(path)} characters: expected {_PATH_LENGTH} at most, as "
            "patterns of the config are matched with it."
        )
    return path


@lru_cache(maxsize=1024)
def _tree(pattern: str) -> tuple[Node, ...]:
    if len(pattern) > _PATTERN_LENGTH:
        raise Unsupported(
            f"the expression {pattern[:60]!r}… has {len(pattern)} characters, and {_PATTERN_LENGTH} at most are "
            "matched: write it shorter."
        )
    try:
        tree = _parser.parse(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise BadInput(f"{pattern[:60]!r} is not a regular expression: {error}.") from error
    if tree.state.flags != re.UNICODE:
        raise _refused("flags", pattern)
    nodes = tuple(tree)
    for name in _names(nodes):
        if name not in _STEP:
            raise _refused(name, pattern)
    return nodes


def _refused(what: str, pattern: str) -> Unsupported:
    why = "" if what == "flags" else ", as it can take for ever"
    return Unsupported(
        f"the expression {pattern[:60]!r} has {what}, which is not matched here{why}: write it without."
    )


def _names(nodes: Iterable[Node]) -> Iterator[str]:
    """The operations of a tree: those of one character count as what they are."""
    for operation, about in nodes:
        name = str(operation)
        yield name
        if name == "IN":
            for kind, value in about:
                yield "IN" if str(kind) in ("NEGATE", "LITERAL", "RANGE") or str(value) in _CATEGORIES else str(kind)
        elif name == "AT":
            yield "AT" if str(about) in _PLACES else str(about)
        elif name == "SUBPATTERN":
            yield "flags" if about[1] or about[2] else name
            yield from _names(about[3])
        elif name == "BRANCH":
            for branch in about[1]:
                yield from _names(branch)
        elif name in ("MAX_REPEAT", "MIN_REPEAT"):
            yield from _names(about[2])
        elif name in ("ASSERT", "ASSERT_NOT"):
            yield from _names(about[1])


@dataclass(slots=True)
class _Text:
    """A path, and the places before each kind of character in it. ``pattern``: for messages."""

    path: str
    pattern: str
    steps: int = 0
    characters: dict[str, int] = field(default_factory=dict)
    kinds: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for place, character in enumerate(self.path):
            self.characters[character] = self.characters.get(character, 0) | 1 << place

    def before(self, accepts: Callable[[str], bool]) -> int:
        """The places before the characters that are accepted."""
        return sum(places for character, places in self.characters.items() if accepts(character))

    def count(self) -> None:
        self.steps += 1
        if self.steps > _STEPS:
            raise Unsupported(
                f"The expression {self.pattern[:60]!r} takes over {_STEPS:,} steps to match {self.path[:60]!r}: "
                "write it with fewer repetitions in each other."
            )


def _after(nodes: Iterable[Node], places: int, text: _Text) -> int:
    """Where the operations, one after the other, can lead to from any of ``places``."""
    for operation, about in nodes:
        if not places:
            return 0
        text.count()
        places = _STEP[str(operation)](operation, about, places, text)
    return places


def _places_of(place: int) -> Iterator[int]:
    while place:
        yield (place & -place).bit_length() - 1
        place &= place - 1


def _kind(operation: Any, about: Any, text: _Text) -> int:
    """The places before the characters that an operation of one character accepts."""
    name = str(operation)
    if name == "LITERAL":
        return text.characters.get(chr(about), 0)
    if name == "NOT_LITERAL":
        return text.before(lambda character: ord(character) != about)
    if name == "ANY":
        return text.before(lambda character: character != "\n")
    if id(about) not in text.kinds:  # the tree is kept, so that no other has its identity
        text.kinds[id(about)] = text.before(lambda character: _is_in(about, character))
    return text.kinds[id(about)]


def _is_in(about: Iterable[Node], character: str) -> bool:
    negated, found = False, False
    for kind, value in about:
        name = str(kind)
        if name == "NEGATE":
            negated = True
        elif name == "LITERAL":
            found |= ord(character) == value
        elif name == "RANGE":
            found |= value[0] <= ord(character) <= value[1]
        else:
            found |= _CATEGORIES[str(value)].match(character) is not None
    return found != negated


def _one(operation: Any, about: Any, places: int, text: _Text) -> int:
    return (places & _kind(operation, about, text)) << 1


def _group(operation: Any, about: Any, places: int, text: _Text) -> int:
    return _after(about[3], places, text)


def _branch(operation: Any, about: Any, places: int, text: _Text) -> int:
    found = 0
    for branch in about[1]:
        found |= _after(branch, places, text)
    return found


def _repeat(operation: Any, about: Any, places: int, text: _Text) -> int:
    least, most, body = about
    for _ in range(int(least)):
        led = _after(body, places, text)
        if led == places:  # so any more would lead there too
            break
        places = led
    only, what = body[0] if len(body) == 1 else ("", None)
    if str(only) in _ONE and most == _parser.MAXREPEAT:
        kind = _kind(only, what, text)
        return places | (((places & kind) + kind) ^ kind)
    found = new = places
    more = int(most) - int(least)
    while new and more:
        new = _after(body, new, text) & ~found
        found |= new
        more -= 1
    return found


def _assert(operation: Any, about: Any, places: int, text: _Text) -> int:
    direction, body = about
    wanted, width, found = str(operation) == "ASSERT", body.getwidth()[0], 0
    for place in _places_of(places):
        if direction > 0:
            there = _after(body, 1 << place, text) != 0
        else:
            there = place >= width and bool(_after(body, 1 << place - width, text))
        found |= (there == wanted) << place
    return found


def _at(operation: Any, about: Any, places: int, text: _Text) -> int:
    return places & _PLACES[str(about)](text.path)


def _end(path: str) -> int:
    return 1 << len(path) | (1 << len(path) - 1 if path.endswith("\n") else 0)


def _boundary(path: str) -> int:
    words = [False, *(_WORD.match(character) is not None for character in path), False]
    return sum((before != after) << place for place, (before, after) in enumerate(pairwise(words)))


_PLACES: Mapping[str, Callable[[str], int]] = {
    "AT_BEGINNING": lambda path: 1,
    "AT_BEGINNING_STRING": lambda path: 1,
    "AT_END": _end,
    "AT_END_STRING": lambda path: 1 << len(path),
    "AT_BOUNDARY": _boundary,
    "AT_NON_BOUNDARY": lambda path: (1 << len(path) + 1) - 1 & ~_boundary(path),
}
_ONE = ("LITERAL", "NOT_LITERAL", "ANY", "IN")
_STEP: Mapping[str, Callable[[Any, Any, int, _Text], int]] = {
    **dict.fromkeys(_ONE, _one),
    "SUBPATTERN": _group,
    "BRANCH": _branch,
    "MAX_REPEAT": _repeat,
    "MIN_REPEAT": _repeat,
    "ASSERT": _assert,
    "ASSERT_NOT": _assert,
    "AT": _at,
}
