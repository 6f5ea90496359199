BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO alembic_version VALUES ('0002');
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
 STRICT

;
INSERT INTO blobs VALUES ('blake3:489f83dee3fe41f2c55f51565c3a69381e68d7b0d49529a863ddb428fc4d4086', 'd6caf675bdb812c6', '80ffc098a5fd25d3ddc97a74d73ecc558f68b03c10057f890ca055d62cb9540e', 1045, 'live', 1795917033778661);
INSERT INTO blobs VALUES ('blake3:fabc3a78e2ce793105148e06e997b79c15a3ec999af07084beb21b4b4f91b220', '003268c2b4695d99', '5a1ee90c88c2c51b025f2efacb3434c1a60ff5c1723cdf9d25fd5d1dc3a64617', 1045, 'live', 1795917033371834);
INSERT INTO blobs VALUES ('blake3:1558234d4fe52f7cdf3d2cabf002ddbfadbf4d13b83c8cf7d950ee3fbd809e5c', 'a4b86ef58d7cb0d5', 'c65ae691aee5063952660e79c669e037c57a61845dc8f0e28b27f26c92844f40', 560, 'live', 1795917033673802);
INSERT INTO blobs VALUES ('blake3:7ee4433312221f563c51497781c3af4bc511fb76dafc7271024f473a464d15e4', '17be41c53e0fffbc', '7b20c83d8ec5c55dc558576c1b32032ee6b5ec679cf3e2dd37cc34fa6f585ea8', 162, 'live', 1795917033673802);
INSERT INTO blobs VALUES ('blake3:d32f772e768d265bc320932b447ee2c8d9cbd9e349c4ccc7bc18078dda35cf2d', '6f4bf68c757989a8', 'e28a95b0de9f1ac1d0caf72be72e16e5259a5e6ed57ce0b3b2146b2ca6f8c1cf', 608, 'live', 1795917029691806);
INSERT INTO blobs VALUES ('blake3:8b68ff4a5800d8d0c6601216cda515bae4ba974eb65cc75a5194c4495ea222c7', '3b1782761aea7480', 'bcb2d7811958d12943f7313a252a8abd7f52bf8f2dc9a0c036cd20599939754f', 2885, 'live', 1795917029691806);
INSERT INTO blobs VALUES ('blake3:6dd72ac6713d3113e2d763dfc67f83dc4224a9ae2be41a419b4a9c87bee99046', '7cc41ef68e5b6bb1', '7f7232200f558081e4718b3e31642c433e6c1a76fce154ef04320695ebabeacc', 608, 'live', 1795917029826154);
INSERT INTO blobs VALUES ('blake3:85fb9b5930358d3db68ff2f94e8bd85d8e2595dc724b52169c99c78706cbac05', '15b0affaec6e7d19', 'b61319063851360d0e1d78c4a0257c9b3c33dc29454d067aaafab757d9243bf9', 2885, 'live', 1795917029826154);
INSERT INTO blobs VALUES ('blake3:249b956d5663aa255f24c7f39b486aa74dff371df81dcf0c255aabd0b977c30c', 'c221cf58c87234eb', '37d4fc633b669f0e237a9ec80d9a23be95d192278f5e1e2b597271bc5580f928', 560, 'live', 1795917029921777);
INSERT INTO blobs VALUES ('blake3:f23592aa9bf7a9b0c6bad3f1e44af6daf4d658a23795910dc785f01589a86eba', '186d5badc3ef92f2', '67e9434b20d770f18d7923808ece906259bfcb5ab92e2dafd6803ad5cceb1725', 162, 'live', 1795917029921777);
INSERT INTO blobs VALUES ('blake3:06c3b7ad46d31975251f328334f38fb3f4356f0ad112459f659713aabf5e8482', 'deed1f5172d5fdc2', '32a87c46f2fe039f9e0aa079cbc6840acacb6915ac7a7452e2dc611b57f1f215', 712, 'live', 1795917029921777);
INSERT INTO blobs VALUES ('blake3:6bb47b87d99579b67650ce7271be4f823a54a68d92ada781f434bb8cdda7909a', 'd878f87128fdad26', '8aeb4d9758f2dc8839c8957bdd5cc198e6d26e41b23cec4a3038f7ba3539a363', 2917, 'live', 1795917029921777);
INSERT INTO blobs VALUES ('blake3:ba45bcb6f49d60d2a997189f3d19750496771d5e8e0dbface1b18dbccd4f7f91', '50ee213e14a32019', '72f22ab06580d2512ace6c2aa8c5814e2b5c28b4124b514a1db0e9d9d12474a7', 1312, 'live', 1795917033297522);
INSERT INTO blobs VALUES ('blake3:34f63938240d14963380fc9f3f32d72372b288722836e48816aac8f66f0d22c3', '385a5bb51048547e', 'd4a547f580d04ed5b900c5b0be376bfa27fb2d47218f1a71f32a3ff923eab565', 2996, 'live', 1795917033297522);
INSERT INTO blobs VALUES ('blake3:343101ce72e89f9e57a0fe6cd2f4138918a0280883d47e563c7d1fc8b15ae6ef', '62de7880b1cc10f7', '361564b3b30cbca8b5289dd946b8247376737bf90e50eeff0d562e48ffa4ff1f', 608, 'live', 1795917033673802);
INSERT INTO blobs VALUES ('blake3:2ecb159267feebbd3b50541e88d5188fafe99d55a374ada8625ab1bd21ade303', '1d14be8870069c48', '993232107cdcb2b3742557a9a3b29690ffab10f7db82492c85844dfd9b2285fc', 2885, 'live', 1795917033673802);
CREATE TABLE leases (
	id TEXT NOT NULL, 
	owner TEXT NOT NULL, 
	created_at INTEGER NOT NULL, 
	expires_at INTEGER NOT NULL, 
	CONSTRAINT pk_leases PRIMARY KEY (id), 
	CONSTRAINT ck_leases_id CHECK (length(id) = 32 AND ltrim(id, '0123456789abcdef') = '')
)
 STRICT

