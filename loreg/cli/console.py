"""What a command talks to: the registry it opens, and the two streams it may write to."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from loreg.cli.progress import ProgressBar
from loreg.cli.text import legible, shorten

if TYPE_CHECKING:
    from loreg.registry import Registry


@dataclass
class Console:
    """The options that every command takes, and what follows from them."""

    json: bool = False
    debug: bool = False
    home: str | None = None

    def open(self) -> Registry:
        from loreg.registry import open as open_registry

        return open_registry(self.home)

    def progress(self) -> ProgressBar:
        """Bars on stderr, for people only: a terminal that is not reading JSON."""
        return ProgressBar(shown=not self.json and sys.stderr.isatty())

    def emit(self, document: Mapping[str, Any], text: str) -> None:
        """The result: ``document`` with ``--json``, else ``text``, with digests short."""
        if self.json:
            click.echo(json.dumps(document, indent=2))
        elif text:
            click.echo(shorten(text), color=_color())

    def complain(self, text: str) -> None:
        """To the person, on stderr."""
        click.echo(text, err=True, color=_color())

    def fail(self, kind: str, message: str, code: int) -> None:
        """An error: for people on stderr, and with ``--json`` for programs on stdout."""
        self.complain(f"{click.style('loreg:', fg='red', bold=True)} {legible(message)}")
        if self.json:
            self.emit({"error": {"type": kind, "message": message, "exit_code": code}}, "")


def _color() -> bool | None:
    """None lets click decide by the stream; see https://no-color.org."""
    return False if os.environ.get("NO_COLOR") else None
