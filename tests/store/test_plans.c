// Every statement beside 400,000 rows: what it reads is found by an index, and nothing sorts.
#include "fixture.h"
#include "store/int.h"

// Whole tables are walked only where that is meant: lists by a partial index, single rows, prune's oldest few.
static void check_plan(void *arg, const char *sql, const char *line)
{
    static const char *const MEANT[] = {"USING INDEX", "USING COVERING INDEX", "VIRTUAL TABLE", "SCAN checkpoint",
                                        "SCAN keys", "CONSTANT ROW", "SCAN (subquery", "SCAN audit"};
    ++*(unsigned *)arg;
    if (strncmp(line, "USE TEMP B-TREE", 15) == 0 && !strstr(sql, "FROM keys"))
        fail_msg("sorts: %s", sql);
    if (strncmp(line, "SCAN", 4) != 0)
        return;
    for (size_t i = 0; i < sizeof MEANT / sizeof MEANT[0]; i++)
        if (strstr(line, MEANT[i]))
            return;
    if (!strstr(line, "SCAN events")) // prune: the oldest few, by rowid
        fail_msg("%s: %s", line, sql);
}

static int plans_tx(struct store_tx *tx, void *arg, struct err *err)
{
    db_plans(tx->db, check_plan, arg);
    return 0;
}

static bool ignore_token(void *arg, const struct token_row *row)
{
    return true;
}

static bool ignore_sandbox(void *arg, const struct sandbox_row *row)
{
    return true;
}

static bool ignore_job(void *arg, const struct job_row *row)
{
    return true;
}

static bool ignore_command(void *arg, const struct command_row *row)
{
    return true;
}

static bool ignore_event(void *arg, const struct event_row *row)
{
    return true;
}

static bool ignore_audit(void *arg, const struct audit_row *row)
{
    return true;
}

static bool ignore_receipt(void *arg, const struct receipt_row *row)
{
    return true;
}

static bool ignore_snapshot(void *arg, const struct snapshot_row *row)
{
    return true;
}

static bool ignore_admission(void *arg, const struct admission *a)
{
    return true;
}

static void read_snapshots(struct store *s, const char *sandbox_id)
{
    struct err err = {0};
    struct snapshot_row row;
    for (int deleted = 0; deleted < 2; deleted++)
        for (int of_sandbox = 0; of_sandbox < 2; of_sandbox++) {
            const struct snapshot_filter f = {{.tenant = "a", .limit = 20}, of_sandbox ? sandbox_id : NULL, deleted};
            assert_int_equal(snapshot_list(s, &f, ignore_snapshot, NULL, &err), 0);
        }
    assert_int_equal(snapshot_get(s, "a", "none", &row, &err), 1);
    assert_int_equal(snapshot_each_expired_all_tenants(s, INT64_MAX, 20, ignore_snapshot, NULL, &err), 0);
    assert_int_equal(snapshot_each_alive_all_tenants(s, ignore_snapshot, NULL, &err), 0);
}

// All reads once, so that they are prepared.
static void read_everything(struct store *s, const char *sandbox_id)
{
    struct err err = {0};
    struct sandbox_row sandbox;
    struct job_row job;
    struct command_row command;
    struct receipt_row receipt;
    struct idem_row idem;
    struct token_row token;
    uint8_t hash[SHA256_BYTES] = {0};
    const struct page page = {.tenant = "a", .limit = 20};
    for (int state = -1; state < 3; state += 3)
        for (int label = 0; label < 2; label++) {
            const struct sandbox_filter f = {page, state, label ? "k" : NULL, "v"};
            assert_int_equal(sandbox_list(s, &f, ignore_sandbox, NULL, &err), 0);
        }
    assert_int_equal(sandbox_get(s, "a", "none", &sandbox, &err), 1);
    assert_int_equal(sandbox_each_live_all_tenants(s, ignore_sandbox, NULL, &err), 0);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(job_list(s, &page, i ? sandbox_id : NULL, ignore_job, NULL, &err), 0);
        assert_int_equal(receipt_list(s, &page, i ? sandbox_id : NULL, ignore_receipt, NULL, &err), 0);
    }
    assert_int_equal(job_get(s, "a", "none", &job, &err), 1);
    assert_int_equal(job_each_unfinished_all_tenants(s, ignore_job, NULL, &err), 0);
    assert_int_equal(command_get(s, "a", sandbox_id, "none", &command, &err), 1);
    assert_int_equal(command_list(s, &page, sandbox_id, ignore_command, NULL, &err), 0);
    assert_int_equal(command_each_unfinished_all_tenants(s, ignore_command, NULL, &err), 0);
    assert_int_equal(event_list(s, "a", 0, 10, ignore_event, NULL, &err), 0);
    assert_int_equal(audit_list(s, "a", 0, 10, ignore_audit, NULL, &err), 0);
    assert_int_equal(receipt_get(s, "a", "none", &receipt, &err), 1);
    assert_int_equal(receipt_each_pending_all_tenants(s, ignore_admission, NULL, &err), 0);
    assert_int_equal(idem_find(s, "a", "POST", "/x", "k", &idem, &err), 1);
    assert_int_equal(token_find(s, hash, &token, &err), 1);
    assert_int_equal(token_get(s, "a", "none", &token, &err), 1);
    assert_int_equal(token_list(s, &page, ignore_token, NULL, &err), 0);
    read_snapshots(s, sandbox_id);
    free(audit_checkpoint(s, &err));
    free(evidence_keys(s, &err));
}

