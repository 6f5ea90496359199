"""A store by its address: ``file:///a/directory``, a plain absolute path, ``s3://bucket/prefix``."""

from __future__ import annotations

from pathlib import Path

from loreg.addresses import expanded, split
from loreg.errors import UsageError
from loreg.store.base import Store
from loreg.store.local import LocalStore

_EXPECTED = "an absolute path, file:///a/directory or s3://bucket/prefix"


def open_store(place: str | Path) -> Store:
    """The store at an address. Makes no request, and nothing on a disk.

    Raises UsageError for what is none, NotFound if the package that it needs is not installed.
    """
    scheme, rest = split(place, "a store", _EXPECTED)
    if scheme == "s3":
        from loreg.store.object_store import ObjectStore

        return ObjectStore(str(place))
    if scheme not in (None, "file"):
        # The rest of it is not repeated: it may hold a password.
        raise UsageError(f"{scheme}:// is not a store that loreg opens: expected {_EXPECTED}.")
    path = expanded(rest)
    if not path.is_absolute():
        found = "file:// and a relative path" if scheme else repr(rest)
        raise UsageError(f"a store cannot be at a relative path: expected {_EXPECTED}, found {found}.")
    return LocalStore(path)
