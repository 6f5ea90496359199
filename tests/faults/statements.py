"""Statements that are compiled once for all catalogs that a process opens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Engine


@contextmanager
def compiled_once() -> Iterator[None]:
    """Compiling takes most of the time of a command on a small registry, and each opening of one begins anew. Here
    all engines share what one has compiled. That is the same for each; connections are shared by none."""
    make, shared = Engine.__init__, []

    def init(engine: Engine, pool: Any, dialect: Any, *given: Any, **options: Any) -> None:
        shared[:] = shared or [dialect]
        pool._dialect = shared[0]
        make(engine, pool, shared[0], *given, **options)
        shared[1:] = shared[1:] or [engine._compiled_cache]
        engine._compiled_cache = shared[1]

    Engine.__init__ = init  # type: ignore[method-assign]
    try:
        yield
    finally:
        Engine.__init__ = make  # type: ignore[method-assign]
