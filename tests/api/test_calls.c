// Routing, problems, validation, scopes, the same 404, HEAD, OPTIONS and what else is decided before a handler runs.
#include "harness.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "api/principal.h"
#include "api/problem.h"

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

static void test_create_and_run(void **state)
{
    struct world *w = *state;
    char id[ID_MAX];
    make_sandbox(w, NULL, id);
    struct answer *r = get(w, path_of("/v1/sandboxes/%s", id), NULL);
    answer_is(r, 200, NULL, NULL);
    assert_string_equal(answer_text(r, "state"), "running");
    assert_non_null(answer_header(r, "ETag"));
    answer_free(r);
    r = post(w, path_of("/v1/sandboxes/%s/commands", id), "{\"argv\":[\"echo\",\"h\\u00e9llo\"]}");
    answer_is(r, 200, NULL, NULL);
    assert_string_equal(answer_text(r, "stdout"), "h\xc3\xa9llo");
    assert_string_equal(answer_text(r, "stdout_encoding"), "utf8");
    assert_string_equal(answer_text(r, "audit_id"), answer_header(r, "Airlock-Audit-Id"));
    answer_free(r);
}

static void test_routing(void **state)
{
    struct world *w = *state;
    char id[ID_MAX];
    make_sandbox(w, NULL, id);
    static const struct {
        const char *method, *path;
        int status;
        const char *allow;
    } CASES[] = {
        {"GET", "/nowhere", 404, NULL},
        {"GET", "/v1/sandboxes/", 404, NULL},
        {"GET", "/v1//sandboxes", 404, NULL},
        {"GET", "/v1/sandbox%65s", 404, NULL},
        {"GET", "", 404, NULL},
        {"GET", "/", 404, NULL},
        {"GET", "/healthz/", 404, NULL},
        {"PUT", "/v1/sandboxes", 405, "GET, POST"},
        {"OPTIONS", "/v1/sandboxes", 405, "GET, POST"},
        {"BREW", "/healthz", 405, "GET"},
        {"HEAD", "/healthz", 405, "GET"},
        {"get", "/healthz", 405, "GET"},
        {"DELETE", "/v1/sandboxes", 405, "GET, POST"},
        {"GET", "/v1/plans", 404, NULL},
        {"GET", "/healthz", 200, NULL},
    };
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        struct answer *r = ask(w, &(struct ask){.method = CASES[i].method, .path = CASES[i].path, .token = ""});
        if (r->status != CASES[i].status)
            fail_msg("%s %s: %d", CASES[i].method, CASES[i].path, r->status);
        if (CASES[i].allow)
            assert_string_equal(answer_header(r, "Allow"), CASES[i].allow);
        if (r->status == 404)
            answer_is(r, 404, "not_found", NULL);
        if (r->status == 405)
            answer_is(r, 405, "method_not_allowed", NULL);
        answer_free(r);
    }
}

static void test_authentication(void **state)
{
    struct world *w = *state;
    char expired[TOKEN_TEXT_LEN + 1];
    world_token(w, "default", 255, clock_wall_ms() - 1000, expired, NULL);
    const char *const BAD[] = {"", "alk_short", "alk_0123456789012345678901234567890123456789", expired,
                               "xyz_0123456789012345678901234567890123456789"};
    for (size_t i = 0; i < sizeof BAD / sizeof *BAD; i++) {
        struct answer *r = ask(w, &(struct ask){.method = "GET", .path = "/v1/sandboxes", .token = BAD[i]});
        answer_is(r, 401, "unauthorized", NULL);
        assert_string_equal(answer_header(r, "WWW-Authenticate"), "Bearer realm=\"airlock\"");
        answer_free(r);
    }
    // Before validation: a bad request without a token is still a 401.
    struct answer *r = ask(w, &(struct ask){.method = "GET", .path = "/v1/sandboxes", .query = "nonsense=1", .token = ""});
    answer_is(r, 401, "unauthorized", NULL);
    answer_free(r);
}

