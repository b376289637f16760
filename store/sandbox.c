// "Destroyed" is destroyed_at_ms <> 0 here: what the numbers of `state` mean is the business of sandbox/.
#include <stdlib.h>
#include <string.h>

#include "store/int.h"

#define SANDBOX_KEY "id, tenant"
#define SANDBOX_REST                                                                                                   \
    "name, state, state_reason, image_ref, image_digest, vcpus, memory_mib, disk_mib, labels_json, env_json,"          \
    " ttl_seconds, expires_at_ms, on_expiry, detached, owner, generation, created_at_ms, updated_at_ms,"               \
    " destroyed_at_ms, job_id, audit_id, receipt_id, backend_json, timings_json, runtime_json, deletion_json,"         \
    " parent_sandbox_id, parent_snapshot_id, origin_json, uniqueness_json"
#define SANDBOX_COLUMNS SANDBOX_KEY ", " SANDBOX_REST
#define QUESTIONS_30                                                                                                   \
    "?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?"
static const struct field SANDBOX_FIELDS[] = {
    FIELD(TEXT, sandbox_row, id), FIELD(TEXT, sandbox_row, tenant), FIELD(TEXT, sandbox_row, name),
    FIELD(INT, sandbox_row, state), FIELD(TEXT, sandbox_row, state_reason), FIELD(TEXT, sandbox_row, image_ref),
    FIELD(TEXT, sandbox_row, image_digest), FIELD(INT, sandbox_row, vcpus), FIELD(INT, sandbox_row, memory_mib),
    FIELD(INT, sandbox_row, disk_mib), FIELD(HEAP, sandbox_row, labels_json), FIELD(HEAP, sandbox_row, env_json),
    FIELD(INT64, sandbox_row, ttl_seconds), FIELD(INT64, sandbox_row, expires_at_ms),
    FIELD(TEXT, sandbox_row, on_expiry), FIELD(BOOL, sandbox_row, detached), FIELD(TEXT, sandbox_row, owner),
    FIELD(INT64, sandbox_row, generation), FIELD(INT64, sandbox_row, created_at_ms),
    FIELD(INT64, sandbox_row, updated_at_ms), FIELD(INT64, sandbox_row, destroyed_at_ms),
    FIELD(TEXT, sandbox_row, job_id), FIELD(TEXT, sandbox_row, audit_id), FIELD(TEXT, sandbox_row, receipt_id),
    FIELD(HEAP, sandbox_row, backend_json), FIELD(HEAP, sandbox_row, timings_json),
    FIELD(HEAP, sandbox_row, runtime_json), FIELD(HEAP, sandbox_row, deletion_json),
    FIELD(TEXT, sandbox_row, parent_sandbox_id), FIELD(TEXT, sandbox_row, parent_snapshot_id),
    FIELD(HEAP, sandbox_row, origin_json), FIELD(HEAP, sandbox_row, uniqueness_json),
};
static const struct row_type SANDBOX = ROW_TYPE(sandbox_row, SANDBOX_FIELDS);
enum { SANDBOX_KEYS = 2 };

void sandbox_row_free(struct sandbox_row *row)
{
    row_free(&SANDBOX, row);
}

int sandbox_row_copy(struct sandbox_row *to, const struct sandbox_row *from)
{
    return row_copy(&SANDBOX, to, from);
}

// ---- writing ----------------------------------------------------------------------------------------------------------
static int check_name(struct store_tx *tx, const struct sandbox_row *row, struct err *err)
{
    CLEANUP_STMT struct stmt *st =
        db_stmt(tx->db, "SELECT 1 FROM sandboxes WHERE tenant = ? AND name = ? AND destroyed_at_ms = 0 AND name <> ''"
                        " AND id <> ?", err);
    db_bind_text(st, row->tenant);
    db_bind_text(st, row->name);
    db_bind_text(st, row->id);
    const int got = db_step(st, err);
    return got > 0 ? err_set(err, ERR_CONFLICT, "name_taken", "another sandbox has this name") : got;
}

static int check_quota(struct store_tx *tx, const char *tenant, unsigned max_live, struct err *err)
{
    CLEANUP_STMT struct stmt *st =
        db_stmt(tx->db, "SELECT count(*) FROM sandboxes WHERE tenant = ? AND destroyed_at_ms = 0", err);
    db_bind_text(st, tenant);
    if (db_step(st, err) < 0)
        return -1;
    if (db_col_int(st) < (int64_t)max_live)
        return 0;
    err_set(err, ERR_RATE_LIMITED, "quota_exceeded", "the tenant has its %u sandboxes", max_live);
    return err_remedy(err, "delete sandboxes that are no longer needed");
}

int sandbox_insert(struct store_tx *tx, const struct sandbox_row *row, unsigned max_live, struct err *err)
{
    if (*row->name && check_name(tx, row, err) != 0)
        return -1;
    if (max_live > 0 && check_quota(tx, row->tenant, max_live, err) != 0)
        return -1;
    CLEANUP_STMT struct stmt *st =
        db_stmt(tx->db, "INSERT INTO sandboxes (" SANDBOX_COLUMNS ") VALUES (?, ?, " QUESTIONS_30 ")", err);
    row_bind(st, &SANDBOX, row, 0);
    return db_run(st, err);
}

