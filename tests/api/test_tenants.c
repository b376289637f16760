// Tenants, lists and pages, tokens, preconditions, deletion, evidence of each kind of request.
#include "harness.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int setup(void **state)
{
    *state = world_new();
    return 0;
}

static int teardown(void **state)
{
    world_free(*state);
    return 0;
}

static struct answer *as(struct world *w, const char *token, const char *method, const char *path, const char *query,
                         const char *body)
{
    return ask(w, &(struct ask){.method = method, .path = path, .query = query, .body = body, .token = token});
}

static size_t count(const struct answer *r)
{
    return json_array_size(json_object_get(r->json, "items"));
}

static void test_pages(void **state)
{
    struct world *w = *state;
    char ids[7][ID_MAX], foreign[ID_MAX];
    for (int i = 0; i < 7; i++)
        make_sandbox(w, NULL, ids[i]);
    make_sandbox(w, w->other, foreign);
    char query[128] = "limit=3";
    int seen = 0;
    for (int page = 0; page < 3; page++) {
        struct answer *r = get(w, "/v1/sandboxes", query);
        answer_is(r, 200, NULL, NULL);
        for (size_t i = 0; i < count(r); i++, seen++)
            assert_string_equal(json_get_str(json_array_get(json_object_get(r->json, "items"), i), "id"), ids[6 - seen]);
        const char *next = answer_text(r, "next_cursor");
        if (page == 2)
            assert_null(next);
        else
            snprintf(query, sizeof query, "limit=3&cursor=%s", next);
        answer_free(r);
    }
    assert_int_equal(seen, 7);
    struct answer *r = get(w, "/v1/sandboxes", "limit=7"); // exactly all: no further page
    assert_null(answer_text(r, "next_cursor"));
    assert_null(strstr(r->body, foreign));
    answer_free(r);
}

static void test_filters(void **state)
{
    struct world *w = *state;
    char foreign[ID_MAX], mine[ID_MAX];
    struct answer *r = post(w, "/v1/sandboxes",
                            "{\"image\":\"debian\",\"name\":\"n1\",\"labels\":{\"team\":\"a b\",\"x\":\"\"},"
                            "\"lifecycle\":{\"ttl_seconds\":60,\"on_expiry\":\"stop\"}}");
    answer_is(r, 201, NULL, NULL);
    snprintf(mine, sizeof mine, "%s", answer_text(r, "id"));
    answer_free(r);
    r = as(w, w->other, "POST", "/v1/sandboxes", NULL,
           "{\"image\":\"debian\",\"labels\":{\"team\":\"a b\"},\"lifecycle\":{\"ttl_seconds\":60,\"on_expiry\":\"stop\"}}");
    snprintf(foreign, sizeof foreign, "%s", answer_text(r, "id"));
    answer_free(r);
    static const struct {
        const char *query;
        size_t n;
    } CASES[] = {{"label=team=a%20b", 1}, {"label=team=a", 0}, {"label=x=", 1}, {"state=running", 1}, {"state=destroyed", 0},
                 {"state=running&label=team=a+b", 1}};
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        r = get(w, "/v1/sandboxes", CASES[i].query);
        answer_is(r, 200, NULL, NULL);
        if (count(r) != CASES[i].n)
            fail_msg("%s: %zu", CASES[i].query, count(r));
        assert_null(strstr(r->body, foreign));
        answer_free(r);
    }
    // Filters by a foreign, missing or malformed sandbox match nothing.
    const char *const LISTS[] = {"/v1/jobs", "/v1/receipts"};
    const char *const OF[] = {foreign, "sbx01k30x4rwm8e7q2v9hbnjt0001", "nonsense", ""};
    for (size_t i = 0; i < 2; i++) {
        for (size_t k = 0; k < 4; k++) {
            r = get(w, LISTS[i], path_of("sandbox_id=%s", OF[k]));
            answer_is(r, 200, NULL, NULL);
            assert_int_equal(count(r), 0);
            answer_free(r);
        }
        r = get(w, LISTS[i], path_of("sandbox_id=%s", mine));
        assert_int_equal(count(r), 1);
        answer_free(r);
    }
    // A destroyed one is listed only when asked for, and still readable.
    r = as(w, NULL, "DELETE", path_of("/v1/sandboxes/%s", mine), NULL, NULL);
    answer_is(r, 200, NULL, NULL);
    answer_free(r);
    r = get(w, "/v1/sandboxes", NULL);
    assert_int_equal(count(r), 0);
    answer_free(r);
    r = get(w, "/v1/sandboxes", "state=destroyed");
    assert_int_equal(count(r), 1);
    answer_free(r);
    r = get(w, path_of("/v1/sandboxes/%s", mine), NULL);
    assert_string_equal(answer_text(r, "state"), "destroyed");
    answer_free(r);
}

