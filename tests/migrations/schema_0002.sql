CREATE TABLE adapters (
	id INTEGER NOT NULL,
	name TEXT NOT NULL,
	last_number INTEGER NOT NULL,
	created_at INTEGER NOT NULL,
	CONSTRAINT pk_adapters PRIMARY KEY (id),
	CONSTRAINT uq_adapters_name UNIQUE (name),
	CONSTRAINT ck_adapters_name CHECK (length(name) - length(rtrim(name, 'abcdefghijklmnopqrstuvwxyz0123456789._-')) BETWEEN 1 AND 128 AND length(rtrim(name, 'abcdefghijklmnopqrstuvwxyz0123456789._-')) <= 129 AND ltrim(rtrim(name, 'abcdefghijklmnopqrstuvwxyz0123456789._-'), 'abcdefghijklmnopqrstuvwxyz0123456789._-') IN ('', '/') AND ltrim(substr(name, 1, 1), 'abcdefghijklmnopqrstuvwxyz0123456789') = '' AND ltrim(substr(name, length(rtrim(name, 'abcdefghijklmnopqrstuvwxyz0123456789._-')) + 1, 1), 'abcdefghijklmnopqrstuvwxyz0123456789') = ''),
	CONSTRAINT ck_adapters_last_number CHECK (last_number >= 0)
)
 STRICT;

CREATE TABLE bases (
	id INTEGER NOT NULL,
	name TEXT NOT NULL,
	manifest TEXT NOT NULL,
	weights_root TEXT NOT NULL,
	structure_root TEXT NOT NULL,
	content_set TEXT NOT NULL,
	hub_repo TEXT,
	hub_commit TEXT,
	hub_files TEXT,
	path TEXT,
	tensors INTEGER NOT NULL,
	bytes INTEGER NOT NULL,
	created_at INTEGER NOT NULL,
	CONSTRAINT pk_bases PRIMARY KEY (id),
	CONSTRAINT uq_bases_name UNIQUE (name),
	CONSTRAINT ck_bases_name CHECK (length(name) - length(rtrim(name, 'abcdefghijklmnopqrstuvwxyz0123456789._-')) BETWEEN 1 AND 128 AND length(rtrim(name, 'abcdefghijklmnopqrstuvwxyz0123456789._-')) <= 129 AND ltrim(rtrim(name, 'abcdefghijklmnopqrstuvwxyz0123456789._-'), 'abcdefghijklmnopqrstuvwxyz0123456789._-') IN ('', '/') AND ltrim(substr(name, 1, 1), 'abcdefghijklmnopqrstuvwxyz0123456789') = '' AND ltrim(substr(name, length(rtrim(name, 'abcdefghijklmnopqrstuvwxyz0123456789._-')) + 1, 1), 'abcdefghijklmnopqrstuvwxyz0123456789') = ''),
	CONSTRAINT ck_bases_weights_root CHECK (weights_root = 'blake3:' || substr(weights_root, 8, 64) AND length(weights_root) = 71 AND ltrim(substr(weights_root, 8), '0123456789abcdef') = ''),
	CONSTRAINT ck_bases_structure_root CHECK (structure_root = 'blake3:' || substr(structure_root, 8, 64) AND length(structure_root) = 71 AND ltrim(substr(structure_root, 8), '0123456789abcdef') = ''),
	CONSTRAINT ck_bases_content_set CHECK (content_set = 'blake3:' || substr(content_set, 8, 64) AND length(content_set) = 71 AND ltrim(substr(content_set, 8), '0123456789abcdef') = ''),
	CONSTRAINT ck_bases_tensors CHECK (tensors >= 0),
	CONSTRAINT ck_bases_bytes CHECK (bytes >= 0),
	CONSTRAINT fk_bases_manifest FOREIGN KEY(manifest) REFERENCES blobs (digest)
)
 STRICT;

CREATE TABLE blobs (
	digest TEXT NOT NULL,
	generation TEXT NOT NULL,
	sha256 TEXT NOT NULL,
	size INTEGER NOT NULL,
	state TEXT NOT NULL,
	created_at INTEGER NOT NULL,
	CONSTRAINT pk_blobs PRIMARY KEY (digest),
	CONSTRAINT ck_blobs_digest CHECK (digest = 'blake3:' || substr(digest, 8, 64) AND length(digest) = 71 AND ltrim(substr(digest, 8), '0123456789abcdef') = ''),
	CONSTRAINT ck_blobs_generation CHECK (length(generation) = 16 AND ltrim(generation, '0123456789abcdef') = ''),
	CONSTRAINT ck_blobs_sha256 CHECK (length(sha256) = 64 AND ltrim(sha256, '0123456789abcdef') = ''),
	CONSTRAINT ck_blobs_size CHECK (size >= 0),
	CONSTRAINT ck_blobs_state CHECK (state IN ('live', 'deleting'))
)
 STRICT;

CREATE TABLE edges (
	source TEXT NOT NULL,
	blob TEXT NOT NULL,
	CONSTRAINT pk_edges PRIMARY KEY (source, blob),
	CONSTRAINT ck_edges_source CHECK (source = 'blake3:' || substr(source, 8, 64) AND length(source) = 71 AND ltrim(substr(source, 8), '0123456789abcdef') = ''),
	CONSTRAINT fk_edges_blob FOREIGN KEY(blob) REFERENCES blobs (digest)
)
 STRICT;

CREATE TABLE file_hashes (
	device INTEGER NOT NULL,
	inode INTEGER NOT NULL,
	size INTEGER NOT NULL,
	mtime_ns INTEGER NOT NULL,
	ctime_ns INTEGER NOT NULL,
	leaves TEXT NOT NULL,
	seen_at INTEGER NOT NULL,
	CONSTRAINT pk_file_hashes PRIMARY KEY (device, inode, size, mtime_ns, ctime_ns)
)
 STRICT;

