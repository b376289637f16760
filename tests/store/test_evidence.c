// Admission, settlement, idempotency, chain, keys; and a receipt checked by the openssl command line.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/enc.h"
#include "fixture.h"
#include "store/int.h"
#include "store/verify.h"

static int admit_fn(struct store_tx *tx, void *arg, struct err *err)
{
    return evidence_admit(tx, arg, NULL, err);
}

static int settle_fn(struct store_tx *tx, void *arg, struct err *err)
{
    const struct settlement s = {.outcome = "succeeded", .status = 200};
    return evidence_settle(tx, arg, &s, err);
}

static int forget_fn(struct store_tx *tx, void *arg, struct err *err)
{
    const struct settlement s = {.outcome = "failed", .status = 503, .forget_idem = true};
    return evidence_settle(tx, arg, &s, err);
}

static int problem_fn(struct store_tx *tx, void *arg, struct err *err)
{
    const struct settlement s = {.outcome = "failed", .status = 409, .problem_json = "{\"status\":409}"};
    return evidence_settle(tx, arg, &s, err);
}

static int both_fn(struct store_tx *tx, void *arg, struct err *err)
{
    return evidence_admit(tx, arg, NULL, err) == 0 ? settle_fn(tx, arg, err) : -1;
}

// ---- receipts -------------------------------------------------------------------------------------------------------
static json_t *payload_of(const struct receipt_row *row)
{
    CLEANUP_JSON json_t *envelope = json_loads(row->envelope_json, 0, NULL);
    const json_t *text = json_object_get(envelope, "payload");
    CLEANUP_FREE uint8_t *raw = malloc(json_string_length(text));
    const ssize_t n = enc_unbase64(json_string_value(text), json_string_length(text), raw, json_string_length(text));
    assert_true(n > 0);
    assert_string_equal(json_get_str(envelope, "payloadType"), RECEIPT_PAYLOAD_TYPE);
    json_t *payload = json_loadb((char *)raw, (size_t)n, 0, NULL);
    assert_non_null(payload);
    return payload;
}

static void test_receipt(void **state)
{
    struct store *s = open_store(*state);
    struct err err = {0};
    struct receipt_row row;
    struct admission a = admission_of("t", "command.run");
    strcpy(a.sandbox_id, "sbx1");
    admit(s, &a);
    assert_int_equal(receipt_get(s, "t", a.receipt_id, &row, &err), 0);
    assert_int_equal(row.state, RECEIPT_PENDING);
    assert_null(row.envelope_json);
    receipt_row_free(&row);
    settle(s, &a, "exited", 200);
    assert_int_equal(receipt_get(s, "t", a.receipt_id, &row, &err), 0);
    assert_int_equal(row.state, RECEIPT_FINAL);
    assert_string_equal(row.outcome, "exited");
    CLEANUP_JSON json_t *p = payload_of(&row);
    receipt_row_free(&row);
    static const char *const MEMBERS[] = {"schema",     "receipt_id", "audit_id",     "tenant",  "operation", "sandbox_id",
                                          "job_id",     "request_id", "actor",        "admitted_at", "settled_at",
                                          "outcome",    "status",     "facts",        "previous_receipt_sha256",
                                          "server_version"};
    assert_int_equal(json_object_size(p), sizeof MEMBERS / sizeof MEMBERS[0]);
    for (size_t i = 0; i < sizeof MEMBERS / sizeof MEMBERS[0]; i++)
        assert_non_null(json_object_get(p, MEMBERS[i]));
    assert_string_equal(json_get_str(p, "schema"), "airlock.receipt.v1");
    assert_string_equal(json_get_str(p, "actor"), a.token_id);
    assert_string_equal(json_get_str(p, "sandbox_id"), "sbx1");
    assert_int_equal(json_get_int(json_object_get(p, "facts"), "exit_code", -1), 0);
    assert_true(json_is_null(json_object_get(p, "previous_receipt_sha256")));
    assert_int_equal(store_write(s, settle_fn, &a, &err), -1);
    assert_err(err, ERR_CONFLICT, "already_settled");
    store_close(s);
}

