// Files: both ways, ranges, HEAD, paths in every disguise, users, directories.
#include "harness.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "api/range.h"

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

static void files_of(struct world *w, char out[128])
{
    char id[ID_MAX];
    make_sandbox(w, NULL, id);
    snprintf(out, 128, "/v1/sandboxes/%s/files", id);
}

static void test_both_ways(void **state)
{
    struct world *w = *state;
    char files[128];
    files_of(w, files);
    char *data = malloc(300000);
    for (int i = 0; i < 300000; i++)
        data[i] = (char)('A' + i % 50);
    for (int window = 0; window < 2; window++)
        for (int chunked = 0; chunked < 2; chunked++) {
            w->m->window = window ? 5000 : 0;
            struct answer *r = ask(w, &(struct ask){.method = "PUT", .path = files, .query = "path=%2Fwork%2Fa%20b+c&mode=0600",
                                                    .body = data, .body_len = 300000, .piece = 32768, .chunked = chunked,
                                                    .headers = {"Content-Type", "text/plain"}});
            answer_is(r, !window && !chunked ? 201 : 200, NULL, NULL);
            assert_string_equal(answer_text(r, "path"), "/work/a b c");
            assert_int_equal(json_get_int(r->json, "bytes", 0), 300000);
            assert_string_equal(answer_text(r, "receipt_id"), answer_header(r, "Airlock-Receipt-Id"));
            answer_free(r);
        }
    struct answer *r = get(w, files, "path=/work/a+b%20c");
    answer_is(r, 200, NULL, NULL);
    assert_int_equal(r->stream_len, 300000);
    assert_memory_equal(r->body, data, 300000);
    assert_string_equal(answer_header(r, "Content-Type"), "application/octet-stream");
    assert_string_equal(answer_header(r, "X-Content-Type-Options"), "nosniff");
    assert_string_equal(answer_header(r, "Content-Disposition"), "attachment");
    assert_string_equal(answer_header(r, "Accept-Ranges"), "bytes");
    char receipt[ID_MAX];
    snprintf(receipt, sizeof receipt, "%s", answer_header(r, "Airlock-Receipt-Id"));
    answer_free(r);
    r = get(w, path_of("/v1/receipts/%s", receipt), NULL);
    answer_is(r, 200, NULL, NULL);
    answer_free(r);
    // Refused when the client does not want to replace, accepted without a body.
    r = ask(w, &(struct ask){.method = "PUT", .path = files, .query = "path=/work/a+b+c", .headers = {"If-None-Match", "*"}});
    answer_is(r, 412, "precondition_failed", "exists");
    answer_free(r);
    r = ask(w, &(struct ask){.method = "PUT", .path = files, .query = "path=/work/empty"});
    answer_is(r, 201, NULL, NULL);
    assert_int_equal(json_get_int(r->json, "bytes", -1), 0);
    answer_free(r);
    free(data);
}

// The client goes away in the middle: the old file stays, the receipt says so, nothing leaks.
static void test_cut_upload(void **state)
{
    struct world *w = *state;
    char files[128];
    files_of(w, files);
    fake_file_put(w->m, "/work/x", "old", 3);
    struct driven *d = drive_begin(w, &(struct ask){.method = "PUT", .path = files, .query = "path=/work/x", .body = "new"});
    assert_int_equal(api_body_push(d->call, "ne", 2), 2);
    drive_leave(d);
    struct answer *r = get(w, files, "path=/work/x");
    assert_string_equal(r->body, "old");
    answer_free(r);
    // And before the token was even looked up.
    char token[TOKEN_TEXT_LEN + 1];
    world_token(w, "default", 255, 0, token, NULL);
    d = drive_begin(w, &(struct ask){.method = "PUT", .path = files, .query = "path=/work/x", .body = "new", .token = token});
    drive_leave(d);
}

