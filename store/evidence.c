// Admission and settlement: what is written before an act, and what becomes of it.
#include "store/evidence.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/enc.h"
#include "base/fd.h"
#include "base/json.h"
#include "store/dsse.h"
#include "store/int.h"

static int no_memory(struct err *err)
{
    return err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
}

static const char *or_null(const char *text)
{
    return text && *text ? text : NULL;
}

// ---- admission ------------------------------------------------------------------------------------------------------
static int insert_pending(struct store_tx *tx, const struct admission *a, struct err *err)
{
    CLEANUP_STMT struct stmt *st =
        db_stmt(tx->db, "INSERT INTO receipts (id, tenant, sandbox_id, job_id, audit_id, operation, outcome, state,"
                        " created_at_ms, settled_at_ms, token_id, request_id, idem_key, method, path, body_sha256,"
                        " settle_seq, payload_sha256)"
                        " VALUES (?, ?, ?, ?, ?, ?, '', 1, ?, 0, ?, ?, ?, ?, ?, ?, 0, '')", err);
    db_bind_text(st, a->receipt_id);
    db_bind_text(st, a->tenant);
    db_bind_text(st, a->sandbox_id);
    db_bind_text(st, a->job_id);
    db_bind_text(st, a->audit_id);
    db_bind_text(st, a->operation);
    db_bind_int(st, tx->now_ms);
    db_bind_text(st, a->token_id);
    db_bind_text(st, a->request_id);
    db_bind_text(st, a->idem_key);
    db_bind_text(st, a->method);
    db_bind_text(st, a->path);
    db_bind_blob(st, a->body_sha256, sizeof a->body_sha256);
    return db_run(st, err);
}

// Claims the key. A row that is past its time does not count.
static int insert_idem(struct store_tx *tx, const struct admission *a, struct err *err)
{
    CLEANUP_STMT struct stmt *st =
        db_stmt(tx->db, "INSERT INTO idempotency (tenant, method, path, key, body_sha256, state, status, ref, job_id,"
                        " audit_id, receipt_id, problem_json, created_at_ms)"
                        " VALUES (?1, ?2, ?3, ?4, ?5, 1, 0, '', ?6, ?7, ?8, NULL, ?9)"
                        " ON CONFLICT (tenant, path, key, method) DO UPDATE SET body_sha256 = ?5, state = 1,"
                        " status = 0, ref = '', job_id = ?6, audit_id = ?7, receipt_id = ?8, problem_json = NULL,"
                        " created_at_ms = ?9 WHERE created_at_ms < ?10", err);
    db_bind_text(st, a->tenant);
    db_bind_text(st, a->method);
    db_bind_text(st, a->path);
    db_bind_text(st, a->idem_key);
    db_bind_blob(st, a->body_sha256, sizeof a->body_sha256);
    db_bind_text(st, a->job_id);
    db_bind_text(st, a->audit_id);
    db_bind_text(st, a->receipt_id);
    db_bind_int(st, tx->now_ms);
    db_bind_int(st, tx->now_ms - (int64_t)LIMIT_IDEMPOTENCY_HOURS * 3600 * 1000);
    if (db_run(st, err) != 0)
        return -1;
    return db_changes(tx->db) == 1 ? 0 : err_set(err, ERR_CONFLICT, "idempotency_race",
                                                 "another request with this Idempotency-Key came first");
}

int evidence_admit(struct store_tx *tx, const struct admission *a, const json_t *facts, struct err *err)
{
    const struct audit_entry e = {.id = a->audit_id, .tenant = a->tenant, .token_id = a->token_id,
                                  .request_id = a->request_id, .operation = a->operation,
                                  .sandbox_id = a->sandbox_id, .job_id = a->job_id, .decision = "allowed",
                                  .receipt_id = a->receipt_id, .facts = facts};
    if (*a->idem_key && insert_idem(tx, a, err) != 0)
        return -1;
    if (*a->receipt_id && insert_pending(tx, a, err) != 0)
        return -1;
    return audit_add(tx, &e, err);
}

