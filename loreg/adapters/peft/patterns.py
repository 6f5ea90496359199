"""A stranger's regular expressions, matched with module paths in a number of steps that is bounded.

Python's ``re`` tries one way after another, and takes years for ``(a|a)*b`` or, on a long path, for ``.*.*.*x``. Here
all ways are followed at once (Thompson, "Regular expression search algorithm", CACM 11(6), 1968): what is kept is the
set of places that the expression can have come to, as the bits of an integer, bit i for the place before character i.
A run over one character class is an addition, whose carry goes through the run (Myers, "A fast bit-vector algorithm
for approximate string matching", J. ACM 46(3), 1999). Whether an expression fits is the same as for ``re``, whose own
parser reads it, and which is asked of each single character. What is not regular, such as a reference to a group, is
refused, as are the flags for other alphabets than Unicode.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from re import _parser  # type: ignore[attr-defined]  # has the syntax tree; what it may have new is refused by name
from typing import Any, TypeAlias

from loreg.adapters.names import PATH_LENGTH
from loreg.errors import BadInput, Unsupported

_PATTERN_LENGTH = 4096
_STEPS = 20_000  # of one expression with one path; the longest in use take a few hundred
_RANGE = 1000  # as ``re`` looks at each character of a range when it compiles one, for 10 ms in the widest
_NESTING = 100  # a fixed number: what Python's stack has room for depends on the caller

_LITERAL = re.compile(r"(?:[\w/-]|\\[.\-])+", re.ASCII)
_DOTTED = re.compile(r"[\w./-]+", re.ASCII)
_WORD = re.compile(r"\w")
_CATEGORIES: Mapping[str, str] = {
    "CATEGORY_DIGIT": r"\d",
    "CATEGORY_NOT_DIGIT": r"\D",
    "CATEGORY_SPACE": r"\s",
    "CATEGORY_NOT_SPACE": r"\S",
    "CATEGORY_WORD": r"\w",
    "CATEGORY_NOT_WORD": r"\W",
}
_FLAGS = re.IGNORECASE | re.DOTALL | re.MULTILINE | re.VERBOSE | re.UNICODE

Accepts: TypeAlias = str | re.Pattern[str]
"""A character, or an expression for one."""

Node: TypeAlias = tuple[str, Any]
"""A step of ``_STEP``, and what it is about."""


def check(pattern: str, where: str, *, inside: bool = True) -> None:
    """Raises BadInput, naming ``where``, for what is no regular expression, Unsupported for one not handled here.

    ``inside``: whether PEFT puts it into an expression of its own, where Python takes no flags for all of it.
    """
    try:
        _tree(pattern)
        if inside:
            _tree(_as_end(pattern))
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
    if len(path) > PATH_LENGTH:
        raise BadInput(
            f"The module path {path[:60]!r}… has {len(path)} characters: expected {PATH_LENGTH} at most, as "
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
        hint = ", such as '(?i:…)' around a part" if "global flags" in str(error) else ""
        raise BadInput(f"{pattern[:60]!r} is not a regular expression: {error}{hint}.") from error
    return _Reading(pattern).nodes(tree, tree.state.flags, 0)


@dataclass(frozen=True, slots=True)
class _Reading:
    """From the syntax tree of ``re`` to steps, with the flags of each place in them."""

    pattern: str

    def nodes(self, tree: Iterable[tuple[Any, Any]], flags: int, depth: int) -> tuple[Node, ...]:
        """Raises Unsupported for what is not matched here, by its name in ``re``."""
        if flags & ~_FLAGS:
            raise self._refused("flags other than i, m, s and x")
        if depth > _NESTING:
            raise Unsupported(
                f"the expression {self.pattern[:60]!r} is nested over {_NESTING} deep: write it with fewer groups."
            )
        found: list[Node] = []
        for operation, about in tree:
            name = str(operation)
            if name == "SUBPATTERN":
                _, added, removed, body = about
                # Flags of another alphabet replace that of Unicode in ``re``, and are refused just above.
                found += self.nodes(body, (flags | added) & ~removed, depth + 1)
            elif name == "BRANCH":
                found.append(("branch", [self.nodes(branch, flags, depth + 1) for branch in about[1]]))
            elif name in ("MAX_REPEAT", "MIN_REPEAT"):
                least, most, body = about
                found.append(("repeat", (int(least), most, self.nodes(body, flags, depth + 1))))
            elif name in ("ASSERT", "ASSERT_NOT"):
                direction, body = about
                width = body.getwidth()[0] if direction < 0 else 0
                found.append(("assert", (name == "ASSERT", direction, width, self.nodes(body, flags, depth + 1))))
            elif name == "AT":
                found.append(("at", self._place(str(about), flags)))
            else:
                found.append(("one", self._accepts(name, about, flags)))
        return tuple(found)

    def _refused(self, what: str) -> Unsupported:
        return Unsupported(
            f"the expression {self.pattern[:60]!r} has {what}, which is not matched: write it without."
        )

    def _place(self, name: str, flags: int) -> Callable[[str], int]:
        if name not in _PLACES:
            raise self._refused(name)
        return _LINES.get(name, _PLACES[name]) if flags & re.MULTILINE else _PLACES[name]

    def _accepts(self, name: str, about: Any, flags: int) -> Accepts:
        """What tells the characters that an operation of one character accepts."""
        if name == "LITERAL" and not flags & re.IGNORECASE:
            return chr(about)
        if name == "ANY":
            return re.compile(".", flags & re.DOTALL)
        items = {"LITERAL": [(name, about)], "NOT_LITERAL": [("NEGATE", None), ("LITERAL", about)], "IN": about}
        if name not in items:
            raise self._refused(f"{name} (as it can take for ever)")
        inner = "".join(self._item(str(kind), value) for kind, value in items[name])
        return re.compile(f"[{inner}]", flags & re.IGNORECASE)

    def _item(self, kind: str, value: Any) -> str:
        if kind == "NEGATE":
            return "^"
        if kind == "LITERAL":
            return f"\\U{value:08x}"
        if kind != "RANGE":
            if str(value) not in _CATEGORIES:
                raise self._refused(str(value))
            return _CATEGORIES[str(value)]
        if value[1] - value[0] >= _RANGE:
            raise self._refused(f"a range of over {_RANGE:,} characters")
        return f"\\U{value[0]:08x}-\\U{value[1]:08x}"


@dataclass(slots=True)
class _Text:
    """A path, and the places before each kind of character in it. ``pattern``: for messages."""

    path: str
    pattern: str
    steps: int = 0
    characters: dict[str, int] = field(default_factory=dict)
    kinds: dict[re.Pattern[str], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for place, character in enumerate(self.path):
            self.characters[character] = self.characters.get(character, 0) | 1 << place

    def before(self, accepts: Accepts) -> int:
        """The places before the characters that are accepted."""
        if isinstance(accepts, str):
            return self.characters.get(accepts, 0)
        if accepts not in self.kinds:
            found = (places for character, places in self.characters.items() if accepts.fullmatch(character))
            self.kinds[accepts] = sum(found)
        return self.kinds[accepts]

    def count(self) -> None:
        self.steps += 1
        if self.steps > _STEPS:
            raise Unsupported(
                f"The expression {self.pattern[:60]!r} takes over {_STEPS:,} steps to match {self.path[:60]!r}: "
                "write it with fewer repetitions in each other."
            )


def _after(nodes: Iterable[Node], places: int, text: _Text) -> int:
    """Where the operations, one after the other, can lead to from any of ``places``."""
    for step, about in nodes:
        if not places:
            return 0
        text.count()
        places = _STEP[step](about, places, text)
    return places


def _places_of(place: int) -> Iterator[int]:
    while place:
        yield (place & -place).bit_length() - 1
        place &= place - 1


def _one(accepts: Accepts, places: int, text: _Text) -> int:
    return (places & text.before(accepts)) << 1


def _branch(branches: Iterable[tuple[Node, ...]], places: int, text: _Text) -> int:
    found = 0
    for branch in branches:
        found |= _after(branch, places, text)
    return found


def _repeat(about: tuple[int, Any, tuple[Node, ...]], places: int, text: _Text) -> int:
    least, most, body = about
    for _ in range(least):
        led = _after(body, places, text)
        if led == places:  # so any more would lead there too
            break
        places = led
    if len(body) == 1 and body[0][0] == "one" and most == _parser.MAXREPEAT:
        kind = text.before(body[0][1])
        return places | (((places & kind) + kind) ^ kind)
    found = new = places
    more = int(most) - least
    while new and more:
        new = _after(body, new, text) & ~found
        found |= new
        more -= 1
    return found


def _assert(about: tuple[bool, int, int, tuple[Node, ...]], places: int, text: _Text) -> int:
    wanted, direction, width, body = about
    found = 0
    for place in _places_of(places):
        if direction > 0:
            there = _after(body, 1 << place, text) != 0
        else:
            there = place >= width and bool(_after(body, 1 << place - width, text))
        found |= (there == wanted) << place
    return found


def _at(places_in: Callable[[str], int], places: int, text: _Text) -> int:
    return places & places_in(text.path)


def _end(path: str) -> int:
    return 1 << len(path) | (1 << len(path) - 1 if path.endswith("\n") else 0)


def _boundary(path: str) -> int:
    words = [False, *(_WORD.match(character) is not None for character in path), False]
    return sum((before != after) << place for place, (before, after) in enumerate(pairwise(words)))


def _line_ends(path: str) -> int:
    return sum(1 << place for place, character in enumerate(path + "\n") if character == "\n")


_PLACES: Mapping[str, Callable[[str], int]] = {
    "AT_BEGINNING": lambda path: 1,
    "AT_BEGINNING_STRING": lambda path: 1,
    "AT_END": _end,
    "AT_END_STRING": lambda path: 1 << len(path),
    "AT_BOUNDARY": _boundary,
    "AT_NON_BOUNDARY": lambda path: (1 << len(path) + 1) - 1 & ~_boundary(path),
}
_LINES: Mapping[str, Callable[[str], int]] = {
    "AT_BEGINNING": lambda path: 1 | _line_ends(path) << 1,
    "AT_END": _line_ends,
}
_STEP: Mapping[str, Callable[[Any, int, _Text], int]] = {
    "one": _one,
    "branch": _branch,
    "repeat": _repeat,
    "assert": _assert,
    "at": _at,
}
