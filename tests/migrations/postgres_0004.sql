TABLE adapters
  id bigint NOT NULL DEFAULT nextval('adapters_id_seq'::regclass)
  name text COLLATE C NOT NULL
  last_number bigint NOT NULL
  created_at bigint NOT NULL
  ck_adapters_last_number CHECK ((last_number >= 0))
  ck_adapters_name CHECK ((((length(name) - length(rtrim(name, 'abcdefghijklmnopqrstuvwxyz0123456789._-'::text))) >= 1) AND ((length(name) - length(rtrim(name, 'abcdefghijklmnopqrstuvwxyz0123456789._-'::text))) <= 128) AND (length(rtrim(name, 'abcdefghijklmnopqrstuvwxyz0123456789._-'::text)) <= 129) AND (ltrim(rtrim(name, 'abcdefghijklmnopqrstuvwxyz0123456789._-'::text), 'abcdefghijklmnopqrstuvwxyz0123456789._-'::text) = ANY (ARRAY[''::text, '/'::text])) AND (ltrim(substr(name, 1, 1), 'abcdefghijklmnopqrstuvwxyz0123456789'::text) = ''::text) AND (ltrim(substr(name, (length(rtrim(name, 'abcdefghijklmnopqrstuvwxyz0123456789._-'::text)) + 1), 1), 'abcdefghijklmnopqrstuvwxyz0123456789'::text) = ''::text)))
  pk_adapters PRIMARY KEY (id)
  uq_adapters_name UNIQUE (name)
TABLE bases
  id bigint NOT NULL DEFAULT nextval('bases_id_seq'::regclass)
  name text COLLATE C NOT NULL
  manifest text COLLATE C NOT NULL
  weights_root text COLLATE C NOT NULL
  structure_root text COLLATE C NOT NULL
  content_set text COLLATE C NOT NULL
  hub_repo text COLLATE C
  hub_commit text COLLATE C
  hub_files text COLLATE C
  path text COLLATE C
  tensors bigint NOT NULL
  bytes bigint NOT NULL
  created_at bigint NOT NULL
  ck_bases_bytes CHECK ((bytes >= 0))
  ck_bases_content_set CHECK (((content_set = ('blake3:'::text || substr(content_set, 8, 64))) AND (length(content_set) = 71) AND (ltrim(substr(content_set, 8), '0123456789abcdef'::text) = ''::text)))
  ck_bases_name CHECK ((((length(name) - length(rtrim(name, 'abcdefghijklmnopqrstuvwxyz0123456789._-'::text))) >= 1) AND ((length(name) - length(rtrim(name, 'abcdefghijklmnopqrstuvwxyz0123456789._-'::text))) <= 128) AND (length(rtrim(name, 'abcdefghijklmnopqrstuvwxyz0123456789._-'::text)) <= 129) AND (ltrim(rtrim(name, 'abcdefghijklmnopqrstuvwxyz0123456789._-'::text), 'abcdefghijklmnopqrstuvwxyz0123456789._-'::text) = ANY (ARRAY[''::text, '/'::text])) AND (ltrim(substr(name, 1, 1), 'abcdefghijklmnopqrstuvwxyz0123456789'::text) = ''::text) AND (ltrim(substr(name, (length(rtrim(name, 'abcdefghijklmnopqrstuvwxyz0123456789._-'::text)) + 1), 1), 'abcdefghijklmnopqrstuvwxyz0123456789'::text) = ''::text)))
  ck_bases_structure_root CHECK (((structure_root = ('blake3:'::text || substr(structure_root, 8, 64))) AND (length(structure_root) = 71) AND (ltrim(substr(structure_root, 8), '0123456789abcdef'::text) = ''::text)))
  ck_bases_tensors CHECK ((tensors >= 0))
  ck_bases_weights_root CHECK (((weights_root = ('blake3:'::text || substr(weights_root, 8, 64))) AND (length(weights_root) = 71) AND (ltrim(substr(weights_root, 8), '0123456789abcdef'::text) = ''::text)))
  fk_bases_manifest FOREIGN KEY (manifest) REFERENCES blobs(digest)
  pk_bases PRIMARY KEY (id)
  uq_bases_name UNIQUE (name)
  CREATE INDEX ix_bases_manifest ON bases USING btree (manifest)
  CREATE INDEX ix_bases_weights_root ON bases USING btree (weights_root)