// No list of the other tenant's shows anything of ours.
static void test_lists_keep_tenants_apart(void **state)
{
    struct world *w = *state;
    char id[ID_MAX];
    make_sandbox(w, NULL, id);
    struct answer *r = post(w, path_of("/v1/sandboxes/%s/commands", id), "{\"argv\":[\"echo\",\"x\"]}");
    char command[ID_MAX], job[ID_MAX], receipt[ID_MAX];
    snprintf(command, sizeof command, "%s", answer_text(r, "command_id"));
    snprintf(job, sizeof job, "%s", answer_text(r, "job_id"));
    snprintf(receipt, sizeof receipt, "%s", answer_text(r, "receipt_id"));
    answer_free(r);
    const char *const LISTS[] = {"/v1/sandboxes", "/v1/jobs", "/v1/receipts", "/v1/tokens", "/v1/audit"};
    for (size_t i = 0; i < 5; i++) {
        r = as(w, w->other, "GET", LISTS[i], "limit=500", NULL);
        answer_is(r, 200, NULL, NULL);
        assert_null(strstr(r->body, id));
        assert_null(strstr(r->body, "\"tenant\":\"default\""));
        answer_free(r);
    }
    const char *const OBJECTS[] = {path_of("/v1/jobs/%s", job), path_of("/v1/receipts/%s", receipt),
                                   path_of("/v1/sandboxes/%s/commands/%s", id, command)};
    for (size_t i = 0; i < 3; i++) {
        r = as(w, NULL, "GET", OBJECTS[i], NULL, NULL);
        answer_is(r, 200, NULL, NULL);
        answer_free(r);
        r = as(w, w->other, "GET", OBJECTS[i], NULL, NULL);
        answer_is(r, 404, "not_found", NULL);
        answer_free(r);
    }
}

static void test_tokens(void **state)
{
    struct world *w = *state;
    struct answer *r = post(w, "/v1/tokens", "{\"name\":\"a\",\"scopes\":[\"sandbox:read\",\"admin\"],\"tenant\":\"third\"}");
    answer_is(r, 201, NULL, NULL);
    assert_string_equal(answer_header(r, "Cache-Control"), "no-store");
    assert_non_null(answer_text(r, "expires_at"));
    char secret[TOKEN_TEXT_LEN + 1], id[ID_MAX];
    snprintf(secret, sizeof secret, "%s", answer_text(r, "token"));
    snprintf(id, sizeof id, "%s", answer_text(r, "id"));
    answer_free(r);
    r = as(w, secret, "GET", "/v1/tokens", NULL, NULL);
    answer_is(r, 200, NULL, NULL);
    assert_int_equal(count(r), 1);
    assert_null(strstr(r->body, "alk_"));
    answer_free(r);
    // Another tenant's administrator makes tokens for its own tenant only, and sees and revokes no others.
    r = as(w, secret, "POST", "/v1/tokens", NULL, "{\"name\":\"b\",\"scopes\":[\"admin\"],\"tenant\":\"default\"}");
    answer_is(r, 403, "policy_denied", "tenant_denied");
    assert_non_null(answer_text(r, "audit_id"));
    answer_free(r);
    r = as(w, secret, "POST", "/v1/tokens", NULL,
           "{\"name\":\"b\",\"scopes\":[\"admin\"],\"tenant\":\"third\",\"expires_in_seconds\":null}");
    answer_is(r, 201, NULL, NULL);
    assert_null(answer_text(r, "expires_at"));
    answer_free(r);
    r = as(w, w->other, "DELETE", path_of("/v1/tokens/%s", id), NULL, NULL);
    answer_is(r, 404, "not_found", NULL);
    answer_free(r);
    r = as(w, secret, "DELETE", path_of("/v1/tokens/%s", id), NULL, NULL);
    answer_is(r, 200, NULL, NULL);
    answer_free(r);
    r = as(w, secret, "GET", "/v1/tokens", NULL, NULL);
    answer_is(r, 401, "unauthorized", NULL);
    answer_free(r);
}

