"""What a command talks to: the registry it opens, and the two streams it may write to."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from loreg.cli.progress import ProgressBar
from loreg.cli.text import is_terminal, legible, shorten
from loreg.errors import CheckFailed

if TYPE_CHECKING:
    from loreg.registry import Registry


@dataclass
class Console:
    """The options that every command takes, and what follows from them."""

    json: bool = False
    debug: bool = False
    home: str | None = None

    @property
    def watched(self) -> bool:
        """Whether a person looks on: stderr is a terminal, and the result is not for a program."""
        return not self.json and is_terminal(sys.stderr)

    def open(self) -> Registry:
        from loreg.registry import open as open_registry

        if not self.watched:
            # The Hub's client draws bars into any stderr, log files too; it reads this when it is imported.
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        return open_registry(self.home)

    def progress(self) -> ProgressBar:
        """Bars on stderr, for people only."""
        return ProgressBar(shown=self.watched)

    def emit(self, document: Mapping[str, Any], text: str) -> None:
        """The result: ``document`` with ``--json``, else ``text``, with digests short. Raises CheckFailed if it
        cannot be written, but for a closed pipe, which is an OSError."""
        try:
            if self.json:
                click.echo(json.dumps(document, indent=2))
            elif text:
                click.echo(shorten(text), color=_color())
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            raise CheckFailed(
                f"the result could not be written to where stdout goes: {error.strerror or error}; what was asked "
                "for is done: free some space, or write elsewhere, to see it."
            ) from error

    def fail(self, kind: str, message: str, code: int, trace: str = "") -> None:
        """An error: ``trace`` and a sentence for people on stderr, and with ``--json`` an object on stdout."""
        sentence = f"{click.style('loreg:', fg='red', bold=True)} {legible(message)}"
        # A full disk or a closed pipe may be what the error is about: the exit code tells it all the same.
        with suppress(OSError):
            click.echo(trace + sentence, err=True, color=_color())
        with suppress(OSError, CheckFailed):
            self.emit({"error": {"type": kind, "message": message, "exit_code": code}}, "")


def _color() -> bool | None:
    """None lets click decide by the stream; see https://no-color.org."""
    return False if os.environ.get("NO_COLOR") else None
