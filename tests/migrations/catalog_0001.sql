BEGIN TRANSACTION;
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
INSERT INTO "adapters" VALUES(1,'sql',2,1795889704719915);
INSERT INTO "adapters" VALUES(2,'team/humor',1,1795889704914291);
INSERT INTO "adapters" VALUES(3,'both',1,1795889709598990);
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0001');
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
INSERT INTO "bases" VALUES(1,'base','blake3:489f83dee3fe41f2c55f51565c3a69381e68d7b0d49529a863ddb428fc4d4086','blake3:f623a13376b2d6daefed6f3cac7003c15c1638d506d02828ae623fe44237590b','blake3:28cc61c520030dca78dba7c63f92f03a7be13ef21c2929c17c5d2bcb4fdb391f','blake3:cd6fac990fa88f49a089c7a72d75c80ea4a3187358953cb1048295f81cc15933',NULL,NULL,NULL,'/models/base',7,476,1795889703902526);
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
INSERT INTO "blobs" VALUES('blake3:489f83dee3fe41f2c55f51565c3a69381e68d7b0d49529a863ddb428fc4d4086','78e17986f9a739f3','80ffc098a5fd25d3ddc97a74d73ecc558f68b03c10057f890ca055d62cb9540e',1045,'live',1795889704874786);
INSERT INTO "blobs" VALUES('blake3:1558234d4fe52f7cdf3d2cabf002ddbfadbf4d13b83c8cf7d950ee3fbd809e5c','cb716e8e3c26daf6','c65ae691aee5063952660e79c669e037c57a61845dc8f0e28b27f26c92844f40',560,'live',1795889704824837);
INSERT INTO "blobs" VALUES('blake3:7ee4433312221f563c51497781c3af4bc511fb76dafc7271024f473a464d15e4','3ab22f8b79e60117','7b20c83d8ec5c55dc558576c1b32032ee6b5ec679cf3e2dd37cc34fa6f585ea8',162,'live',1795889704824837);
INSERT INTO "blobs" VALUES('blake3:d32f772e768d265bc320932b447ee2c8d9cbd9e349c4ccc7bc18078dda35cf2d','8e26b2c6080b9875','e28a95b0de9f1ac1d0caf72be72e16e5259a5e6ed57ce0b3b2146b2ca6f8c1cf',608,'live',1795889704713489);
INSERT INTO "blobs" VALUES('blake3:8b68ff4a5800d8d0c6601216cda515bae4ba974eb65cc75a5194c4495ea222c7','1671dc9a7f3c63ac','bcb2d7811958d12943f7313a252a8abd7f52bf8f2dc9a0c036cd20599939754f',2885,'live',1795889704713489);
INSERT INTO "blobs" VALUES('blake3:343101ce72e89f9e57a0fe6cd2f4138918a0280883d47e563c7d1fc8b15ae6ef','33845b156f02d9f9','361564b3b30cbca8b5289dd946b8247376737bf90e50eeff0d562e48ffa4ff1f',608,'live',1795889704824837);
INSERT INTO "blobs" VALUES('blake3:2ecb159267feebbd3b50541e88d5188fafe99d55a374ada8625ab1bd21ade303','ba0eb96c7d7798cd','993232107cdcb2b3742557a9a3b29690ffab10f7db82492c85844dfd9b2285fc',2885,'live',1795889704824837);
INSERT INTO "blobs" VALUES('blake3:249b956d5663aa255f24c7f39b486aa74dff371df81dcf0c255aabd0b977c30c','8f35f80f1ae021b6','37d4fc633b669f0e237a9ec80d9a23be95d192278f5e1e2b597271bc5580f928',560,'live',1795889704906364);
INSERT INTO "blobs" VALUES('blake3:5ee1ccb23904ed0d82f79b4900da89f4837d8c90943c6b42e7d0511737464fcc','95ababf3e028e7cc','06770b5022f84da7420ce317c3326c713d77868716e20deafbe66c23751ca31b',182,'live',1795889704906364);
INSERT INTO "blobs" VALUES('blake3:349b768ba60497ef74b3bfb5609a2692e3edc0fcdca3292950c4fcbba1ce687f','cfbf2c746138d9e0','318bfb26dbc4de63ffaad3b64d1ee08b513ec7648883c8c2586abbd16de989f4',712,'live',1795889704906364);
INSERT INTO "blobs" VALUES('blake3:ec022847e67c55a426c60d75c7dca93c2b7f58cba4018fd6e3426b2440f78239','2ca7d76bdf1f27ac','8e2823f7af72ca657bb18b7c648a4e3790ef80293a6441022d1276f1106aaa43',2917,'live',1795889704906364);
INSERT INTO "blobs" VALUES('blake3:71df0fe50cdaa282e41b08477b692e0313c245a54673c92142365229d0db3212','11eb9a46ddf6e400','a7af2d32e3b5ef9f58cf408cc2ec379d27ff006574cc9b2c212de021bedf49cb',1312,'live',1795889709594228);
INSERT INTO "blobs" VALUES('blake3:73748ef25ee60847a587fe8d025ecb890cb1162a166b1eef86a91649d99fd5aa','249ac47fcf87e364','638db2843b0593742018210aa42c7c64b67f8230b770208fdacf6cb4a2879965',2996,'live',1795889709594228);
CREATE TABLE edges (
	source TEXT NOT NULL, 
	blob TEXT NOT NULL, 
	CONSTRAINT pk_edges PRIMARY KEY (source, blob), 
	CONSTRAINT ck_edges_source CHECK (source = 'blake3:' || substr(source, 8, 64) AND length(source) = 71 AND ltrim(substr(source, 8), '0123456789abcdef') = ''), 
	CONSTRAINT fk_edges_blob FOREIGN KEY(blob) REFERENCES blobs (digest)
)
 STRICT