static void test_preconditions(void **state)
{
    struct world *w = *state;
    char id[ID_MAX], path[128], etag[32];
    make_sandbox(w, NULL, id);
    snprintf(path, sizeof path, "/v1/sandboxes/%s", id);
    struct answer *r = get(w, path, NULL);
    snprintf(etag, sizeof etag, "%s", answer_header(r, "ETag"));
    answer_free(r);
    const struct ask stale = {.method = "PATCH", .path = path, .body = "{\"ttl_seconds\":5}", .headers = {"If-Match", "\"99\""}};
    r = ask(w, &stale);
    answer_is(r, 412, "precondition_failed", "generation_mismatch");
    answer_free(r);
    struct ask fits = stale;
    fits.headers[1] = etag;
    r = ask(w, &fits);
    answer_is(r, 200, NULL, NULL);
    assert_string_not_equal(answer_header(r, "ETag"), etag);
    answer_free(r);
    r = ask(w, &fits); // the generation has moved on
    answer_is(r, 412, "precondition_failed", "generation_mismatch");
    answer_free(r);
    fits.headers[1] = "*";
    r = ask(w, &fits);
    answer_is(r, 200, NULL, NULL);
    answer_free(r);
    fits.headers[1] = "W/\"3\"";
    r = ask(w, &fits);
    answer_is(r, 422, "validation", NULL);
    assert_true(answer_faults(r, "/header/If-Match"));
    answer_free(r);
    static const struct {
        const char *method, *rest;
    } OTHERS[] = {{"POST", "/stop"}, {"POST", "/start"}, {"POST", "/detach"}, {"DELETE", ""}};
    for (size_t i = 0; i < 4; i++) {
        r = ask(w, &(struct ask){.method = OTHERS[i].method, .path = path_of("%s%s", path, OTHERS[i].rest),
                                 .headers = {"If-Match", "\"99\""}});
        answer_is(r, 412, "precondition_failed", "generation_mismatch");
        answer_free(r);
    }
    r = post(w, path_of("%s/stop", path), "{}");
    answer_is(r, 200, NULL, NULL);
    answer_free(r);
    r = ask(w, &(struct ask){.method = "PATCH", .path = path, .body = "{\"ttl_seconds\":5,\"lifecycle\":{\"ttl_seconds\":6}}"});
    answer_is(r, 422, "validation", NULL);
    assert_true(answer_faults(r, "/ttl_seconds"));
    answer_free(r);
    r = ask(w, &(struct ask){.method = "PATCH", .path = path, .body = "{}"});
    answer_is(r, 422, "validation", NULL);
    answer_free(r);
}

