"""Bytes by digest. A store knows nothing of adapters, names or versions; the catalog does."""

from __future__ import annotations

from loreg.store.base import BlobKey, Store, new_generation
from loreg.store.local import LocalStore

__all__ = ["BlobKey", "LocalStore", "Store", "new_generation"]