static void test_every_scope(void **state)
{
    struct world *w = *state;
    w->loose = true;
    for (size_t i = 0; i < spec_count(w->api->spec); i++) {
        const struct operation *op = spec_at(w->api->spec, i);
        char path[256] = "", token[TOKEN_TEXT_LEN + 1];
        for (const char *p = op->path; *p;) {
            if (*p == '{') {
                strcat(path, "x");
                p = strchr(p, '}') + 1;
            } else {
                strncat(path, p++, 1);
            }
        }
        if (!op->scope) {
            struct answer *r = ask(w, &(struct ask){.method = op->method, .path = path, .token = ""});
            assert_int_equal(r->status, 200);
            answer_free(r);
            continue;
        }
        world_token(w, "default", 255u & ~op->scope, 0, token, NULL);
        struct answer *r = ask(w, &(struct ask){.method = op->method, .path = path, .token = token});
        answer_is(r, 403, "policy_denied", "scope_missing");
        assert_non_null(answer_text(r, "audit_id"));
        assert_null(answer_text(r, "sandbox_id"));
        answer_free(r);
    }
}

static void test_all_faults_at_once(void **state)
{
    struct world *w = *state;
    struct answer *r = ask(w, &(struct ask){.method = "POST", .path = "/v1/sandboxes",
                                            .headers = {"X-Request-Id", "bad id", "Idempotency-Key", ""},
                                            .query = "verbose=1",
                                            .body = "{\"image\":7,\"plan_id\":\"x\",\"nope\":1,\"a/b~c\":2,"
                                                    "\"labels\":{\"a=b\":\"x\",\"k\":5},"
                                                    "\"resources\":{\"vcpus\":9,\"memory_mib\":1.5},"
                                                    "\"lifecycle\":{\"ttl_seconds\":0,\"on_expiry\":\"explode\"}}"});
    answer_is(r, 422, "validation", NULL);
    static const char *const POINTERS[] = {"/header/X-Request-Id", "/header/Idempotency-Key", "/query/verbose", "/image", "",
                                           "/nope", "/a~1b~0c", "/labels/a=b", "/labels/k", "/resources/vcpus",
                                           "/resources/memory_mib", "/lifecycle/ttl_seconds", "/lifecycle/on_expiry"};
    for (size_t i = 0; i < sizeof POINTERS / sizeof *POINTERS; i++)
        if (!answer_faults(r, POINTERS[i]))
            fail_msg("no fault at %s in %s", POINTERS[i], r->body);
    answer_free(r);
    r = post(w, "/v1/sandboxes", "{}");
    answer_is(r, 422, "validation", NULL);
    assert_true(answer_faults(r, "/lifecycle"));
    assert_true(answer_faults(r, ""));
    answer_free(r);
    r = post(w, "/v1/sandboxes", "{\"image\":\"debian\",\"lifecycle\":{}}");
    assert_true(answer_faults(r, "/lifecycle/ttl_seconds"));
    assert_true(answer_faults(r, "/lifecycle/on_expiry"));
    answer_free(r);
}

static void test_more_faults_than_fit(void **state)
{
    struct world *w = *state;
    struct buf b = BUF_INIT(1 << 20);
    buf_adds(&b, "{\"image\":\"debian\",\"lifecycle\":{\"ttl_seconds\":1,\"on_expiry\":\"stop\"}");
    for (int i = 0; i < 200; i++)
        buf_addf(&b, ",\"x%d\":1", i);
    buf_adds(&b, "}");
    struct answer *r = post(w, "/v1/sandboxes", buf_text(&b));
    answer_is(r, 422, "validation", NULL);
    assert_int_equal(json_array_size(json_object_get(r->json, "errors")), FAULTS_MAX);
    answer_free(r);
    buf_free(&b);
}