static void test_deletion(void **state)
{
    struct world *w = *state;
    char id[ID_MAX], path[128];
    make_sandbox(w, NULL, id);
    snprintf(path, sizeof path, "/v1/sandboxes/%s", id);
    err_set(&w->m->fail_next, ERR_CLEANUP_FAILED, "cleanup_failed", "1 kind of data could not be erased");
    struct answer *r = as(w, NULL, "DELETE", path, NULL, NULL);
    answer_is(r, 500, "cleanup_failed", NULL);
    assert_non_null(json_object_get(r->json, "report"));
    answer_free(r);
    r = as(w, NULL, "DELETE", path, NULL, NULL);
    answer_is(r, 200, NULL, NULL);
    assert_int_equal(json_array_size(json_object_get(r->json, "erased")), 1);
    assert_string_equal(answer_text(r, "receipt_id"), answer_header(r, "Airlock-Receipt-Id"));
    answer_free(r);
    r = ask(w, &(struct ask){.method = "PATCH", .path = path, .body = "{\"ttl_seconds\":5}"});
    answer_is(r, 409, "conflict", "destroyed");
    answer_free(r);
}

// Lists and the like leave an audit entry, single reads none, changes a receipt.
static void test_evidence(void **state)
{
    struct world *w = *state;
    char id[ID_MAX];
    make_sandbox(w, NULL, id);
    struct answer *r = get(w, "/v1/sandboxes", NULL);
    char audit[ID_MAX];
    snprintf(audit, sizeof audit, "%s", answer_header(r, "Airlock-Audit-Id"));
    assert_null(answer_header(r, "Airlock-Receipt-Id"));
    answer_free(r);
    r = get(w, path_of("/v1/sandboxes/%s", id), NULL);
    assert_null(answer_header(r, "Airlock-Audit-Id"));
    answer_free(r);
    r = post(w, path_of("/v1/sandboxes/%s/commands", id), "{\"argv\":[\"hold\"],\"background\":true}");
    answer_is(r, 202, NULL, NULL);
    char receipt[ID_MAX], command[ID_MAX];
    snprintf(receipt, sizeof receipt, "%s", answer_text(r, "receipt_id"));
    snprintf(command, sizeof command, "%s", answer_text(r, "command_id"));
    answer_free(r);
    r = get(w, path_of("/v1/receipts/%s", receipt), NULL);
    answer_is(r, 409, "conflict", "receipt_pending");
    answer_free(r);
    fake_exit(w->m, command, 0);
    r = get(w, path_of("/v1/receipts/%s", receipt), NULL);
    answer_is(r, 200, NULL, NULL);
    assert_string_equal(answer_text(r, "payloadType"), RECEIPT_PAYLOAD_TYPE);
    answer_free(r);
    // The list's entry was queued after the answer: it is there by now, since a later write was durable.
    r = get(w, "/v1/audit", "limit=500");
    assert_non_null(strstr(r->body, audit));
    answer_free(r);
    r = post(w, path_of("/v1/sandboxes/%s/commands/%s/signal", id, command), "{\"signal\":\"TERM\"}");
    answer_is(r, 409, "conflict", "not_running");
    answer_free(r);
    r = post(w, path_of("/v1/sandboxes/%s/commands/%s/signal", id, command), "{\"signal\":\"SIGTERM\"}");
    answer_is(r, 422, "validation", NULL);
    answer_free(r);
}

static void test_jobs(void **state)
{
    struct world *w = *state;
    char id[ID_MAX], job[ID_MAX];
    make_sandbox(w, NULL, id);
    struct answer *r = get(w, "/v1/jobs", path_of("sandbox_id=%s", id));
    snprintf(job, sizeof job, "%s", json_get_str(json_array_get(json_object_get(r->json, "items"), 0), "id"));
    answer_free(r);
    r = get(w, path_of("/v1/jobs/%s", job), NULL);
    answer_is(r, 200, NULL, NULL);
    assert_string_equal(json_get_str(json_object_get(r->json, "result"), "href"), path_of("/v1/sandboxes/%s", id));
    answer_free(r);
    r = post(w, path_of("/v1/jobs/%s/cancel", job), NULL);
    answer_is(r, 409, "conflict", "not_cancellable");
    answer_free(r);
    r = as(w, w->other, "POST", path_of("/v1/jobs/%s/cancel", job), NULL, NULL);
    answer_is(r, 404, "not_found", NULL);
    answer_free(r);
    // A create that fails after its admission names its job, and the job has the same problem.
    err_set(&w->m->fail_next, ERR_TIMEOUT, "boot_timeout", "the guest was not ready");
    r = post(w, "/v1/sandboxes", "{\"image\":\"debian\",\"lifecycle\":{\"ttl_seconds\":60,\"on_expiry\":\"destroy\"}}");
    answer_is(r, 504, "timeout", "boot_timeout");
    assert_non_null(answer_text(r, "sandbox_id"));
    assert_non_null(answer_header(r, "Airlock-Receipt-Id"));
    struct answer *j = get(w, path_of("/v1/jobs/%s", answer_text(r, "job_id")), NULL);
    answer_is(j, 200, NULL, NULL);
    assert_true(json_equal(json_object_get(j->json, "problem"), r->json));
    answer_free(j);
    answer_free(r);
}

