"""Where errors end: one sentence on stderr, one object on stdout with ``--json``, and an exit code."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import click

from loreg.cli.console import Console
from loreg.errors import LoregError

INTERRUPTED = 130
"""128 + SIGINT, as a shell reports a program that Ctrl-C ended."""


class Boundary:
    """A context that no error leaves. ``code`` is the exit code: the block sets it, or the error does."""

    def __init__(self, console: Console, arguments: Sequence[str]) -> None:
        self.code = 0
        self._console = console
        self._arguments = arguments

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> bool:
        # click itself answers a closed pipe with SystemExit, quietly.
        if error is None or isinstance(error, SystemExit):
            return False
        self._report(error)
        return True

    def _report(self, error: BaseException) -> None:
        console = self._console
        if isinstance(error, click.UsageError):
            # The parser may have stopped before it came to --json.
            console.json = console.json or "--json" in self._arguments
        name, message, self.code = describe(error)
        trace = "".join(traceback.format_exception(error)) if console.debug else ""
        console.fail(name, message, self.code, trace)


def describe(error: BaseException) -> tuple[str, str, int]:
    """The kind of an error, one sentence about it, and the exit code."""
    if isinstance(error, LoregError):
        return type(error).__name__, str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return "Interrupted", "interrupted", INTERRUPTED
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "loreg"
        return "UsageError", f"{error.format_message()} See '{command} --help'.", error.exit_code
    if isinstance(error, click.ClickException):
        return type(error).__name__, error.format_message(), error.exit_code
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "CheckFailed", f"{error.filename or 'the output'} has no room: {error.strerror}; free some space.", 1
    reason = str(error)
    if isinstance(error, OSError) and error.strerror:
        reason = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    kind = type(error).__name__
    return kind, f"unexpected {kind}: {reason or 'no reason given'}; run it again with --debug to see where.", 1