;
INSERT INTO leases VALUES ('862a1485db4579a3764ea2705edc9bfe', 'vm:31583', 1795917033785094, 1795920633785094);
CREATE TABLE intents (
	lease_id TEXT NOT NULL, 
	digest TEXT NOT NULL, 
	CONSTRAINT pk_intents PRIMARY KEY (lease_id, digest), 
	CONSTRAINT ck_intents_digest CHECK (digest = 'blake3:' || substr(digest, 8, 64) AND length(digest) = 71 AND ltrim(substr(digest, 8), '0123456789abcdef') = ''), 
	CONSTRAINT fk_intents_lease_id FOREIGN KEY(lease_id) REFERENCES leases (id) ON DELETE CASCADE
)
 STRICT

;
INSERT INTO intents VALUES ('862a1485db4579a3764ea2705edc9bfe', 'blake3:1558234d4fe52f7cdf3d2cabf002ddbfadbf4d13b83c8cf7d950ee3fbd809e5c');
INSERT INTO intents VALUES ('862a1485db4579a3764ea2705edc9bfe', 'blake3:6b746128ce185ce069ca9295a0e9e5ad435869e3ca11cd00ea6e3dc1ef94a31b');
INSERT INTO intents VALUES ('862a1485db4579a3764ea2705edc9bfe', 'blake3:7ee4433312221f563c51497781c3af4bc511fb76dafc7271024f473a464d15e4');
INSERT INTO intents VALUES ('862a1485db4579a3764ea2705edc9bfe', 'blake3:9be4aa8bb5c1a5f9d50f11a9e9521c195dca463dcd3f9ea1efbc99cc01f73837');
CREATE TABLE edges (
	source TEXT NOT NULL, 
	blob TEXT NOT NULL, 
	CONSTRAINT pk_edges PRIMARY KEY (source, blob), 
	CONSTRAINT ck_edges_source CHECK (source = 'blake3:' || substr(source, 8, 64) AND length(source) = 71 AND ltrim(substr(source, 8), '0123456789abcdef') = ''), 
	CONSTRAINT fk_edges_blob FOREIGN KEY(blob) REFERENCES blobs (digest)
)
 STRICT