CREATE TABLE intents (
	lease_id TEXT NOT NULL,
	digest TEXT NOT NULL,
	CONSTRAINT pk_intents PRIMARY KEY (lease_id, digest),
	CONSTRAINT ck_intents_digest CHECK (digest = 'blake3:' || substr(digest, 8, 64) AND length(digest) = 71 AND ltrim(substr(digest, 8), '0123456789abcdef') = ''),
	CONSTRAINT fk_intents_lease_id FOREIGN KEY(lease_id) REFERENCES leases (id) ON DELETE CASCADE
)
 STRICT;

CREATE TABLE leases (
	id TEXT NOT NULL,
	owner TEXT NOT NULL,
	created_at INTEGER NOT NULL,
	expires_at INTEGER NOT NULL,
	CONSTRAINT pk_leases PRIMARY KEY (id),
	CONSTRAINT ck_leases_id CHECK (length(id) = 32 AND ltrim(id, '0123456789abcdef') = '')
)
 STRICT;

CREATE TABLE tag_history (
	adapter_id INTEGER NOT NULL,
	name TEXT NOT NULL,
	seq INTEGER NOT NULL,
	version_id INTEGER,
	moved_at INTEGER NOT NULL,
	CONSTRAINT pk_tag_history PRIMARY KEY (adapter_id, name, seq),
	CONSTRAINT ck_tag_history_name CHECK (length(name) BETWEEN 1 AND 128 AND ltrim(name, 'abcdefghijklmnopqrstuvwxyz0123456789._-') = '' AND ltrim(substr(name, 1, 1), 'abcdefghijklmnopqrstuvwxyz0123456789') = ''),
	CONSTRAINT ck_tag_history_seq CHECK (seq >= 1),
	CONSTRAINT fk_tag_history_adapter_id FOREIGN KEY(adapter_id) REFERENCES adapters (id),
	CONSTRAINT fk_tag_history_version_id FOREIGN KEY(version_id) REFERENCES versions (id) ON DELETE SET NULL
)
 STRICT;

CREATE TABLE tags (
	adapter_id INTEGER NOT NULL,
	name TEXT NOT NULL,
	version_id INTEGER NOT NULL,
	seq INTEGER NOT NULL,
	CONSTRAINT pk_tags PRIMARY KEY (adapter_id, name),
	CONSTRAINT ck_tags_name CHECK (length(name) BETWEEN 1 AND 128 AND ltrim(name, 'abcdefghijklmnopqrstuvwxyz0123456789._-') = '' AND ltrim(substr(name, 1, 1), 'abcdefghijklmnopqrstuvwxyz0123456789') = ''),
	CONSTRAINT ck_tags_seq CHECK (seq >= 1),
	CONSTRAINT fk_tags_adapter_id FOREIGN KEY(adapter_id) REFERENCES adapters (id),
	CONSTRAINT fk_tags_version_id FOREIGN KEY(version_id) REFERENCES versions (id)
)
 STRICT;

CREATE TABLE targets (
	version_id INTEGER NOT NULL,
	target TEXT NOT NULL,
	CONSTRAINT pk_targets PRIMARY KEY (version_id, target),
	CONSTRAINT fk_targets_version_id FOREIGN KEY(version_id) REFERENCES versions (id) ON DELETE CASCADE
)
 STRICT;

CREATE TABLE versions (
	id INTEGER NOT NULL,
	adapter_id INTEGER NOT NULL,
	number INTEGER NOT NULL,
	digest TEXT NOT NULL,
	base_root TEXT NOT NULL,
	base_name TEXT NOT NULL,
	rank INTEGER NOT NULL,
	modules INTEGER NOT NULL,
	bytes INTEGER NOT NULL,
	note TEXT,
	created_at INTEGER NOT NULL,
	removed_at INTEGER,
	CONSTRAINT pk_versions PRIMARY KEY (id),
	CONSTRAINT uq_versions_adapter_id_number UNIQUE (adapter_id, number),
	CONSTRAINT uq_versions_adapter_id_digest UNIQUE (adapter_id, digest),
	CONSTRAINT ck_versions_number CHECK (number >= 1),
	CONSTRAINT ck_versions_base_root CHECK (base_root = 'blake3:' || substr(base_root, 8, 64) AND length(base_root) = 71 AND ltrim(substr(base_root, 8), '0123456789abcdef') = ''),
	CONSTRAINT ck_versions_rank CHECK (rank >= 0),
	CONSTRAINT ck_versions_modules CHECK (modules >= 0),
	CONSTRAINT ck_versions_bytes CHECK (bytes >= 0),
	CONSTRAINT fk_versions_adapter_id FOREIGN KEY(adapter_id) REFERENCES adapters (id),
	CONSTRAINT fk_versions_digest FOREIGN KEY(digest) REFERENCES blobs (digest)
)
 STRICT;

CREATE INDEX ix_bases_manifest ON bases (manifest);

CREATE INDEX ix_bases_weights_root ON bases (weights_root);

CREATE INDEX ix_edges_blob ON edges (blob);

CREATE INDEX ix_intents_digest ON intents (digest);

CREATE INDEX ix_tag_history_version_id ON tag_history (version_id);

CREATE INDEX ix_tags_version_id ON tags (version_id);

CREATE INDEX ix_targets_target ON targets (target);

CREATE INDEX ix_versions_base_root ON versions (base_root);

CREATE INDEX ix_versions_digest ON versions (digest);

CREATE INDEX ix_versions_rank ON versions (rank);
