// Streams: framing, code points, resume, followers of logs and events, tokens that end, waiting, output by offset.
#include "harness.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "api/output.h"
#include "base/clock.h"
#include "base/enc.h"

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

static void commands_path(struct world *w, char out[128], char id[ID_MAX])
{
    make_sandbox(w, NULL, id);
    snprintf(out, 128, "/v1/sandboxes/%s/commands", id);
}

static void begin_held(struct world *w, const char *path, char id[ID_MAX])
{
    struct answer *r = post(w, path, "{\"argv\":[\"hold\"],\"background\":true}");
    answer_is(r, 202, NULL, NULL);
    snprintf(id, ID_MAX, "%s", answer_text(r, "command_id"));
    answer_free(r);
}

// Concatenates what the events of one stream carry; checks that utf8 chunks are UTF-8 and offsets are gapless.
static void collect(const char *text, const char *stream, struct buf *out, int64_t *ret_last_id)
{
    char head[32];
    snprintf(head, sizeof head, "event: %s\n", stream);
    for (const char *p = strstr(text, head); p; p = strstr(p + 1, head)) {
        *ret_last_id = strtoll(strstr(p, "id: ") + 4, NULL, 10);
        const char *data = strstr(p, "data: ") + 6;
        json_t *j = json_loadb(data, strcspn(data, "\n"), 0, NULL);
        assert_non_null(j);
        assert_int_equal(json_get_int(j, "offset", -1), out->len);
        assert_string_equal(json_get_str(j, "stream"), stream);
        const json_t *d = json_object_get(j, "data");
        if (strcmp(json_get_str(j, "encoding"), "utf8") == 0) {
            buf_add(out, json_string_value(d), json_string_length(d));
        } else {
            uint8_t raw[8192];
            const ssize_t n = enc_unbase64(json_string_value(d), json_string_length(d), raw, sizeof raw);
            assert_true(n >= 0);
            assert_false(enc_utf8_valid(raw, (size_t)n));
            buf_add(out, raw, (size_t)n);
        }
        json_decref(j);
    }
}

static void test_live_command(void **state)
{
    struct world *w = *state;
    char path[128], id[ID_MAX];
    int end;
    commands_path(w, path, id);
    struct driven *d = drive(w, &(struct ask){.method = "POST", .path = path, .body = "{\"argv\":[\"hold\"]}",
                                              .headers = {"Accept", "text/event-stream"}});
    assert_true(drive_response(d)->stream);
    char *text = drive_read(d, "\n\n", &end);
    assert_int_equal(strncmp(text, "event: started\nid: 0\ndata: {\"command_id\":\"cmd", 45), 0);
    char command[ID_MAX];
    memcpy(command, strstr(text, "cmd"), ID_LEN);
    command[ID_LEN] = 0;
    free(text);
    fake_output(w->m, command, SPOOL_STDOUT, "one", 3);
    text = drive_read(d, "\n\n", &end);
    assert_string_equal(text, "event: stdout\nid: 3\ndata: {\"stream\":\"stdout\",\"offset\":0,\"encoding\":\"utf8\",\"data\":\"one\"}\n\n");
    free(text);
    fake_output(w->m, command, SPOOL_STDERR, "a\0b\n", 4);
    text = drive_read(d, "\n\n", &end);
    assert_string_equal(
        text, "event: stderr\nid: 7\ndata: {\"stream\":\"stderr\",\"offset\":0,\"encoding\":\"utf8\",\"data\":\"a\\u0000b\\n\"}\n\n");
    free(text);
    fake_exit(w->m, command, 4);
    struct answer *r = drive_finish(d);
    assert_int_equal(r->end, -1);
    assert_non_null(strstr(r->body, "event: exit\nid: 7\n"));
    assert_non_null(strstr(r->body, "\"exit_code\":4"));
    answer_free(r);
}