// What is stored decides: a destroyed row stays destroyed, a newer one stays newer.
static int check_stored(struct store_tx *tx, const struct sandbox_row *row, struct err *err)
{
    CLEANUP_STMT struct stmt *st =
        db_stmt(tx->db, "SELECT destroyed_at_ms, generation FROM sandboxes WHERE tenant = ? AND id = ?", err);
    db_bind_text(st, row->tenant);
    db_bind_text(st, row->id);
    const int got = db_step(st, err);
    if (got <= 0)
        return got < 0 ? -1 : err_set(err, ERR_NOT_FOUND, "", "no such sandbox");
    if (db_col_int(st) != 0 && row->destroyed_at_ms == 0)
        return err_set(err, ERR_CONFLICT, "deleted", "the sandbox was deleted");
    if (db_col_int(st) > row->generation)
        return err_set(err, ERR_INTERNAL, "stale_row", "the sandbox was changed in between");
    return 0;
}

int sandbox_update(struct store_tx *tx, const struct sandbox_row *row, struct err *err)
{
    if (check_stored(tx, row, err) != 0)
        return -1;
    CLEANUP_STMT struct stmt *st = db_stmt(tx->db, "UPDATE sandboxes SET (" SANDBOX_REST ") = (" QUESTIONS_30 ")"
                                                   " WHERE tenant = ? AND id = ?", err);
    row_bind(st, &SANDBOX, row, SANDBOX_KEYS);
    db_bind_text(st, row->tenant);
    db_bind_text(st, row->id);
    return db_run(st, err);
}

// ---- reading ----------------------------------------------------------------------------------------------------------
int sandbox_get(struct store *s, const char *tenant, const char *id, struct sandbox_row *ret, struct err *err)
{
    struct sandbox_row row;
    struct db *db = reader_db(s, err);
    CLEANUP_STMT struct stmt *st =
        db ? db_stmt(db, "SELECT " SANDBOX_COLUMNS " FROM sandboxes WHERE tenant = ? AND id = ?", err) : NULL;
    db_bind_text(st, tenant);
    db_bind_text(st, id);
    const int got = row_next(st, &SANDBOX, &row, err);
    if (got > 0)
        *ret = row;
    return got > 0 ? 0 : got == 0 ? 1 : -1;
}

static int each(struct stmt *st, bool (*fn)(void *, const struct sandbox_row *), void *arg, struct err *err)
{
    struct sandbox_row row;
    int got;
    while ((got = row_next(st, &SANDBOX, &row, err)) > 0) {
        const bool more = fn(arg, &row);
        row_free(&SANDBOX, &row);
        if (!more)
            return 0;
    }
    return got;
}

#define LABEL " AND EXISTS (SELECT 1 FROM json_each(labels_json) AS l WHERE l.key = ? AND l.value = ?)"
#define NEWEST " ORDER BY id DESC LIMIT ?"

int sandbox_list(struct store *s, const struct sandbox_filter *f, bool (*fn)(void *, const struct sandbox_row *),
                 void *arg, struct err *err)
{
    static const char *const SQL[2][2] = {
        {"SELECT " SANDBOX_COLUMNS " FROM sandboxes INDEXED BY sandboxes_live WHERE tenant = ? AND id < ?"
         " AND destroyed_at_ms = 0" NEWEST,
         "SELECT " SANDBOX_COLUMNS " FROM sandboxes INDEXED BY sandboxes_live WHERE tenant = ? AND id < ?"
         " AND destroyed_at_ms = 0" LABEL NEWEST},
        {"SELECT " SANDBOX_COLUMNS " FROM sandboxes INDEXED BY sandboxes_state WHERE tenant = ? AND id < ?"
         " AND state = ?" NEWEST,
         "SELECT " SANDBOX_COLUMNS " FROM sandboxes INDEXED BY sandboxes_state WHERE tenant = ? AND id < ?"
         " AND state = ?" LABEL NEWEST},
    };
    struct db *db = reader_db(s, err);
    CLEANUP_STMT struct stmt *st = db ? db_stmt(db, SQL[f->state >= 0][f->label_key != NULL], err) : NULL;
    db_bind_text(st, f->page.tenant);
    db_bind_text(st, f->page.cursor ? f->page.cursor : "~"); // sorts after every id
    if (f->state >= 0)
        db_bind_int(st, f->state);
    if (f->label_key) {
        db_bind_text(st, f->label_key);
        db_bind_text(st, f->label_value);
    }
    db_bind_int(st, f->page.limit);
    return each(st, fn, arg, err);
}

int sandbox_each_id_all_tenants(struct store *s, void (*fn)(void *, const char *id), void *arg, struct err *err)
{
    struct db *db = reader_db(s, err);
    CLEANUP_STMT struct stmt *st = db ? db_stmt(db, "SELECT id FROM sandboxes", err) : NULL;
    int got;
    while ((got = db_step(st, err)) > 0) {
        char id[ID_MAX];
        db_col_text(st, id, sizeof id);
        fn(arg, id);
    }
    return got;
}

int sandbox_each_live_all_tenants(struct store *s, bool (*fn)(void *, const struct sandbox_row *), void *arg,
                                  struct err *err)
{
    struct db *db = reader_db(s, err);
    CLEANUP_STMT struct stmt *st =
        db ? db_stmt(db, "SELECT " SANDBOX_COLUMNS " FROM sandboxes INDEXED BY sandboxes_live"
                         " WHERE destroyed_at_ms = 0", err) : NULL;
    return each(st, fn, arg, err);
}
