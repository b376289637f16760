// Strict JSON: what is read, what is refused and where it says the fault is, and the text that is signed.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/buf.h"
#include "base/fd.h"
#include "base/json.h"
#include "base/limits.h"

static void assert_refused(const char *text, size_t len)
{
    struct err err = {0};
    json_t *o = json_parse_strict(text, len, &err);
    if (o)
        fail_msg("%.*s was read", (int)len, text);
    assert_int_equal(err.kind, ERR_VALIDATION);
    assert_string_equal(err.code, "malformed_json");
    assert_true(err.detail[0] != 0);
    assert_null(json_parse_strict(text, len, NULL)); // nobody need ask why
}

static void assert_read(const char *text, const char *canonical)
{
    struct err err = {0};
    CLEANUP_JSON json_t *o = json_parse_strict(text, strlen(text), &err);
    if (!o)
        fail_msg("%s: %s", text, err.detail);
    CLEANUP_FREE char *got = json_canonical(o);
    assert_string_equal(got, canonical);
    assert_int_equal(err.kind, ERR_NONE);
}

static void values_of_every_kind(void **state)
{
    assert_read("{}", "{}");
    assert_read("[]", "[]");
    assert_read(" \t\r\n{ \"a\" : [ 1 , -2 , true , false , null , \"x\" ] } \n", "{\"a\":[1,-2,true,false,null,\"x\"]}");
    assert_read("7", "7");
    assert_read("\"text\"", "\"text\"");
    assert_read("null", "null");
    assert_read("9223372036854775807", "9223372036854775807");
    assert_read("-9223372036854775808", "-9223372036854775808");
    assert_read("\"\\u00e4\\n\\/\\uD83D\\uDE00\"", "\"\xc3\xa4\\n/\xf0\x9f\x98\x80\"");
}

static void what_is_no_json(void **state)
{
    static const char *const BAD[] = {
        "", " ", "{", "}", "[1,]", "{\"a\":1,}", "{a:1}", "{'a':1}", "{\"a\" 1}", "{\"a\":}", "nul", "True", "NaN", "Infinity",
        "01", "+1", ".5", "1.", "0x10", "--1", "\"unfinished", "\"tab\tin it\"", "\"\\x41\"", "// comment\n1", "/* c */ 1",
        "{} {}", "1 2", "[] x", "{}\n}", "9223372036854775808", "\"\\uD83D\"", "\"\\uDE00\"", "\"\\u12\"",
        "\xef\xbb\xbf{}", // a byte order mark
    };
    for (size_t i = 0; i < sizeof BAD / sizeof *BAD; i++)
        assert_refused(BAD[i], strlen(BAD[i]));
}

static void bytes_that_are_no_utf8(void **state)
{
    static const char *const BAD[] = {"\"\xff\"", "\"\xc3\"", "\"\xc0\x80\"", "\"\xed\xa0\x80\"", "\"\xf4\x90\x80\x80\"",
                                      "{\"\x80\": 1}"};
    for (size_t i = 0; i < sizeof BAD / sizeof *BAD; i++)
        assert_refused(BAD[i], strlen(BAD[i]));
}

static void nul_is_nowhere(void **state)
{
    assert_refused("{}\0", 3);
    assert_refused("\0{}", 3);
    assert_refused("{\"a\0b\": 1}", 10);
    assert_refused("\"a\0b\"", 5);
    assert_refused("\"\\u0000\"", 8);
    assert_refused("{\"\\u0000\": 1}", 13);
    assert_refused("[1,\0 2]", 7);
}

// One reader must not see one value and another the other.
static void keys_come_once(void **state)
{
    static const char *const BAD[] = {"{\"a\": 1, \"a\": 1}", "{\"a\": {\"b\": 1, \"c\": 2, \"b\": 3}}",
                                      "{\"a\": 1, \"\\u0061\": 2}", "[{\"\": 1, \"\": 2}]"};
    for (size_t i = 0; i < sizeof BAD / sizeof *BAD; i++)
        assert_refused(BAD[i], strlen(BAD[i]));
    assert_read("{\"a\": 1, \"A\": 2, \"b\": {\"a\": 3}}", "{\"A\":2,\"a\":1,\"b\":{\"a\":3}}");
}

static void depth_has_a_limit(void **state)
{
    static const char *const OPEN[] = {"[", "{\"k\":", "[{\"k\":"}, *const CLOSE[] = {"]", "}", "}]"};
    static const int LEVELS[] = {1, 1, 2};
    for (int kind = 0; kind < 3; kind++)
        for (int depth = LIMIT_JSON_DEPTH - 2; depth <= LIMIT_JSON_DEPTH + 2; depth++) {
            CLEANUP_BUF struct buf b = BUF_INIT(4096);
            if (depth % LEVELS[kind])
                continue;
            for (int i = 0; i < depth / LEVELS[kind]; i++)
                buf_adds(&b, OPEN[kind]);
            buf_adds(&b, "1");
            for (int i = 0; i < depth / LEVELS[kind]; i++)
                buf_adds(&b, CLOSE[kind]);
            if (depth <= LIMIT_JSON_DEPTH) {
                CLEANUP_JSON json_t *o = json_parse_strict(buf_text(&b), b.len, NULL);
                assert_non_null(o);
            } else {
                assert_refused(buf_text(&b), b.len);
            }
        }
}

