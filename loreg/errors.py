"""Every error that loreg raises on purpose: one root, a few families by whose fault it is.

A message is one sentence that names the thing, what was expected, what was found, and what to do. The
exit code of the command line stands on the class, so that a new error cannot forget to have one.
"""

from __future__ import annotations


class LoregError(Exception):
    """The root. Catch this to catch everything that loreg refuses."""

    exit_code = 1


class CheckFailed(LoregError):
    """A check says no: a verification failed, or the disk is too small for what is asked."""

    exit_code = 1


class UsageError(LoregError):
    """The caller asked for something that does not make sense: a malformed name, expression or option."""

    exit_code = 2


class NotFound(LoregError):
    """A name, tag, digest, base, file or optional package that is not here."""

    exit_code = 3


class BaseMismatch(LoregError):
    """The adapter was trained on another base than the one at hand."""

    exit_code = 4


class BadInput(LoregError):
    """Corrupt, truncated, hostile or unreadable input."""

    exit_code = 5


class Unsupported(BadInput):
    """Input that is well-formed, and that this version refuses by name rather than get wrong."""

    exit_code = 5


class Conflict(LoregError):
    """Somebody else was there first: an output that exists, a name that is taken, a lease that is gone."""

    exit_code = 6


class RemoteError(LoregError):
    """A remote did not do what was asked, or sent something other than what it announced."""

    exit_code = 7
