// Receipts as clients and reconciliation read them. They are written by evidence.c and never removed.
#include <stdlib.h>
#include <string.h>

#include "store/int.h"

#define RECEIPT_COLUMNS                                                                                                \
    "id, tenant, sandbox_id, job_id, audit_id, operation, outcome, state, envelope_json, created_at_ms, settled_at_ms"
static const struct field RECEIPT_FIELDS[] = {
    FIELD(TEXT, receipt_row, id), FIELD(TEXT, receipt_row, tenant), FIELD(TEXT, receipt_row, sandbox_id),
    FIELD(TEXT, receipt_row, job_id), FIELD(TEXT, receipt_row, audit_id), FIELD(TEXT, receipt_row, operation),
    FIELD(TEXT, receipt_row, outcome), FIELD(INT, receipt_row, state), FIELD(HEAP, receipt_row, envelope_json),
    FIELD(INT64, receipt_row, created_at_ms), FIELD(INT64, receipt_row, settled_at_ms),
};
static const struct row_type RECEIPT = ROW_TYPE(receipt_row, RECEIPT_FIELDS);

void receipt_row_free(struct receipt_row *row)
{
    row_free(&RECEIPT, row);
}

int receipt_get(struct store *s, const char *tenant, const char *id, struct receipt_row *ret, struct err *err)
{
    struct receipt_row row;
    struct db *db = reader_db(s, err);
    CLEANUP_STMT struct stmt *st =
        db ? db_stmt(db, "SELECT " RECEIPT_COLUMNS " FROM receipts WHERE tenant = ? AND id = ?", err) : NULL;
    db_bind_text(st, tenant);
    db_bind_text(st, id);
    const int got = row_next(st, &RECEIPT, &row, err);
    if (got > 0)
        *ret = row;
    return got > 0 ? 0 : got == 0 ? 1 : -1;
}

int receipt_list(struct store *s, const struct page *page, const char *sandbox_id,
                 bool (*fn)(void *, const struct receipt_row *), void *arg, struct err *err)
{
    static const char ALL[] = "SELECT " RECEIPT_COLUMNS " FROM receipts"
                              " WHERE tenant = ? AND id < ? ORDER BY id DESC LIMIT ?";
    static const char OF_SANDBOX[] = "SELECT " RECEIPT_COLUMNS " FROM receipts INDEXED BY receipts_sandbox"
                                     " WHERE tenant = ? AND id < ? AND sandbox_id = ? AND sandbox_id <> ''"
                                     " ORDER BY id DESC LIMIT ?";
    struct db *db = reader_db(s, err);
    CLEANUP_STMT struct stmt *st = db ? db_stmt(db, sandbox_id ? OF_SANDBOX : ALL, err) : NULL;
    db_bind_text(st, page->tenant);
    db_bind_text(st, page->cursor ? page->cursor : "~"); // sorts after every id
    if (sandbox_id)
        db_bind_text(st, sandbox_id);
    db_bind_int(st, page->limit);
    struct receipt_row row;
    int got;
    while ((got = row_next(st, &RECEIPT, &row, err)) > 0) {
        const bool more = fn(arg, &row);
        row_free(&RECEIPT, &row);
        if (!more)
            return 0;
    }
    return got;
}

static const struct field ADMISSION_FIELDS[] = {
    FIELD(TEXT, admission, tenant), FIELD(TEXT, admission, token_id), FIELD(TEXT, admission, request_id),
    FIELD(TEXT, admission, operation), FIELD(TEXT, admission, sandbox_id), FIELD(TEXT, admission, job_id),
    FIELD(TEXT, admission, audit_id), FIELD(TEXT, admission, receipt_id), FIELD(TEXT, admission, idem_key),
    FIELD(TEXT, admission, method), FIELD(TEXT, admission, path), FIELD(BLOB, admission, body_sha256),
};
static const struct row_type ADMISSION = ROW_TYPE(admission, ADMISSION_FIELDS);

int receipt_each_pending_all_tenants(struct store *s, bool (*fn)(void *, const struct admission *), void *arg,
                                     struct err *err)
{
    struct db *db = reader_db(s, err);
    CLEANUP_STMT struct stmt *st =
        db ? db_stmt(db, "SELECT tenant, token_id, request_id, operation, sandbox_id, job_id, audit_id, id, idem_key,"
                         " method, path, body_sha256 FROM receipts WHERE state = 1 ORDER BY id", err) : NULL;
    struct admission a = {0};
    int got;
    while ((got = row_next(st, &ADMISSION, &a, err)) > 0)
        if (!fn(arg, &a))
            return 0;
    return got;
}
