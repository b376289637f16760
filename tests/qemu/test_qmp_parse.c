// QMP's reading half: whole objects come out whatever the cuts, what is no object is skipped, a line has an end.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/json.h"
#include "base/limits.h"
#include "qemu/qmp_parse.h"

#define GREETING "{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 22, \"minor\": 2, \"major\": 7}}, \"capabilities\": [\"oob\"]}}\r\n"
#define RETURN "{\"return\": {\"status\": \"running\", \"running\": true}, \"id\": 7}\r\n"
#define ERROR "{\"id\": 8, \"error\": {\"class\": \"CommandNotFound\", \"desc\": \"The command x has not been found\"}}\r\n"
#define EVENT "{\"timestamp\": {\"seconds\": 1, \"microseconds\": 2}, \"event\": \"SHUTDOWN\", \"data\": {\"guest\": true, " \
              "\"reason\": \"guest-shutdown\"}}\r\n"
#define OTHER "{\"hello\": 1}\r\n"

static void feed(struct qmp_parser *p, const char *text)
{
    assert_int_equal(qmp_parser_feed(p, text, strlen(text)), 0);
}

// The kind of the next object; -1: none. Its text, where asked for.
static int next(struct qmp_parser *p, json_t **ret, unsigned *skipped)
{
    enum qmp_kind kind = QMP_OTHER;
    json_t *o = qmp_parser_next(p, &kind, skipped);
    if (ret)
        *ret = o;
    else
        json_decref(o);
    return o ? (int)kind : -1;
}

static void each_kind_is_known(void **state)
{
    struct qmp_parser p;
    json_t *o;
    qmp_parser_init(&p);
    feed(&p, GREETING RETURN ERROR EVENT OTHER);
    assert_int_equal(next(&p, &o, NULL), QMP_GREETING);
    assert_int_equal(json_get_int(json_object_get(json_object_get(json_object_get(o, "QMP"), "version"), "qemu"), "major", 0), 7);
    json_decref(o);
    assert_int_equal(next(&p, &o, NULL), QMP_RETURN);
    assert_int_equal(json_get_int(o, "id", 0), 7);
    assert_string_equal(json_get_str(json_object_get(o, "return"), "status"), "running");
    json_decref(o);
    assert_int_equal(next(&p, &o, NULL), QMP_ERROR);
    assert_int_equal(json_get_int(o, "id", 0), 8);
    assert_string_equal(json_get_str(json_object_get(o, "error"), "class"), "CommandNotFound");
    json_decref(o);
    assert_int_equal(next(&p, &o, NULL), QMP_EVENT);
    assert_string_equal(json_get_str(o, "event"), "SHUTDOWN");
    json_decref(o);
    assert_int_equal(next(&p, NULL, NULL), QMP_OTHER);
    assert_int_equal(next(&p, NULL, NULL), -1);
    qmp_parser_free(&p);
}

static void an_empty_return_is_one(void **state)
{
    struct qmp_parser p;
    qmp_parser_init(&p);
    feed(&p, "{\"return\": {}}\n{\"return\": null, \"id\": 1}\n");
    assert_int_equal(next(&p, NULL, NULL), QMP_RETURN);
    assert_int_equal(next(&p, NULL, NULL), QMP_RETURN);
    qmp_parser_free(&p);
}

static void any_cut_gives_the_same_objects(void **state)
{
    static const char TEXT[] = GREETING "\r\n" RETURN "garbage\n" EVENT ERROR OTHER RETURN;
    static const int WANT[] = {QMP_GREETING, QMP_RETURN, QMP_EVENT, QMP_ERROR, QMP_OTHER, QMP_RETURN};
    for (size_t step = 1; step < sizeof TEXT + 1; step++) {
        struct qmp_parser p;
        unsigned skipped = 0;
        size_t n = 0;
        qmp_parser_init(&p);
        for (size_t at = 0; at < sizeof TEXT - 1; at += step) {
            const size_t left = sizeof TEXT - 1 - at;
            assert_int_equal(qmp_parser_feed(&p, TEXT + at, step < left ? step : left), 0);
            for (int kind; (kind = next(&p, NULL, &skipped)) >= 0; n++) {
                assert_true(n < sizeof WANT / sizeof *WANT);
                assert_int_equal(kind, WANT[n]);
            }
        }
        assert_int_equal(n, sizeof WANT / sizeof *WANT);
        assert_int_equal(skipped, 2);
        qmp_parser_free(&p);
    }
}