// A million of them cost no stack.
static void depth_is_counted_before_it_is_read(void **state)
{
    enum { N = 1000000 };
    char *text = malloc(N);
    memset(text, '[', N);
    struct err err = {0};
    assert_null(json_parse_strict(text, N, &err));
    assert_non_null(strstr(err.detail, "32"));
    free(text);
    // Brackets in strings are none, whatever is escaped before them; siblings do not add up.
    CLEANUP_BUF struct buf b = BUF_INIT(100000);
    buf_adds(&b, "[\"\\\\\"");
    for (int i = 0; i < 300; i++)
        buf_adds(&b, ",\"\\\"[[[[{{{{\",[],{\"a[\":{}}");
    buf_adds(&b, "]");
    CLEANUP_JSON json_t *o = json_parse_strict(buf_text(&b), b.len, &err);
    assert_non_null(o);
    assert_int_equal(json_array_size(o), 901);
}

static void the_place_of_a_fault_is_told(void **state)
{
    struct err err = {0};
    static const char TEXT[] = "{\n  \"a\": 1,\n  \"b\": oops\n}";
    assert_null(json_parse_strict(TEXT, sizeof TEXT - 1, &err));
    assert_non_null(strstr(err.detail, "line 3"));
}

// ---- canonical text ---------------------------------------------------------------------------------------------------
static void canonical_text_is_one(void **state)
{
    assert_read("{\"b\": 1, \"a\": {\"z\": [3, 1, 2], \"y\": null}, \"\": 0, \"aa\": 2, \"B\": 3}",
                "{\"\":0,\"B\":3,\"a\":{\"y\":null,\"z\":[3,1,2]},\"aa\":2,\"b\":1}");
    assert_read("[ \"\\u0041\\u00e9\", \"/\", \"\\\"\\\\\", \"\\b\\f\\n\\r\\t\" ]",
                "[\"A\xc3\xa9\",\"/\",\"\\\"\\\\\",\"\\b\\f\\n\\r\\t\"]");
    // And reading it again changes nothing.
    static const char TEXT[] = "{\"\":0,\"B\":3,\"a\":{\"y\":null,\"z\":[3,1,2]},\"aa\":2,\"b\":1}";
    assert_read(TEXT, TEXT);
}

// ---- building and looking -----------------------------------------------------------------------------------------------
static void values_are_put(void **state)
{
    CLEANUP_JSON json_t *o = json_object();
    assert_int_equal(json_put(o, "list", json_array()), 0);
    assert_int_equal(json_put_str(o, "text", "some"), 0);
    assert_int_equal(json_put_str(o, "none", NULL), 0);
    assert_int_equal(json_put_int(o, "n", INT64_MIN), 0);
    assert_int_equal(json_put_time(o, "never", 0), 0);
    assert_int_equal(json_put_time(o, "at", 1769860800123), 0);
    CLEANUP_FREE char *text = json_canonical(o);
    assert_string_equal(text, "{\"at\":\"2026-01-31T12:00:00.123Z\",\"list\":[],\"n\":-9223372036854775808,\"never\":null,"
                              "\"none\":null,\"text\":\"some\"}");
    assert_int_equal(json_put(o, "text", NULL), -1); // out of memory somewhere before: seen, and nothing changed
    assert_string_equal(json_get_str(o, "text"), "some");
    assert_int_equal(json_put_str(o, "bad", "\xff"), -1);
    assert_null(json_object_get(o, "bad"));
}

static void values_are_looked_up(void **state)
{
    CLEANUP_JSON json_t *o = json_pack("{s:s, s:i, s:b, s:n}", "text", "some", "n", 5, "yes", 1, "null");
    assert_string_equal(json_get_str(o, "text"), "some");
    assert_null(json_get_str(o, "n"));
    assert_null(json_get_str(o, "null"));
    assert_null(json_get_str(o, "missing"));
    assert_null(json_get_str(NULL, "text"));
    assert_int_equal(json_get_int(o, "n", 9), 5);
    assert_int_equal(json_get_int(o, "text", 9), 9);
    assert_int_equal(json_get_int(o, "yes", 9), 9); // true is no number
    assert_int_equal(json_get_int(o, "missing", -1), -1);
    assert_int_equal(json_get_int(NULL, "n", 9), 9);
    CLEANUP_JSON json_t *list = json_array();
    assert_null(json_get_str(list, "text"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(values_of_every_kind),
        cmocka_unit_test(what_is_no_json),
        cmocka_unit_test(bytes_that_are_no_utf8),
        cmocka_unit_test(nul_is_nowhere),
        cmocka_unit_test(keys_come_once),
        cmocka_unit_test(depth_has_a_limit),
        cmocka_unit_test(depth_is_counted_before_it_is_read),
        cmocka_unit_test(the_place_of_a_fault_is_told),
        cmocka_unit_test(canonical_text_is_one),
        cmocka_unit_test(values_are_put),
        cmocka_unit_test(values_are_looked_up),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