TABLE blobs
  digest text COLLATE C NOT NULL
  generation text COLLATE C NOT NULL
  sha256 text COLLATE C NOT NULL
  size bigint NOT NULL
  state text COLLATE C NOT NULL
  created_at bigint NOT NULL
  ck_blobs_digest CHECK (((digest = ('blake3:'::text || substr(digest, 8, 64))) AND (length(digest) = 71) AND (ltrim(substr(digest, 8), '0123456789abcdef'::text) = ''::text)))
  ck_blobs_generation CHECK (((length(generation) = 16) AND (ltrim(generation, '0123456789abcdef'::text) = ''::text)))
  ck_blobs_sha256 CHECK (((length(sha256) = 64) AND (ltrim(sha256, '0123456789abcdef'::text) = ''::text)))
  ck_blobs_size CHECK ((size >= 0))
  ck_blobs_state CHECK ((state = ANY (ARRAY['live'::text, 'deleting'::text])))
  pk_blobs PRIMARY KEY (digest)
TABLE documents
  version_id bigint NOT NULL
  text text COLLATE C NOT NULL
  grams tsvector GENERATED loreg_grams(text)
  fk_documents_version_id FOREIGN KEY (version_id) REFERENCES versions(id) ON DELETE CASCADE
  pk_documents PRIMARY KEY (version_id)
  CREATE INDEX ix_documents_grams ON documents USING gin (grams) WITH (fastupdate=off)
TABLE edges
  source text COLLATE C NOT NULL
  blob text COLLATE C NOT NULL
  ck_edges_source CHECK (((source = ('blake3:'::text || substr(source, 8, 64))) AND (length(source) = 71) AND (ltrim(substr(source, 8), '0123456789abcdef'::text) = ''::text)))
  fk_edges_blob FOREIGN KEY (blob) REFERENCES blobs(digest)
  pk_edges PRIMARY KEY (source, blob)
  CREATE INDEX ix_edges_blob ON edges USING btree (blob)
TABLE file_hashes
  device bigint NOT NULL
  inode bigint NOT NULL
  size bigint NOT NULL
  mtime_ns bigint NOT NULL
  ctime_ns bigint NOT NULL
  leaves text COLLATE C NOT NULL
  seen_at bigint NOT NULL
  pk_file_hashes PRIMARY KEY (device, inode, size, mtime_ns, ctime_ns)
TABLE intents
  lease_id text COLLATE C NOT NULL
  digest text COLLATE C NOT NULL
  ck_intents_digest CHECK (((digest = ('blake3:'::text || substr(digest, 8, 64))) AND (length(digest) = 71) AND (ltrim(substr(digest, 8), '0123456789abcdef'::text) = ''::text)))
  fk_intents_lease_id FOREIGN KEY (lease_id) REFERENCES leases(id) ON DELETE CASCADE
  pk_intents PRIMARY KEY (lease_id, digest)
  CREATE INDEX ix_intents_digest ON intents USING btree (digest)
TABLE leases
  id text COLLATE C NOT NULL
  owner text COLLATE C NOT NULL
  created_at bigint NOT NULL
  expires_at bigint NOT NULL
  ck_leases_id CHECK (((length(id) = 32) AND (ltrim(id, '0123456789abcdef'::text) = ''::text)))
  pk_leases PRIMARY KEY (id)
TABLE ledger
  seq bigint NOT NULL
  digest text COLLATE C NOT NULL
  body text COLLATE C NOT NULL
  ck_ledger_digest CHECK (((digest = ('blake3:'::text || substr(digest, 8, 64))) AND (length(digest) = 71) AND (ltrim(substr(digest, 8), '0123456789abcdef'::text) = ''::text)))
  ck_ledger_seq CHECK ((seq >= 1))
  pk_ledger PRIMARY KEY (seq)
TABLE registry
  id bigint NOT NULL DEFAULT nextval('registry_id_seq'::regclass)
  catalog text COLLATE C NOT NULL
  store text COLLATE C
  ck_registry_catalog CHECK (((length(catalog) = 32) AND (ltrim(catalog, '0123456789abcdef'::text) = ''::text)))
  ck_registry_id CHECK ((id = 1))
  ck_registry_store CHECK (((length(store) = 32) AND (ltrim(store, '0123456789abcdef'::text) = ''::text)))
  pk_registry PRIMARY KEY (id)
