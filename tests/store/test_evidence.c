#include "fixture.h"
#include "store/verify.h"

static void test_smoke(void **state)
{
    struct dir *d = *state;
    struct store *s = open_store(d);
    struct err err = {0};
    for (int i = 0; i < 5; i++) {
        struct admission a = admission_of("t1", "command.run");
        admit(s, &a);
        settle(s, &a, "exited", 200);
        struct receipt_row row;
        assert_int_equal(receipt_get(s, "t1", a.receipt_id, &row, &err), 0);
        assert_int_equal(row.state, RECEIPT_FINAL);
        receipt_row_free(&row);
    }
    struct verify_report r;
    verify_state(d->path, NULL, NULL, 1, &r);
    print_message("%d %s %lu %lu\n", r.verdict, r.fault, r.entries, r.receipts);
    assert_int_equal(r.verdict, VERIFY_OK);
    store_close(s);
    verify_state(d->path, NULL, NULL, 1, &r);
    print_message("%d %s %lu %lu\n", r.verdict, r.fault, r.entries, r.receipts);
    assert_int_equal(r.verdict, VERIFY_OK);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test_setup_teardown(test_smoke, dir_setup, dir_teardown)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
