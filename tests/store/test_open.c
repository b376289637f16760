// What is found in the state directory: nothing, an older schema, a newer one, somebody else's lock, damage.
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "fixture.h"
#include "store/int.h"
#include "store/migrate.h"
#include "store/verify.h"

static void refused(const struct dir *d, enum err_kind kind, const char *code, struct err *err)
{
    const struct store_options o = {.state_dirfd = d->fd, .server_version = "test"};
    memset(err, 0, sizeof *err);
    assert_null(store_open(&o, err));
    assert_err(*err, kind, code);
}

static struct db *open_db(const struct dir *d)
{
    char path[300];
    struct err err = {0};
    snprintf(path, sizeof path, "%s/airlock.db", d->path);
    struct db *db = db_open(path, DB_WRITER, &err);
    assert_non_null(db);
    return db;
}

// ---- migrations -------------------------------------------------------------------------------------------------------
static void load_old(const struct dir *d, const char *name)
{
    char path[300];
    CLEANUP_BUF struct buf sql = BUF_INIT(1 << 20);
    snprintf(path, sizeof path, "tests/store/data/%s", name); // tests run in the source directory
    assert_int_equal(fd_read_file(AT_FDCWD, path, &sql), 0);
    poke(d, buf_text(&sql));
}

static char *schema_of(const struct dir *d)
{
    struct err err = {0};
    struct db *db = open_db(d);
    struct stmt *st = db_stmt(db, "SELECT group_concat(sql, char(10)) FROM (SELECT sql FROM sqlite_schema"
                                  " WHERE sql IS NOT NULL ORDER BY name)", &err);
    assert_int_equal(db_step(st, &err), 1);
    char *text = db_col_dup(st);
    db_end(st);
    db_close(db);
    return text;
}

// A released step is never edited: it still makes what it made.
static void test_step_1_makes_what_it_made(void **state)
{
    struct dir *now = *state, *then = dir_new();
    struct err err = {0};
    struct db *db = open_db(now);
    assert_int_equal(migrate_run(db, MIGRATIONS, 1, &err), 0);
    assert_int_equal(db_number(db, "PRAGMA user_version", &err), 1);
    db_close(db);
    load_old(then, "v1.sql");
    CLEANUP_FREE char *a = schema_of(now), *b = schema_of(then);
    assert_string_equal(a, b);
    dir_free(then);
}

static bool keep_sandbox(void *arg, const struct sandbox_row *row)
{
    *(int *)arg += strcmp(row->name, "one") == 0 && strcmp(row->labels_json, "{\"k\":\"v\"}") == 0;
    return true;
}

static bool count_pending(void *arg, const struct admission *a)
{
    *(int *)arg += strcmp(a->path, "/v1/x") == 0;
    return true;
}

static int update_tx(struct store_tx *tx, void *arg, struct err *err)
{
    return sandbox_update(tx, arg, err);
}

static void test_from_version_1(void **state)
{
    struct dir *d = *state;
    struct err err = {0};
    int sandboxes = 0, pending = 0;
    uint8_t secret[SHA256_BYTES] = {7};
    struct token_row token;
    struct idem_row idem;
    load_old(d, "v1.sql");
    struct store *s = open_store(d);
    assert_int_equal(db_number(reader_db(s, &err), "PRAGMA user_version", &err), MIGRATIONS_COUNT);
    assert_int_equal(sandbox_each_live_all_tenants(s, keep_sandbox, &sandboxes, &err), 0);
    assert_int_equal(sandboxes, 1);
    assert_int_equal(token_find(s, secret, &token, &err), 0);
    assert_int_equal(receipt_each_pending_all_tenants(s, count_pending, &pending, &err), 0);
    assert_int_equal(pending, 1);
    const int found = idem_find(s, "t", "POST", "/v1/sandboxes", "k", &idem, &err); // until a day has passed
    assert_true(found == 0 || found == 1);
    if (found == 0)
        idem_row_free(&idem);
    struct admission a = admission_of("t", "x.y"); // the old chain goes on
    admit(s, &a);
    settle(s, &a, "succeeded", 200);
    store_close(s);
    struct verify_report r;
    if (verify_state(d->path, NULL, NULL, 1, &r) != VERIFY_OK)
        fail_msg("verdict %d: %s", r.verdict, r.fault);
    assert_int_equal(r.entries, 5);
    assert_int_equal(r.receipts, 2);
}