// Every way to cut two streams with many-byte code points into pieces, resumed at every event.
static void test_code_points_and_resume(void **state)
{
    struct world *w = *state;
    char path[128], id[ID_MAX], command[ID_MAX];
    commands_path(w, path, id);
    static const char OUT[] = "a\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80z\xff\xc3(\xf0\x9f";
    static const char ERR[] = "\xe2\x82\xac\xe2\x82\xac\xe2\x82\xac!";
    for (size_t step = 1; step <= 4; step++) {
        begin_held(w, path, command);
        for (size_t i = 0; i < sizeof OUT; i += step) {
            const size_t n = sizeof OUT - 1 - i < step ? sizeof OUT - 1 - i : step;
            if (n > 0 && i < sizeof OUT - 1)
                fake_output(w->m, command, SPOOL_STDOUT, OUT + i, n);
            if (i < sizeof ERR - 1)
                fake_output(w->m, command, SPOOL_STDERR, ERR + i, sizeof ERR - 1 - i < step ? sizeof ERR - 1 - i : step);
        }
        fake_exit(w->m, command, 0);
        char output[256];
        snprintf(output, sizeof output, "%s/%s/output", path, command);
        struct answer *whole = get(w, output, "follow=true");
        struct buf out = BUF_INIT(1000), err = BUF_INIT(1000);
        int64_t last = 0;
        collect(whole->body, "stdout", &out, &last);
        collect(whole->body, "stderr", &err, &last);
        assert_int_equal(out.len, sizeof OUT - 1);
        assert_memory_equal(out.data, OUT, out.len);
        assert_int_equal(err.len, sizeof ERR - 1);
        assert_memory_equal(err.data, ERR, err.len);
        // The euro signs of stderr are never split, whatever came between their bytes.
        assert_null(strstr(strstr(whole->body, "event: stderr"), "\"stream\":\"stderr\",\"encoding\":\"base64\""));
        last = (int64_t)(sizeof OUT - 1 + sizeof ERR - 1);
        // What follows each event is exactly what a resumed stream says.
        for (const char *p = strstr(whole->body, "\n\n"); p && p[2]; p = strstr(p + 2, "\n\n")) {
            const char *event = p;
            while (event > whole->body && strncmp(event, "event: ", 7) != 0)
                event--;
            const char *at = strstr(event, "id: ") + 4, *rest = p + 2;
            char from[24];
            snprintf(from, sizeof from, "%lld", strtoll(at, NULL, 10));
            struct answer *again = ask(w, &(struct ask){.method = "GET", .path = output, .query = "follow=true",
                                                        .headers = {"Last-Event-ID", from}});
            // What stands at the very end (a code point that was never completed, the exit) may be told again.
            const size_t more = strlen(again->body), less = strlen(rest);
            assert_true(more >= less || strtoll(from, NULL, 10) == last);
            if (strcmp(from, "0") != 0 && strtoll(from, NULL, 10) != last)
                assert_string_equal(again->body, rest);
            else if (more >= less)
                assert_string_equal(again->body + more - less, rest);
            answer_free(again);
        }
        buf_free(&out);
        buf_free(&err);
        answer_free(whole);
    }
}

static void test_follow_refusals(void **state)
{
    struct world *w = *state;
    char path[128], id[ID_MAX], command[ID_MAX];
    commands_path(w, path, id);
    begin_held(w, path, command);
    fake_output(w->m, command, SPOOL_STDOUT, "12345", 5);
    const char *output = path_of("%s/%s/output", path, command);
    struct answer *r = get(w, output, "follow=true&offset=1&limit=2");
    answer_is(r, 422, "validation", NULL);
    assert_true(answer_faults(r, "/query/offset"));
    assert_true(answer_faults(r, "/query/limit"));
    answer_free(r);
    r = ask(w, &(struct ask){.method = "GET", .path = output, .query = "follow=true", .headers = {"Last-Event-ID", "6"}});
    answer_is(r, 422, "validation", NULL);
    assert_true(answer_faults(r, "/header/Last-Event-ID"));
    answer_free(r);
    fake_exit(w->m, command, 0);
}