static void test_bodies(void **state)
{
    struct world *w = *state;
    static const struct {
        const char *body, *type;
        int status;
        const char *kind, *code;
    } CASES[] = {
        {"{\"image\":", "application/json", 422, "validation", "malformed_json"},
        {"{\"a\":1,\"a\":2}", "application/json", 422, "validation", "malformed_json"},
        {"{\"a\":\"\xff\"}", "application/json", 422, "validation", "malformed_json"},
        {"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]", "application/json", 422, "validation",
         "malformed_json"},
        {"[]", "application/json", 422, "validation", NULL},
        {"null", "application/json", 422, "validation", NULL},
        {"{}", "text/plain", 415, "unsupported_media_type", NULL},
        {"{}", "application/json; charset=latin1", 415, "unsupported_media_type", NULL},
        {"{}", "application/json; charset=utf-8", 422, "validation", NULL},
        {"{}", "application/jsonx", 415, "unsupported_media_type", NULL},
    };
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        struct answer *r = ask(w, &(struct ask){.method = "POST", .path = "/v1/sandboxes", .body = CASES[i].body,
                                                .headers = {"Content-Type", CASES[i].type}});
        answer_is(r, CASES[i].status, CASES[i].kind, CASES[i].code);
        if (i < 3)
            assert_true(json_get_int(json_array_get(json_object_get(r->json, "errors"), 0), "line", 0) >= 1);
        answer_free(r);
    }
    struct answer *r = post(w, "/v1/sandboxes", "{\"env\":{\"KEY\":\"hunter2\" oops}}");
    answer_is(r, 422, "validation", "malformed_json");
    assert_null(strstr(r->body, "hunter2"));
    answer_free(r);
    r = ask(w, &(struct ask){.method = "POST", .path = "/v1/sandboxes"});
    answer_is(r, 422, "validation", NULL);
    assert_true(answer_faults(r, ""));
    answer_free(r);
    r = ask(w, &(struct ask){.method = "GET", .path = "/v1/jobs", .body = "{}"});
    answer_is(r, 422, "validation", NULL);
    answer_free(r);
}

static void test_too_large(void **state)
{
    struct world *w = *state;
    const size_t len = LIMIT_BODY_JSON_BYTES + 10;
    char *big = malloc(len);
    memset(big, ' ', len);
    for (int chunked = 0; chunked < 2; chunked++) {
        struct answer *r = ask(w, &(struct ask){.method = "POST", .path = "/v1/sandboxes", .body = big, .body_len = len,
                                                .piece = 100000, .chunked = chunked});
        answer_is(r, 413, "too_large", NULL);
        answer_free(r);
    }
    free(big);
}

static void test_unbuilt(void **state)
{
    struct world *w = *state;
    static const struct {
        const char *body, *pointer;
    } CASES[] = {
        {"{\"plan_id\":\"pln0\",\"lifecycle\":{\"ttl_seconds\":1,\"on_expiry\":\"stop\"}}", "/plan_id"},
        {"{\"image\":\"debian\",\"lifecycle\":{\"ttl_seconds\":1,\"on_expiry\":\"stop\"},"
         "\"network\":{\"egress\":[{\"host\":\"a\",\"port\":1}]}}",
         "/network/egress"},
        {"{\"image\":\"debian\",\"lifecycle\":{\"ttl_seconds\":1,\"on_expiry\":\"stop\"},"
         "\"secrets\":{\"A\":{\"ref\":\"r\",\"hosts\":[\"h\"]}}}",
         "/secrets"},
    };
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        struct answer *r = post(w, "/v1/sandboxes", CASES[i].body);
        answer_is(r, 501, "unsupported_capability", CASES[i].pointer);
        answer_free(r);
    }
    struct answer *r = post(w, "/v1/sandboxes",
                            "{\"image\":\"debian\",\"lifecycle\":{\"ttl_seconds\":1,\"on_expiry\":\"stop\"},\"network\":null,"
                            "\"secrets\":{}}");
    answer_is(r, 201, NULL, NULL);
    answer_free(r);
}