static void test_rows_of_version_1(void **state)
{
    struct dir *d = *state;
    struct err err = {0};
    struct sandbox_row row, again;
    struct snapshot_row none;
    load_old(d, "v1.sql");
    struct store *s = open_store(d);
    assert_int_equal(sandbox_get(s, "t", "sbx01m85e05nn3kt7yvyt0g7e86v5", &row, &err), 0);
    assert_string_equal(row.parent_sandbox_id, "");
    assert_string_equal(row.parent_snapshot_id, "");
    assert_null(row.origin_json);
    assert_null(row.uniqueness_json);
    row.generation++; // and goes on as one of today
    row.origin_json = strdup("{}");
    must_write(s, update_tx, &row);
    assert_int_equal(sandbox_get(s, "t", row.id, &again, &err), 0);
    assert_string_equal(again.name, "one");
    assert_string_equal(again.labels_json, "{\"k\":\"v\"}");
    assert_string_equal(again.origin_json, "{}");
    sandbox_row_free(&row);
    sandbox_row_free(&again);
    assert_int_equal(snapshot_get(s, "t", "none", &none, &err), 1);
    store_close(s);
}

// A backup from before the upgrade is checked as it is.
static void test_verify_version_1(void **state)
{
    struct dir *d = *state, *opened = dir_new();
    struct verify_report r;
    char line[700];
    load_old(d, "v1.sql");
    load_old(opened, "v1.sql");
    store_close(open_store(opened)); // writes the public keys that the table has
    snprintf(line, sizeof line, "cp -a '%s/keys' '%s/'", opened->path, d->path);
    assert_int_equal(system(line), 0);
    if (verify_state(d->path, NULL, NULL, 1, &r) != VERIFY_OK)
        fail_msg("verdict %d: %s", r.verdict, r.fault);
    assert_int_equal(r.entries, 3);
    struct err err = {0};
    struct db *db = open_db(d); // looking changed nothing
    assert_int_equal(db_number(db, "PRAGMA user_version", &err), 1);
    db_close(db);
    poke(d, "PRAGMA user_version = 1000");
    assert_int_equal(verify_state(d->path, NULL, NULL, 1, &r), VERIFY_UNREADABLE);
    dir_free(opened);
}

static void test_a_step_is_all_or_nothing(void **state)
{
    static const char *const STEPS[] = {"CREATE TABLE a (x)", "CREATE TABLE b (x); INSERT INTO b VALUES (1); BAD WORDS",
                                        "CREATE TABLE c (x)"};
    static const char *const MENDED[] = {"CREATE TABLE a (x)", "CREATE TABLE b (x)", "CREATE TABLE c (x)"};
    struct err err = {0};
    struct db *db = open_db(*state);
    assert_int_equal(migrate_run(db, STEPS, 3, &err), -1);
    assert_int_equal(db_number(db, "PRAGMA user_version", &err), 1);
    assert_int_equal(db_number(db, "SELECT count(*) FROM sqlite_schema", &err), 1);
    assert_int_equal(migrate_run(db, MENDED, 3, &err), 0);
    assert_int_equal(db_number(db, "PRAGMA user_version", &err), 3);
    assert_int_equal(migrate_run(db, MENDED, 3, &err), 0); // nothing left to do
    assert_int_equal(migrate_run(db, MENDED, 2, &err), -1);
    assert_err(err, ERR_INTERNAL, "store_newer");
    db_close(db);
}

static void test_newer(void **state)
{
    struct dir *d = *state;
    struct err err = {0};
    store_close(open_store(d));
    poke(d, "PRAGMA user_version = 1000");
    refused(d, ERR_INTERNAL, "store_newer", &err);
}

// ---- locks --------------------------------------------------------------------------------------------------------------
static void test_second_server_names_the_first(void **state)
{
    struct dir *d = *state;
    char want[80], ready;
    int fds[2];
    struct err err = {0};
    assert_int_equal(pipe2(fds, O_CLOEXEC), 0);
    const pid_t pid = fork();
    if (pid == 0) {
        if (open_store(d) && write(fds[1], "x", 1) == 1)
            for (;;)
                pause();
        _exit(1);
    }
    assert_int_equal(fd_read_full(fds[0], &ready, 1), 0);
    refused(d, ERR_UNAVAILABLE, "store_locked", &err);
    snprintf(want, sizeof want, "process %d holds the state directory", (int)pid);
    assert_string_equal(err.detail, want);
    kill(pid, SIGKILL);
    assert_int_equal(waitpid(pid, NULL, 0), pid);
    close(fds[0]);
    close(fds[1]);
    store_close(open_store(d)); // a lock dies with its holder
}

static void test_second_in_one_process(void **state)
{
    struct dir *d = *state;
    struct err err = {0};
    struct store *s = open_store(d);
    refused(d, ERR_UNAVAILABLE, "store_locked", &err);
    struct admission a = admission_of("t", "x.y"); // the first is unharmed
    admit(s, &a);
    store_close(s);
}

// ---- damage -------------------------------------------------------------------------------------------------------------
static void test_garbage(void **state)
{
    struct dir *d = *state;
    struct err err = {0};
    static char garbage[8192];
    memset(garbage, 'g', sizeof garbage);
    assert_int_equal(fd_write_file_atomic(d->fd, "airlock.db", garbage, sizeof garbage, 0600), 0);
    refused(d, ERR_INTERNAL, "store_corrupt", &err);
}