// ---- settlement -----------------------------------------------------------------------------------------------------
// What the pending receipt knows of its admission outlives the caller's copy, which a restart may have made up.
static int load_admission(struct store_tx *tx, const struct admission *a, struct admission *ret, int64_t *ret_at,
                          struct err *err)
{
    CLEANUP_STMT struct stmt *st =
        db_stmt(tx->db, "SELECT state, created_at_ms, audit_id, operation, token_id, request_id, sandbox_id, job_id,"
                        " idem_key, method, path FROM receipts WHERE tenant = ? AND id = ?", err);
    db_bind_text(st, a->tenant);
    db_bind_text(st, a->receipt_id);
    const int got = db_step(st, err);
    if (got <= 0)
        return got < 0 ? -1 : err_set(err, ERR_INTERNAL, "not_admitted", "the act was never admitted");
    if (db_col_int(st) != RECEIPT_PENDING)
        return err_set(err, ERR_CONFLICT, "already_settled", "the act was settled before");
    *ret = *a;
    *ret_at = db_col_int(st);
    db_col_text(st, ret->audit_id, sizeof ret->audit_id);
    db_col_text(st, ret->operation, sizeof ret->operation);
    db_col_text(st, ret->token_id, sizeof ret->token_id);
    db_col_text(st, ret->request_id, sizeof ret->request_id);
    char sandbox_id[ID_MAX], job_id[ID_MAX];
    db_col_text(st, sandbox_id, sizeof sandbox_id);
    db_col_text(st, job_id, sizeof job_id);
    if (!*ret->sandbox_id)
        memcpy(ret->sandbox_id, sandbox_id, sizeof sandbox_id);
    if (!*ret->job_id)
        memcpy(ret->job_id, job_id, sizeof job_id);
    db_col_text(st, ret->idem_key, sizeof ret->idem_key);
    db_col_text(st, ret->method, sizeof ret->method);
    db_col_text(st, ret->path, sizeof ret->path);
    return 0;
}

// Digest of the tenant's receipt before this one; "" for none.
static int previous_digest(struct store_tx *tx, const char *tenant, char out[static DIGEST_TEXT_MAX], struct err *err)
{
    CLEANUP_STMT struct stmt *st =
        db_stmt(tx->db, "SELECT payload_sha256 FROM receipts WHERE tenant = ? AND settle_seq <> 0"
                        " ORDER BY settle_seq DESC LIMIT 1", err);
    db_bind_text(st, tenant);
    const int got = db_step(st, err);
    out[0] = 0;
    if (got > 0)
        db_col_text(st, out, DIGEST_TEXT_MAX);
    return got < 0 ? -1 : 0;
}

static char *receipt_payload(const struct store_tx *tx, const struct admission *a, const struct settlement *s,
                             int64_t admitted_at_ms, const char *previous)
{
    CLEANUP_JSON json_t *o = json_object();
    int bad = json_put_str(o, "schema", "airlock.receipt.v1");
    bad |= json_put_str(o, "receipt_id", a->receipt_id);
    bad |= json_put_str(o, "audit_id", a->audit_id);
    bad |= json_put_str(o, "tenant", a->tenant);
    bad |= json_put_str(o, "operation", a->operation);
    bad |= json_put_str(o, "sandbox_id", or_null(a->sandbox_id));
    bad |= json_put_str(o, "job_id", or_null(a->job_id));
    bad |= json_put_str(o, "request_id", or_null(a->request_id));
    bad |= json_put_str(o, "actor", *a->token_id ? a->token_id : "system");
    bad |= json_put_time(o, "admitted_at", admitted_at_ms);
    bad |= json_put_time(o, "settled_at", tx->now_ms);
    bad |= json_put_str(o, "outcome", s->outcome);
    bad |= json_put_int(o, "status", s->status);
    bad |= s->facts ? json_object_set(o, "facts", (json_t *)s->facts) : json_put(o, "facts", json_object());
    bad |= json_put_str(o, "previous_receipt_sha256", or_null(previous));
    bad |= json_put_str(o, "server_version", tx->store->server_version);
    return bad ? NULL : json_canonical(o);
}

