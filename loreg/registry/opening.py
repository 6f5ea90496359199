"""Where a registry is: opened there, or its catalog made again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from loreg.addresses import directory
from loreg.catalog import Database
from loreg.checkpoint import Advance
from loreg.registry.core import Registry, silent
from loreg.registry.verified import is_strict
from loreg.store import Store, open_store

if TYPE_CHECKING:
    from loreg.registry.rebuilding import Rebuilt


def open(  # noqa: A001 - loreg.open() is the contract
    home: str | Path | None = None,
    *,
    catalog: str | None = None,
    store: str | None = None,
    strict: bool | None = None,
) -> Registry:
    """Open the registry at ``home`` (default ``$LOREG_HOME``, else ``~/.loreg``), making it if need be.

    ``catalog`` (a SQLAlchemy URL, default ``$LOREG_CATALOG``) and ``store`` (``file:///dir`` or ``s3://bucket/prefix``,
    default ``$LOREG_STORE``) move either part. ``strict`` (default: if ``$LOREG_VERIFY`` is ``always``): a blob is
    hashed whenever it is read, also if its file looks the same. Raises BadInput for a damaged, foreign or newer
    catalog, Conflict for a new one whose store is another's, UsageError for a store that is none, NotFound if what it
    needs is missing.
    """
    registry = _open(home, catalog, store, strict)
    try:
        registry.storage.recorder.check_new()
    except BaseException:
        registry.close()
        raise
    return registry


def rebuild_catalog(
    home: str | Path | None = None,
    *,
    catalog: str | None = None,
    store: str | None = None,
    advance: Advance = silent,
) -> Rebuilt:
    """Make the catalog of the registry that ``open`` would open again, from its store alone, where it is lost.

    Raises Conflict if it is not empty, so move a damaged one away first; NotFound, and makes nothing, if there is no
    store.
    """
    from loreg.registry.rebuilding import rebuild, require_store

    require_store(_place(home, store)[1])
    with _open(home, catalog, store) as registry:
        return rebuild(registry.database, registry.storage.store, advance)


def _place(home: str | Path | None, store: str | None) -> tuple[Path, Store]:
    root = directory(home or os.environ.get("LOREG_HOME") or "~/.loreg", "the home of a registry")
    return root, open_store(store or os.environ.get("LOREG_STORE") or root)


def _open(home: str | Path | None, catalog: str | None, store: str | None, strict: bool | None = None) -> Registry:
    root, place = _place(home, store)
    database = Database.open(catalog or os.environ.get("LOREG_CATALOG") or root / "catalog.db")
    return Registry(root, database, place, is_strict(strict))
