"""Connections to a PostgreSQL server, and why there is none: a server that is not reached and one that lets nobody in
are told apart, though psycopg has no SQLSTATE of either.

libpq has it, for its ping: that says whether a server answers at an address, and whether it only starts or stops.
Where one answers and the connection fails a second time, it is the connection that is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from loreg.errors import LoregError, RemoteError, UsageError

if TYPE_CHECKING:
    from psycopg.pq import Ping

_SAYABLE = {"host", "hostaddr", "port", "dbname", "user"}
_TOO_MANY = ("too many clients", "too many connections", "connection slots")
"""The one thing that nothing but the text tells, and only of a server that speaks English; else it is told as the
others are, with what the server says."""
_PROGRAMS = {"context"}
"""What psycopg takes beside the settings of libpq, as SQLAlchemy gives it."""


def connect(name: str, make: Callable[[], Any], settings: Mapping[str, Any], own: Mapping[str, str]) -> Any:
    """What ``make`` makes with ``settings``, of which ``own`` are not the user's.

    Raises UsageError for settings that libpq does not take and for a server that refuses them, RemoteError for one
    that is not reached, is not ready or has too many connections. No message, and no cause of it, has a setting in it
    but host, port, database and user.
    """
    import psycopg
    from psycopg.pq import Ping

    answered = False
    while True:
        try:
            return make()
        except psycopg.Error as error:
            if not isinstance(error, psycopg.OperationalError):
                found = Ping.NO_ATTEMPT
            elif error.pgconn is None:  # it never came to a server
                found = Ping.NO_RESPONSE
            else:
                found = _ping(settings)
            said = _repeatable(error, settings, own)
        # A server that has come up since the first time refuses nothing.
        if found != Ping.OK or answered:
            raise _refusal(name, found, said)
        answered = True


def _ping(settings: Mapping[str, Any]) -> Ping:
    from psycopg import ProgrammingError
    from psycopg.conninfo import make_conninfo
    from psycopg.pq import PGconn, Ping

    given = {key: value for key, value in settings.items() if key not in _PROGRAMS}
    try:
        return Ping(PGconn.ping(make_conninfo(**given).encode()))
    except ProgrammingError:  # settings that psycopg takes, and libpq does not
        return Ping.NO_ATTEMPT


def _repeatable(error: Exception, settings: Mapping[str, Any], own: Mapping[str, str]) -> str:
    """What psycopg, libpq or the server says, empty if it quotes what is nobody's business."""
    said = " ".join(str(error).split())
    hidden = (str(value) for key, value in settings.items() if key not in {*_SAYABLE, *_PROGRAMS, *own})
    return "" if any(value in said for value in hidden if value) else f": {said}"


def _refusal(name: str, found: Ping, said: str) -> LoregError:
    if found.name == "NO_ATTEMPT":
        return UsageError(
            f"the catalog {name} cannot be connected to: expected settings of libpq after the ? in LOREG_CATALOG, "
            "found another, or a value that is none of it; correct it."
        )
    if found.name == "NO_RESPONSE":
        return RemoteError(
            f"the catalog {name} is not reached{said}; see whether the server runs, and check the host and the port "
            "in LOREG_CATALOG."
        )
    if found.name == "REJECT":
        return RemoteError(f"the catalog {name} is not ready{said}; the server starts or stops: try again later.")
    if any(words in said for words in _TOO_MANY):
        return RemoteError(
            f"the catalog {name} refused the connection{said}; too many are connected: try again later."
        )
    return UsageError(
        f"the catalog {name} refused the connection{said}; the server runs: check the user, the password and the "
        "database in LOREG_CATALOG."
    )
