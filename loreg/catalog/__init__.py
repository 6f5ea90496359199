"""What the registry knows: names, versions, tags, bases, and which blobs are live. In SQLite or PostgreSQL."""

from __future__ import annotations

from loreg.catalog.database import Database
from loreg.catalog.kinds import HEAD, migrations_path

__all__ = ["HEAD", "Database", "migrations_path"]
