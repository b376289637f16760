// Idempotency-Key: replay, mismatch, two at once, refusals, restarts, what is not kept.
#include "harness.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

static const char CREATE[] = "{\"image\":\"debian\",\"lifecycle\":{\"ttl_seconds\":60,\"on_expiry\":\"destroy\"}}";

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

static struct ask keyed(const char *path, const char *key, const char *body)
{
    return (struct ask){.method = "POST", .path = path, .body = body, .headers = {"Idempotency-Key", key}};
}

static void assert_replayed(const struct answer *r)
{
    assert_string_equal(answer_header(r, "Idempotent-Replayed"), "true");
}

static void test_replay(void **state)
{
    struct world *w = *state;
    const struct ask a = keyed("/v1/sandboxes", "k1", CREATE);
    struct answer *first = ask(w, &a);
    answer_is(first, 201, NULL, NULL);
    assert_null(answer_header(first, "Idempotent-Replayed"));
    for (int i = 0; i < 3; i++) {
        struct answer *again = ask(w, &a);
        answer_is(again, 201, NULL, NULL);
        assert_replayed(again);
        assert_string_equal(answer_text(again, "id"), answer_text(first, "id"));
        assert_string_equal(answer_text(again, "receipt_id"), answer_text(first, "receipt_id"));
        assert_string_equal(answer_header(again, "Airlock-Audit-Id"), answer_header(first, "Airlock-Audit-Id"));
        assert_string_equal(answer_header(again, "Location"), answer_header(first, "Location"));
        answer_free(again);
        if (i == 1)
            world_restart(w);
    }
    assert_int_equal(atomic_load(&w->m->created), 0); // of the manager after the restart
    answer_free(first);
}

static void test_mismatch_and_scope_of_keys(void **state)
{
    struct world *w = *state;
    struct ask a = keyed("/v1/sandboxes", "k", CREATE);
    struct answer *first = ask(w, &a), *r;
    answer_is(first, 201, NULL, NULL);
    a.body = "{\"image\":\"debian\",\"lifecycle\":{\"ttl_seconds\":61,\"on_expiry\":\"destroy\"}}";
    r = ask(w, &a);
    answer_is(r, 409, "conflict", "idempotency_mismatch");
    answer_free(r);
    // Another tenant, another path: another key.
    a = keyed("/v1/sandboxes", "k", CREATE);
    a.token = w->other;
    r = ask(w, &a);
    answer_is(r, 201, NULL, NULL);
    assert_null(answer_header(r, "Idempotent-Replayed"));
    assert_string_not_equal(answer_text(r, "id"), answer_text(first, "id"));
    answer_free(r);
    a = keyed(path_of("/v1/sandboxes/%s/stop", answer_text(first, "id")), "k", NULL);
    r = ask(w, &a);
    answer_is(r, 200, NULL, NULL);
    answer_free(r);
    answer_free(first);
}

static void test_two_at_once(void **state)
{
    struct world *w = *state;
    const struct ask a = keyed("/v1/sandboxes", "both", CREATE);
    atomic_store(&w->m->hold, true);
    struct driven *calls[5];
    for (int i = 0; i < 5; i++)
        calls[i] = drive(w, &a);
    wait_held(w, 1);
    drive_leave(calls[4]); // one does not wait for the answer
    for (int i = 0; i < 4; i++)
        assert_null(api_response(calls[i]->call));
    atomic_store(&w->m->hold, false);
    char id[ID_MAX] = "";
    int replays = 0;
    for (int i = 0; i < 4; i++) {
        struct answer *r = drive_finish(calls[i]);
        answer_is(r, 201, NULL, NULL);
        if (!*id)
            memcpy(id, answer_text(r, "id"), ID_MAX);
        assert_string_equal(answer_text(r, "id"), id);
        replays += answer_header(r, "Idempotent-Replayed") != NULL;
        answer_free(r);
    }
    assert_true(replays >= 3);
    assert_int_equal(atomic_load(&w->m->created), 1);
}

// The client of the first goes away: the work goes on and the second gets its answer.
static void test_first_client_leaves(void **state)
{
    struct world *w = *state;
    const struct ask a = keyed("/v1/sandboxes", "gone", CREATE);
    atomic_store(&w->m->hold, true);
    struct driven *first = drive(w, &a);
    wait_held(w, 1);
    drive_leave(first);
    struct driven *second = drive(w, &a);
    atomic_store(&w->m->hold, false);
    struct answer *r = drive_finish(second);
    answer_is(r, 201, NULL, NULL);
    assert_replayed(r);
    answer_free(r);
    assert_int_equal(atomic_load(&w->m->created), 1);
}

