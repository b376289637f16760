#include <stdlib.h>
#include <string.h>

#include "store/int.h"

const char *command_outcome_name(enum command_outcome o)
{
    switch (o) {
    case OUTCOME_NONE:
        return NULL;
    case OUTCOME_EXITED:
        return "exited";
    case OUTCOME_SIGNALED:
        return "signaled";
    case OUTCOME_TIMED_OUT:
        return "timed_out";
    case OUTCOME_KILLED:
        return "killed";
    case OUTCOME_LOST:
        return "lost";
    case OUTCOME_SPAWN_FAILED:
        return "spawn_failed";
    }
    return NULL;
}

#define COMMAND_KEY "id, tenant, sandbox_id"
#define COMMAND_REST                                                                                                   \
    "phase, outcome, exit_code, signal, spawn_error, user, timeout_ms, max_output_bytes, duration_ms, background,"     \
    " \"check\", internal, has_stdin, stdin_closed, stdin_bytes, argv_hmac, env_names_json, stdout_bytes,"             \
    " stderr_bytes, stdout_spooled, stderr_spooled, stdout_sha256, stderr_sha256, redacted, job_id, audit_id,"         \
    " receipt_id, agent_id, created_at_ms, started_at_ms, finished_at_ms"
#define COMMAND_COLUMNS COMMAND_KEY ", " COMMAND_REST
#define QUESTIONS_31 "?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?"
static const struct field COMMAND_FIELDS[] = {
    FIELD(TEXT, command_row, id), FIELD(TEXT, command_row, tenant), FIELD(TEXT, command_row, sandbox_id),
    FIELD(INT, command_row, phase), FIELD(INT, command_row, outcome), FIELD(INT, command_row, exit_code),
    FIELD(INT, command_row, signal), FIELD(TEXT, command_row, spawn_error), FIELD(TEXT, command_row, user),
    FIELD(INT64, command_row, timeout_ms), FIELD(INT64, command_row, max_output_bytes),
    FIELD(INT64, command_row, duration_ms), FIELD(BOOL, command_row, background), FIELD(BOOL, command_row, check),
    FIELD(BOOL, command_row, internal), FIELD(BOOL, command_row, has_stdin), FIELD(BOOL, command_row, stdin_closed),
    FIELD(INT64, command_row, stdin_bytes), FIELD(TEXT, command_row, argv_hmac),
    FIELD(HEAP, command_row, env_names_json), FIELD(INT64, command_row, stdout_bytes),
    FIELD(INT64, command_row, stderr_bytes), FIELD(INT64, command_row, stdout_spooled),
    FIELD(INT64, command_row, stderr_spooled), FIELD(TEXT, command_row, stdout_sha256),
    FIELD(TEXT, command_row, stderr_sha256), FIELD(BOOL, command_row, redacted), FIELD(TEXT, command_row, job_id),
    FIELD(TEXT, command_row, audit_id), FIELD(TEXT, command_row, receipt_id), FIELD(INT64, command_row, agent_id),
    FIELD(INT64, command_row, created_at_ms), FIELD(INT64, command_row, started_at_ms),
    FIELD(INT64, command_row, finished_at_ms),
};
static const struct row_type COMMAND = ROW_TYPE(command_row, COMMAND_FIELDS);
enum { COMMAND_KEYS = 3 };

void command_row_free(struct command_row *row)
{
    row_free(&COMMAND, row);
}

int command_row_copy(struct command_row *to, const struct command_row *from)
{
    return row_copy(&COMMAND, to, from);
}

// ---- writing ----------------------------------------------------------------------------------------------------------
static int check_running(struct store_tx *tx, const char *sandbox_id, unsigned max_running, struct err *err)
{
    CLEANUP_STMT struct stmt *st =
        db_stmt(tx->db, "SELECT count(*) FROM commands INDEXED BY commands_unfinished"
                        " WHERE sandbox_id = ? AND phase < 3", err);
    db_bind_text(st, sandbox_id);
    if (db_step(st, err) < 0)
        return -1;
    if (db_col_int(st) < (int64_t)max_running)
        return 0;
    err_set(err, ERR_RATE_LIMITED, "too_many_commands", "the sandbox runs %u commands", max_running);
    return err_remedy(err, "wait for one of them to finish");
}