;
INSERT INTO edges VALUES ('blake3:8b68ff4a5800d8d0c6601216cda515bae4ba974eb65cc75a5194c4495ea222c7', 'blake3:1558234d4fe52f7cdf3d2cabf002ddbfadbf4d13b83c8cf7d950ee3fbd809e5c');
INSERT INTO edges VALUES ('blake3:8b68ff4a5800d8d0c6601216cda515bae4ba974eb65cc75a5194c4495ea222c7', 'blake3:7ee4433312221f563c51497781c3af4bc511fb76dafc7271024f473a464d15e4');
INSERT INTO edges VALUES ('blake3:8b68ff4a5800d8d0c6601216cda515bae4ba974eb65cc75a5194c4495ea222c7', 'blake3:d32f772e768d265bc320932b447ee2c8d9cbd9e349c4ccc7bc18078dda35cf2d');
INSERT INTO edges VALUES ('blake3:85fb9b5930358d3db68ff2f94e8bd85d8e2595dc724b52169c99c78706cbac05', 'blake3:1558234d4fe52f7cdf3d2cabf002ddbfadbf4d13b83c8cf7d950ee3fbd809e5c');
INSERT INTO edges VALUES ('blake3:85fb9b5930358d3db68ff2f94e8bd85d8e2595dc724b52169c99c78706cbac05', 'blake3:6dd72ac6713d3113e2d763dfc67f83dc4224a9ae2be41a419b4a9c87bee99046');
INSERT INTO edges VALUES ('blake3:85fb9b5930358d3db68ff2f94e8bd85d8e2595dc724b52169c99c78706cbac05', 'blake3:7ee4433312221f563c51497781c3af4bc511fb76dafc7271024f473a464d15e4');
INSERT INTO edges VALUES ('blake3:6bb47b87d99579b67650ce7271be4f823a54a68d92ada781f434bb8cdda7909a', 'blake3:06c3b7ad46d31975251f328334f38fb3f4356f0ad112459f659713aabf5e8482');
INSERT INTO edges VALUES ('blake3:6bb47b87d99579b67650ce7271be4f823a54a68d92ada781f434bb8cdda7909a', 'blake3:249b956d5663aa255f24c7f39b486aa74dff371df81dcf0c255aabd0b977c30c');
INSERT INTO edges VALUES ('blake3:6bb47b87d99579b67650ce7271be4f823a54a68d92ada781f434bb8cdda7909a', 'blake3:f23592aa9bf7a9b0c6bad3f1e44af6daf4d658a23795910dc785f01589a86eba');
INSERT INTO edges VALUES ('blake3:34f63938240d14963380fc9f3f32d72372b288722836e48816aac8f66f0d22c3', 'blake3:ba45bcb6f49d60d2a997189f3d19750496771d5e8e0dbface1b18dbccd4f7f91');
INSERT INTO edges VALUES ('blake3:2ecb159267feebbd3b50541e88d5188fafe99d55a374ada8625ab1bd21ade303', 'blake3:1558234d4fe52f7cdf3d2cabf002ddbfadbf4d13b83c8cf7d950ee3fbd809e5c');
INSERT INTO edges VALUES ('blake3:2ecb159267feebbd3b50541e88d5188fafe99d55a374ada8625ab1bd21ade303', 'blake3:343101ce72e89f9e57a0fe6cd2f4138918a0280883d47e563c7d1fc8b15ae6ef');
INSERT INTO edges VALUES ('blake3:2ecb159267feebbd3b50541e88d5188fafe99d55a374ada8625ab1bd21ade303', 'blake3:7ee4433312221f563c51497781c3af4bc511fb76dafc7271024f473a464d15e4');
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
 STRICT

;
INSERT INTO bases VALUES (1, 'base', 'blake3:489f83dee3fe41f2c55f51565c3a69381e68d7b0d49529a863ddb428fc4d4086', 'blake3:f623a13376b2d6daefed6f3cac7003c15c1638d506d02828ae623fe44237590b', 'blake3:28cc61c520030dca78dba7c63f92f03a7be13ef21c2929c17c5d2bcb4fdb391f', 'blake3:cd6fac990fa88f49a089c7a72d75c80ea4a3187358953cb1048295f81cc15933', NULL, NULL, NULL, '/models/base', 7, 476, 1795917029391927);
INSERT INTO bases VALUES (2, 'other', 'blake3:fabc3a78e2ce793105148e06e997b79c15a3ec999af07084beb21b4b4f91b220', 'blake3:79b391fedf0c56de56a7de54e2459332bf71378bad3c1632dc67699cdba56475', 'blake3:28cc61c520030dca78dba7c63f92f03a7be13ef21c2929c17c5d2bcb4fdb391f', 'blake3:e8f86300f7375a602172e064553cf1bb185635fb74125ac1679333b0a04c01ba', NULL, NULL, NULL, '/models/other', 7, 476, 1795917029438821);
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
 STRICT

;
INSERT INTO adapters VALUES (1, 'sql', 3, 1795917029699335);
INSERT INTO adapters VALUES (2, 'team/humor', 1, 1795917029924121);
INSERT INTO adapters VALUES (3, 'both', 1, 1795917033301862);
INSERT INTO adapters VALUES (4, 'gone', 1, 1795917033427545);
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
	created_at INTEGER NOT NULL, removed_at INTEGER, 
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
 STRICT