// What a restart makes up is replaced by what was admitted.
static void test_settled_by_a_later_server(void **state)
{
    struct store *s = open_store(*state);
    struct err err = {0};
    struct receipt_row row;
    struct admission a = admission_of("t", "command.run"), made_up = {.tenant = "t", .request_id = "system"};
    admit(s, &a);
    strcpy(made_up.receipt_id, a.receipt_id);
    strcpy(made_up.sandbox_id, "sbx9");
    id_new(ID_AUDIT, made_up.audit_id);
    settle(s, &made_up, "lost", 503);
    assert_int_equal(receipt_get(s, "t", a.receipt_id, &row, &err), 0);
    CLEANUP_JSON json_t *p = payload_of(&row);
    assert_string_equal(json_get_str(p, "audit_id"), a.audit_id);
    assert_string_equal(json_get_str(p, "actor"), a.token_id);
    assert_string_equal(json_get_str(p, "operation"), "command.run");
    assert_string_equal(json_get_str(p, "sandbox_id"), "sbx9");
    receipt_row_free(&row);
    struct admission never = admission_of("t", "x.y");
    assert_int_equal(store_write(s, settle_fn, &never, &err), -1);
    assert_err(err, ERR_INTERNAL, "not_admitted");
    store_close(s);
}

static void test_without_a_receipt(void **state)
{
    struct store *s = open_store(*state);
    struct err err = {0};
    struct admission a = admission_of("t", "x.y");
    a.receipt_id[0] = 0;
    must_write(s, both_fn, &a);
    assert_int_equal(store_write(s, settle_fn, &a, &err), -1);
    assert_err(err, ERR_CONFLICT, "already_settled");
    store_close(s);
}

static void test_receipts_are_chained_per_tenant(void **state)
{
    struct store *s = open_store(*state);
    struct err err = {0};
    char last[2][DIGEST_TEXT_MAX] = {"", ""};
    static const char *const TENANTS[] = {"t", "u"};
    for (int i = 0; i < 6; i++) {
        struct admission a = admission_of(TENANTS[i % 2], "x.y");
        struct receipt_row row;
        must_write(s, both_fn, &a);
        assert_int_equal(receipt_get(s, a.tenant, a.receipt_id, &row, &err), 0);
        CLEANUP_JSON json_t *p = payload_of(&row);
        const char *previous = json_get_str(p, "previous_receipt_sha256");
        assert_string_equal(previous ? previous : "", last[i % 2]);
        CLEANUP_FREE char *text = json_canonical(p);
        uint8_t hash[SHA256_BYTES];
        crypto_sha256(text, strlen(text), hash);
        crypto_digest_text(hash, last[i % 2]);
        receipt_row_free(&row);
    }
    store_close(s);
}

static bool count_receipt(void *arg, const struct receipt_row *row)
{
    assert_string_equal(row->tenant, "t");
    ++*(int *)arg;
    return true;
}

static void test_receipt_lists_keep_tenants_apart(void **state)
{
    struct store *s = open_store(*state);
    struct err err = {0};
    struct receipt_row row;
    struct admission mine = admission_of("t", "x.y"), theirs = admission_of("u", "x.y");
    strcpy(mine.sandbox_id, "sbx1");
    strcpy(theirs.sandbox_id, "sbx1");
    must_write(s, both_fn, &mine);
    must_write(s, both_fn, &theirs);
    assert_int_equal(receipt_get(s, "t", theirs.receipt_id, &row, &err), 1);
    int all = 0, of = 0;
    const struct page page = {.tenant = "t", .limit = 10};
    assert_int_equal(receipt_list(s, &page, NULL, count_receipt, &all, &err), 0);
    assert_int_equal(receipt_list(s, &page, "sbx1", count_receipt, &of, &err), 0);
    assert_int_equal(all, 1);
    assert_int_equal(of, 1);
    store_close(s);
}

static bool keep_admission(void *arg, const struct admission *a)
{
    struct admission *all = arg;
    all[all[0].tenant[0] != 0] = *a;
    return true;
}

