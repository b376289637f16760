// Receipts and spooled output against the chain.
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/fd.h"
#include "base/json.h"
#include "store/evidence.h"
#include "store/verify_int.h"

#define PAGE_COMMANDS 256

struct receipt {
    char id[ID_MAX], tenant[128], sandbox_id[ID_MAX], job_id[ID_MAX], audit_id[ID_MAX], operation[64], outcome[64];
    char token_id[ID_MAX], request_id[160], payload_sha256[DIGEST_TEXT_MAX];
    int state;
    int64_t created_at_ms, settled_at_ms, settle_seq;
    char *envelope;
    bool key_left;      // columns of the idempotency key that a settled receipt no longer has
};

static void receipt_free(struct receipt *r)
{
    free(r->envelope);
}
#define CLEANUP_RECEIPT __attribute__((cleanup(receipt_free)))

static const char LOAD[] =
    "SELECT id, tenant, sandbox_id, job_id, audit_id, operation, outcome, state, envelope_json, created_at_ms,"
    " settled_at_ms, token_id, request_id, settle_seq, payload_sha256,"
    " idem_key <> '' OR method <> '' OR path <> '' OR body_sha256 <> x'' FROM receipts WHERE tenant = ? AND id = ?";

// 1 found, 0 not, -1.
static int load(struct verifier *v, const char *tenant, const char *id, struct receipt *r)
{
    struct err err = {0};
    CLEANUP_STMT struct stmt *st = db_stmt(v->src.db, LOAD, &err);
    db_bind_text(st, tenant);
    db_bind_text(st, id);
    const int got = db_step(st, &err);
    if (got <= 0)
        return got < 0 ? verify_unreadable(v, &err) : 0;
    db_col_text(st, r->id, sizeof r->id);
    db_col_text(st, r->tenant, sizeof r->tenant);
    db_col_text(st, r->sandbox_id, sizeof r->sandbox_id);
    db_col_text(st, r->job_id, sizeof r->job_id);
    db_col_text(st, r->audit_id, sizeof r->audit_id);
    db_col_text(st, r->operation, sizeof r->operation);
    db_col_text(st, r->outcome, sizeof r->outcome);
    r->state = (int)db_col_int(st);
    r->envelope = db_col_dup(st);
    r->created_at_ms = db_col_int(st);
    r->settled_at_ms = db_col_int(st);
    db_col_text(st, r->token_id, sizeof r->token_id);
    db_col_text(st, r->request_id, sizeof r->request_id);
    r->settle_seq = db_col_int(st);
    db_col_text(st, r->payload_sha256, sizeof r->payload_sha256);
    r->key_left = db_col_int(st) != 0;
    return 1;
}

static int differs(struct verifier *v, const char *id, const char *what)
{
    return verify_fault(v, VERIFY_MISMATCH, "receipt %.40s: %s", id, what);
}

static bool same_time(const json_t *o, const char *key, int64_t at_ms)
{
    char text[CLOCK_TEXT_MAX];
    return verify_same(json_get_str(o, key), at_ms ? clock_text(at_ms, text) : NULL);
}

// ---- admissions -----------------------------------------------------------------------------------------------------------
// A final receipt is held against its own payload when its settlement comes.
static bool pending_agrees(const struct receipt *r, const json_t *e)
{
    return verify_same(r->audit_id, json_get_str(e, "id")) && verify_same(r->operation, json_get_str(e, "operation")) &&
           verify_same(r->sandbox_id, json_get_str(e, "sandbox_id")) &&
           verify_same(r->job_id, json_get_str(e, "job_id")) && verify_same(r->token_id, json_get_str(e, "token_id")) &&
           verify_same(r->request_id, json_get_str(e, "request_id")) && same_time(e, "at", r->created_at_ms) &&
           !*r->outcome && !r->envelope && r->settled_at_ms == 0 && r->settle_seq == 0 && !*r->payload_sha256;
}

int verify_admission(struct verifier *v, const json_t *e)
{
    CLEANUP_RECEIPT struct receipt r = {0};
    const char *id = json_get_str(e, "receipt_id");
    const int got = load(v, json_get_str(e, "tenant"), id, &r);
    if (got <= 0)
        return got < 0 ? -1 : differs(v, id, "it is missing");
    if (r.state != RECEIPT_PENDING && r.state != RECEIPT_FINAL)
        return differs(v, id, "it is in no known state");
    if (r.state == RECEIPT_PENDING && !pending_agrees(&r, e))
        return differs(v, id, "it differs from its admission");
    v->admitted++;
    return 0;
}

// ---- settlements ------------------------------------------------------------------------------------------------------------
static int previous_digest(struct verifier *v, const struct receipt *r, char out[static DIGEST_TEXT_MAX])
{
    struct err err = {0};
    CLEANUP_STMT struct stmt *st =
        db_stmt(v->src.db, "SELECT payload_sha256 FROM receipts WHERE tenant = ? AND settle_seq <> 0"
                           " AND settle_seq < ? ORDER BY settle_seq DESC LIMIT 1", &err);
    db_bind_text(st, r->tenant);
    db_bind_int(st, r->settle_seq);
    const int got = db_step(st, &err);
    out[0] = 0;
    if (got > 0)
        db_col_text(st, out, DIGEST_TEXT_MAX);
    return got < 0 ? verify_unreadable(v, &err) : 0;
}