int command_insert(struct store_tx *tx, const struct command_row *row, unsigned max_running, struct err *err)
{
    if (max_running > 0 && check_running(tx, row->sandbox_id, max_running, err) != 0)
        return -1;
    CLEANUP_STMT struct stmt *st =
        db_stmt(tx->db, "INSERT INTO commands (" COMMAND_COLUMNS ") VALUES (?, ?, ?, " QUESTIONS_31 ")", err);
    row_bind(st, &COMMAND, row, 0);
    return db_run(st, err);
}

static int must_exist(struct store_tx *tx, const struct command_row *row, struct err *err)
{
    CLEANUP_STMT struct stmt *st =
        db_stmt(tx->db, "SELECT 1 FROM commands WHERE sandbox_id = ? AND id = ? AND tenant = ?", err);
    db_bind_text(st, row->sandbox_id);
    db_bind_text(st, row->id);
    db_bind_text(st, row->tenant);
    const int got = db_step(st, err);
    return got == 0 ? err_set(err, ERR_NOT_FOUND, "", "no such command") : got < 0 ? -1 : 0;
}

int command_update(struct store_tx *tx, const struct command_row *row, struct err *err)
{
    CLEANUP_STMT struct stmt *st =
        db_stmt(tx->db, "UPDATE commands SET (" COMMAND_REST ") = (" QUESTIONS_31 ")"
                        " WHERE sandbox_id = ? AND id = ? AND tenant = ? AND phase < 3", err);
    row_bind(st, &COMMAND, row, COMMAND_KEYS);
    db_bind_text(st, row->sandbox_id);
    db_bind_text(st, row->id);
    db_bind_text(st, row->tenant);
    if (db_run(st, err) != 0)
        return -1;
    return db_changes(tx->db) == 1 ? 0 : must_exist(tx, row, err);
}

// ---- reading ----------------------------------------------------------------------------------------------------------
int command_get(struct store *s, const char *tenant, const char *sandbox_id, const char *id, struct command_row *ret,
                struct err *err)
{
    struct command_row row;
    struct db *db = reader_db(s, err);
    CLEANUP_STMT struct stmt *st =
        db ? db_stmt(db, "SELECT " COMMAND_COLUMNS " FROM commands WHERE tenant = ? AND sandbox_id = ? AND id = ?", err)
           : NULL;
    db_bind_text(st, tenant);
    db_bind_text(st, sandbox_id);
    db_bind_text(st, id);
    const int got = row_next(st, &COMMAND, &row, err);
    if (got > 0)
        *ret = row;
    return got > 0 ? 0 : got == 0 ? 1 : -1;
}

static int each(struct stmt *st, bool (*fn)(void *, const struct command_row *), void *arg, struct err *err)
{
    struct command_row row;
    int got;
    while ((got = row_next(st, &COMMAND, &row, err)) > 0) {
        const bool more = fn(arg, &row);
        row_free(&COMMAND, &row);
        if (!more)
            return 0;
    }
    return got;
}

int command_list(struct store *s, const struct page *page, const char *sandbox_id,
                 bool (*fn)(void *, const struct command_row *), void *arg, struct err *err)
{
    struct db *db = reader_db(s, err);
    CLEANUP_STMT struct stmt *st =
        db ? db_stmt(db, "SELECT " COMMAND_COLUMNS " FROM commands WHERE tenant = ? AND id < ? AND sandbox_id = ?"
                         " AND internal = 0 ORDER BY id DESC LIMIT ?", err) : NULL;
    db_bind_text(st, page->tenant);
    db_bind_text(st, page->cursor ? page->cursor : "~"); // sorts after every id
    db_bind_text(st, sandbox_id);
    db_bind_int(st, page->limit);
    return each(st, fn, arg, err);
}

int command_each_unfinished_all_tenants(struct store *s, bool (*fn)(void *, const struct command_row *), void *arg,
                                        struct err *err)
{
    struct db *db = reader_db(s, err);
    CLEANUP_STMT struct stmt *st =
        db ? db_stmt(db, "SELECT " COMMAND_COLUMNS " FROM commands INDEXED BY commands_unfinished"
                         " WHERE phase < 3 ORDER BY sandbox_id, id", err) : NULL;
    return each(st, fn, arg, err);
}
