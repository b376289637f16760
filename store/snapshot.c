// "Alive" is deleted_at_ms = 0. Where a snapshot came from (source, parent) is written once and never again: lineage is
// what the refusal to delete a parent goes by.
#include <stdlib.h>
#include <string.h>

#include "store/int.h"

#define SNAPSHOT_KEY "id, tenant, sandbox_id, parent_id, created_at_ms" // never change
#define SNAPSHOT_REST                                                                                                  \
    "name, state, state_reason, kind, template_key, image_ref, image_digest, vcpus, memory_mib, disk_mib, env_json,"   \
    " accel, epoch, manifest_sha256, sizes_json, digests_json, qemu_json, timings_json, bytes, paused_us,"             \
    " expires_at_ms, generation, deleted_at_ms, job_id, audit_id, receipt_id, deletion_json"
#define SNAPSHOT_COLUMNS SNAPSHOT_KEY ", " SNAPSHOT_REST
#define QUESTIONS_27 "?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?"
static const struct field SNAPSHOT_FIELDS[] = {
    FIELD(TEXT, snapshot_row, id), FIELD(TEXT, snapshot_row, tenant), FIELD(TEXT, snapshot_row, sandbox_id),
    FIELD(TEXT, snapshot_row, parent_id), FIELD(INT64, snapshot_row, created_at_ms), FIELD(TEXT, snapshot_row, name),
    FIELD(INT, snapshot_row, state), FIELD(TEXT, snapshot_row, state_reason), FIELD(TEXT, snapshot_row, kind),
    FIELD(TEXT, snapshot_row, template_key), FIELD(TEXT, snapshot_row, image_ref),
    FIELD(TEXT, snapshot_row, image_digest), FIELD(INT, snapshot_row, vcpus), FIELD(INT, snapshot_row, memory_mib),
    FIELD(INT, snapshot_row, disk_mib), FIELD(HEAP, snapshot_row, env_json), FIELD(TEXT, snapshot_row, accel),
    FIELD(INT64, snapshot_row, epoch), FIELD(TEXT, snapshot_row, manifest_sha256),
    FIELD(HEAP, snapshot_row, sizes_json), FIELD(HEAP, snapshot_row, digests_json),
    FIELD(HEAP, snapshot_row, qemu_json), FIELD(HEAP, snapshot_row, timings_json), FIELD(INT64, snapshot_row, bytes),
    FIELD(INT64, snapshot_row, paused_us), FIELD(INT64, snapshot_row, expires_at_ms),
    FIELD(INT64, snapshot_row, generation), FIELD(INT64, snapshot_row, deleted_at_ms),
    FIELD(TEXT, snapshot_row, job_id), FIELD(TEXT, snapshot_row, audit_id), FIELD(TEXT, snapshot_row, receipt_id),
    FIELD(HEAP, snapshot_row, deletion_json),
};
static const struct row_type SNAPSHOT = ROW_TYPE(snapshot_row, SNAPSHOT_FIELDS);
enum { SNAPSHOT_KEYS = 5 };

void snapshot_row_free(struct snapshot_row *row)
{
    row_free(&SNAPSHOT, row);
}

int snapshot_row_copy(struct snapshot_row *to, const struct snapshot_row *from)
{
    return row_copy(&SNAPSHOT, to, from);
}

// ---- writing ----------------------------------------------------------------------------------------------------------
// The word and the time say the same, or lists, quota and pruning would not agree about the row.
static int check_sense(const struct snapshot_row *row, struct err *err)
{
    if ((row->state == SNAPSHOT_DELETED) == (row->deleted_at_ms != 0))
        return 0;
    return err_set(err, ERR_INTERNAL, "snapshot_state", "state and time of deletion of a snapshot disagree");
}

static int check_quota(struct store_tx *tx, const char *tenant, unsigned max_alive, struct err *err)
{
    CLEANUP_STMT struct stmt *st =
        db_stmt(tx->db, "SELECT count(*) FROM snapshots INDEXED BY snapshots_alive WHERE tenant = ?"
                        " AND deleted_at_ms = 0", err);
    db_bind_text(st, tenant);
    if (db_step(st, err) < 0)
        return -1;
    if (db_col_int(st) < (int64_t)max_alive)
        return 0;
    err_set(err, ERR_RATE_LIMITED, "quota_exceeded", "the tenant has its %u snapshots", max_alive);
    return err_remedy(err, "delete snapshots that are no longer needed");
}

