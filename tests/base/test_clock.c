// Times as text: written, read, and what is no time.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/clock.h"

static const struct {
    int64_t ms;
    const char *text;
} TIMES[] = {
    {0, "1970-01-01T00:00:00.000Z"},
    {1, "1970-01-01T00:00:00.001Z"},
    {999, "1970-01-01T00:00:00.999Z"},
    {1000, "1970-01-01T00:00:01.000Z"},
    {-1, "1969-12-31T23:59:59.999Z"},
    {-1000, "1969-12-31T23:59:59.000Z"},
    {-1001, "1969-12-31T23:59:58.999Z"},
    {951782400000, "2000-02-29T00:00:00.000Z"},  // a century that is a leap year
    {1709164799999, "2024-02-28T23:59:59.999Z"},
    {1769860800123, "2026-01-31T12:00:00.123Z"},
    {2147483648000, "2038-01-19T03:14:08.000Z"}, // past 32 bits
    {4107542400000, "2100-03-01T00:00:00.000Z"}, // 2100 is none
    {253402300799999, "9999-12-31T23:59:59.999Z"},
};

static void known_times_both_ways(void **state)
{
    for (size_t i = 0; i < sizeof TIMES / sizeof *TIMES; i++) {
        char text[CLOCK_TEXT_MAX];
        int64_t ms = 77;
        assert_ptr_equal(clock_text(TIMES[i].ms, text), text);
        assert_string_equal(text, TIMES[i].text);
        assert_int_equal(clock_parse(TIMES[i].text, &ms), 0);
        assert_int_equal(ms, TIMES[i].ms);
    }
}

static void any_time_both_ways(void **state)
{
    unsigned seed = 4;
    for (int i = 0; i < 5000; i++) {
        const int64_t ms = ((int64_t)rand_r(&seed) << 16 ^ rand_r(&seed)) % 253402300799999;
        char text[CLOCK_TEXT_MAX];
        int64_t back;
        assert_int_equal(clock_parse(clock_text(ms, text), &back), 0);
        assert_int_equal(back, ms);
        assert_int_equal(strlen(text), 24);
    }
}

static void the_fraction_is_optional_and_cut_to_milliseconds(void **state)
{
    static const struct {
        const char *text;
        int64_t ms;
    } CASES[] = {{"2026-01-31T12:00:00Z", 0}, {"2026-01-31T12:00:00.1Z", 100}, {"2026-01-31T12:00:00.12Z", 120},
                 {"2026-01-31T12:00:00.123456789Z", 123}, {"2026-01-31T12:00:00.0009Z", 0}};
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        int64_t ms;
        assert_int_equal(clock_parse(CASES[i].text, &ms), 0);
        assert_int_equal(ms, 1769860800000 + CASES[i].ms);
    }
}

static void what_is_no_time(void **state)
{
    static const char *const BAD[] = {
        "", "Z", "2026", "2026-01-31", "2026-01-31T12:00Z", "2026-01-31 12:00:00Z", "2026-01-31T12:00:00",
        "2026-01-31T12:00:00+00:00", "2026-01-31T12:00:00.5", "2026-01-31T12:00:00,5Z", "2026-01-31T12:00:00z",
        "2026-01-31T12:00:00Z ", "2026-01-31T12:00:00ZZ", "2026-01-31T12:00:00.5+01:00", "26-01-31T12:00:00Z",
        "2026-1-31T12:00:00Z", "2026-13-01T12:00:00Z", "2026-00-01T12:00:00Z", "2026-01-00T12:00:00Z",
        "2026-01-32T12:00:00Z", "2026-01-31T24:00:00Z", "2026-01-31T12:60:00Z", "2026-01-31T12:00:61Z",
        "2026-01-31T1200:00Z", "2026/01/31T12:00:00Z", "12026-01-31T12:00:00Z", "now", "1769860800",
    };
    for (size_t i = 0; i < sizeof BAD / sizeof *BAD; i++) {
        int64_t ms = 77;
        if (clock_parse(BAD[i], &ms) != -1)
            fail_msg("%s was read", BAD[i]);
        assert_int_equal(ms, 77);
    }
}

static void clocks_go_on(void **state)
{
    const int64_t mono = clock_mono_ms(), mono_us = clock_mono_us(), boot = clock_boot_ms(), wall = clock_wall_ms();
    assert_true(mono > 0 && boot > 0);
    assert_true(mono_us / 1000 >= mono && mono_us / 1000 < mono + 60000);
    assert_true(wall > 1700000000000);
    for (int64_t last = mono_us, i = 0; i < 1000; i++) {
        const int64_t now = clock_mono_us();
        assert_true(now >= last);
        last = now;
    }
    assert_true(clock_mono_ms() >= mono && clock_boot_ms() >= boot);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(known_times_both_ways),
        cmocka_unit_test(any_time_both_ways),
        cmocka_unit_test(the_fraction_is_optional_and_cut_to_milliseconds),
        cmocka_unit_test(what_is_no_time),
        cmocka_unit_test(clocks_go_on),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