static void test_damaged_pages(void **state)
{
    struct dir *d = *state;
    struct err err = {0};
    struct stat st;
    static char garbage[4096];
    struct store *s = open_store(d);
    for (int i = 0; i < 50; i++) {
        struct admission a = admission_of("t", "x.y");
        admit(s, &a);
    }
    store_close(s);
    memset(garbage, 0x55, sizeof garbage);
    CLEANUP_FD int fd = openat(d->fd, "airlock.db", O_RDWR | O_CLOEXEC);
    assert_int_equal(fstat(fd, &st), 0);
    for (off_t at = 4096 * 2; at < st.st_size; at += 4096 * 3)
        assert_int_equal(fd_pwrite_full(fd, garbage, sizeof garbage, at), 0);
    refused(d, ERR_INTERNAL, "store_corrupt", &err);
}

static void test_chain_cut_by_hand(void **state)
{
    struct dir *d = *state;
    struct err err = {0};
    struct store *s = open_store(d);
    struct admission a = admission_of("t", "x.y");
    admit(s, &a);
    settle(s, &a, "succeeded", 200);
    store_close(s);
    poke(d, "DELETE FROM audit WHERE seq = 2"); // writing on would hide it
    refused(d, ERR_INTERNAL, "store_corrupt", &err);
    assert_string_not_equal(err.remedy, "");
}

static void test_unreadable_keys(void **state)
{
    struct dir *d = *state;
    struct err err = {0};
    store_close(open_store(d));
    CLEANUP_FD int keys = openat(d->fd, "keys", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    assert_int_equal(fd_write_file_atomic(keys, "argv.key", "short", 5, 0600), 0);
    refused(d, ERR_INTERNAL, "key_unreadable", &err);
    assert_int_equal(unlinkat(keys, "argv.key", 0), 0);
    assert_int_equal(fd_write_file_atomic(keys, "snapshot.key", "", 0, 0600), 0);
    refused(d, ERR_INTERNAL, "key_unreadable", &err);
    assert_string_equal(err.detail, "keys/snapshot.key is damaged");
    static const char LONG[33] = "thirty-three bytes are not a key";
    assert_int_equal(fd_write_file_atomic(keys, "snapshot.key", LONG, sizeof LONG, 0600), 0);
    refused(d, ERR_INTERNAL, "key_unreadable", &err);
    assert_int_equal(unlinkat(keys, "snapshot.key", 0), 0);
    assert_int_equal(mkdirat(keys, "snapshot.key", 0700), 0); // there, but not to be read: not made anew
    refused(d, ERR_INTERNAL, "system_error", &err);
    assert_int_equal(unlinkat(keys, "snapshot.key", AT_REMOVEDIR), 0);
    assert_int_equal(fd_write_file_atomic(keys, "receipt.pem", "no key", 6, 0600), 0);
    refused(d, ERR_INTERNAL, "key_unreadable", &err);
}

// ---- a directory with an odd name -----------------------------------------------------------------------------------------
static void test_odd_path(void **state)
{
    const struct dir *d = *state;
    struct dir odd = {0};
    snprintf(odd.path, sizeof odd.path, "%s/a b%%20?c#d", d->path);
    assert_int_equal(mkdir(odd.path, 0700), 0);
    odd.fd = open(odd.path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    struct store *s = open_store(&odd);
    struct admission a = admission_of("t", "x.y");
    admit(s, &a);
    struct verify_report r;
    assert_int_equal(verify_state(odd.path, NULL, NULL, 1, &r), VERIFY_OK);
    store_close(s);
    assert_int_equal(faccessat(odd.fd, "airlock.db", F_OK, 0), 0);
    assert_int_equal(verify_state(odd.path, NULL, NULL, 1, &r), VERIFY_OK);
    fd_close(&odd.fd);
}

// ---- nothing stays open -----------------------------------------------------------------------------------------------------
static void test_descriptors(void **state)
{
    struct dir *d = *state;
    struct err err = {0};
    struct receipt_row row;
    const int before = fd_count_open();
    for (int i = 0; i < 3; i++) {
        struct store *s = open_store(d);
        assert_int_equal(receipt_get(s, "t", "none", &row, &err), 1);
        store_close(s);
        struct verify_report r;
        assert_int_equal(verify_state(d->path, NULL, NULL, 1, &r), VERIFY_OK);
    }
    assert_int_equal(fd_count_open(), before);
}

int main(void)
{
#define T(fn) cmocka_unit_test_setup_teardown(fn, dir_setup, dir_teardown)
    const struct CMUnitTest tests[] = {
        T(test_step_1_makes_what_it_made), T(test_from_version_1), T(test_rows_of_version_1), T(test_verify_version_1),
        T(test_a_step_is_all_or_nothing), T(test_newer),
        T(test_second_server_names_the_first), T(test_second_in_one_process), T(test_garbage), T(test_damaged_pages),
        T(test_chain_cut_by_hand), T(test_unreadable_keys), T(test_odd_path), T(test_descriptors),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