// Another tenant's is none.
static int check_parent(struct store_tx *tx, const struct snapshot_row *row, struct err *err)
{
    CLEANUP_STMT struct stmt *st =
        db_stmt(tx->db, "SELECT 1 FROM snapshots INDEXED BY snapshots_alive WHERE tenant = ? AND id = ?"
                        " AND deleted_at_ms = 0", err);
    db_bind_text(st, row->tenant);
    db_bind_text(st, row->parent_id);
    const int got = db_step(st, err);
    return got == 0 ? err_set(err, ERR_CONFLICT, "parent_deleted", "the snapshot it comes from was deleted")
                    : got < 0 ? -1 : 0;
}

int snapshot_insert(struct store_tx *tx, const struct snapshot_row *row, unsigned max_alive, struct err *err)
{
    if (check_sense(row, err) != 0 || (*row->parent_id && check_parent(tx, row, err) != 0))
        return -1;
    if (max_alive > 0 && check_quota(tx, row->tenant, max_alive, err) != 0)
        return -1;
    CLEANUP_STMT struct stmt *st =
        db_stmt(tx->db, "INSERT INTO snapshots (" SNAPSHOT_COLUMNS ") VALUES (?, ?, ?, ?, ?, " QUESTIONS_27 ")", err);
    row_bind(st, &SNAPSHOT, row, 0);
    return db_run(st, err);
}

static int check_children(struct store_tx *tx, const struct snapshot_row *row, struct err *err)
{
    CLEANUP_STMT struct stmt *st =
        db_stmt(tx->db, "SELECT count(*) FROM snapshots INDEXED BY snapshots_children WHERE parent_id = ?"
                        " AND tenant = ? AND deleted_at_ms = 0 AND parent_id <> ''", err);
    db_bind_text(st, row->id);
    db_bind_text(st, row->tenant);
    if (db_step(st, err) < 0)
        return -1;
    const int64_t n = db_col_int(st);
    if (n == 0)
        return 0;
    err_set(err, ERR_CONFLICT, "has_children", "%lld snapshots have it as their parent", (long long)n);
    return err_remedy(err, "delete them first");
}

// What is stored decides: a deleted row stays deleted, a newer one stays newer. Of two deletions at once the second has
// another time and is refused. 0 with what it finds.
static int check_stored(struct store_tx *tx, const struct snapshot_row *row, bool *ret_deleted, struct err *err)
{
    CLEANUP_STMT struct stmt *st =
        db_stmt(tx->db, "SELECT deleted_at_ms, generation FROM snapshots WHERE tenant = ? AND id = ?", err);
    db_bind_text(st, row->tenant);
    db_bind_text(st, row->id);
    const int got = db_step(st, err);
    if (got <= 0)
        return got < 0 ? -1 : err_set(err, ERR_NOT_FOUND, "", "no such snapshot");
    const int64_t deleted_at_ms = db_col_int(st);
    if (deleted_at_ms != 0 && row->deleted_at_ms != deleted_at_ms)
        return err_set(err, ERR_CONFLICT, "deleted", "the snapshot was deleted");
    if (db_col_int(st) > row->generation)
        return err_set(err, ERR_INTERNAL, "stale_row", "the snapshot was changed in between");
    *ret_deleted = deleted_at_ms != 0;
    return 0;
}

int snapshot_update(struct store_tx *tx, const struct snapshot_row *row, struct err *err)
{
    bool deleted = false;
    if (check_sense(row, err) != 0 || check_stored(tx, row, &deleted, err) != 0)
        return -1;
    if (!deleted && row->deleted_at_ms != 0 && check_children(tx, row, err) != 0)
        return -1;
    CLEANUP_STMT struct stmt *st = db_stmt(tx->db, "UPDATE snapshots SET (" SNAPSHOT_REST ") = (" QUESTIONS_27 ")"
                                                   " WHERE tenant = ? AND id = ?", err);
    row_bind(st, &SNAPSHOT, row, SNAPSHOT_KEYS);
    db_bind_text(st, row->tenant);
    db_bind_text(st, row->id);
    return db_run(st, err);
}