static void test_ranges(void **state)
{
    struct world *w = *state;
    char files[128];
    files_of(w, files);
    fake_file_put(w->m, "/work/x", "0123456789", 10);
    static const struct {
        const char *range;
        int status;
        const char *body, *content_range;
    } CASES[] = {
        {"bytes=0-3", 206, "0123", "bytes 0-3/10"},   {"bytes=4-", 206, "456789", "bytes 4-9/10"},
        {"bytes=-3", 206, "789", "bytes 7-9/10"},     {"bytes=-30", 206, "0123456789", "bytes 0-9/10"},
        {"bytes=9-100", 206, "9", "bytes 9-9/10"},    {"bytes=10-", 416, NULL, "bytes */10"},
        {"bytes=-0", 416, NULL, "bytes */10"},        {"bytes=5-4", 416, NULL, "bytes */10"},
        {"bytes=0-1,3-4", 416, NULL, "bytes */10"},   {"bytes=99999999999999999999-", 416, NULL, "bytes */10"},
        {"bytes=--1", 416, NULL, "bytes */10"},
    };
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        struct answer *r = ask(w, &(struct ask){.method = "GET", .path = files, .query = "path=/work/x",
                                                .headers = {"Range", CASES[i].range}});
        if (r->status != CASES[i].status)
            fail_msg("%s: %d", CASES[i].range, r->status);
        assert_string_equal(answer_header(r, "Content-Range"), CASES[i].content_range);
        assert_non_null(answer_header(r, "Airlock-Receipt-Id"));
        if (CASES[i].body)
            assert_string_equal(r->body, CASES[i].body);
        else
            answer_is(r, 416, "validation", "range_not_satisfiable");
        answer_free(r);
    }
    struct answer *r = ask(w, &(struct ask){.method = "GET", .path = files, .query = "path=/work/x",
                                            .headers = {"Range", "lines=1-2"}});
    answer_is(r, 422, "validation", NULL);
    assert_true(answer_faults(r, "/header/Range"));
    answer_free(r);
    uint64_t offset, length;
    assert_int_equal(range_parse("bytes=0-0", 0, &offset, &length), RANGE_NONE);
    assert_int_equal(range_parse("bytes=-1", 0, &offset, &length), RANGE_NONE);
    assert_int_equal(range_parse("items=0-0", 5, &offset, &length), RANGE_WHOLE);
    assert_int_equal(range_parse("bytes=18446744073709551615-", 5, &offset, &length), RANGE_NONE);
}

static void test_head_and_missing(void **state)
{
    struct world *w = *state;
    char files[128];
    files_of(w, files);
    fake_file_put(w->m, "/work/x", "0123456789", 10);
    fake_file_put(w->m, "/proc/version", "Linux", 5);
    struct answer *r = ask(w, &(struct ask){.method = "HEAD", .path = files, .query = "path=/work/x"});
    answer_is(r, 200, NULL, NULL);
    assert_true(r->head);
    assert_int_equal(r->len, 10);
    assert_non_null(answer_header(r, "Airlock-Audit-Id"));
    assert_null(answer_header(r, "Airlock-Receipt-Id"));
    answer_free(r);
    r = ask(w, &(struct ask){.method = "HEAD", .path = files, .query = "path=/work/none"});
    answer_is(r, 404, "not_found", "path_not_found");
    assert_true(r->head);
    answer_free(r);
    r = get(w, files, "path=/proc/version"); // says 0, has content
    answer_is(r, 200, NULL, NULL);
    assert_int_equal(r->stream_len, -1);
    assert_string_equal(r->body, "Linux");
    answer_free(r);
    for (int ranged = 0; ranged < 2; ranged++) {
        r = ask(w, &(struct ask){.method = "GET", .path = files, .query = "path=/work/none",
                                 .headers = {ranged ? "Range" : NULL, "bytes=0-1"}});
        answer_is(r, 404, "not_found", "path_not_found");
        assert_string_equal(answer_text(r, "boundary"), "guest");
        assert_non_null(answer_text(r, "audit_id"));
        assert_non_null(answer_text(r, "sandbox_id"));
        assert_non_null(answer_header(r, "Airlock-Receipt-Id"));
        answer_free(r);
    }
}