;
INSERT INTO "edges" VALUES('blake3:8b68ff4a5800d8d0c6601216cda515bae4ba974eb65cc75a5194c4495ea222c7','blake3:1558234d4fe52f7cdf3d2cabf002ddbfadbf4d13b83c8cf7d950ee3fbd809e5c');
INSERT INTO "edges" VALUES('blake3:8b68ff4a5800d8d0c6601216cda515bae4ba974eb65cc75a5194c4495ea222c7','blake3:7ee4433312221f563c51497781c3af4bc511fb76dafc7271024f473a464d15e4');
INSERT INTO "edges" VALUES('blake3:8b68ff4a5800d8d0c6601216cda515bae4ba974eb65cc75a5194c4495ea222c7','blake3:d32f772e768d265bc320932b447ee2c8d9cbd9e349c4ccc7bc18078dda35cf2d');
INSERT INTO "edges" VALUES('blake3:2ecb159267feebbd3b50541e88d5188fafe99d55a374ada8625ab1bd21ade303','blake3:1558234d4fe52f7cdf3d2cabf002ddbfadbf4d13b83c8cf7d950ee3fbd809e5c');
INSERT INTO "edges" VALUES('blake3:2ecb159267feebbd3b50541e88d5188fafe99d55a374ada8625ab1bd21ade303','blake3:343101ce72e89f9e57a0fe6cd2f4138918a0280883d47e563c7d1fc8b15ae6ef');
INSERT INTO "edges" VALUES('blake3:2ecb159267feebbd3b50541e88d5188fafe99d55a374ada8625ab1bd21ade303','blake3:7ee4433312221f563c51497781c3af4bc511fb76dafc7271024f473a464d15e4');
INSERT INTO "edges" VALUES('blake3:ec022847e67c55a426c60d75c7dca93c2b7f58cba4018fd6e3426b2440f78239','blake3:249b956d5663aa255f24c7f39b486aa74dff371df81dcf0c255aabd0b977c30c');
INSERT INTO "edges" VALUES('blake3:ec022847e67c55a426c60d75c7dca93c2b7f58cba4018fd6e3426b2440f78239','blake3:349b768ba60497ef74b3bfb5609a2692e3edc0fcdca3292950c4fcbba1ce687f');
INSERT INTO "edges" VALUES('blake3:ec022847e67c55a426c60d75c7dca93c2b7f58cba4018fd6e3426b2440f78239','blake3:5ee1ccb23904ed0d82f79b4900da89f4837d8c90943c6b42e7d0511737464fcc');
INSERT INTO "edges" VALUES('blake3:73748ef25ee60847a587fe8d025ecb890cb1162a166b1eef86a91649d99fd5aa','blake3:71df0fe50cdaa282e41b08477b692e0313c245a54673c92142365229d0db3212');
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
CREATE TABLE intents (
	lease_id TEXT NOT NULL, 
	digest TEXT NOT NULL, 
	CONSTRAINT pk_intents PRIMARY KEY (lease_id, digest), 
	CONSTRAINT ck_intents_digest CHECK (digest = 'blake3:' || substr(digest, 8, 64) AND length(digest) = 71 AND ltrim(substr(digest, 8), '0123456789abcdef') = ''), 
	CONSTRAINT fk_intents_lease_id FOREIGN KEY(lease_id) REFERENCES leases (id) ON DELETE CASCADE
)
 STRICT