static void test_output_by_offset(void **state)
{
    struct world *w = *state;
    char path[128], id[ID_MAX], command[ID_MAX];
    commands_path(w, path, id);
    begin_held(w, path, command);
    fake_output(w->m, command, SPOOL_STDOUT, "0123456789", 10);
    const char *output = path_of("%s/%s/output", path, command);
    static const struct {
        const char *query, *body, *next, *complete;
    } CASES[] = {
        {NULL, "0123456789", "10", "false"},
        {"offset=3&limit=4", "3456", "7", "false"},
        {"offset=10", "", "10", "false"},
        {"stream=stderr", "", "0", "false"},
    };
    for (size_t i = 0; i < 4; i++) {
        struct answer *r = get(w, output, CASES[i].query);
        answer_is(r, 200, NULL, NULL);
        assert_string_equal(r->body, CASES[i].body);
        assert_string_equal(answer_header(r, "Airlock-Next-Offset"), CASES[i].next);
        assert_string_equal(answer_header(r, "Airlock-Complete"), CASES[i].complete);
        assert_string_equal(answer_header(r, "X-Content-Type-Options"), "nosniff");
        assert_string_equal(answer_header(r, "Content-Type"), "application/octet-stream");
        answer_free(r);
    }
    struct answer *r = get(w, output, "offset=11");
    answer_is(r, 416, "validation", "range_not_satisfiable");
    answer_free(r);
    fake_exit(w->m, command, 0);
    r = get(w, output, "offset=3&limit=4");
    assert_string_equal(answer_header(r, "Airlock-Complete"), "false");
    answer_free(r);
    r = get(w, output, "offset=3");
    assert_string_equal(answer_header(r, "Airlock-Complete"), "true");
    answer_free(r);
}

static void test_truncated_answer(void **state)
{
    struct world *w = *state;
    char path[128], id[ID_MAX];
    commands_path(w, path, id);
    static const struct {
        const char *body, *text, *encoding;
        bool truncated;
    } CASES[] = {
        {"{\"argv\":[\"echo\",\"ab\\u00e9\"],\"max_output_bytes\":4}", "ab\xc3\xa9", "utf8", false},
        {"{\"argv\":[\"echo\",\"ab\\u00e9\"],\"max_output_bytes\":3}", "ab", "utf8", true},
        {"{\"argv\":[\"echo\",\"ab\\u00e9\"],\"max_output_bytes\":0}", "", "utf8", true},
    };
    for (size_t i = 0; i < 3; i++) {
        struct answer *r = post(w, path, CASES[i].body);
        answer_is(r, 200, NULL, NULL);
        assert_string_equal(answer_text(r, "stdout"), CASES[i].text);
        assert_string_equal(answer_text(r, "stdout_encoding"), CASES[i].encoding);
        assert_int_equal(json_is_true(json_object_get(r->json, "stdout_truncated")), CASES[i].truncated);
        assert_int_equal(json_get_int(r->json, "stdout_bytes", -1), 4);
        answer_free(r);
    }
}

static void test_slow_reader(void **state)
{
    struct world *w = *state;
    char path[128], id[ID_MAX], command[ID_MAX];
    int end;
    commands_path(w, path, id);
    begin_held(w, path, command);
    char *big = malloc(1 << 20);
    for (int i = 0; i < 1 << 20; i++)
        big[i] = (char)('a' + i % 26);
    for (int i = 0; i < 4; i++)
        fake_output(w->m, command, SPOOL_STDOUT, big, 1 << 20);
    struct driven *d = drive(w, &(struct ask){.method = "GET", .path = path_of("%s/%s/output", path, command),
                                              .query = "follow=true"});
    drive_response(d);
    free(drive_read(d, "event: stdout", &end)); // then it reads no more for a while, and may leave
    nanosleep(&(struct timespec){0, 50000000}, NULL);
    drive_leave(d);
    fake_exit(w->m, command, 0);
    struct answer *r = get(w, path_of("%s/%s/output", path, command), "follow=true");
    struct buf out = BUF_INIT(8u << 20);
    int64_t last = 0;
    collect(r->body, "stdout", &out, &last);
    assert_int_equal(out.len, 4 << 20);
    assert_int_equal(last, 4 << 20);
    buf_free(&out);
    answer_free(r);
    free(big);
}