static void test_paths(void **state)
{
    struct world *w = *state;
    char files[128], longest[4300];
    files_of(w, files);
    snprintf(longest, sizeof longest, "path=/%04096d", 0);
    const char *const BAD[] = {"path=", "path", "path=work/x", "path=/work/../etc/passwd", "path=/work/%2e%2e/x", "path=/work/.",
                               "path=/work/x/", "path=//work/x", "path=/work/x%00", "path=/work/x%00/y", "path=/work/%ff",
                               "path=/work/%2e%2E%2f", longest, "path=%2e%2e/x", "path=/work/x%2F"};
    static const struct {
        const char *method, *rest;
    } WHERE[] = {{"GET", ""}, {"HEAD", ""}, {"PUT", ""}, {"DELETE", ""}, {"GET", "/stat"}};
    for (size_t i = 0; i < sizeof BAD / sizeof *BAD; i++)
        for (size_t k = 0; k < sizeof WHERE / sizeof *WHERE; k++) {
            struct answer *r = ask(w, &(struct ask){.method = WHERE[k].method, .query = BAD[i],
                                                    .path = path_of("%s%s", files, WHERE[k].rest)});
            answer_is(r, 422, "validation", "path_invalid");
            assert_true(answer_faults(r, "/query/path"));
            answer_free(r);
        }
    struct answer *r = get(w, files, NULL);
    answer_is(r, 422, "validation", NULL);
    assert_true(answer_faults(r, "/query/path"));
    answer_free(r);
    r = post(w, path_of("%s/move", files), "{\"from\":\"/work/a/../b\",\"to\":\"rel\",\"overwrite\":1}");
    answer_is(r, 422, "validation", "path_invalid");
    assert_true(answer_faults(r, "/from") && answer_faults(r, "/to") && answer_faults(r, "/overwrite"));
    answer_free(r);
    char commands[128];
    snprintf(commands, sizeof commands, "%.*s/commands", (int)(strlen(files) - 6), files);
    r = post(w, path_of("%.*scommands", (int)strlen(files) - 5, files), "{\"argv\":[\"\"],\"cwd\":\"work\",\"shell\":\"x\"}");
    answer_is(r, 422, "validation", "path_invalid");
    assert_true(answer_faults(r, "/cwd"));
    answer_free(r);
}

static void test_users(void **state)
{
    struct world *w = *state;
    char files[128], token[TOKEN_TEXT_LEN + 1];
    files_of(w, files);
    fake_file_put(w->m, "/work/x", "1", 1);
    world_token(w, "default", 255u & ~(unsigned)SCOPE_COMMAND_ROOT, 0, token, NULL);
    static const struct {
        const char *user;
        int status;
    } CASES[] = {{"root", 403}, {"sandbox", 200}, {"nobody", 403}};
    for (size_t i = 0; i < 3; i++) {
        struct answer *r = ask(w, &(struct ask){.method = "GET", .path = files, .token = token,
                                                .query = path_of("path=/work/x&user=%s", CASES[i].user)});
        answer_is(r, CASES[i].status, NULL, NULL);
        answer_free(r);
        r = ask(w, &(struct ask){.method = "POST", .path = path_of("%.*scommands", (int)strlen(files) - 5, files), .token = token,
                                 .body = path_of("{\"argv\":[\"echo\"],\"user\":\"%s\"}", CASES[i].user)});
        answer_is(r, CASES[i].status, NULL, NULL);
        if (r->status == 403) {
            assert_string_equal(answer_text(r, "code"), "scope_missing");
            assert_non_null(answer_text(r, "audit_id"));
        }
        answer_free(r);
    }
    struct answer *r = get(w, files, "path=/work/x&user=root");
    answer_is(r, 200, NULL, NULL);
    answer_free(r);
}