static void test_stdin(void **state)
{
    struct world *w = *state;
    char id[ID_MAX], command[ID_MAX];
    make_sandbox(w, NULL, id);
    struct answer *r = post(w, path_of("/v1/sandboxes/%s/commands", id), "{\"argv\":[\"hold\"],\"background\":true}");
    snprintf(command, sizeof command, "%s", answer_text(r, "command_id"));
    answer_free(r);
    char path[200];
    snprintf(path, sizeof path, "/v1/sandboxes/%s/commands/%s/stdin", id, command);
    r = ask(w, &(struct ask){.method = "POST", .path = path, .query = "eof=true&offset=0", .body = "a\0b", .body_len = 3});
    answer_is(r, 200, NULL, NULL);
    assert_int_equal(json_get_int(r->json, "next_offset", -1), 3);
    assert_true(json_is_true(json_object_get(r->json, "eof")));
    answer_free(r);
    r = ask(w, &(struct ask){.method = "POST", .path = path, .query = "offset=7", .body = "x"});
    answer_is(r, 409, "conflict", "stdin_offset");
    answer_free(r);
    // Of any size, in bounded pieces, under one receipt.
    char *big = calloc(1, 3 << 20);
    r = ask(w, &(struct ask){.method = "POST", .path = path, .body = big, .body_len = 3 << 20, .piece = 100001, .chunked = true});
    answer_is(r, 200, NULL, NULL);
    assert_int_equal(json_get_int(r->json, "next_offset", -1), 3 + (3 << 20));
    assert_int_equal(w->m->stdin_calls, 1 + 12);
    char receipt[ID_MAX];
    snprintf(receipt, sizeof receipt, "%s", answer_text(r, "receipt_id"));
    answer_free(r);
    r = get(w, path_of("/v1/receipts/%s", receipt), NULL);
    answer_is(r, 200, NULL, NULL);
    assert_string_equal(answer_text(r, "outcome"), "succeeded");
    answer_free(r);
    struct driven *d = drive_begin(w, &(struct ask){.method = "POST", .path = path, .body = big, .body_len = 10});
    api_body_push(d->call, big, 5);
    drive_leave(d);
    free(big);
    r = ask(w, &(struct ask){.method = "POST", .path = path_of("%.*scmd01k30x4rwm8e7q2v9hbnjt0001/stdin",
                                                               (int)(strstr(path, "/cmd") + 1 - path), path), .body = "x"});
    answer_is(r, 404, "not_found", NULL);
    answer_free(r);
    fake_exit(w->m, command, 0);
}

static int snapshot_tx(struct store_tx *tx, void *arg, struct err *err)
{
    return snapshot_insert(tx, arg, 0, err);
}

static void make_snapshot(struct world *w, char path[128])
{
    char sandbox[ID_MAX];
    struct err err = {0};
    struct snapshot_row row = {.state = SNAPSHOT_READY, .kind = "full", .tenant = "default", .created_at_ms = 1, .generation = 1};
    make_sandbox(w, NULL, sandbox);
    snprintf(row.sandbox_id, sizeof row.sandbox_id, "%s", sandbox);
    id_new(ID_SNAPSHOT, row.id);
    if (store_write(w->store, snapshot_tx, &row, &err) != 0)
        fail_msg("%s %s", err.detail, err.internal);
    snprintf(path, 128, "/v1/snapshots/%s", row.id);
}