// A create learns late what it made. Apart, because the column is indexed.
static int store_sandbox_id(struct store_tx *tx, const struct admission *a, struct err *err)
{
    CLEANUP_STMT struct stmt *st =
        db_stmt(tx->db, "UPDATE receipts SET sandbox_id = ?1 WHERE tenant = ?2 AND id = ?3 AND sandbox_id <> ?1", err);
    db_bind_text(st, a->sandbox_id);
    db_bind_text(st, a->tenant);
    db_bind_text(st, a->receipt_id);
    return db_run(st, err);
}

static int store_receipt(struct store_tx *tx, const struct admission *a, const char *outcome, const char *envelope,
                         const char *digest, struct err *err)
{
    if (store_sandbox_id(tx, a, err) != 0)
        return -1;
    // The outcome's entry is the next one of the chain. The key's columns have served.
    CLEANUP_STMT struct stmt *st =
        db_stmt(tx->db, "UPDATE receipts SET job_id = ?, outcome = ?, state = 2, envelope_json = ?,"
                        " settled_at_ms = ?, idem_key = '', method = '', path = '', body_sha256 = x'', settle_seq = ?,"
                        " payload_sha256 = ? WHERE tenant = ? AND id = ?", err);
    db_bind_text(st, a->job_id);
    db_bind_text(st, outcome);
    db_bind_text(st, envelope);
    db_bind_int(st, tx->now_ms);
    db_bind_int(st, tx->head.size + 1);
    db_bind_text(st, digest);
    db_bind_text(st, a->tenant);
    db_bind_text(st, a->receipt_id);
    return db_run(st, err);
}

static int seal_receipt(struct store_tx *tx, const struct admission *a, const struct settlement *s,
                        int64_t admitted_at_ms, char digest[static DIGEST_TEXT_MAX], struct err *err)
{
    uint8_t hash[SHA256_BYTES];
    char previous[DIGEST_TEXT_MAX];
    if (previous_digest(tx, a->tenant, previous, err) != 0)
        return -1;
    CLEANUP_FREE char *payload = receipt_payload(tx, a, s, admitted_at_ms, previous);
    if (!payload)
        return err_set(err, ERR_INTERNAL, "receipt_payload", "the receipt could not be written");
    crypto_sha256(payload, strlen(payload), hash);
    crypto_digest_text(hash, digest);
    CLEANUP_JSON json_t *sealed = dsse_seal(tx->store->keys.receipt, RECEIPT_PAYLOAD_TYPE, payload, err);
    if (!sealed)
        return -1;
    CLEANUP_FREE char *envelope = json_canonical(sealed);
    return envelope ? store_receipt(tx, a, s->outcome, envelope, digest, err) : no_memory(err);
}

static int settle_idem(struct store_tx *tx, const struct admission *a, const struct settlement *s, struct err *err)
{
    static const char FORGET[] = "DELETE FROM idempotency WHERE tenant = ?1 AND method = ?2 AND path = ?3 AND key = ?4"
                                 " AND audit_id = ?5";
    static const char COMPLETE[] = "UPDATE idempotency SET state = 2, status = ?6, ref = ?7, job_id = ?8,"
                                   " problem_json = ?9 WHERE tenant = ?1 AND method = ?2 AND path = ?3 AND key = ?4"
                                   " AND audit_id = ?5";
    CLEANUP_STMT struct stmt *st = db_stmt(tx->db, s->forget_idem ? FORGET : COMPLETE, err);
    db_bind_text(st, a->tenant);
    db_bind_text(st, a->method);
    db_bind_text(st, a->path);
    db_bind_text(st, a->idem_key);
    db_bind_text(st, a->audit_id); // not the row of a later request with the same key
    if (!s->forget_idem) {
        db_bind_int(st, s->status);
        db_bind_text(st, s->ref ? s->ref : "");
        db_bind_text(st, a->job_id);
        db_bind_text(st, s->problem_json);
    }
    return db_run(st, err);
}