// Equal byte for byte but the request id, through the same path.
static void test_same_404(void **state)
{
    struct world *w = *state;
    char foreign[ID_MAX], mine[ID_MAX], command[ID_MAX];
    make_sandbox(w, w->other, foreign);
    make_sandbox(w, NULL, mine);
    id_new(ID_COMMAND, command);
    const char *const IDS[] = {foreign, "sbx01k30x4rwm8e7q2v9hbnjt0001", "sbx", "nonsense", "SBX01K30X4RWM8E7Q2V9HBNJT0001",
                               "sbx01k30x4rwm8e7q2v9hbnjt00011111111111111111111111111111111111111", "%2e%2e", "sbx\xff"};
    static const struct {
        const char *method, *rest, *body, *query;
    } CASES[] = {
        {"GET", "", NULL, NULL},
        {"DELETE", "", NULL, NULL},
        {"PATCH", "", "{\"ttl_seconds\":5}", NULL},
        {"POST", "/stop", NULL, NULL},
        {"POST", "/detach", NULL, NULL},
        {"GET", "/wait", NULL, NULL},
        {"GET", "/logs", NULL, NULL},
        {"GET", "/logs", NULL, "follow=true"},
        {"GET", "/commands", NULL, NULL},
        {"POST", "/commands", "{\"argv\":[\"true\"]}", NULL},
        {"GET", "/commands/cmd01k30x4rwm8e7q2v9hbnjt0001", NULL, NULL},
        {"GET", "/commands/cmd01k30x4rwm8e7q2v9hbnjt0001/output", NULL, NULL},
        {"GET", "/commands/cmd01k30x4rwm8e7q2v9hbnjt0001/output", NULL, "follow=true"},
        {"GET", "/files", NULL, "path=/work/x"},
        {"HEAD", "/files", NULL, "path=/work/x"},
        {"PUT", "/files", "x", "path=/work/x"},
        {"GET", "/files/stat", NULL, "path=/work/x"},
        {"GET", "/dirs", NULL, "path=/work"},
    };
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        char *first = NULL;
        for (size_t k = 0; k < sizeof IDS / sizeof *IDS; k++) {
            struct answer *r = ask(w, &(struct ask){.method = CASES[i].method, .path = path_of("/v1/sandboxes/%s%s", IDS[k], CASES[i].rest),
                                                    .query = CASES[i].query, .body = CASES[i].body,
                                                    .headers = {"X-Request-Id", "same"}});
            answer_is(r, 404, "not_found", NULL);
            assert_null(answer_header(r, "Airlock-Audit-Id"));
            assert_null(answer_header(r, "Airlock-Receipt-Id"));
            assert_null(answer_text(r, "sandbox_id"));
            assert_null(answer_text(r, "audit_id"));
            if (first)
                assert_string_equal(r->body, first);
            else
                first = strdup(r->body);
            answer_free(r);
        }
        free(first);
    }
    // The same for what lies below a sandbox of one's own.
    char *first = NULL;
    const char *const COMMANDS[] = {command, "cmd", "x"};
    for (size_t k = 0; k < 3; k++) {
        struct answer *r = ask(w, &(struct ask){.method = "GET", .headers = {"X-Request-Id", "same"},
                                                .path = path_of("/v1/sandboxes/%s/commands/%s", mine, COMMANDS[k])});
        answer_is(r, 404, "not_found", NULL);
        if (first)
            assert_string_equal(r->body, first);
        else
            first = strdup(r->body);
        answer_free(r);
    }
    free(first);
}

static void test_request_ids(void **state)
{
    struct world *w = *state;
    struct answer *r = ask(w, &(struct ask){.method = "GET", .path = "/healthz", .headers = {"X-Request-Id", "a.B-9_"}});
    assert_string_equal(answer_header(r, "X-Request-Id"), "a.B-9_");
    answer_free(r);
    r = get(w, "/healthz", NULL);
    char *made = strdup(answer_header(r, "X-Request-Id"));
    assert_true(strlen(made) > 8);
    answer_free(r);
    r = get(w, "/healthz", NULL);
    assert_string_not_equal(answer_header(r, "X-Request-Id"), made);
    free(made);
    answer_free(r);
    char longest[130];
    memset(longest, 'a', 129);
    longest[128] = 0;
    r = ask(w, &(struct ask){.method = "GET", .path = "/healthz", .headers = {"X-Request-Id", longest}});
    assert_int_equal(r->status, 200);
    assert_string_equal(answer_header(r, "X-Request-Id"), longest);
    answer_free(r);
    longest[128] = 'a';
    longest[129] = 0;
    r = ask(w, &(struct ask){.method = "GET", .path = "/healthz", .headers = {"X-Request-Id", longest}});
    answer_is(r, 422, "validation", NULL);
    assert_true(answer_faults(r, "/header/X-Request-Id"));
    answer_free(r);
}

