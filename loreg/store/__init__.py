"""Bytes by digest. A store knows nothing of adapters, names or versions; the catalog does."""

from __future__ import annotations

from loreg.store.base import BlobKey, Store, Unfinished, new_generation
from loreg.store.cache import BlobCache
from loreg.store.local import LocalStore
from loreg.store.opening import open_store
from loreg.store.reading import pieces

__all__ = ["BlobCache", "BlobKey", "LocalStore", "Store", "Unfinished", "new_generation", "open_store", "pieces"]
