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
    find_blobs,
    live_generation,
    record_blobs,
    record_edges,
    release_lease,
    require_lease,
)
from loreg.catalog.checking import (
    adopt_copy,
    contradictions,
    describe,
    described,
    every_blob,
    restate_copy,
    set_edges,
    touched_by,
)
from loreg.catalog.collecting import (
    drop_marked,
    known_copies,
    mark_unneeded,
    needed_by,
    pinned_digests,
    reap_leases,
    roots,
)
from loreg.catalog.describing import columns_of
from loreg.catalog.ledger import (
    begin_anew,
    count_facts,
    every_fact,
    forget_records,
    go_on_from,
    identity,
    kept_records,
    last_record,
    standing_tags,
)
from loreg.catalog.models import BaseRow, Blob
from loreg.catalog.restating import is_empty, record_store, restate
from loreg.catalog.tags import TagMoveRow, TagRow, follow_newest, move_tag, tag_history, tag_seq, tags_of
from loreg.catalog.trash import purge_versions, remove_version, removed_versions, restore_version
from loreg.catalog.versions import (
    VersionRow,
    add_version,
    find_version,
    list_versions,
    standing_digest,
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
    "adopt_copy",
    "begin_anew",
    "begin_lease",
    "blob_matching_prefix",
    "cached_leaves",
    "columns_of",
    "contradictions",
    "count_facts",
    "describe",
    "described",
    "drop_marked",
    "every_blob",
    "every_fact",
    "find_base",
    "find_blob",
    "find_blobs",
    "find_version",
    "follow_newest",
    "forget_records",
    "go_on_from",
    "identity",
    "is_empty",
    "kept_records",
    "known_copies",
    "last_record",
    "list_bases",
    "list_versions",
    "live_generation",
    "mark_unneeded",
    "move_tag",
    "needed_by",
    "pinned_digests",
    "purge_versions",
    "reap_leases",
    "record_blobs",
    "record_edges",
    "record_store",
    "release_lease",
    "remember_leaves",
    "remove_version",
    "removed_versions",
    "require_lease",
    "restate",
    "restate_copy",
    "restore_version",
    "roots",
    "set_edges",
    "standing_digest",
    "standing_tags",
    "tag_history",
    "tag_seq",
    "tags_of",
    "touched_by",
    "versions_by_digest",
    "versions_of",
]