static void test_logs(void **state)
{
    struct world *w = *state;
    char id[ID_MAX];
    int end;
    make_sandbox(w, NULL, id);
    const char *path = path_of("/v1/sandboxes/%s/logs", id);
    fake_log(w->m, id, LOGSRC_CONSOLE, "boot");
    fake_log(w->m, id, LOGSRC_AGENT, "hello");
    struct answer *r = get(w, path, NULL);
    answer_is(r, 200, NULL, NULL);
    assert_int_equal(json_get_int(r->json, "last_seq", -1), 2);
    answer_free(r);
    r = get(w, path, "source=agent");
    assert_int_equal(json_array_size(json_object_get(r->json, "items")), 1);
    answer_free(r);
    r = get(w, path, "after_seq=2");
    assert_int_equal(json_get_int(r->json, "last_seq", -1), 2);
    answer_free(r);
    r = get(w, path, "follow=true&limit=4");
    answer_is(r, 422, "validation", NULL);
    answer_free(r);
    struct driven *d = drive(w, &(struct ask){.method = "GET", .path = path, .query = "follow=true&after_seq=1"});
    assert_true(drive_response(d)->stream);
    char *text = drive_read(d, "\n\n", &end);
    assert_int_equal(strncmp(text, "event: log\nid: 2\ndata: {\"seq\":2,", 31), 0);
    free(text);
    fake_log(w->m, id, LOGSRC_VMM, "later");
    text = drive_read(d, "\n\n", &end);
    assert_non_null(strstr(text, "\"text\":\"later\""));
    free(text);
    r = ask(w, &(struct ask){.method = "DELETE", .path = path_of("/v1/sandboxes/%s", id)});
    answer_is(r, 200, NULL, NULL);
    answer_free(r);
    fake_log(w->m, id, LOGSRC_VMM, "last words");
    r = drive_finish(d); // ends by itself once the sandbox is gone and all was said
    assert_non_null(strstr(r->body, "last words"));
    assert_int_equal(r->end, -1);
    answer_free(r);
}

static void test_events(void **state)
{
    struct world *w = *state;
    char id[ID_MAX], foreign[ID_MAX];
    int end;
    make_sandbox(w, NULL, id);
    make_sandbox(w, w->other, foreign);
    struct answer *r = ask(w, &(struct ask){.method = "GET", .path = "/v1/events", .headers = {"Accept", "application/json"}});
    answer_is(r, 200, NULL, NULL);
    assert_true(json_array_size(json_object_get(r->json, "items")) > 0);
    assert_null(strstr(r->body, foreign));
    const int64_t last = json_get_int(r->json, "last_seq", 0);
    answer_free(r);
    struct driven *now = drive(w, &(struct ask){.method = "GET", .path = "/v1/events"});
    struct driven *all = drive(w, &(struct ask){.method = "GET", .path = "/v1/events", .query = "after_seq=0"});
    struct driven *some = drive(w, &(struct ask){.method = "GET", .path = "/v1/events",
                                                 .headers = {"Last-Event-ID", path_of("%lld", (long long)last)}});
    drive_response(now);
    drive_response(all);
    drive_response(some);
    fake_event(w->m, "other", "sandbox.state", foreign);
    fake_event(w->m, "default", "sandbox.state", id);
    char *text = drive_read(now, "\n\n", &end);
    assert_int_equal(strncmp(text, "event: sandbox.state\nid: ", 25), 0);
    assert_true(strtoll(text + 25, NULL, 10) > last);
    assert_null(strstr(text, foreign));
    free(text);
    text = drive_read(some, "\n\n", &end);
    assert_true(strtoll(text + 25, NULL, 10) > last);
    free(text);
    text = drive_read(all, "\n\n", &end);
    assert_true(strtoll(text + 25, NULL, 10) <= last);
    free(text);
    drive_leave(now);
    drive_leave(all);
    drive_leave(some);
}

static void test_revocation_ends_streams(void **state)
{
    struct world *w = *state;
    char token[TOKEN_TEXT_LEN + 1], id[ID_MAX];
    world_token(w, "default", 255, 0, token, id);
    struct driven *d = drive(w, &(struct ask){.method = "GET", .path = "/v1/events", .token = token});
    struct driven *other = drive(w, &(struct ask){.method = "GET", .path = "/v1/events"});
    drive_response(d);
    drive_response(other);
    for (int i = 0; i < 2; i++) {
        struct answer *r = ask(w, &(struct ask){.method = "DELETE", .path = path_of("/v1/tokens/%s", id)});
        answer_is(r, 200, NULL, NULL);
        assert_non_null(answer_text(r, "revoked_at"));
        answer_free(r);
    }
    struct answer *r = drive_finish(d);
    assert_int_equal(r->end, -1);
    answer_free(r);
    r = ask(w, &(struct ask){.method = "GET", .path = "/v1/jobs", .token = token});
    answer_is(r, 401, "unauthorized", NULL);
    answer_free(r);
    int end = 0;
    fake_event(w->m, "default", "sandbox.state", NULL);
    free(drive_read(other, "\n\n", &end)); // goes on
    assert_int_equal(end, 0);
    drive_leave(other);
}