static void test_pending_receipts_give_their_admissions_back(void **state)
{
    struct store *s = open_store(*state);
    struct err err = {0};
    struct admission a = admission_of("t", "x.y"), b = admission_of("u", "x.z"), all[2] = {0};
    strcpy(a.idem_key, "key");
    strcpy(a.method, "POST");
    strcpy(a.path, "/v1/x");
    memset(a.body_sha256, 7, sizeof a.body_sha256);
    admit(s, &a);
    must_write(s, both_fn, &b);
    assert_int_equal(receipt_each_pending_all_tenants(s, keep_admission, all, &err), 0);
    assert_string_equal(all[1].tenant, "");
    assert_string_equal(all[0].receipt_id, a.receipt_id);
    assert_string_equal(all[0].audit_id, a.audit_id);
    assert_string_equal(all[0].idem_key, "key");
    assert_string_equal(all[0].path, "/v1/x");
    assert_memory_equal(all[0].body_sha256, a.body_sha256, SHA256_BYTES);
    store_close(s);
}

// ---- idempotency ------------------------------------------------------------------------------------------------------
static struct admission keyed(const char *tenant, const char *path, const char *key)
{
    struct admission a = admission_of(tenant, "sandbox.create");
    strcpy(a.idem_key, key);
    strcpy(a.method, "POST");
    strcpy(a.path, path);
    return a;
}

static int find(struct store *s, const struct admission *a, struct idem_row *row)
{
    struct err err = {0};
    return idem_find(s, a->tenant, a->method, a->path, a->idem_key, row, &err);
}

static void test_idempotency(void **state)
{
    struct dir *d = *state;
    struct store *s = open_store(d);
    struct err err = {0};
    struct idem_row row;
    struct admission a = keyed("t", "/v1/sandboxes", "k"), again = keyed("t", "/v1/sandboxes", "k"),
                     elsewhere = keyed("t", "/v1/tokens", "k"), theirs = keyed("u", "/v1/sandboxes", "k");
    assert_int_equal(find(s, &a, &row), 1);
    admit(s, &a);
    assert_int_equal(find(s, &a, &row), 0);
    assert_int_equal(row.state, IDEM_RUNNING);
    assert_string_equal(row.audit_id, a.audit_id);
    idem_row_free(&row);
    assert_int_equal(store_write(s, admit_fn, &again, &err), -1);
    assert_err(err, ERR_CONFLICT, "idempotency_race");
    struct receipt_row receipt; // nothing of the second is left
    assert_int_equal(receipt_get(s, "t", again.receipt_id, &receipt, &err), 1);
    admit(s, &elsewhere);
    admit(s, &theirs);
    store_close(s);
    s = open_store(d); // it holds across restarts
    settle(s, &a, "succeeded", 201);
    assert_int_equal(find(s, &a, &row), 0);
    assert_int_equal(row.state, IDEM_DONE);
    assert_int_equal(row.status, 201);
    assert_string_equal(row.ref, a.job_id);
    assert_string_equal(row.job_id, a.job_id);
    idem_row_free(&row);
    must_write(s, forget_fn, &elsewhere); // 5xx: the key is free again
    assert_int_equal(find(s, &elsewhere, &row), 1);
    struct admission retry = keyed("t", "/v1/tokens", "k");
    admit(s, &retry);
    must_write(s, problem_fn, &retry);
    assert_int_equal(find(s, &retry, &row), 0);
    assert_string_equal(row.problem_json, "{\"status\":409}");
    idem_row_free(&row);
    store_close(s);
}

static void test_idempotency_ends_after_a_day(void **state)
{
    struct dir *d = *state;
    struct store *s = open_store(d);
    struct idem_row row;
    struct admission a = keyed("t", "/v1/x", "k"), next = keyed("t", "/v1/x", "k");
    admit(s, &a);
    store_close(s);
    poke(d, "UPDATE idempotency SET created_at_ms = created_at_ms - 24 * 3600 * 1000 - 1");
    s = open_store(d);
    assert_int_equal(find(s, &a, &row), 1);
    admit(s, &next);
    settle(s, &a, "succeeded", 200); // the old request ends: the new one's row is not touched
    assert_int_equal(find(s, &next, &row), 0);
    assert_int_equal(row.state, IDEM_RUNNING);
    assert_string_equal(row.audit_id, next.audit_id);
    idem_row_free(&row);
    store_close(s);
}