;
INSERT INTO versions VALUES (1, 1, 1, 'blake3:8b68ff4a5800d8d0c6601216cda515bae4ba974eb65cc75a5194c4495ea222c7', 'blake3:f623a13376b2d6daefed6f3cac7003c15c1638d506d02828ae623fe44237590b', 'base', 2, 2, 1330, 'first', 1795917029699335, NULL);
INSERT INTO versions VALUES (2, 1, 2, 'blake3:85fb9b5930358d3db68ff2f94e8bd85d8e2595dc724b52169c99c78706cbac05', 'blake3:f623a13376b2d6daefed6f3cac7003c15c1638d506d02828ae623fe44237590b', 'base', 2, 2, 1330, NULL, 1795917029831782, NULL);
INSERT INTO versions VALUES (3, 2, 1, 'blake3:6bb47b87d99579b67650ce7271be4f823a54a68d92ada781f434bb8cdda7909a', 'blake3:f623a13376b2d6daefed6f3cac7003c15c1638d506d02828ae623fe44237590b', 'base', 3, 2, 1434, 'Größer, 100% – ''witty''
and shorter', 1795917029924121, NULL);
INSERT INTO versions VALUES (4, 3, 1, 'blake3:34f63938240d14963380fc9f3f32d72372b288722836e48816aac8f66f0d22c3', 'blake3:f623a13376b2d6daefed6f3cac7003c15c1638d506d02828ae623fe44237590b', 'base', 5, 2, 1312, NULL, 1795917033301862, NULL);
INSERT INTO versions VALUES (5, 1, 3, 'blake3:2ecb159267feebbd3b50541e88d5188fafe99d55a374ada8625ab1bd21ade303', 'blake3:f623a13376b2d6daefed6f3cac7003c15c1638d506d02828ae623fe44237590b', 'base', 2, 2, 1330, 'in the trash', 1795917033677598, 1795917033704254);
CREATE TABLE targets (
	version_id INTEGER NOT NULL, 
	target TEXT NOT NULL, 
	CONSTRAINT pk_targets PRIMARY KEY (version_id, target), 
	CONSTRAINT fk_targets_version_id FOREIGN KEY(version_id) REFERENCES versions (id) ON DELETE CASCADE
)
 STRICT

;
INSERT INTO targets VALUES (1, 'q_proj');
INSERT INTO targets VALUES (1, 'v_proj');
INSERT INTO targets VALUES (2, 'q_proj');
INSERT INTO targets VALUES (2, 'v_proj');
INSERT INTO targets VALUES (3, 'q_proj');
INSERT INTO targets VALUES (3, 'v_proj');
INSERT INTO targets VALUES (4, 'q_proj');
INSERT INTO targets VALUES (4, 'v_proj');
INSERT INTO targets VALUES (5, 'q_proj');
INSERT INTO targets VALUES (5, 'v_proj');
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
 STRICT

;
INSERT INTO tags VALUES (1, 'latest', 2, 4);
INSERT INTO tags VALUES (1, 'prod', 1, 1);
INSERT INTO tags VALUES (1, 'old', 2, 2);
INSERT INTO tags VALUES (2, 'latest', 3, 1);
INSERT INTO tags VALUES (3, 'latest', 4, 1);
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
 STRICT

;
INSERT INTO tag_history VALUES (1, 'latest', 1, 1, 1795917029699335);
INSERT INTO tag_history VALUES (1, 'prod', 1, 1, 1795917029699335);
INSERT INTO tag_history VALUES (1, 'old', 1, 1, 1795917029699335);
INSERT INTO tag_history VALUES (1, 'latest', 2, 2, 1795917029831782);
INSERT INTO tag_history VALUES (2, 'latest', 1, 3, 1795917029924121);
INSERT INTO tag_history VALUES (3, 'latest', 1, 4, 1795917033301862);
INSERT INTO tag_history VALUES (1, 'old', 2, 2, 1795917033335755);
INSERT INTO tag_history VALUES (4, 'latest', 1, NULL, 1795917033427545);
INSERT INTO tag_history VALUES (4, 'latest', 2, NULL, 1795917033463247);
INSERT INTO tag_history VALUES (1, 'latest', 3, 5, 1795917033677598);
INSERT INTO tag_history VALUES (1, 'latest', 4, 2, 1795917033704254);
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
 STRICT

;
CREATE INDEX ix_intents_digest ON intents (digest);
CREATE INDEX ix_edges_blob ON edges (blob);
CREATE INDEX ix_bases_manifest ON bases (manifest);
CREATE INDEX ix_bases_weights_root ON bases (weights_root);
CREATE INDEX ix_versions_base_root ON versions (base_root);
CREATE INDEX ix_versions_digest ON versions (digest);
CREATE INDEX ix_versions_rank ON versions (rank);
CREATE INDEX ix_targets_target ON targets (target);
CREATE INDEX ix_tags_version_id ON tags (version_id);
CREATE INDEX ix_tag_history_version_id ON tag_history (version_id);
COMMIT;
