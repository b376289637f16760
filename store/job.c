#include <stdlib.h>
#include <string.h>

#include "store/int.h"

const char *job_state_name(enum job_state s)
{
    switch (s) {
    case JOB_QUEUED:
        return "queued";
    case JOB_RUNNING:
        return "running";
    case JOB_SUCCEEDED:
        return "succeeded";
    case JOB_FAILED:
        return "failed";
    case JOB_CANCELLED:
        return "cancelled";
    }
    return "failed";
}

#define JOB_KEY "id, tenant, sandbox_id, created_at_ms" // never change
#define JOB_REST                                                                                                       \
    "kind, state, stage, stages_json, problem_json, result_json, ref, audit_id, receipt_id, request_id,"               \
    " updated_at_ms, finished_at_ms"
#define JOB_COLUMNS JOB_KEY ", " JOB_REST
#define QUESTIONS_12 "?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?"
static const struct field JOB_FIELDS[] = {
    FIELD(TEXT, job_row, id), FIELD(TEXT, job_row, tenant), FIELD(TEXT, job_row, sandbox_id),
    FIELD(INT64, job_row, created_at_ms), FIELD(TEXT, job_row, kind), FIELD(INT, job_row, state), FIELD(TEXT, job_row, stage),
    FIELD(HEAP, job_row, stages_json), FIELD(HEAP, job_row, problem_json), FIELD(HEAP, job_row, result_json),
    FIELD(TEXT, job_row, ref), FIELD(TEXT, job_row, audit_id), FIELD(TEXT, job_row, receipt_id),
    FIELD(TEXT, job_row, request_id), FIELD(INT64, job_row, updated_at_ms), FIELD(INT64, job_row, finished_at_ms),
};
static const struct row_type JOB = ROW_TYPE(job_row, JOB_FIELDS);
enum { JOB_KEYS = 4 };

void job_row_free(struct job_row *row)
{
    row_free(&JOB, row);
}

int job_insert(struct store_tx *tx, const struct job_row *row, struct err *err)
{
    CLEANUP_STMT struct stmt *st =
        db_stmt(tx->db, "INSERT INTO jobs (" JOB_COLUMNS ") VALUES (?, ?, ?, ?, " QUESTIONS_12 ")", err);
    row_bind(st, &JOB, row, 0);
    return db_run(st, err);
}

static int must_exist(struct store_tx *tx, const struct job_row *row, struct err *err)
{
    CLEANUP_STMT struct stmt *st = db_stmt(tx->db, "SELECT 1 FROM jobs WHERE tenant = ? AND id = ?", err);
    db_bind_text(st, row->tenant);
    db_bind_text(st, row->id);
    const int got = db_step(st, err);
    return got == 0 ? err_set(err, ERR_NOT_FOUND, "", "no such job") : got < 0 ? -1 : 0;
}

int job_update(struct store_tx *tx, const struct job_row *row, struct err *err)
{
    CLEANUP_STMT struct stmt *st = db_stmt(tx->db, "UPDATE jobs SET (" JOB_REST ") = (" QUESTIONS_12 ")"
                                                   " WHERE tenant = ? AND id = ? AND state < 3", err);
    row_bind(st, &JOB, row, JOB_KEYS);
    db_bind_text(st, row->tenant);
    db_bind_text(st, row->id);
    if (db_run(st, err) != 0)
        return -1;
    return db_changes(tx->db) == 1 ? 0 : must_exist(tx, row, err);
}

int job_get(struct store *s, const char *tenant, const char *id, struct job_row *ret, struct err *err)
{
    struct job_row row;
    struct db *db = reader_db(s, err);
    CLEANUP_STMT struct stmt *st =
        db ? db_stmt(db, "SELECT " JOB_COLUMNS " FROM jobs WHERE tenant = ? AND id = ?", err) : NULL;
    db_bind_text(st, tenant);
    db_bind_text(st, id);
    const int got = row_next(st, &JOB, &row, err);
    if (got > 0)
        *ret = row;
    return got > 0 ? 0 : got == 0 ? 1 : -1;
}

static int each(struct stmt *st, bool (*fn)(void *, const struct job_row *), void *arg, struct err *err)
{
    struct job_row row;
    int got;
    while ((got = row_next(st, &JOB, &row, err)) > 0) {
        const bool more = fn(arg, &row);
        row_free(&JOB, &row);
        if (!more)
            return 0;
    }
    return got;
}

int job_list(struct store *s, const struct page *page, const char *sandbox_id,
             bool (*fn)(void *, const struct job_row *), void *arg, struct err *err)
{
    static const char ALL[] = "SELECT " JOB_COLUMNS " FROM jobs INDEXED BY jobs_id"
                              " WHERE tenant = ? AND id < ? ORDER BY id DESC LIMIT ?";
    static const char OF_SANDBOX[] = "SELECT " JOB_COLUMNS " FROM jobs INDEXED BY jobs_sandbox"
                                     " WHERE tenant = ? AND id < ? AND sandbox_id = ? ORDER BY id DESC LIMIT ?";
    struct db *db = reader_db(s, err);
    CLEANUP_STMT struct stmt *st = db ? db_stmt(db, sandbox_id ? OF_SANDBOX : ALL, err) : NULL;
    db_bind_text(st, page->tenant);
    db_bind_text(st, page->cursor ? page->cursor : "~"); // sorts after every id
    if (sandbox_id)
        db_bind_text(st, sandbox_id);
    db_bind_int(st, page->limit);
    return each(st, fn, arg, err);
}

int job_each_unfinished_all_tenants(struct store *s, bool (*fn)(void *, const struct job_row *), void *arg,
                                    struct err *err)
{
    struct db *db = reader_db(s, err);
    CLEANUP_STMT struct stmt *st =
        db ? db_stmt(db, "SELECT " JOB_COLUMNS " FROM jobs INDEXED BY jobs_unfinished WHERE state < 3 ORDER BY id", err)
           : NULL;
    return each(st, fn, arg, err);
}