TABLE tag_history
  adapter_id bigint NOT NULL
  name text COLLATE C NOT NULL
  seq bigint NOT NULL
  version_id bigint
  moved_at bigint NOT NULL
  ck_tag_history_name CHECK (((length(name) >= 1) AND (length(name) <= 128) AND (ltrim(name, 'abcdefghijklmnopqrstuvwxyz0123456789._-'::text) = ''::text) AND (ltrim(substr(name, 1, 1), 'abcdefghijklmnopqrstuvwxyz0123456789'::text) = ''::text)))
  ck_tag_history_seq CHECK ((seq >= 1))
  fk_tag_history_adapter_id FOREIGN KEY (adapter_id) REFERENCES adapters(id)
  fk_tag_history_version_id FOREIGN KEY (version_id) REFERENCES versions(id) ON DELETE SET NULL
  pk_tag_history PRIMARY KEY (adapter_id, name, seq)
  CREATE INDEX ix_tag_history_version_id ON tag_history USING btree (version_id)
TABLE tags
  adapter_id bigint NOT NULL
  name text COLLATE C NOT NULL
  version_id bigint NOT NULL
  seq bigint NOT NULL
  ck_tags_name CHECK (((length(name) >= 1) AND (length(name) <= 128) AND (ltrim(name, 'abcdefghijklmnopqrstuvwxyz0123456789._-'::text) = ''::text) AND (ltrim(substr(name, 1, 1), 'abcdefghijklmnopqrstuvwxyz0123456789'::text) = ''::text)))
  ck_tags_seq CHECK ((seq >= 1))
  fk_tags_adapter_id FOREIGN KEY (adapter_id) REFERENCES adapters(id)
  fk_tags_version_id FOREIGN KEY (version_id) REFERENCES versions(id)
  pk_tags PRIMARY KEY (adapter_id, name)
  CREATE INDEX ix_tags_version_id ON tags USING btree (version_id)
TABLE targets
  version_id bigint NOT NULL
  target text COLLATE C NOT NULL
  fk_targets_version_id FOREIGN KEY (version_id) REFERENCES versions(id) ON DELETE CASCADE
  pk_targets PRIMARY KEY (version_id, target)
  CREATE INDEX ix_targets_target ON targets USING btree (target)
TABLE versions
  id bigint NOT NULL DEFAULT nextval('versions_id_seq'::regclass)
  adapter_id bigint NOT NULL
  number bigint NOT NULL
  digest text COLLATE C NOT NULL
  base_root text COLLATE C NOT NULL
  base_name text COLLATE C NOT NULL
  rank bigint NOT NULL
  modules bigint NOT NULL
  bytes bigint NOT NULL
  note text COLLATE C
  created_at bigint NOT NULL
  removed_at bigint
  ck_versions_base_root CHECK (((base_root = ('blake3:'::text || substr(base_root, 8, 64))) AND (length(base_root) = 71) AND (ltrim(substr(base_root, 8), '0123456789abcdef'::text) = ''::text)))
  ck_versions_bytes CHECK ((bytes >= 0))
  ck_versions_modules CHECK ((modules >= 0))
  ck_versions_number CHECK ((number >= 1))
  ck_versions_rank CHECK ((rank >= 0))
  fk_versions_adapter_id FOREIGN KEY (adapter_id) REFERENCES adapters(id)
  fk_versions_digest FOREIGN KEY (digest) REFERENCES blobs(digest)
  pk_versions PRIMARY KEY (id)
  uq_versions_adapter_id_digest UNIQUE (adapter_id, digest)
  uq_versions_adapter_id_number UNIQUE (adapter_id, number)
  CREATE INDEX ix_versions_base_name ON versions USING btree (base_name)
  CREATE INDEX ix_versions_base_root ON versions USING btree (base_root)
  CREATE INDEX ix_versions_digest ON versions USING btree (digest)
  CREATE INDEX ix_versions_rank ON versions USING btree (rank)
  CREATE INDEX ix_versions_removed_at ON versions USING btree (removed_at) WHERE (removed_at IS NOT NULL)
CREATE OR REPLACE FUNCTION loreg_grams(document text)
 RETURNS tsvector
 LANGUAGE sql
 IMMUTABLE PARALLEL SAFE STRICT
RETURN (SELECT array_to_tsvector(COALESCE(array_agg(found.gram), '{}'::text[])) AS array_to_tsvector FROM (SELECT ((each.one || lead(each.one, 1) OVER along) || lead(each.one, 2) OVER along) AS gram FROM unnest(string_to_array(loreg_grams.document, NULL::text)) WITH ORDINALITY each(one, place) WINDOW along AS (ORDER BY each.place)) found WHERE (found.gram IS NOT NULL))