static void test_refusals_are_kept(void **state)
{
    struct world *w = *state;
    char id[ID_MAX];
    make_sandbox(w, NULL, id);
    static const struct {
        const char *key, *body;
        int status;
        const char *kind, *code;
    } CASES[] = {
        {"v", "{\"image\":\"debian\"}", 422, "validation", NULL},
        {"j", "{\"image\":", 422, "validation", "malformed_json"},
        {"e", "{\"image\":\"debian\",\"env\":{\"LD_PRELOAD\":\"x\"},\"lifecycle\":{\"ttl_seconds\":6,\"on_expiry\":\"stop\"}}", 403,
         "policy_denied", "env_denied"},
        {"i", "{\"image\":\"missing\",\"lifecycle\":{\"ttl_seconds\":6,\"on_expiry\":\"stop\"}}", 422, "admission_failed",
         "image_not_found"},
    };
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        const struct ask a = keyed("/v1/sandboxes", CASES[i].key, CASES[i].body);
        struct answer *first = ask(w, &a), *again = ask(w, &a);
        answer_is(first, CASES[i].status, CASES[i].kind, CASES[i].code);
        answer_is(again, CASES[i].status, CASES[i].kind, CASES[i].code);
        assert_replayed(again);
        assert_non_null(answer_text(first, "audit_id"));
        assert_string_equal(answer_text(first, "audit_id"), answer_text(again, "audit_id"));
        assert_string_equal(answer_text(again, "request_id"), answer_header(again, "X-Request-Id"));
        answer_free(first);
        answer_free(again);
        struct ask other = a;
        other.body = CREATE;
        struct answer *r = ask(w, &other);
        answer_is(r, 409, "conflict", "idempotency_mismatch");
        answer_free(r);
    }
    // A 404 under a key says no ids, the first time and again.
    const struct ask a = keyed("/v1/sandboxes/sbx01k30x4rwm8e7q2v9hbnjt0001/stop", "n", NULL);
    for (int i = 0; i < 2; i++) {
        struct answer *r = ask(w, &a);
        answer_is(r, 404, "not_found", NULL);
        assert_null(answer_text(r, "audit_id"));
        assert_null(answer_header(r, "Airlock-Receipt-Id"));
        answer_free(r);
    }
}

static void test_failures_are_not_kept(void **state)
{
    struct world *w = *state;
    char id[ID_MAX];
    make_sandbox(w, NULL, id);
    static const enum err_kind KINDS[] = {ERR_INTERNAL, ERR_TIMEOUT, ERR_UNAVAILABLE, ERR_TRANSPORT_FAILED};
    for (size_t i = 0; i < sizeof KINDS / sizeof *KINDS; i++) {
        const struct ask a = keyed(path_of("/v1/sandboxes/%s/stop", id), path_of("f%zu", i), NULL);
        err_set(&w->m->fail_next, KINDS[i], "once", "once");
        struct answer *r = ask(w, &a);
        assert_true(r->status >= 500);
        answer_free(r);
        r = ask(w, &a);
        answer_is(r, 200, NULL, NULL);
        assert_null(answer_header(r, "Idempotent-Replayed"));
        answer_free(r);
    }
}

static void test_admitted_failure_is_kept(void **state)
{
    struct world *w = *state;
    char id[ID_MAX];
    make_sandbox(w, NULL, id);
    const struct ask a = keyed(path_of("/v1/sandboxes/%s/stop", id), "c", NULL);
    err_set(&w->m->fail_next, ERR_CONFLICT, "deleted", "deleted while it ran");
    struct answer *first = ask(w, &a), *again = ask(w, &a);
    answer_is(first, 409, "conflict", "deleted");
    answer_is(again, 409, "conflict", "deleted");
    assert_replayed(again);
    assert_string_equal(answer_text(first, "job_id"), answer_text(again, "job_id"));
    answer_free(first);
    answer_free(again);
}