// ---- reading ----------------------------------------------------------------------------------------------------------
int snapshot_get(struct store *s, const char *tenant, const char *id, struct snapshot_row *ret, struct err *err)
{
    struct snapshot_row row;
    struct db *db = reader_db(s, err);
    CLEANUP_STMT struct stmt *st =
        db ? db_stmt(db, "SELECT " SNAPSHOT_COLUMNS " FROM snapshots WHERE tenant = ? AND id = ?", err) : NULL;
    db_bind_text(st, tenant);
    db_bind_text(st, id);
    const int got = row_next(st, &SNAPSHOT, &row, err);
    if (got > 0)
        *ret = row;
    return got > 0 ? 0 : got == 0 ? 1 : -1;
}

static int each(struct stmt *st, bool (*fn)(void *, const struct snapshot_row *), void *arg, struct err *err)
{
    struct snapshot_row row;
    int got;
    while ((got = row_next(st, &SNAPSHOT, &row, err)) > 0) {
        const bool more = fn(arg, &row);
        row_free(&SNAPSHOT, &row);
        if (!more)
            return 0;
    }
    return got;
}

#define ALIVE " AND deleted_at_ms = 0"
#define DELETED " AND deleted_at_ms <> 0"
#define OF_SANDBOX " AND sandbox_id = ?"
#define NEWEST " ORDER BY id DESC LIMIT ?"

int snapshot_list(struct store *s, const struct snapshot_filter *f, bool (*fn)(void *, const struct snapshot_row *),
                  void *arg, struct err *err)
{
    static const char *const SQL[2][2] = {
        {"SELECT " SNAPSHOT_COLUMNS " FROM snapshots INDEXED BY snapshots_alive WHERE tenant = ? AND id < ?" ALIVE NEWEST,
         "SELECT " SNAPSHOT_COLUMNS " FROM snapshots INDEXED BY snapshots_sandbox WHERE tenant = ? AND id < ?"
         ALIVE OF_SANDBOX NEWEST},
        {"SELECT " SNAPSHOT_COLUMNS " FROM snapshots INDEXED BY snapshots_deleted WHERE tenant = ? AND id < ?"
         DELETED NEWEST,
         "SELECT " SNAPSHOT_COLUMNS " FROM snapshots INDEXED BY snapshots_deleted WHERE tenant = ? AND id < ?"
         DELETED OF_SANDBOX NEWEST},
    };
    struct db *db = reader_db(s, err);
    CLEANUP_STMT struct stmt *st = db ? db_stmt(db, SQL[f->deleted][f->sandbox_id != NULL], err) : NULL;
    db_bind_text(st, f->page.tenant);
    db_bind_text(st, f->page.cursor ? f->page.cursor : "~"); // sorts after every id
    if (f->sandbox_id)
        db_bind_text(st, f->sandbox_id);
    db_bind_int(st, f->page.limit);
    return each(st, fn, arg, err);
}

// Those with alive children cannot go yet: they are left out, or a few of them would stand before all others for ever.
int snapshot_each_expired_all_tenants(struct store *s, int64_t now_ms, unsigned limit,
                                      bool (*fn)(void *, const struct snapshot_row *), void *arg, struct err *err)
{
    static const char SQL[] =
        "SELECT " SNAPSHOT_COLUMNS " FROM snapshots AS s INDEXED BY snapshots_expiry WHERE deleted_at_ms = 0"
        " AND expires_at_ms <> 0 AND expires_at_ms <= ? AND NOT EXISTS (SELECT 1 FROM snapshots AS c"
        " INDEXED BY snapshots_children WHERE c.parent_id = s.id AND c.tenant = s.tenant AND c.deleted_at_ms = 0"
        " AND c.parent_id <> '') ORDER BY expires_at_ms LIMIT ?";
    struct db *db = reader_db(s, err);
    CLEANUP_STMT struct stmt *st = db ? db_stmt(db, SQL, err) : NULL;
    db_bind_int(st, now_ms);
    db_bind_int(st, limit);
    return each(st, fn, arg, err);
}

int snapshot_each_alive_all_tenants(struct store *s, bool (*fn)(void *, const struct snapshot_row *), void *arg,
                                    struct err *err)
{
    struct db *db = reader_db(s, err);
    CLEANUP_STMT struct stmt *st =
        db ? db_stmt(db, "SELECT " SNAPSHOT_COLUMNS " FROM snapshots INDEXED BY snapshots_alive"
                         " WHERE deleted_at_ms = 0", err) : NULL;
    return each(st, fn, arg, err);
}
