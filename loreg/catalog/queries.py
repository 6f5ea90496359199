"""What the registry asks of the catalog, under one name.

Every function takes the caller's session first, works inside its transaction and never commits; rows and
values stay readable after it. The time is always an argument.
"""

from __future__ import annotations

from loreg.catalog.bases import add_base, cached_leaves, find_base, list_bases, remember_leaves
from loreg.catalog.blobs import (
    begin_lease,
    blob_matching_prefix,
    find_blob,
    record_blobs,
    record_edges,
    release_lease,
    require_lease,
)
from loreg.catalog.models import BaseRow, Blob
from loreg.catalog.tags import TagMoveRow, TagRow, move_tag, tag_history, tag_seq, tags_of
from loreg.catalog.versions import (
    VersionRow,
    add_version,
    find_version,
    list_versions,
    versions_by_digest,
    versions_of,
)

__all__ = [
    "BaseRow",
    "Blob",
    "TagMoveRow",
    "TagRow",
    "VersionRow",
    "add_base",
    "add_version",
    "begin_lease",
    "blob_matching_prefix",
    "cached_leaves",
    "find_base",
    "find_blob",
    "find_version",
    "list_bases",
    "list_versions",
    "move_tag",
    "record_blobs",
    "record_edges",
    "release_lease",
    "remember_leaves",
    "require_lease",
    "tag_history",
    "tag_seq",
    "tags_of",
    "versions_by_digest",
    "versions_of",
]
