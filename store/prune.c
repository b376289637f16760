// What is past its time goes, a bounded number of rows at once. Receipts and the audit chain stay: they are the proof.
#include <stdlib.h>
#include <string.h>

#include "store/int.h"

static int old_rows(struct store_tx *tx, const char *sql, int64_t before_ms, unsigned max_rows, struct err *err)
{
    CLEANUP_STMT struct stmt *st = db_stmt(tx->db, sql, err);
    db_bind_int(st, before_ms);
    db_bind_int(st, max_rows);
    return db_run(st, err);
}

static int64_t rows_of_sandbox(struct store_tx *tx, const char *sql, const char *id, int64_t max_rows, struct err *err)
{
    CLEANUP_STMT struct stmt *st = db_stmt(tx->db, sql, err);
    db_bind_text(st, id);
    db_bind_int(st, max_rows);
    return db_run(st, err) == 0 ? db_changes(tx->db) : -1;
}

struct gone {
    int64_t rowid;
    char id[ID_MAX];
};

// 1: it is gone with all that was its own, 0: *left ran out, the rest goes next time, -1.
static int remove_sandbox(struct store_tx *tx, const struct gone *g, int64_t *left, struct err *err)
{
    static const char *const SQL[] = {
        "DELETE FROM commands WHERE rowid IN (SELECT rowid FROM commands WHERE sandbox_id = ? LIMIT ?)",
        "DELETE FROM jobs WHERE rowid IN (SELECT rowid FROM jobs WHERE sandbox_id = ? LIMIT ?)",
    };
    for (size_t i = 0; i < sizeof SQL / sizeof SQL[0]; i++) {
        const int64_t n = rows_of_sandbox(tx, SQL[i], g->id, *left, err);
        if (n < 0)
            return -1;
        *left -= n;
        if (*left <= 0)
            return 0;
    }
    CLEANUP_STMT struct stmt *st = db_stmt(tx->db, "DELETE FROM sandboxes WHERE rowid = ?", err);
    db_bind_int(st, g->rowid);
    --*left;
    return db_run(st, err) == 0 ? 1 : -1;
}

static int next_gone(struct store_tx *tx, int64_t before_ms, struct gone *ret, struct err *err)
{
    CLEANUP_STMT struct stmt *st =
        db_stmt(tx->db, "SELECT rowid, id FROM sandboxes INDEXED BY sandboxes_gone WHERE destroyed_at_ms <> 0"
                        " AND destroyed_at_ms < ? ORDER BY destroyed_at_ms LIMIT 1", err);
    db_bind_int(st, before_ms);
    const int got = db_step(st, err);
    if (got > 0) {
        ret->rowid = db_col_int(st);
        db_col_text(st, ret->id, sizeof ret->id);
    }
    return got;
}

// Each looks at the max_rows oldest only, so that a call is short however much there is.
static int old_odds(struct store_tx *tx, const struct retention *r, struct err *err)
{
    static const char IDEM[] =
        "DELETE FROM idempotency WHERE (tenant, path, key, method) IN (SELECT tenant, path, key, method"
        " FROM idempotency INDEXED BY idempotency_created WHERE created_at_ms < ? ORDER BY created_at_ms LIMIT ?)";
    // The newest stays, so that seq never starts again.
    static const char EVENTS[] =
        "DELETE FROM events WHERE seq IN (SELECT seq FROM (SELECT seq, at_ms FROM events ORDER BY seq LIMIT ?2)"
        " WHERE at_ms < ?1) AND seq < (SELECT max(seq) FROM events)";
    // Jobs of sandboxes go with them.
    static const char JOBS[] =
        "DELETE FROM jobs WHERE rowid IN (SELECT rowid FROM (SELECT rowid, state, finished_at_ms FROM jobs"
        " WHERE sandbox_id = '' ORDER BY id LIMIT ?2) WHERE state >= 3 AND finished_at_ms < ?1)";
    // Alive ones stay, also when the sandbox they were taken of is gone: they carry what a restore needs.
    static const char SNAPSHOTS[] =
        "DELETE FROM snapshots WHERE rowid IN (SELECT rowid FROM snapshots INDEXED BY snapshots_gone"
        " WHERE deleted_at_ms <> 0 AND deleted_at_ms < ? ORDER BY deleted_at_ms LIMIT ?)";
    if (old_rows(tx, IDEM, r->idem_before_ms, r->max_rows, err) != 0 ||
        old_rows(tx, EVENTS, r->events_before_ms, r->max_rows, err) != 0 ||
        old_rows(tx, SNAPSHOTS, r->destroyed_before_ms, r->max_rows, err) != 0)
        return -1;
    return old_rows(tx, JOBS, r->destroyed_before_ms, r->max_rows, err);
}

int store_prune(struct store_tx *tx, const struct retention *r, void (*fn)(void *arg, const char *sandbox_id), void *arg,
                struct err *err)
{
    int removed = 0;
    int64_t left = r->max_rows;
    struct gone g;
    if (old_odds(tx, r, err) != 0)
        return -1;
    while (left > 0) {
        const int got = next_gone(tx, r->destroyed_before_ms, &g, err);
        if (got <= 0)
            return got < 0 ? -1 : removed;
        const int gone = remove_sandbox(tx, &g, &left, err);
        if (gone < 0)
            return -1;
        if (gone) {
            removed++;
            fn(arg, g.id);
        }
    }
    return removed;
}