static void test_snapshot_preconditions(void **state)
{
    struct world *w = *state;
    char path[128];
    make_snapshot(w, path);
    static const struct {
        const char *tag;
        int status;
        const char *kind, *code;
    } CASES[] = {{"\"99\"", 412, "precondition_failed", "generation_mismatch"}, {"\"1\"", 409, "conflict", "has_children"},
                 {"*", 409, "conflict", "has_children"}, {"1", 422, "validation", NULL}};
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        struct answer *r = ask(w, &(struct ask){.method = "DELETE", .path = path, .headers = {"If-Match", CASES[i].tag}});
        answer_is(r, CASES[i].status, CASES[i].kind, CASES[i].code);
        answer_free(r);
    }
}

// How many have their answer, waited for until there are n.
static unsigned answered(struct driven **d, size_t n_d, unsigned n)
{
    unsigned have = 0;
    for (int tries = 0; tries < PATIENCE_MS && have < n; tries++) {
        nanosleep(&(struct timespec){0, 1000000}, NULL);
        have = 0;
        for (size_t i = 0; i < n_d; i++)
            have += api_response(d[i]->call) != NULL;
    }
    return have;
}

// Verdicts on snapshots that take long hold nothing else up, and no more than some wait for them.
static void test_compat_aside(void **state)
{
    enum { ASKED = 40, WAIT = 16, REFUSED = ASKED - WAIT - 1 };
    struct world *w = *state;
    struct driven *d[ASKED];
    char path[128];
    unsigned busy = 0;
    make_snapshot(w, path);
    atomic_store(&w->m->hold, true);
    d[0] = drive(w, &(struct ask){.method = "GET", .path = path_of("%s/compat", path)});
    wait_held(w, 1); // under way: all others can but wait
    for (size_t i = 1; i < ASKED; i++)
        d[i] = drive(w, &(struct ask){.method = "GET", .path = path_of("%s/compat", path)});
    assert_int_equal(answered(d, ASKED, REFUSED), REFUSED);
    struct answer *r = get(w, "/v1/jobs", NULL);
    answer_is(r, 200, NULL, NULL);
    answer_free(r);
    r = get(w, "/v1/snapshots/snp01k30x4rwm8e7q2v9hbnjt0001/compat", NULL);
    answer_is(r, 404, "not_found", NULL);
    answer_free(r);
    assert_int_equal(atomic_load(&w->m->held), 1);
    atomic_store(&w->m->hold, false);
    for (size_t i = 0; i < ASKED; i++) {
        r = drive_finish(d[i]);
        if (r->status == 503) {
            answer_is(r, 503, "unavailable", "busy");
            assert_true(json_is_true(json_object_get(r->json, "retryable")));
            busy++;
        } else {
            answer_is(r, 409, "conflict", "snapshot_deleted");
        }
        answer_free(r);
    }
    assert_int_equal(busy, REFUSED);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_pages, setup, teardown),
        cmocka_unit_test_setup_teardown(test_filters, setup, teardown),
        cmocka_unit_test_setup_teardown(test_lists_keep_tenants_apart, setup, teardown),
        cmocka_unit_test_setup_teardown(test_tokens, setup, teardown),
        cmocka_unit_test_setup_teardown(test_preconditions, setup, teardown),
        cmocka_unit_test_setup_teardown(test_snapshot_preconditions, setup, teardown),
        cmocka_unit_test_setup_teardown(test_compat_aside, setup, teardown),
        cmocka_unit_test_setup_teardown(test_deletion, setup, teardown),
        cmocka_unit_test_setup_teardown(test_evidence, setup, teardown),
        cmocka_unit_test_setup_teardown(test_jobs, setup, teardown),
        cmocka_unit_test_setup_teardown(test_stdin, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
