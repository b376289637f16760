// Ids: their form, their order also within a millisecond and from many threads, and what is no id.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <pthread.h>

#include "base/clock.h"
#include "base/id.h"

static const char ALPHABET[] = "0123456789abcdefghjkmnpqrstvwxyz";

static void prefixes_are_pinned(void **state)
{
    static const struct {
        enum id_type type;
        const char *prefix;
    } PINNED[] = {{ID_SANDBOX, "sbx"}, {ID_COMMAND, "cmd"}, {ID_JOB, "job"}, {ID_SNAPSHOT, "snp"}, {ID_IMAGE, "img"},
                  {ID_RECEIPT, "rct"}, {ID_AUDIT, "aud"}, {ID_PLAN, "pln"}, {ID_TOKEN, "tok"}, {ID_EVENT, "evt"},
                  {ID_WORKLOAD, "wkl"}};
    for (size_t i = 0; i < sizeof PINNED / sizeof *PINNED; i++) {
        char id[ID_MAX];
        assert_string_equal(id_prefix(PINNED[i].type), PINNED[i].prefix);
        assert_ptr_equal(id_new(PINNED[i].type, id), id);
        assert_int_equal(strlen(id), ID_LEN);
        assert_memory_equal(id, PINNED[i].prefix, 3);
        for (size_t k = 0; k < sizeof PINNED / sizeof *PINNED; k++)
            assert_true(id_valid(PINNED[k].type, id) == (i == k));
    }
}

// The first ten characters are the time, five bits each, two zero bits before them.
static void the_time_is_in_front(void **state)
{
    const int64_t before = clock_wall_ms();
    char id[ID_MAX];
    id_new(ID_JOB, id);
    const int64_t after = clock_wall_ms();
    uint64_t bits = 0;
    for (int i = 0; i < 10; i++)
        bits = bits << 5 | (uint64_t)(strchr(ALPHABET, id[3 + i]) - ALPHABET);
    const int64_t ms = (int64_t)bits; // 50 bits: two zeros and 48 of time
    assert_true(ms >= before && ms <= after);
}

static void later_ids_sort_after_earlier_ones(void **state)
{
    char last[ID_MAX] = "", id[ID_MAX];
    for (int i = 0; i < 50000; i++) { // many within each millisecond
        id_new(ID_EVENT, id);
        assert_true(strcmp(id, last) > 0);
        memcpy(last, id, sizeof last);
    }
}

// Within one millisecond an id does not give its neighbour away.
static void neighbours_are_not_consecutive(void **state)
{
    int same_ms = 0, far = 0;
    char a[ID_MAX], b[ID_MAX];
    id_new(ID_TOKEN, a);
    for (int i = 0; i < 2000; i++, memcpy(a, b, sizeof a)) {
        id_new(ID_TOKEN, b);
        if (memcmp(a, b, 13) != 0)
            continue;
        same_ms++;
        far += memcmp(a + ID_LEN - 4, b + ID_LEN - 4, 3) != 0; // more than the last five bits differ
    }
    assert_true(same_ms > 0);
    assert_true(far > same_ms / 2);
}

static void what_is_no_id(void **state)
{
    char id[ID_MAX + 4];
    id_new(ID_SANDBOX, id);
    assert_true(id_valid(ID_SANDBOX, id));
    for (size_t i = 0; i < ID_LEN; i++) {
        static const char BAD[] = "ilou-_/. A\n\x7f\xc3";
        for (size_t k = 0; k < sizeof BAD; k++) { // with the NUL: shorter ones
            const char good = id[i];
            id[i] = BAD[k];
            assert_false(id_valid(ID_SANDBOX, id));
            id[i] = good;
        }
    }
    assert_false(id_valid(ID_SANDBOX, ""));
    assert_false(id_valid(ID_SANDBOX, "sbx"));
    id[ID_LEN] = '0';
    id[ID_LEN + 1] = 0;
    assert_false(id_valid(ID_SANDBOX, id));
}

// ---- threads ----------------------------------------------------------------------------------------------------------
enum { THREADS = 4, EACH = 3000 };
static char made[THREADS][EACH][ID_MAX];

static void *make(void *arg)
{
    char(*out)[ID_MAX] = arg;
    for (int i = 0; i < EACH; i++)
        id_new(ID_COMMAND, out[i]);
    return NULL;
}

static int compare(const void *a, const void *b)
{
    return strcmp(a, b);
}

static void no_two_are_equal(void **state)
{
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, make, made[i]), 0);
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    for (int t = 0; t < THREADS; t++)
        for (int i = 1; i < EACH; i++)
            assert_true(strcmp(made[t][i - 1], made[t][i]) < 0);
    qsort(made, THREADS * EACH, ID_MAX, compare);
    const char(*all)[ID_MAX] = (const char(*)[ID_MAX])made;
    for (int i = 1; i < THREADS * EACH; i++)
        assert_string_not_equal(all[i - 1], all[i]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(prefixes_are_pinned),
        cmocka_unit_test(the_time_is_in_front),
        cmocka_unit_test(later_ids_sort_after_earlier_ones),
        cmocka_unit_test(neighbours_are_not_consecutive),
        cmocka_unit_test(what_is_no_id),
        cmocka_unit_test(no_two_are_equal),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