static void test_calls(void **state)
{
    struct world *w = *state;
    char files[128], dirs[128];
    files_of(w, files);
    snprintf(dirs, sizeof dirs, "%.*sdirs", (int)strlen(files) - 5, files);
    fake_file_put(w->m, "/work/x", "12345", 5);
    struct answer *r = get(w, path_of("%s/stat", files), "path=/work/x");
    answer_is(r, 200, NULL, NULL);
    assert_string_equal(answer_text(r, "mode"), "0644");
    assert_string_equal(answer_text(r, "owner"), "sandbox");
    assert_string_equal(answer_text(r, "modified_at"), "2023-11-14T22:13:20.123Z");
    answer_free(r);
    r = get(w, dirs, "path=/work&depth=2");
    answer_is(r, 200, NULL, NULL);
    const json_t *entries = json_object_get(r->json, "entries");
    assert_int_equal(json_array_size(entries), 2);
    assert_string_equal(json_get_str(json_array_get(entries, 0), "name"), "a");
    assert_string_equal(json_get_str(json_array_get(entries, 1), "name"), "b\xef\xbf\xbd");
    answer_free(r);
    r = get(w, dirs, "path=/work&depth=33");
    answer_is(r, 422, "validation", NULL);
    answer_free(r);
    const struct ask make = {.method = "POST", .path = dirs, .body = "{\"path\":\"/work/d\",\"mode\":\"0700\"}",
                             .headers = {"Idempotency-Key", "d"}};
    for (int i = 0; i < 2; i++) {
        r = ask(w, &make);
        answer_is(r, 201, NULL, NULL);
        answer_free(r);
    }
    const struct ask move = {.method = "POST", .path = path_of("%s/move", files),
                             .body = "{\"from\":\"/work/x\",\"to\":\"/work/y\"}", .headers = {"Idempotency-Key", "m"}};
    for (int i = 0; i < 2; i++) {
        r = ask(w, &move);
        answer_is(r, 200, NULL, NULL);
        assert_string_equal(answer_text(r, "to"), "/work/y");
        answer_free(r);
    }
    r = ask(w, &(struct ask){.method = "DELETE", .path = files, .query = "path=/work/x&recursive=true"});
    answer_is(r, 200, NULL, NULL);
    answer_free(r);
    r = ask(w, &(struct ask){.method = "DELETE", .path = files, .query = "path=/etc/x"});
    answer_is(r, 403, "policy_denied", "path_outside_roots");
    assert_non_null(answer_text(r, "audit_id"));
    answer_free(r);
    // Not while it does not run.
    r = ask(w, &(struct ask){.method = "POST", .path = path_of("%.*sstop", (int)strlen(files) - 5, files)});
    answer_free(r);
    static const char *const METHODS[] = {"GET", "PUT", "DELETE"};
    for (size_t i = 0; i < 3; i++) {
        r = ask(w, &(struct ask){.method = METHODS[i], .path = files, .query = "path=/work/x", .body = i == 1 ? "data" : NULL});
        answer_is(r, 409, "conflict", "sandbox_not_running");
        answer_free(r);
    }
}

static void test_archives(void **state)
{
    struct world *w = *state;
    char files[128], archive[128];
    files_of(w, files);
    snprintf(archive, sizeof archive, "%.*sarchive", (int)strlen(files) - 5, files);
    struct answer *r = ask(w, &(struct ask){.method = "PUT", .path = archive, .query = "path=/work", .body = "tar", .chunked = true});
    answer_is(r, 200, NULL, NULL);
    answer_free(r);
    r = get(w, archive, "path=/work");
    answer_is(r, 200, NULL, NULL);
    assert_string_equal(answer_header(r, "Content-Type"), "application/x-tar");
    assert_int_equal(r->stream_len, -1);
    assert_string_equal(r->body, "tar");
    answer_free(r);
}

// A stream of a revoked token is cut, not ended: the client must see that something is missing.
static void test_revoked_download(void **state)
{
    struct world *w = *state;
    char files[128], token[TOKEN_TEXT_LEN + 1], id[ID_MAX];
    files_of(w, files);
    world_token(w, "default", 255, 0, token, id);
    fake_file_put(w->m, "/work/x", "0123456789", 10);
    struct driven *d = drive(w, &(struct ask){.method = "GET", .path = files, .query = "path=/work/x", .token = token});
    drive_response(d);
    struct answer *r = ask(w, &(struct ask){.method = "DELETE", .path = path_of("/v1/tokens/%s", id)});
    answer_free(r);
    r = drive_finish(d);
    assert_int_equal(r->end, -2);
    answer_free(r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_both_ways, setup, teardown),
        cmocka_unit_test_setup_teardown(test_cut_upload, setup, teardown),
        cmocka_unit_test_setup_teardown(test_ranges, setup, teardown),
        cmocka_unit_test_setup_teardown(test_head_and_missing, setup, teardown),
        cmocka_unit_test_setup_teardown(test_paths, setup, teardown),
        cmocka_unit_test_setup_teardown(test_users, setup, teardown),
        cmocka_unit_test_setup_teardown(test_calls, setup, teardown),
        cmocka_unit_test_setup_teardown(test_archives, setup, teardown),
        cmocka_unit_test_setup_teardown(test_revoked_download, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