static void test_queries(void **state)
{
    struct world *w = *state;
    static const struct {
        const char *query, *pointer;
    } CASES[] = {
        {"limit=0", "/query/limit"},        {"limit=501", "/query/limit"},     {"limit=5x", "/query/limit"},
        {"limit=", "/query/limit"},         {"limit", "/query/limit"},         {"limit=5&limit=5", "/query/limit"},
        {"limit=1.0", "/query/limit"},      {"limit=%35%zz", "/query/limit"},  {"nope=1", "/query/nope"},
        {"Limit=1", "/query/Limit"},        {"state=sleeping", "/query/state"}, {"label=novalue", "/query/label"},
        {"cursor=zzz", "/query/cursor"},    {"=1", "/query/"},                 {"a%00b=1", "/query/a?b"},
        {"state=running%00", "/query/state"}, {"label=a%3d%ff", "/query/label"}, {"%6cimit=0", "/query/limit"},
        {"limit=99999999999999999999", "/query/limit"},
    };
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        struct answer *r = get(w, "/v1/sandboxes", CASES[i].query);
        answer_is(r, 422, "validation", NULL);
        if (!answer_faults(r, CASES[i].pointer))
            fail_msg("%s: %s", CASES[i].query, r->body);
        answer_free(r);
    }
    struct answer *r = get(w, "/v1/sandboxes", "limit=500&&state=running&label=a%20b%2B=c+d%26");
    answer_is(r, 200, NULL, NULL);
    answer_free(r);
}

// Asked for in memory or by way of the database, first with the token unknown, then known: one answer.
static void test_fast_and_slow_path(void **state)
{
    struct world *w = *state;
    char id[ID_MAX], fresh[TOKEN_TEXT_LEN + 1];
    make_sandbox(w, NULL, id);
    char *first = NULL;
    world_token(w, "default", 255, 0, fresh, NULL);
    for (int i = 0; i < 4; i++) {
        if (i == 2)
            world_restart(w); // the sandbox is no longer in memory, nor is the token
        struct answer *r = ask(w, &(struct ask){.method = "GET", .path = path_of("/v1/sandboxes/%s", id), .token = fresh});
        answer_is(r, 200, NULL, NULL);
        if (first)
            assert_string_equal(r->body, first);
        else
            first = strdup(r->body);
        answer_free(r);
    }
    free(first);
}

static void test_problem_kinds(void **state)
{
    struct world *w = *state;
    char id[ID_MAX];
    make_sandbox(w, NULL, id);
    w->loose = true;
    for (int kind = ERR_POLICY_DENIED; kind <= ERR_INTERNAL; kind++) {
        if (kind == ERR_NOT_FOUND)
            continue;
        err_set(&w->m->fail_next, (enum err_kind)kind, "some_code", "a detail");
        struct answer *r = ask(w, &(struct ask){.method = "POST", .path = path_of("/v1/sandboxes/%s/stop", id)});
        assert_int_equal(r->status, problem_status((enum err_kind)kind));
        assert_string_equal(answer_text(r, "kind"), err_kind_name((enum err_kind)kind));
        assert_string_equal(answer_text(r, "code"), "some_code");
        assert_string_equal(answer_text(r, "operation"), "sandbox.stop");
        assert_string_equal(answer_text(r, "sandbox_id"), id);
        assert_string_equal(answer_text(r, "audit_id"), answer_header(r, "Airlock-Audit-Id"));
        assert_non_null(answer_text(r, "job_id"));
        assert_string_equal(answer_header(r, "Content-Type"), "application/problem+json");
        if (r->status == 429)
            assert_non_null(answer_header(r, "Retry-After"));
        answer_free(r);
    }
}

