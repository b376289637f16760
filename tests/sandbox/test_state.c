// The states of a sandbox: the moves between them, each pair, and the names that are stored.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "sandbox/state.h"

// Row: from; column: to, in the order of the numbers 1 to 9; x is allowed.
//                              start run pause cold restor stopping stopped failed destroyed
static const char *const MOVES[SANDBOX_STATES] = {
    [SANDBOX_STARTING] =  ".x....xxx",
    [SANDBOX_RUNNING] =   "..xx.xxxx",
    [SANDBOX_PAUSED] =    ".x.x.xxxx",
    [SANDBOX_COLD] =      "....x.xxx",
    [SANDBOX_RESTORING] = ".x.x...xx",
    [SANDBOX_STOPPING] =  "......xxx",
    [SANDBOX_STOPPED] =   "x......xx",
    [SANDBOX_FAILED] =    "x.......x",
    [SANDBOX_DESTROYED] = ".........",
};

static void every_pair(void **state)
{
    for (int from = 1; from < SANDBOX_STATES; from++)
        for (int to = 1; to < SANDBOX_STATES; to++) {
            struct sm m;
            const bool allowed = MOVES[from][to - 1] == 'x';
            sm_init(&m, SANDBOX_STATE_TABLE, SANDBOX_STATES, from);
            if (sm_can(&m, to) != allowed)
                fail_msg("%s to %s is %s", sandbox_state_name(from), sandbox_state_name(to), allowed ? "refused" : "allowed");
            assert_true(sm_move(&m, to) == allowed);
            assert_int_equal(m.state, allowed ? to : from); // a refused move changes nothing
        }
}

static void a_sandbox_begins_by_starting(void **state)
{
    for (int to = 0; to < SANDBOX_STATES; to++) {
        struct sm m;
        sm_init(&m, SANDBOX_STATE_TABLE, SANDBOX_STATES, 0);
        assert_true(sm_can(&m, to) == (to == SANDBOX_STARTING));
    }
}

static void delete_wins_and_is_final(void **state)
{
    for (int from = 1; from < SANDBOX_STATES; from++) {
        struct sm m;
        sm_init(&m, SANDBOX_STATE_TABLE, SANDBOX_STATES, from);
        assert_true(sm_can(&m, SANDBOX_DESTROYED) == (from != SANDBOX_DESTROYED));
        assert_true(SANDBOX_STATE_TABLE[from].final == (from == SANDBOX_DESTROYED));
        assert_false(sm_can(&m, from)); // nothing moves to where it is
        assert_false(sm_can(&m, 0));    // and nothing back before its beginning
    }
}

static void numbers_out_of_range_are_refused(void **state)
{
    static const int BAD[] = {-1, SANDBOX_STATES, 31, 32, 33, 1000, -2147483647 - 1};
    for (size_t i = 0; i < sizeof BAD / sizeof *BAD; i++) {
        struct sm m;
        sm_init(&m, SANDBOX_STATE_TABLE, SANDBOX_STATES, SANDBOX_RUNNING);
        assert_false(sm_move(&m, BAD[i]));
        assert_int_equal(m.state, SANDBOX_RUNNING);
        sm_init(&m, SANDBOX_STATE_TABLE, SANDBOX_STATES, BAD[i]);
        for (int to = 0; to < SANDBOX_STATES; to++)
            assert_false(sm_can(&m, to));
        assert_string_equal(sandbox_state_name(BAD[i]), "unknown");
        assert_false(sandbox_state_has_vm(BAD[i]));
    }
}

// Names and numbers are stored and on the wire.
static void names_are_pinned(void **state)
{
    static const struct {
        int state;
        const char *name;
    } PINNED[] = {{1, "starting"}, {2, "running"}, {3, "paused"}, {4, "cold"}, {5, "restoring"},
                  {6, "stopping"}, {7, "stopped"}, {8, "failed"}, {9, "destroyed"}};
    for (size_t i = 0; i < sizeof PINNED / sizeof *PINNED; i++) {
        assert_string_equal(sandbox_state_name(PINNED[i].state), PINNED[i].name);
        assert_int_equal(sandbox_state_parse(PINNED[i].name), PINNED[i].state);
    }
    static const char *const NONE[] = {"", "none", "unknown", "Running", "running ", "runnin"};
    for (size_t i = 0; i < sizeof NONE / sizeof *NONE; i++)
        assert_int_equal(sandbox_state_parse(NONE[i]), -1);
}

// A VM exists in five states. Whoever has one came from starting or restoring: no move gives one to a sandbox at rest.
static void a_vm_exists_where_it_was_booted(void **state)
{
    for (int s = 0; s < SANDBOX_STATES; s++)
        assert_true(sandbox_state_has_vm(s) == (s == SANDBOX_STARTING || s == SANDBOX_RUNNING || s == SANDBOX_PAUSED ||
                                                s == SANDBOX_STOPPING || s == SANDBOX_RESTORING));
    for (int from = 0; from < SANDBOX_STATES; from++)
        for (int to = 0; to < SANDBOX_STATES; to++) {
            struct sm m;
            sm_init(&m, SANDBOX_STATE_TABLE, SANDBOX_STATES, from);
            if (sm_can(&m, to) && !sandbox_state_has_vm(from) && sandbox_state_has_vm(to))
                assert_true(to == SANDBOX_STARTING || to == SANDBOX_RESTORING);
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_pair),
        cmocka_unit_test(a_sandbox_begins_by_starting),
        cmocka_unit_test(delete_wins_and_is_final),
        cmocka_unit_test(numbers_out_of_range_are_refused),
        cmocka_unit_test(names_are_pinned),
        cmocka_unit_test(a_vm_exists_where_it_was_booted),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