// ---- the chain ----------------------------------------------------------------------------------------------------------
struct chain {
    int n;
    char head[SHA256_HEX], last_of[ID_MAX];
    int64_t last_seq;
    const char *tenant;
};

static bool check_entry(void *arg, const struct audit_row *row)
{
    struct chain *c = arg;
    uint8_t raw[SHA256_BYTES];
    char hash[SHA256_HEX];
    crypto_sha256(row->entry_json, strlen(row->entry_json), raw);
    enc_hex(raw, sizeof raw, hash);
    assert_string_equal(hash, row->hash);
    CLEANUP_JSON json_t *e = json_loads(row->entry_json, 0, NULL);
    assert_int_equal(json_object_size(e), 17);
    assert_string_equal(json_get_str(e, "tenant"), c->tenant);
    assert_string_equal(row->tenant, c->tenant);
    assert_int_equal(json_get_int(e, "seq", 0), row->seq);
    assert_true(row->seq > c->last_seq);
    c->last_seq = row->seq;
    const char *of = json_get_str(e, "of");
    snprintf(c->last_of, sizeof c->last_of, "%s", of ? of : "");
    strcpy(c->head, row->hash);
    c->n++;
    return true;
}

static int note_fn(struct store_tx *tx, void *arg, struct err *err)
{
    const struct audit_note n = {.tenant = arg, .operation = "file.stat", .decision = "allowed", .outcome = "succeeded"};
    return audit_append(tx, &n, err);
}

static void test_chain(void **state)
{
    struct store *s = open_store(*state);
    struct err err = {0};
    struct admission a = admission_of("t", "x.y");
    must_write(s, both_fn, &a);
    must_write(s, note_fn, (void *)"u");
    CLEANUP_JSON json_t *facts = json_pack("{s:i}", "bytes", 12);
    const struct audit_note late = {.id = "aud1", .tenant = "t", .operation = "log.read", .facts = facts};
    assert_int_equal(audit_submit(s, &late), 0);
    must_write(s, note_fn, (void *)"t"); // in order: the one before is in too
    struct chain c = {.tenant = "t"};
    assert_int_equal(audit_list(s, "t", 0, 100, check_entry, &c, &err), 0);
    assert_int_equal(c.n, 4);
    assert_int_equal(c.last_seq, 5);
    struct chain of = {.tenant = "t"};
    assert_int_equal(audit_list(s, "t", 1, 1, check_entry, &of, &err), 0);
    assert_string_equal(of.last_of, a.audit_id);
    CLEANUP_FREE char *text = audit_checkpoint(s, &err);
    CLEANUP_JSON json_t *checkpoint = json_loads(text, 0, NULL);
    assert_int_equal(json_get_int(checkpoint, "size", 0), 5);
    assert_string_equal(json_get_str(checkpoint, "head_hash"), c.head);
    assert_string_equal(json_get_str(checkpoint, "payloadType"), CHECKPOINT_PAYLOAD_TYPE);
    assert_int_equal(json_object_size(checkpoint), 6);
    store_close(s);
}

// ---- keys ---------------------------------------------------------------------------------------------------------------
static int mode_of(const struct dir *d, const char *name)
{
    struct stat st;
    return fstatat(d->fd, name, &st, 0) == 0 ? (int)(st.st_mode & 0777) : -1;
}