static void what_is_no_object_is_skipped_and_counted(void **state)
{
    static const char *const LINES[] = {"\n", "\r\n", "garbage\n", "[1, 2]\n", "\"return\"\n", "7\n", "null\n", "{\"return\": 1\n",
                                        "{\"return\": 1}}\n", "{\"a\": 1, \"a\": 2}\n", "{\"a\": \"\\u0000\"}\n",
                                        "{\"a\": \"\xff\"}\n", "qemu-system-x86_64: terminating on signal 15\n"};
    for (size_t i = 0; i < sizeof LINES / sizeof *LINES; i++) {
        struct qmp_parser p;
        unsigned skipped = 0;
        qmp_parser_init(&p);
        feed(&p, LINES[i]);
        assert_int_equal(next(&p, NULL, &skipped), -1);
        assert_int_equal(skipped, 1);
        feed(&p, RETURN); // and the next line is as good as ever
        assert_int_equal(next(&p, NULL, &skipped), QMP_RETURN);
        assert_int_equal(skipped, 1);
        qmp_parser_free(&p);
    }
}

static void nul_bytes_and_deep_nesting_are_skipped(void **state)
{
    struct qmp_parser p;
    unsigned skipped = 0;
    char deep[LIMIT_JSON_DEPTH * 6 + 64] = "";
    qmp_parser_init(&p);
    assert_int_equal(qmp_parser_feed(&p, "{\"return\"\0: 1}\n", 15), 0);
    assert_int_equal(next(&p, NULL, &skipped), -1);
    assert_int_equal(skipped, 1);
    for (int depth = LIMIT_JSON_DEPTH; depth <= LIMIT_JSON_DEPTH + 1; depth++) {
        deep[0] = 0;
        for (int i = 0; i < depth; i++)
            strcat(deep, i + 1 < depth ? "{\"a\":" : "{\"a\":1");
        for (int i = 0; i < depth; i++)
            strcat(deep, "}");
        strcat(deep, "\n");
        feed(&p, deep);
        assert_int_equal(next(&p, NULL, &skipped), depth <= LIMIT_JSON_DEPTH ? QMP_OTHER : -1);
    }
    assert_int_equal(skipped, 2);
    qmp_parser_free(&p);
}

static void half_a_line_waits(void **state)
{
    struct qmp_parser p;
    unsigned skipped = 0;
    qmp_parser_init(&p);
    feed(&p, "{\"return\": ");
    for (int i = 0; i < 3; i++) // asking again changes nothing
        assert_int_equal(next(&p, NULL, &skipped), -1);
    feed(&p, "{}}");
    assert_int_equal(next(&p, NULL, &skipped), -1);
    feed(&p, "\n");
    assert_int_equal(next(&p, NULL, &skipped), QMP_RETURN);
    assert_int_equal(skipped, 0);
    qmp_parser_free(&p);
}

static void a_line_has_a_largest_length(void **state)
{
    struct qmp_parser p;
    CLEANUP_BUF struct buf line = BUF_INIT(QMP_LINE_MAX + 1000);
    buf_adds(&line, "{\"return\": \"");
    while (line.len < QMP_LINE_MAX - 3)
        buf_add(&line, "x", 1);
    buf_adds(&line, "\"}\n"); // exactly the maximum with its newline
    assert_int_equal(line.len, QMP_LINE_MAX);
    qmp_parser_init(&p);
    for (int round = 0; round < 3; round++) { // the room of a line that was taken is free again
        assert_int_equal(qmp_parser_feed(&p, line.data, line.len), 0);
        assert_int_equal(next(&p, NULL, NULL), QMP_RETURN);
    }
    // Without a newline in sight it ends in a refusal, and memory does not grow past the maximum.
    size_t fed = 0;
    char chunk[8192];
    memset(chunk, 'y', sizeof chunk);
    while (qmp_parser_feed(&p, chunk, sizeof chunk) == 0) {
        fed += sizeof chunk;
        assert_int_equal(next(&p, NULL, NULL), -1);
        assert_true(fed <= QMP_LINE_MAX);
    }
    assert_true(fed > QMP_LINE_MAX - sizeof chunk);
    assert_true(p.line.cap <= QMP_LINE_MAX + 1);
    qmp_parser_free(&p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_kind_is_known),
        cmocka_unit_test(an_empty_return_is_one),
        cmocka_unit_test(any_cut_gives_the_same_objects),
        cmocka_unit_test(what_is_no_object_is_skipped_and_counted),
        cmocka_unit_test(nul_bytes_and_deep_nesting_are_skipped),
        cmocka_unit_test(half_a_line_waits),
        cmocka_unit_test(a_line_has_a_largest_length),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