static void test_spec_equality(void **state)
{
    struct world *w = *state;
    struct err err = {0};
    json_t *doc = json_loads(w->spec, 0, NULL);
    json_t *paths = json_object_get(doc, "paths");
    json_t *health = json_incref(json_object_get(paths, "/healthz"));
    struct api_options o = {.manager = w->m, .store = w->store, .server_version = "1"};
    char *text;
    // A handler without an operation.
    json_object_del(paths, "/healthz");
    text = json_dumps(doc, 0);
    o.spec_json = text;
    o.spec_len = strlen(text);
    assert_null(api_new(&o, &err));
    assert_string_equal(err.code, "spec");
    free(text);
    // An operation without a handler.
    json_object_set(paths, "/healthz", health);
    json_t *copy = json_deep_copy(health);
    json_object_set_new(json_object_get(copy, "get"), "x-airlock-operation", json_string("other.thing"));
    json_object_set_new(paths, "/other", copy);
    text = json_dumps(doc, 0);
    o.spec_json = text;
    o.spec_len = strlen(text);
    assert_null(api_new(&o, &err));
    assert_string_equal(err.code, "spec");
    free(text);
    // A keyword that the validator does not know.
    json_object_del(paths, "/other");
    json_t *create = json_object_get(json_object_get(json_object_get(doc, "components"), "schemas"), "SandboxCreate");
    json_object_set_new(create, "dependentRequired", json_object());
    text = json_dumps(doc, 0);
    o.spec_json = text;
    o.spec_len = strlen(text);
    assert_null(api_new(&o, &err));
    assert_string_equal(err.code, "spec");
    free(text);
    json_decref(health);
    json_decref(doc);
}

static void test_stopping(void **state)
{
    struct world *w = *state;
    api_stop(w->api);
    struct answer *r = get(w, "/v1/sandboxes", NULL);
    answer_is(r, 503, "unavailable", "stopping");
    answer_free(r);
}

static void test_meta(void **state)
{
    struct world *w = *state;
    static const char *const PATHS[] = {"/v1/capabilities", "/v1/security-model", "/v1/images", "/readyz", "/v1/keys",
                                        "/v1/audit", "/v1/receipts", "/v1/tokens", "/v1/jobs", "/v1/audit/checkpoint"};
    char id[ID_MAX];
    make_sandbox(w, NULL, id);
    for (size_t i = 0; i < sizeof PATHS / sizeof *PATHS; i++) {
        struct answer *r = get(w, PATHS[i], NULL);
        if (r->status != 200)
            fail_msg("%s: %s", PATHS[i], r->body);
        answer_free(r);
    }
    struct answer *r = get(w, "/metrics", NULL);
    answer_is(r, 200, NULL, NULL);
    assert_non_null(strstr(r->body, "airlock_requests_total{operation=\"sandbox.create\",status=\"201\"} 1\n"));
    assert_non_null(strstr(r->body, "airlock_sandboxes{state=\"running\"} 2\n"));
    answer_free(r);
    w->m->not_ready = true;
    r = get(w, "/readyz", NULL);
    answer_is(r, 503, "unavailable", "not_ready");
    assert_non_null(strstr(answer_text(r, "detail"), "3 sandboxes not yet adopted"));
    answer_free(r);
    r = get(w, "/openapi.json", NULL);
    assert_string_equal(r->body, w->spec);
    answer_free(r);
    r = get(w, "/docs", NULL);
    assert_string_equal(answer_header(r, "Content-Type"), "text/html; charset=utf-8");
    answer_free(r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_create_and_run, setup, teardown),
        cmocka_unit_test_setup_teardown(test_routing, setup, teardown),
        cmocka_unit_test_setup_teardown(test_authentication, setup, teardown),
        cmocka_unit_test_setup_teardown(test_every_scope, setup, teardown),
        cmocka_unit_test_setup_teardown(test_all_faults_at_once, setup, teardown),
        cmocka_unit_test_setup_teardown(test_more_faults_than_fit, setup, teardown),
        cmocka_unit_test_setup_teardown(test_bodies, setup, teardown),
        cmocka_unit_test_setup_teardown(test_too_large, setup, teardown),
        cmocka_unit_test_setup_teardown(test_unbuilt, setup, teardown),
        cmocka_unit_test_setup_teardown(test_same_404, setup, teardown),
        cmocka_unit_test_setup_teardown(test_request_ids, setup, teardown),
        cmocka_unit_test_setup_teardown(test_queries, setup, teardown),
        cmocka_unit_test_setup_teardown(test_fast_and_slow_path, setup, teardown),
        cmocka_unit_test_setup_teardown(test_problem_kinds, setup, teardown),
        cmocka_unit_test_setup_teardown(test_spec_equality, setup, teardown),
        cmocka_unit_test_setup_teardown(test_stopping, setup, teardown),
        cmocka_unit_test_setup_teardown(test_meta, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