static void test_keys_and_rotation(void **state)
{
    struct dir *d = *state;
    struct store *s = open_store(d);
    struct err err = {0};
    char hmac[2][SHA256_HEX];
    evidence_argv_hmac(s, "ls", 2, hmac[0]);
    struct admission a = admission_of("t", "x.y");
    must_write(s, both_fn, &a);
    store_close(s);
    assert_int_equal(mode_of(d, "keys"), 0700);
    assert_int_equal(mode_of(d, "keys/receipt.pem"), 0600);
    assert_int_equal(mode_of(d, "keys/checkpoint.pem"), 0600);
    assert_int_equal(mode_of(d, "keys/argv.key"), 0600);
    assert_int_equal(mode_of(d, "keys/receipt.pub.pem"), 0644);
    assert_int_equal(mode_of(d, "airlock.db"), 0600);
    assert_int_equal(unlinkat(d->fd, "keys/receipt.pem", 0), 0);
    s = open_store(d);
    evidence_argv_hmac(s, "ls", 2, hmac[1]);
    assert_string_equal(hmac[0], hmac[1]);
    struct admission b = admission_of("t", "x.y");
    must_write(s, both_fn, &b);
    CLEANUP_FREE char *text = evidence_keys(s, &err);
    CLEANUP_JSON json_t *keys = json_loads(text, 0, NULL);
    assert_int_equal(json_array_size(keys), 3);
    assert_true(json_is_null(json_object_get(json_array_get(keys, 0), "retired_at")));
    assert_true(json_is_null(json_object_get(json_array_get(keys, 1), "retired_at")));
    const json_t *old = json_array_get(keys, 2);
    assert_string_equal(json_get_str(old, "use"), "receipt");
    assert_false(json_is_null(json_object_get(old, "retired_at")));
    store_close(s);
    struct verify_report r; // receipts of both keys hold
    assert_int_equal(verify_state(d->path, NULL, NULL, 1, &r), VERIFY_OK);
    assert_int_equal(r.receipts, 2);
}

// ---- the openssl command line ---------------------------------------------------------------------------------------------
static void write_file(const struct dir *d, const char *name, const char *text)
{
    assert_int_equal(fd_write_file_atomic(d->fd, name, text, strlen(text), 0600), 0);
}

// The lines of store/dsse.h, with python's json in the place of jq, which a test machine may lack.
static int by_openssl(const struct dir *d)
{
    char line[2000];
    snprintf(line, sizeof line,
             "cd '%s' && python3 -c 'import json,base64;e=json.load(open(\"receipt.json\"));"
             "open(\"payload.json\",\"wb\").write(base64.b64decode(e[\"payload\"]));"
             "open(\"sig\",\"wb\").write(base64.b64decode(e[\"signatures\"][0][\"sig\"]))' &&"
             "printf 'DSSEv1 %%d %%s %%d ' 36 application/vnd.airlock.receipt+json \"$(stat -c %%s payload.json)\" > pae &&"
             "cat payload.json >> pae &&"
             "openssl pkeyutl -verify -pubin -inkey keys/receipt.pub.pem -rawin -in pae -sigfile sig >/dev/null 2>&1",
             d->path);
    return system(line);
}

static void test_openssl_verifies_a_receipt(void **state)
{
    struct dir *d = *state;
    if (system("command -v openssl >/dev/null && command -v python3 >/dev/null") != 0) {
        print_message("skipped: no openssl or python3 on this machine\n");
        skip();
    }
    struct store *s = open_store(d);
    struct err err = {0};
    struct receipt_row row;
    struct admission a = admission_of("t", "x.y");
    must_write(s, both_fn, &a);
    assert_int_equal(receipt_get(s, "t", a.receipt_id, &row, &err), 0);
    write_file(d, "receipt.json", row.envelope_json);
    assert_int_equal(by_openssl(d), 0);
    char *payload = strstr(row.envelope_json, "\"payload\":\"") + 11; // and a changed one does not pass
    payload[20] = payload[20] == 'A' ? 'B' : 'A';
    write_file(d, "receipt.json", row.envelope_json);
    assert_int_not_equal(by_openssl(d), 0);
    receipt_row_free(&row);
    store_close(s);
}

int main(void)
{
#define T(fn) cmocka_unit_test_setup_teardown(fn, dir_setup, dir_teardown)
    const struct CMUnitTest tests[] = {
        T(test_receipt), T(test_settled_by_a_later_server), T(test_without_a_receipt),
        T(test_receipts_are_chained_per_tenant), T(test_receipt_lists_keep_tenants_apart),
        T(test_pending_receipts_give_their_admissions_back), T(test_idempotency), T(test_idempotency_ends_after_a_day),
        T(test_chain), T(test_keys_and_rotation), T(test_openssl_verifies_a_receipt),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