static void test_expiry_ends_streams(void **state)
{
    struct world *w = *state;
    char token[TOKEN_TEXT_LEN + 1];
    const int64_t t = clock_mono_ms();
    world_token(w, "default", 255, clock_wall_ms() + 700, token, NULL);
    struct driven *d = drive(w, &(struct ask){.method = "GET", .path = "/v1/events", .token = token});
    struct answer *r = drive_finish(d);
    assert_int_equal(r->end, -1);
    assert_true(clock_mono_ms() - t < 5000);
    answer_free(r);
    r = ask(w, &(struct ask){.method = "GET", .path = "/v1/jobs", .token = token});
    answer_is(r, 401, "unauthorized", NULL);
    answer_free(r);
}

static void test_stop_ends_streams(void **state)
{
    struct world *w = *state;
    struct driven *d = drive(w, &(struct ask){.method = "GET", .path = "/v1/events"});
    drive_response(d);
    api_stop(w->api);
    struct answer *r = drive_finish(d);
    assert_int_equal(r->end, -1);
    answer_free(r);
}

static void test_waiting(void **state)
{
    struct world *w = *state;
    char path[128], id[ID_MAX], command[ID_MAX];
    commands_path(w, path, id);
    struct answer *r = get(w, path_of("/v1/sandboxes/%s/wait", id), "state=running");
    answer_is(r, 200, NULL, NULL);
    answer_free(r);
    const int64_t t = clock_mono_ms();
    r = get(w, path_of("/v1/sandboxes/%s/wait", id), "state=stopped&timeout_seconds=0.2");
    answer_is(r, 200, NULL, NULL);
    assert_string_equal(answer_text(r, "state"), "running");
    assert_true(clock_mono_ms() - t >= 190);
    answer_free(r);
    struct driven *d = drive(w, &(struct ask){.method = "GET", .path = path_of("/v1/sandboxes/%s/wait", id),
                                              .query = "state=stopped&timeout_seconds=30"});
    struct driven *leaving = drive(w, &(struct ask){.method = "GET", .path = path_of("/v1/sandboxes/%s/wait", id),
                                                    .query = "state=stopped&timeout_seconds=30"});
    assert_null(api_response(d->call));
    drive_leave(leaving);
    begin_held(w, path, command);
    struct driven *c = drive(w, &(struct ask){.method = "GET", .path = path_of("%s/%s/wait", path, command)});
    assert_null(api_response(c->call));
    r = get(w, path_of("%s/%s/wait", path, command), "timeout_seconds=0");
    assert_string_equal(answer_text(r, "state"), "running");
    answer_free(r);
    fake_exit(w->m, command, 0);
    r = drive_finish(c);
    assert_string_equal(answer_text(r, "state"), "finished");
    answer_free(r);
    r = ask(w, &(struct ask){.method = "POST", .path = path_of("/v1/sandboxes/%s/stop", id)});
    answer_free(r);
    r = drive_finish(d);
    assert_string_equal(answer_text(r, "state"), "stopped");
    answer_free(r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_live_command, setup, teardown),
        cmocka_unit_test_setup_teardown(test_code_points_and_resume, setup, teardown),
        cmocka_unit_test_setup_teardown(test_follow_refusals, setup, teardown),
        cmocka_unit_test_setup_teardown(test_output_by_offset, setup, teardown),
        cmocka_unit_test_setup_teardown(test_truncated_answer, setup, teardown),
        cmocka_unit_test_setup_teardown(test_slow_reader, setup, teardown),
        cmocka_unit_test_setup_teardown(test_logs, setup, teardown),
        cmocka_unit_test_setup_teardown(test_events, setup, teardown),
        cmocka_unit_test_setup_teardown(test_revocation_ends_streams, setup, teardown),
        cmocka_unit_test_setup_teardown(test_expiry_ends_streams, setup, teardown),
        cmocka_unit_test_setup_teardown(test_stop_ends_streams, setup, teardown),
        cmocka_unit_test_setup_teardown(test_waiting, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