static void fill(const struct dir *d)
{
    poke(d, "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000)"
            " INSERT INTO sandboxes SELECT printf('sbx%026d', i), 'a', '', 9, '', 'debian', '', 1, 1, 1, '{}', '{}', 1,"
            " 1, 'destroy', 0, '', 1, i, i, i, '', '', '', NULL, NULL, NULL, NULL, '', '', NULL,"
            " NULL FROM n");
    poke(d, "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000)"
            " INSERT INTO snapshots SELECT printf('snp%026d', i), 'a', printf('sbx%026d', i), printf('snp%026d', i - 1), i,"
            " '', 2, '', 'delta', '', 'debian', '', 1, 1, 1, '{}', 'kvm', 1, '', '{}', '{}', '{}', '{}', 1, 1, i, 1, i, '',"
            " '', '', NULL FROM n");
    poke(d, "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000)"
            " INSERT INTO jobs SELECT printf('job%026d', i), 'a', printf('sbx%026d', i), 'sandbox.create', 3, '', NULL,"
            " NULL, NULL, '', '', '', '', i, i, i FROM n");
    poke(d, "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000)"
            " INSERT INTO commands SELECT printf('cmd%026d', i), 'a', printf('sbx%026d', i / 100), 3, 1, 0, 0, '', '', 1,"
            " 1, 1, 0, 0, 0, 0, 0, 0, '', NULL, 0, 0, 0, 0, '', '', 0, '', '', '', 1, i, i, i FROM n");
}

static int sandbox_update_tx(struct store_tx *tx, void *arg, struct err *err)
{
    return sandbox_update(tx, arg, err);
}

static int job_update_tx(struct store_tx *tx, void *arg, struct err *err)
{
    return job_update(tx, arg, err);
}

static int command_update_tx(struct store_tx *tx, void *arg, struct err *err)
{
    return command_update(tx, arg, err);
}

static int snapshot_update_tx(struct store_tx *tx, void *arg, struct err *err)
{
    return snapshot_update(tx, arg, err);
}

static void ignore_gone(void *arg, const char *id) { (void)arg, (void)id; }

static int prune_tx(struct store_tx *tx, void *arg, struct err *err)
{
    return store_prune(tx, arg, ignore_gone, NULL, err) < 0 ? -1 : 0;
}

static void write_snapshots(struct store *s, const char *sandbox_id)
{
    struct snapshot_row parent = snapshot_of("a", sandbox_id, ""), child = snapshot_of("a", sandbox_id, parent.id);
    put_snapshot(s, &parent);
    put_snapshot(s, &child);
    child.state = SNAPSHOT_DELETED;
    child.deleted_at_ms = 100001;
    must_write(s, snapshot_update_tx, &child);
}

static void test_flat_with_100000_rows(void **state)
{
    struct dir *d = *state;
    store_close(open_store(d));
    fill(d);
    struct store *s = open_store(d);
    struct err err = {0};
    struct sandbox_row row = sandbox_of("a", "new");
    struct command_row command = command_of("a", row.id);
    struct job_row job = job_of("a", row.id);
    const int64_t t0 = clock_mono_us();
    put_sandbox(s, &row);
    row.generation++;
    must_write(s, sandbox_update_tx, &row);
    put_command(s, &command);
    must_write(s, command_update_tx, &command);
    put_job(s, &job);
    must_write(s, job_update_tx, &job);
    write_snapshots(s, row.id);
    read_everything(s, row.id);
    const int64_t us = clock_mono_us() - t0;
    struct retention p = {.destroyed_before_ms = 3, .max_rows = 1000};
    must_write(s, prune_tx, &p);
    unsigned lines = 0;
    db_plans(reader_db(s, &err), check_plan, &lines);
    assert_true(lines >= 20);
    must_write(s, plans_tx, &lines);
    assert_true(lines >= 40);
    print_message("40 calls beside 400,000 rows: %lld us\n", (long long)us);
    assert_true(us < 2000000); // a table walk alone would take longer, also under a sanitizer
    store_close(s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_flat_with_100000_rows, dir_setup, dir_teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