;
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
INSERT INTO "tag_history" VALUES(1,'latest',1,1,1795889704719915);
INSERT INTO "tag_history" VALUES(1,'prod',1,1,1795889704719915);
INSERT INTO "tag_history" VALUES(1,'latest',2,2,1795889704830752);
INSERT INTO "tag_history" VALUES(2,'latest',1,3,1795889704914291);
INSERT INTO "tag_history" VALUES(1,'prod',2,2,1795889704951448);
INSERT INTO "tag_history" VALUES(1,'prod',3,1,1795889704977044);
INSERT INTO "tag_history" VALUES(3,'latest',1,4,1795889709598990);
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
INSERT INTO "tags" VALUES(1,'latest',2,2);
INSERT INTO "tags" VALUES(1,'prod',1,3);
INSERT INTO "tags" VALUES(2,'latest',3,1);
INSERT INTO "tags" VALUES(3,'latest',4,1);
CREATE TABLE targets (
	version_id INTEGER NOT NULL, 
	target TEXT NOT NULL, 
	CONSTRAINT pk_targets PRIMARY KEY (version_id, target), 
	CONSTRAINT fk_targets_version_id FOREIGN KEY(version_id) REFERENCES versions (id) ON DELETE CASCADE
)
 STRICT

;
INSERT INTO "targets" VALUES(1,'q_proj');
INSERT INTO "targets" VALUES(1,'v_proj');
INSERT INTO "targets" VALUES(2,'q_proj');
INSERT INTO "targets" VALUES(2,'v_proj');
INSERT INTO "targets" VALUES(3,'q_proj');
INSERT INTO "targets" VALUES(3,'v_proj');
INSERT INTO "targets" VALUES(4,'q_proj');
INSERT INTO "targets" VALUES(4,'v_proj');
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
INSERT INTO "versions" VALUES(1,1,1,'blake3:8b68ff4a5800d8d0c6601216cda515bae4ba974eb65cc75a5194c4495ea222c7','blake3:f623a13376b2d6daefed6f3cac7003c15c1638d506d02828ae623fe44237590b','base',2,2,1330,'first',1795889704719915);
INSERT INTO "versions" VALUES(2,1,2,'blake3:2ecb159267feebbd3b50541e88d5188fafe99d55a374ada8625ab1bd21ade303','blake3:f623a13376b2d6daefed6f3cac7003c15c1638d506d02828ae623fe44237590b','base',2,2,1330,NULL,1795889704830752);
INSERT INTO "versions" VALUES(3,2,1,'blake3:ec022847e67c55a426c60d75c7dca93c2b7f58cba4018fd6e3426b2440f78239','blake3:f623a13376b2d6daefed6f3cac7003c15c1638d506d02828ae623fe44237590b','base',3,2,1454,NULL,1795889704914291);
INSERT INTO "versions" VALUES(4,3,1,'blake3:73748ef25ee60847a587fe8d025ecb890cb1162a166b1eef86a91649d99fd5aa','blake3:f623a13376b2d6daefed6f3cac7003c15c1638d506d02828ae623fe44237590b','base',5,2,1312,NULL,1795889709598990);
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
