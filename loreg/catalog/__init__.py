"""What the registry knows: names, versions, tags, bases, and which blobs are live. SQLite by SQLAlchemy."""

from __future__ import annotations

from loreg.catalog.database import HEAD, Database, migrations_path

__all__ = ["HEAD", "Database", "migrations_path"]