static void test_async(void **state)
{
    struct world *w = *state;
    struct ask a = keyed("/v1/sandboxes", "async", CREATE);
    a.headers[2] = "Prefer";
    a.headers[3] = "handling=strict, respond-async; wait=1";
    atomic_store(&w->m->hold, true);
    struct answer *first = ask(w, &a); // answers while the work is held
    answer_is(first, 202, NULL, NULL);
    assert_string_equal(answer_header(first, "Preference-Applied"), "respond-async");
    assert_string_equal(answer_text(first, "state"), "running");
    struct answer *again = ask(w, &a); // and so does a replay, before the work has ended
    answer_is(again, 202, NULL, NULL);
    assert_replayed(again);
    assert_string_equal(answer_text(again, "id"), answer_text(first, "id"));
    answer_free(again);
    atomic_store(&w->m->hold, false);
    const char *job = path_of("%s", answer_header(first, "Location"));
    for (int i = 0; i < 1000; i++) {
        struct answer *r = get(w, job, NULL);
        const bool done = strcmp(answer_text(r, "state"), "succeeded") == 0;
        if (done)
            assert_non_null(json_get_str(json_object_get(r->json, "result"), "href"));
        answer_free(r);
        if (done)
            break;
        nanosleep(&(struct timespec){0, 2000000}, NULL);
    }
    again = ask(w, &a);
    answer_is(again, 202, NULL, NULL);
    assert_string_equal(answer_text(again, "state"), "succeeded");
    answer_free(again);
    answer_free(first);
}

static void test_commands(void **state)
{
    struct world *w = *state;
    char id[ID_MAX];
    make_sandbox(w, NULL, id);
    const char *path = path_of("/v1/sandboxes/%s/commands", id);
    char kept[256];
    strcpy(kept, path);
    struct ask a = keyed(kept, "run", "{\"argv\":[\"echo\",\"hi\"]}");
    struct answer *first = ask(w, &a), *again = ask(w, &a);
    answer_is(again, 200, NULL, NULL);
    assert_replayed(again);
    assert_string_equal(answer_text(first, "command_id"), answer_text(again, "command_id"));
    assert_string_equal(answer_text(again, "stdout"), "hi");
    answer_free(first);
    answer_free(again);
    // As a stream, from the spool.
    a.headers[2] = "Accept";
    a.headers[3] = "text/event-stream";
    again = ask(w, &a);
    assert_true(again->stream);
    assert_non_null(strstr(again->body, "event: stdout\nid: 2\ndata: {\"stream\":\"stdout\",\"offset\":0,\"encoding\":\"utf8\",\"data\":\"hi\"}"));
    answer_free(again);
    // check: the problem with the result.
    a = keyed(kept, "check", "{\"argv\":[\"exit\",\"3\"],\"check\":true}");
    for (int i = 0; i < 2; i++) {
        struct answer *r = ask(w, &a);
        answer_is(r, 422, "guest_command_failed", "check_failed");
        assert_int_equal(json_get_int(json_object_get(r->json, "result"), "exit_code", -1), 3);
        answer_free(r);
    }
    // background: the command, also while it runs.
    a = keyed(kept, "bg", "{\"argv\":[\"hold\"],\"background\":true}");
    first = ask(w, &a);
    answer_is(first, 202, NULL, NULL);
    again = ask(w, &a);
    answer_is(again, 202, NULL, NULL);
    assert_replayed(again);
    assert_string_equal(answer_text(first, "command_id"), answer_text(again, "command_id"));
    answer_free(again);
    fake_exit(w->m, answer_text(first, "command_id"), 0);
    again = ask(w, &a);
    answer_is(again, 202, NULL, NULL);
    answer_free(again);
    answer_free(first);
}

static void test_token_secret(void **state)
{
    struct world *w = *state;
    const struct ask a = keyed("/v1/tokens", "t", "{\"name\":\"ci\",\"scopes\":[\"sandbox:read\"]}");
    struct answer *first = ask(w, &a), *again = ask(w, &a);
    answer_is(first, 201, NULL, NULL);
    answer_is(again, 201, NULL, NULL);
    assert_int_equal(strlen(answer_text(first, "token")), TOKEN_TEXT_LEN);
    assert_true(json_is_null(json_object_get(again->json, "token")));
    assert_string_equal(answer_text(first, "id"), answer_text(again, "id"));
    assert_replayed(again);
    answer_free(first);
    answer_free(again);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_replay, setup, teardown),
        cmocka_unit_test_setup_teardown(test_mismatch_and_scope_of_keys, setup, teardown),
        cmocka_unit_test_setup_teardown(test_two_at_once, setup, teardown),
        cmocka_unit_test_setup_teardown(test_first_client_leaves, setup, teardown),
        cmocka_unit_test_setup_teardown(test_refusals_are_kept, setup, teardown),
        cmocka_unit_test_setup_teardown(test_failures_are_not_kept, setup, teardown),
        cmocka_unit_test_setup_teardown(test_admitted_failure_is_kept, setup, teardown),
        cmocka_unit_test_setup_teardown(test_async, setup, teardown),
        cmocka_unit_test_setup_teardown(test_commands, setup, teardown),
        cmocka_unit_test_setup_teardown(test_token_secret, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
