// A buffer never passes its maximum, and an append that would adds nothing.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/buf.h"

static void starts_empty(void **state)
{
    CLEANUP_BUF struct buf b = BUF_INIT(10);
    assert_string_equal(buf_text(&b), "");
    assert_int_equal(b.len, 0);
    struct buf never = {0};
    buf_free(&never);
    assert_false(buf_add(&never, "x", 1)); // a zeroed one has no room at all
    buf_free(&never);
    buf_init(&b, 5);
    assert_int_equal(b.max, 5);
}

static void grows_and_ends_in_nul(void **state)
{
    CLEANUP_BUF struct buf b = BUF_INIT(100000);
    char want[5001];
    for (size_t i = 0; i < 5000; i++) {
        want[i] = (char)('a' + i % 26);
        assert_true(buf_add(&b, want + i, 1));
        assert_int_equal(b.len, i + 1);
        assert_int_equal(b.data[b.len], 0);
    }
    want[5000] = 0;
    assert_string_equal(buf_text(&b), want);
    assert_true(b.cap <= b.max + 1);
    assert_true(buf_add(&b, NULL, 0)); // nothing is fine
    assert_int_equal(b.len, 5000);
}

static void the_maximum_is_exact(void **state)
{
    for (size_t max = 0; max < 200; max++) {
        CLEANUP_BUF struct buf b = BUF_INIT(max);
        char text[201];
        memset(text, 'x', sizeof text);
        assert_true(buf_add(&b, text, max));
        assert_false(b.failed);
        assert_int_equal(b.len, max);
        assert_false(buf_add(&b, text, 1));
        assert_true(b.failed);
        assert_int_equal(b.len, max); // it added nothing
        assert_true(b.cap <= max + 1);
        buf_free(&b);
        assert_false(b.failed);
        assert_false(buf_add(&b, text, max + 1));
        assert_int_equal(b.len, 0);
    }
}

static void sizes_do_not_wrap(void **state)
{
    CLEANUP_BUF struct buf b = BUF_INIT(1000);
    assert_true(buf_adds(&b, "some"));
    assert_false(buf_reserve(&b, SIZE_MAX));
    assert_false(buf_reserve(&b, SIZE_MAX - 3));
    assert_false(buf_reserve(&b, 997));
    assert_true(buf_reserve(&b, 996));
    assert_string_equal(buf_text(&b), "some");
}

static void a_failure_stays_until_cleared(void **state)
{
    CLEANUP_BUF struct buf b = BUF_INIT(4);
    assert_true(buf_adds(&b, "abc"));
    assert_false(buf_adds(&b, "de"));
    assert_true(buf_adds(&b, "d")); // what fits is taken all the same
    assert_true(b.failed);
    assert_string_equal(buf_text(&b), "abcd");
    buf_clear(&b);
    assert_false(b.failed);
    assert_string_equal(buf_text(&b), "");
    assert_true(buf_adds(&b, "wxyz"));
}

static void formatted(void **state)
{
    CLEANUP_BUF struct buf b = BUF_INIT(20);
    assert_true(buf_addf(&b, "%s %d", "seven", 7));
    assert_true(buf_addf(&b, "%s", ""));
    assert_string_equal(buf_text(&b), "seven 7");
    assert_false(buf_addf(&b, "%014d", 1)); // 14 more are one too many
    assert_true(b.failed);
    assert_string_equal(buf_text(&b), "seven 7");
    assert_true(buf_addf(&b, "%013d", 1));
    assert_string_equal(buf_text(&b), "seven 70000000000001");
}

static void nul_bytes_are_content(void **state)
{
    CLEANUP_BUF struct buf b = BUF_INIT(20);
    assert_true(buf_add(&b, "a\0b", 3));
    assert_int_equal(b.len, 3);
    assert_memory_equal(b.data, "a\0b", 4);
}

static void consumed_from_the_front(void **state)
{
    CLEANUP_BUF struct buf b = BUF_INIT(10);
    buf_consume(&b, 0); // of nothing, nothing
    assert_true(buf_adds(&b, "0123456789"));
    buf_consume(&b, 0);
    assert_string_equal(buf_text(&b), "0123456789");
    buf_consume(&b, 4);
    assert_string_equal(buf_text(&b), "456789");
    assert_true(buf_adds(&b, "abcd")); // its room is there again
    assert_string_equal(buf_text(&b), "456789abcd");
    buf_consume(&b, 10);
    assert_int_equal(b.len, 0);
    assert_string_equal(buf_text(&b), "");
}

static void reserved_room_may_be_written(void **state)
{
    CLEANUP_BUF struct buf b = BUF_INIT(1 << 16);
    assert_true(buf_adds(&b, "head"));
    for (size_t n = 1; n < 5000; n = n * 3 + 1) {
        assert_true(buf_reserve(&b, n));
        memset(b.data + b.len, 'r', n);
        b.len += n;
        b.data[b.len] = 0;
    }
    assert_memory_equal(b.data, "headr", 5);
}

static void stolen(void **state)
{
    CLEANUP_BUF struct buf b = BUF_INIT(10);
    char *text = buf_steal(&b);
    assert_string_equal(text, "");
    free(text);
    assert_true(buf_adds(&b, "mine"));
    text = buf_steal(&b);
    assert_string_equal(text, "mine");
    assert_int_equal(b.len, 0);
    assert_string_equal(buf_text(&b), "");
    assert_true(buf_adds(&b, "0123456789")); // the maximum is as it was
    assert_false(buf_adds(&b, "x"));
    assert_string_equal(text, "mine");
    free(text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(starts_empty),
        cmocka_unit_test(grows_and_ends_in_nul),
        cmocka_unit_test(the_maximum_is_exact),
        cmocka_unit_test(sizes_do_not_wrap),
        cmocka_unit_test(a_failure_stays_until_cleared),
        cmocka_unit_test(formatted),
        cmocka_unit_test(nul_bytes_are_content),
        cmocka_unit_test(consumed_from_the_front),
        cmocka_unit_test(reserved_room_may_be_written),
        cmocka_unit_test(stolen),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