static bool payload_agrees(const struct receipt *r, const json_t *p)
{
    return verify_same(json_get_str(p, "receipt_id"), r->id) && verify_same(json_get_str(p, "tenant"), r->tenant) &&
           verify_same(json_get_str(p, "sandbox_id"), r->sandbox_id) &&
           verify_same(json_get_str(p, "job_id"), r->job_id) && verify_same(json_get_str(p, "audit_id"), r->audit_id) &&
           verify_same(json_get_str(p, "operation"), r->operation) &&
           verify_same(json_get_str(p, "outcome"), r->outcome) &&
           verify_same(json_get_str(p, "actor"), *r->token_id ? r->token_id : "system") &&
           verify_same(json_get_str(p, "request_id"), r->request_id) && same_time(p, "admitted_at", r->created_at_ms) &&
           same_time(p, "settled_at", r->settled_at_ms);
}

static bool entry_agrees(const json_t *e, const json_t *p)
{
    static const char *const SAME[] = {"tenant", "operation", "sandbox_id", "job_id", "request_id", "outcome"};
    for (size_t i = 0; i < sizeof SAME / sizeof SAME[0]; i++)
        if (!verify_same(json_get_str(e, SAME[i]), json_get_str(p, SAME[i])))
            return false;
    return verify_same(json_get_str(e, "of"), json_get_str(p, "audit_id")) &&
           json_get_int(e, "status", 0) == json_get_int(p, "status", 0);
}

static int check_final(struct verifier *v, const json_t *e, const struct receipt *r)
{
    uint8_t hash[SHA256_BYTES];
    char digest[DIGEST_TEXT_MAX], previous[DIGEST_TEXT_MAX];
    CLEANUP_JSON json_t *p = verify_envelope(&v->trust, KEY_RECEIPT, r->envelope ? r->envelope : "", hash);
    if (!p)
        return differs(v, r->id, "its signature does not hold");
    crypto_digest_text(hash, digest);
    if (!verify_same(json_get_str(e, "receipt_sha256"), digest) || !verify_same(r->payload_sha256, digest))
        return differs(v, r->id, "it is not the one that the audit entry names");
    if (!payload_agrees(r, p) || r->key_left || r->settle_seq != json_get_int(e, "seq", -1))
        return differs(v, r->id, "it differs from what is signed");
    if (!entry_agrees(e, p))
        return differs(v, r->id, "its audit entry says something else");
    if (previous_digest(v, r, previous) != 0)
        return -1;
    if (!verify_same(json_get_str(p, "previous_receipt_sha256"), previous))
        return differs(v, r->id, "it does not follow the tenant's receipt before it");
    return 0;
}

int verify_settlement(struct verifier *v, const json_t *e)
{
    CLEANUP_RECEIPT struct receipt r = {0};
    const char *id = json_get_str(e, "receipt_id");
    const int got = load(v, json_get_str(e, "tenant"), id, &r);
    if (got <= 0)
        return got < 0 ? -1 : differs(v, id, "it is missing");
    if (r.state != RECEIPT_FINAL)
        return differs(v, id, "it is pending, but was settled");
    if (check_final(v, e, &r) != 0)
        return -1;
    v->report->receipts++;
    return 0;
}

static int count(struct verifier *v, const char *sql, int64_t bound, int64_t *ret)
{
    struct err err = {0};
    CLEANUP_STMT struct stmt *st = db_stmt(v->src.db, sql, &err);
    db_bind_int(st, bound);
    if (db_step(st, &err) <= 0)
        return verify_unreadable(v, &err);
    *ret = db_col_int(st);
    return 0;
}

int verify_counts(struct verifier *v)
{
    int64_t final, pending, unknown;
    if (count(v, "SELECT count(*) FROM receipts WHERE state = 2 AND settle_seq <= ?", v->size, &final) != 0 ||
        count(v, "SELECT count(*) FROM receipts WHERE state = 1 AND ? >= 0", v->size, &pending) != 0 ||
        count(v, "SELECT count(*) FROM receipts WHERE state NOT IN (1, 2) AND ? >= 0", v->size, &unknown) != 0)
        return -1;
    v->report->pending_receipts = (uint64_t)pending;
    if (final != (int64_t)v->report->receipts || unknown != 0)
        return verify_fault(v, VERIFY_MISMATCH, "there are %lld settled receipts, the audit chain knows of %llu",
                            (long long)final + (long long)unknown, (unsigned long long)v->report->receipts);
    if (!v->src.moving && (uint64_t)pending != v->admitted - v->report->receipts)
        return verify_fault(v, VERIFY_MISMATCH, "there are %lld pending receipts, the audit chain knows of %llu",
                            (long long)pending, (unsigned long long)(v->admitted - v->report->receipts));
    return 0;
}