// Without a receipt only the chain remembers.
static int refuse_second(struct store_tx *tx, const struct admission *a, struct err *err)
{
    CLEANUP_STMT struct stmt *st = db_stmt(tx->db, "SELECT 1 FROM audit WHERE settles = ?", err);
    db_bind_text(st, a->audit_id);
    const int got = db_step(st, err);
    return got > 0 ? err_set(err, ERR_CONFLICT, "already_settled", "the act was settled before") : got;
}

int evidence_settle(struct store_tx *tx, const struct admission *given, const struct settlement *s, struct err *err)
{
    struct admission a = *given;
    char digest[DIGEST_TEXT_MAX] = "";
    int64_t admitted_at_ms = 0;
    if (*a.receipt_id) {
        if (load_admission(tx, given, &a, &admitted_at_ms, err) != 0 ||
            seal_receipt(tx, &a, s, admitted_at_ms, digest, err) != 0)
            return -1;
    } else if (refuse_second(tx, &a, err) != 0) {
        return -1;
    }
    if (*a.idem_key && settle_idem(tx, &a, s, err) != 0)
        return -1;
    const struct audit_entry e = {.tenant = a.tenant, .token_id = a.token_id, .request_id = a.request_id,
                                  .operation = a.operation, .sandbox_id = a.sandbox_id, .job_id = a.job_id,
                                  .outcome = s->outcome, .receipt_id = a.receipt_id, .of = a.audit_id,
                                  .receipt_sha256 = digest, .status = s->status};
    return audit_add(tx, &e, err);
}

// ---- idempotency ------------------------------------------------------------------------------------------------------
static const struct field IDEM_FIELDS[] = {
    FIELD(TEXT, idem_row, tenant), FIELD(TEXT, idem_row, method), FIELD(TEXT, idem_row, key),
    FIELD(TEXT, idem_row, path), FIELD(BLOB, idem_row, body_sha256), FIELD(INT, idem_row, state),
    FIELD(INT, idem_row, status), FIELD(TEXT, idem_row, ref), FIELD(TEXT, idem_row, job_id),
    FIELD(TEXT, idem_row, audit_id), FIELD(TEXT, idem_row, receipt_id), FIELD(HEAP, idem_row, problem_json),
    FIELD(INT64, idem_row, created_at_ms),
};
static const struct row_type IDEM = ROW_TYPE(idem_row, IDEM_FIELDS);

int idem_find(struct store *s, const char *tenant, const char *method, const char *path, const char *key,
              struct idem_row *ret, struct err *err)
{
    struct idem_row row;
    struct db *db = reader_db(s, err);
    CLEANUP_STMT struct stmt *st =
        db ? db_stmt(db, "SELECT tenant, method, key, path, body_sha256, state, status, ref, job_id, audit_id,"
                         " receipt_id, problem_json, created_at_ms FROM idempotency WHERE tenant = ? AND method = ?"
                         " AND path = ? AND key = ? AND created_at_ms >= ?", err) : NULL;
    db_bind_text(st, tenant);
    db_bind_text(st, method);
    db_bind_text(st, path);
    db_bind_text(st, key);
    db_bind_int(st, clock_wall_ms() - (int64_t)LIMIT_IDEMPOTENCY_HOURS * 3600 * 1000);
    const int got = row_next(st, &IDEM, &row, err);
    if (got > 0)
        *ret = row;
    return got > 0 ? 0 : got == 0 ? 1 : -1;
}

void idem_row_free(struct idem_row *row)
{
    row_free(&IDEM, row);
}
