"""Other people's formats, one module each: every reader yields a ``Draft``, which ``binding`` ties to a base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loreg.adapters import loralib, lycoris, peft
from loreg.adapters.draft import Draft
from loreg.errors import NotFound, UsageError


@dataclass(frozen=True, slots=True)
class Reader:
    """One format. ``recognises``: whether a file or a directory holds an adapter of it. ``read``: that adapter.

    ``expected`` says in a message what such an adapter is. ``options``: what ``read`` takes by name beside the path,
    for what the format does not store.
    """

    recognises: Callable[[Path], bool]
    read: Callable[..., Draft]
    expected: str
    options: tuple[str, ...] = ()


READERS: Mapping[str, Reader] = {
    "peft": Reader(peft.recognises, peft.read, f"a directory with {peft.CONFIG}", ("initial",)),
    "lycoris": Reader(lycoris.recognises, lycoris.read, lycoris.EXPECTED),
    "loralib": Reader(loralib.recognises, loralib.read, loralib.EXPECTED, loralib.OPTIONS),
}


def read(path: Path, format: str | None = None, **options: Any) -> Draft:  # noqa: A002 - the option's name
    """Read the adapter at ``path``, a file or a directory, by the named format or the first that recognises it.

    ``options`` that are None were not given. Raises NotFound where nothing is recognised, UsageError for an unknown
    format and for an option that the format has not, and what the reader raises.
    """
    if not path.exists():
        raise NotFound(f"{path} does not exist: expected an adapter, a directory or a file.")
    if format is not None and format not in READERS:
        raise UsageError(f"{format!r} is not a format that loreg reads: expected one of {', '.join(READERS)}.")
    name = format or next((name for name, reader in READERS.items() if reader.recognises(path)), None)
    if name is None or (format and not READERS[name].recognises(path)):
        expected = READERS[format].expected if format else ", or ".join(r.expected for r in READERS.values())
        kind = f"{format} adapter" if format else "adapter that loreg knows"
        raise NotFound(f"{path} holds no {kind}: expected {expected}.")
    given = {option: value for option, value in options.items() if value is not None}
    for option in given:
        if option not in READERS[name].options:
            takes = ", ".join(READERS[name].options) or "none"
            raise UsageError(f"{option} is no option of {name} adapters, and {path} is one: they take {takes}.")
    return READERS[name].read(path, **given)
