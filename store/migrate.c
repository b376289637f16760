#include "store/migrate.h"

#include <stdio.h>


const char *const MIGRATIONS[] = {
    // 1: everything of the first version. Ids sort by time, so that newest-first lists go by (tenant, id).
    // Partial indexes hold only what is alive: they stay small however much history there is.
    "CREATE TABLE tokens ("
    "  id TEXT NOT NULL, tenant TEXT NOT NULL, hash BLOB NOT NULL, name TEXT NOT NULL, scopes INTEGER NOT NULL,"
    "  created_at_ms INTEGER NOT NULL, expires_at_ms INTEGER NOT NULL, revoked_at_ms INTEGER NOT NULL) STRICT;"
    "CREATE UNIQUE INDEX tokens_hash ON tokens (hash);"
    "CREATE UNIQUE INDEX tokens_id ON tokens (tenant, id);"

    "CREATE TABLE sandboxes ("
    "  id TEXT NOT NULL, tenant TEXT NOT NULL, name TEXT NOT NULL, state INTEGER NOT NULL,"
    "  state_reason TEXT NOT NULL, image_ref TEXT NOT NULL, image_digest TEXT NOT NULL, vcpus INTEGER NOT NULL,"
    "  memory_mib INTEGER NOT NULL, disk_mib INTEGER NOT NULL, labels_json TEXT, env_json TEXT,"
    "  ttl_seconds INTEGER NOT NULL, expires_at_ms INTEGER NOT NULL, on_expiry TEXT NOT NULL,"
    "  detached INTEGER NOT NULL, owner TEXT NOT NULL, generation INTEGER NOT NULL, created_at_ms INTEGER NOT NULL,"
    "  updated_at_ms INTEGER NOT NULL, destroyed_at_ms INTEGER NOT NULL, job_id TEXT NOT NULL,"
    "  audit_id TEXT NOT NULL, receipt_id TEXT NOT NULL, backend_json TEXT, timings_json TEXT, runtime_json TEXT,"
    "  deletion_json TEXT) STRICT;"
    "CREATE UNIQUE INDEX sandboxes_id ON sandboxes (tenant, id);"
    "CREATE INDEX sandboxes_state ON sandboxes (tenant, state, id);"
    "CREATE UNIQUE INDEX sandboxes_live ON sandboxes (tenant, id) WHERE destroyed_at_ms = 0;"
    "CREATE UNIQUE INDEX sandboxes_name ON sandboxes (tenant, name) WHERE destroyed_at_ms = 0 AND name <> '';"
    "CREATE INDEX sandboxes_gone ON sandboxes (destroyed_at_ms) WHERE destroyed_at_ms <> 0;"

    "CREATE TABLE jobs ("
    "  id TEXT NOT NULL, tenant TEXT NOT NULL, sandbox_id TEXT NOT NULL, kind TEXT NOT NULL, state INTEGER NOT NULL,"
    "  stage TEXT NOT NULL, stages_json TEXT, problem_json TEXT, result_json TEXT, ref TEXT NOT NULL,"
    "  audit_id TEXT NOT NULL, receipt_id TEXT NOT NULL, request_id TEXT NOT NULL, created_at_ms INTEGER NOT NULL,"
    "  updated_at_ms INTEGER NOT NULL, finished_at_ms INTEGER NOT NULL) STRICT;"
    "CREATE UNIQUE INDEX jobs_id ON jobs (tenant, id);"
    "CREATE INDEX jobs_sandbox ON jobs (sandbox_id, id);"
    "CREATE INDEX jobs_unfinished ON jobs (id) WHERE state < 3;"

    "CREATE TABLE commands ("
    "  id TEXT NOT NULL, tenant TEXT NOT NULL, sandbox_id TEXT NOT NULL, phase INTEGER NOT NULL,"
    "  outcome INTEGER NOT NULL, exit_code INTEGER NOT NULL, signal INTEGER NOT NULL, spawn_error TEXT NOT NULL,"
    "  user TEXT NOT NULL, timeout_ms INTEGER NOT NULL, max_output_bytes INTEGER NOT NULL,"
    "  duration_ms INTEGER NOT NULL, background INTEGER NOT NULL, \"check\" INTEGER NOT NULL,"
    "  internal INTEGER NOT NULL, has_stdin INTEGER NOT NULL, stdin_closed INTEGER NOT NULL,"
    "  stdin_bytes INTEGER NOT NULL, argv_hmac TEXT NOT NULL, env_names_json TEXT, stdout_bytes INTEGER NOT NULL,"
    "  stderr_bytes INTEGER NOT NULL, stdout_spooled INTEGER NOT NULL, stderr_spooled INTEGER NOT NULL,"
    "  stdout_sha256 TEXT NOT NULL, stderr_sha256 TEXT NOT NULL, redacted INTEGER NOT NULL, job_id TEXT NOT NULL,"
    "  audit_id TEXT NOT NULL, receipt_id TEXT NOT NULL, agent_id INTEGER NOT NULL, created_at_ms INTEGER NOT NULL,"
    "  started_at_ms INTEGER NOT NULL, finished_at_ms INTEGER NOT NULL) STRICT;"
    "CREATE UNIQUE INDEX commands_id ON commands (sandbox_id, id);"
    "CREATE INDEX commands_unfinished ON commands (sandbox_id, id) WHERE phase < 3;"

    "CREATE TABLE events ("
    "  seq INTEGER PRIMARY KEY, id TEXT NOT NULL, tenant TEXT NOT NULL, kind TEXT NOT NULL, sandbox_id TEXT NOT NULL,"
    "  data_json TEXT, at_ms INTEGER NOT NULL) STRICT;"
    "CREATE INDEX events_tenant ON events (tenant, seq);"

    "CREATE TABLE idempotency ("
    "  tenant TEXT NOT NULL, method TEXT NOT NULL, path TEXT NOT NULL, key TEXT NOT NULL, body_sha256 BLOB NOT NULL,"
    "  state INTEGER NOT NULL, status INTEGER NOT NULL, ref TEXT NOT NULL, job_id TEXT NOT NULL,"
    "  audit_id TEXT NOT NULL, receipt_id TEXT NOT NULL, problem_json TEXT, created_at_ms INTEGER NOT NULL,"
    "  PRIMARY KEY (tenant, path, key, method)) STRICT, WITHOUT ROWID;"
    "CREATE INDEX idempotency_created ON idempotency (created_at_ms);"

    // The admission's key columns are emptied when it is settled.
    "CREATE TABLE receipts ("
    "  id TEXT NOT NULL, tenant TEXT NOT NULL, sandbox_id TEXT NOT NULL, job_id TEXT NOT NULL,"
    "  audit_id TEXT NOT NULL, operation TEXT NOT NULL, outcome TEXT NOT NULL, state INTEGER NOT NULL,"
    "  envelope_json TEXT, created_at_ms INTEGER NOT NULL, settled_at_ms INTEGER NOT NULL, token_id TEXT NOT NULL,"
    "  request_id TEXT NOT NULL, idem_key TEXT NOT NULL, method TEXT NOT NULL, path TEXT NOT NULL,"
    "  body_sha256 BLOB NOT NULL, settle_seq INTEGER NOT NULL, payload_sha256 TEXT NOT NULL) STRICT;"
    "CREATE UNIQUE INDEX receipts_id ON receipts (tenant, id);"
    "CREATE INDEX receipts_sandbox ON receipts (sandbox_id, id) WHERE sandbox_id <> '';"
    "CREATE INDEX receipts_settled ON receipts (tenant, settle_seq) WHERE settle_seq <> 0;"
    "CREATE INDEX receipts_pending ON receipts (id) WHERE state = 1;"

    // settles: the admission that has no receipt and that this entry settles, so that nothing settles it twice.
    "CREATE TABLE audit ("
    "  seq INTEGER PRIMARY KEY, id TEXT NOT NULL, tenant TEXT NOT NULL, at_ms INTEGER NOT NULL,"
    "  entry_json TEXT NOT NULL, hash TEXT NOT NULL, settles TEXT) STRICT;"
    "CREATE INDEX audit_tenant ON audit (tenant, seq);"
    "CREATE UNIQUE INDEX audit_settles ON audit (settles) WHERE settles IS NOT NULL;"

    "CREATE TABLE checkpoint ("
    "  one INTEGER PRIMARY KEY CHECK (one = 1), size INTEGER NOT NULL, head_hash TEXT NOT NULL,"
    "  at_ms INTEGER NOT NULL, signed_json TEXT NOT NULL) STRICT;"

    "CREATE TABLE keys ("
    "  key_id TEXT NOT NULL, use TEXT NOT NULL, public_pem TEXT NOT NULL, created_at_ms INTEGER NOT NULL,"
    "  retired_at_ms INTEGER NOT NULL, PRIMARY KEY (key_id, use)) STRICT, WITHOUT ROWID;",

    // 2: snapshots, and what a sandbox that continues from one knows of it. Deleted rows have two indexes, one to list
    // them and one to prune them; the rest is for what is alive.
    "CREATE TABLE snapshots ("
    "  id TEXT NOT NULL, tenant TEXT NOT NULL, sandbox_id TEXT NOT NULL, parent_id TEXT NOT NULL,"
    "  created_at_ms INTEGER NOT NULL, name TEXT NOT NULL, state INTEGER NOT NULL, state_reason TEXT NOT NULL,"
    "  kind TEXT NOT NULL, template_key TEXT NOT NULL, image_ref TEXT NOT NULL, image_digest TEXT NOT NULL,"
    "  vcpus INTEGER NOT NULL, memory_mib INTEGER NOT NULL, disk_mib INTEGER NOT NULL, env_json TEXT,"
    "  accel TEXT NOT NULL, epoch INTEGER NOT NULL, manifest_sha256 TEXT NOT NULL, sizes_json TEXT,"
    "  digests_json TEXT, qemu_json TEXT, timings_json TEXT, bytes INTEGER NOT NULL, paused_us INTEGER NOT NULL,"
    "  expires_at_ms INTEGER NOT NULL, generation INTEGER NOT NULL, deleted_at_ms INTEGER NOT NULL,"
    "  job_id TEXT NOT NULL, audit_id TEXT NOT NULL, receipt_id TEXT NOT NULL, deletion_json TEXT) STRICT;"
    "CREATE UNIQUE INDEX snapshots_id ON snapshots (tenant, id);"
    "CREATE UNIQUE INDEX snapshots_alive ON snapshots (tenant, id) WHERE deleted_at_ms = 0;"
    "CREATE INDEX snapshots_sandbox ON snapshots (sandbox_id, id) WHERE deleted_at_ms = 0;"
    "CREATE INDEX snapshots_children ON snapshots (parent_id) WHERE deleted_at_ms = 0 AND parent_id <> '';"
    "CREATE INDEX snapshots_expiry ON snapshots (expires_at_ms) WHERE deleted_at_ms = 0 AND expires_at_ms <> 0;"
    "CREATE UNIQUE INDEX snapshots_deleted ON snapshots (tenant, id) WHERE deleted_at_ms <> 0;"
    "CREATE INDEX snapshots_gone ON snapshots (deleted_at_ms) WHERE deleted_at_ms <> 0;"
    "ALTER TABLE sandboxes ADD COLUMN parent_sandbox_id TEXT NOT NULL DEFAULT '';"
    "ALTER TABLE sandboxes ADD COLUMN parent_snapshot_id TEXT NOT NULL DEFAULT '';"
    "ALTER TABLE sandboxes ADD COLUMN origin_json TEXT;"
    "ALTER TABLE sandboxes ADD COLUMN uniqueness_json TEXT;",
};
const size_t MIGRATIONS_COUNT = sizeof MIGRATIONS / sizeof MIGRATIONS[0];

static int step(struct db *db, const char *sql, size_t to, struct err *err)
{
    char version[64];
    snprintf(version, sizeof version, "PRAGMA user_version = %zu", to);
    if (db_exec(db, "BEGIN IMMEDIATE", err) != 0)
        return -1;
    if (db_exec(db, sql, err) == 0 && db_exec(db, version, err) == 0 && db_exec(db, "COMMIT", err) == 0)
        return 0;
    if (db_in_transaction(db))
        (void)db_exec(db, "ROLLBACK", NULL);
    return -1;
}

int migrate_run(struct db *db, const char *const *steps, size_t n, struct err *err)
{
    const int64_t at = db_number(db, "PRAGMA user_version", err);
    if (at < 0)
        return -1;
    if ((size_t)at > n)
        return err_set(err, ERR_INTERNAL, "store_newer", "the database was made by a newer server (schema %d, not %d)",
                       (int)at, (int)n);
    for (size_t i = (size_t)at; i < n; i++)
        if (step(db, steps[i], i + 1, err) != 0)
            return -1;
    return 0;
}