// ---- output -------------------------------------------------------------------------------------------------------------------
struct output {
    int64_t rowid;
    char id[ID_MAX], tenant[128], sandbox_id[ID_MAX], receipt_id[ID_MAX];
    char digest[2][DIGEST_TEXT_MAX];
    int64_t kept[2];
};
static const char *const STREAMS[] = {"stdout", "stderr"};

static int check_stream(struct verifier *v, const struct output *o, int i, int outfd)
{
    char name[ID_MAX + 8], digest[DIGEST_TEXT_MAX];
    uint8_t hash[SHA256_BYTES];
    uint64_t bytes = 0;
    struct err err = {0};
    snprintf(name, sizeof name, "%s.%s", o->id, STREAMS[i]);
    CLEANUP_FD int fd = outfd < 0 ? -1 : openat(outfd, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0) // a stream without bytes has no file
        return o->kept[i] == 0 ? 0 : verify_fault(v, VERIFY_MISMATCH, "command %s: its %s is missing", o->id, STREAMS[i]);
    if (crypto_sha256_fd(fd, hash, &bytes, &err) != 0)
        return verify_unreadable(v, &err);
    if (strcmp(crypto_digest_text(hash, digest), o->digest[i]) != 0 || (int64_t)bytes != o->kept[i])
        return verify_fault(v, VERIFY_MISMATCH, "command %s: its %s differs from its receipt", o->id, STREAMS[i]);
    v->report->outputs_checked++;
    return 0;
}

// The row of the command against the facts that were signed.
static int check_facts(struct verifier *v, const struct output *o)
{
    CLEANUP_RECEIPT struct receipt r = {0};
    char key[32];
    const int got = load(v, o->tenant, o->receipt_id, &r);
    if (got < 0)
        return -1;
    if (got == 0 || r.state != RECEIPT_FINAL)
        return verify_fault(v, VERIFY_MISMATCH, "command %s: it has no receipt", o->id);
    CLEANUP_JSON json_t *p = verify_envelope(&v->trust, KEY_RECEIPT, r.envelope ? r.envelope : "", NULL);
    const json_t *facts = json_object_get(p, "facts");
    for (int i = 0; i < 2; i++) {
        snprintf(key, sizeof key, "%s_sha256", STREAMS[i]);
        const char *signed_digest = json_get_str(facts, key);
        snprintf(key, sizeof key, "%s_kept_bytes", STREAMS[i]);
        if (signed_digest && (strcmp(signed_digest, o->digest[i]) != 0 || json_get_int(facts, key, 0) != o->kept[i]))
            return verify_fault(v, VERIFY_MISMATCH, "command %s: its record differs from its receipt", o->id);
    }
    return 0;
}

static int check_output(struct verifier *v, const struct output *o)
{
    char path[64 + ID_MAX];
    snprintf(path, sizeof path, "sandboxes/%s/out", o->sandbox_id);
    CLEANUP_FD int outfd = openat(v->dirfd, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (outfd < 0 && errno == ENOENT && v->src.live)
        return 0; // its retention has just ended
    if (check_facts(v, o) != 0)
        return -1;
    return check_stream(v, o, 0, outfd) == 0 && check_stream(v, o, 1, outfd) == 0 ? 0 : -1;
}

static int check_page(struct verifier *v, int64_t *after)
{
    struct err err = {0};
    struct output o;
    int got, n = 0;
    CLEANUP_STMT struct stmt *st =
        db_stmt(v->src.db, "SELECT rowid, id, tenant, sandbox_id, receipt_id, stdout_sha256, stderr_sha256,"
                           " stdout_spooled, stderr_spooled FROM commands WHERE rowid > ? AND phase = 3"
                           " AND internal = 0 AND stdout_sha256 <> '' AND stderr_sha256 <> '' ORDER BY rowid LIMIT ?",
                &err);
    db_bind_int(st, *after);
    db_bind_int(st, PAGE_COMMANDS);
    while ((got = db_step(st, &err)) > 0) {
        *after = db_col_int(st);
        db_col_text(st, o.id, sizeof o.id);
        db_col_text(st, o.tenant, sizeof o.tenant);
        db_col_text(st, o.sandbox_id, sizeof o.sandbox_id);
        db_col_text(st, o.receipt_id, sizeof o.receipt_id);
        db_col_text(st, o.digest[0], sizeof o.digest[0]);
        db_col_text(st, o.digest[1], sizeof o.digest[1]);
        o.kept[0] = db_col_int(st);
        o.kept[1] = db_col_int(st);
        if (check_output(v, &o) != 0)
            return -1;
        n++;
    }
    return got < 0 ? verify_unreadable(v, &err) : n == PAGE_COMMANDS;
}

int verify_outputs(struct verifier *v)
{
    int64_t after = 0;
    int more;
    do
        more = check_page(v, &after);
    while (more > 0);
    return more;
}
