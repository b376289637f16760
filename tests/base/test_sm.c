// The engine of state machines, with a machine of its own.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/sm.h"

enum { RED, GREEN, YELLOW, BROKEN, UNNAMED, STATES };

static const struct sm_state TABLE[STATES] = {
    [RED] = {"red", 1u << GREEN | 1u << BROKEN, false},
    [GREEN] = {"green", 1u << YELLOW | 1u << GREEN, false}, // stays, if it likes
    [YELLOW] = {"yellow", 1u << RED | 1u << UNNAMED | 1u << 31, false}, // and to one that is not there
    [BROKEN] = {"broken", 0, true},
    [UNNAMED] = {NULL, 0, true},
};

static struct sm in(int state)
{
    struct sm m;
    sm_init(&m, TABLE, STATES, state);
    assert_int_equal(m.state, state);
    return m;
}

static void only_what_the_table_allows(void **state)
{
    for (int from = 0; from < STATES; from++)
        for (int to = 0; to < STATES; to++) {
            struct sm m = in(from);
            const bool allowed = TABLE[from].allowed >> to & 1u;
            assert_true(sm_can(&m, to) == allowed);
            assert_int_equal(m.state, from); // asking moves nothing
            assert_true(sm_move(&m, to) == allowed);
            assert_int_equal(m.state, allowed ? to : from);
        }
}

static void a_way_through_it(void **state)
{
    struct sm m = in(RED);
    assert_true(sm_move(&m, GREEN));
    assert_true(sm_move(&m, GREEN));
    assert_false(sm_move(&m, RED));
    assert_true(sm_move(&m, YELLOW));
    assert_true(sm_move(&m, RED));
    assert_true(sm_move(&m, BROKEN));
    for (int to = 0; to < STATES; to++)
        assert_false(sm_move(&m, to));
    assert_int_equal(m.state, BROKEN);
}

static void numbers_that_are_no_states(void **state)
{
    static const int BAD[] = {-1, STATES, 31, 32, 64, 1000000, -2147483647 - 1, 2147483647};
    for (size_t i = 0; i < sizeof BAD / sizeof *BAD; i++) {
        struct sm m = in(YELLOW);
        assert_false(sm_can(&m, BAD[i]));
        assert_false(sm_move(&m, BAD[i]));
        assert_int_equal(m.state, YELLOW);
        m = in(BAD[i]);
        assert_false(sm_can(&m, RED));
        assert_string_equal(sm_name(TABLE, STATES, BAD[i]), "unknown");
    }
}

static void names_both_ways(void **state)
{
    assert_string_equal(sm_name(TABLE, STATES, RED), "red");
    assert_string_equal(sm_name(TABLE, STATES, BROKEN), "broken");
    assert_string_equal(sm_name(TABLE, STATES, UNNAMED), "unknown");
    assert_int_equal(sm_parse(TABLE, STATES, "red"), RED);
    assert_int_equal(sm_parse(TABLE, STATES, "broken"), BROKEN);
    assert_int_equal(sm_parse(TABLE, STATES, "Red"), -1);
    assert_int_equal(sm_parse(TABLE, STATES, "unknown"), -1);
    assert_int_equal(sm_parse(TABLE, STATES, ""), -1);
    assert_int_equal(sm_parse(TABLE, 2, "yellow"), -1); // only as many as were given
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(only_what_the_table_allows),
        cmocka_unit_test(a_way_through_it),
        cmocka_unit_test(numbers_that_are_no_states),
        cmocka_unit_test(names_both_ways),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
