// A disk that is really full: a small tmpfs in a mount namespace of the test's own. Needs root.
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fixture.h"
#include "store/logfile.h"
#include "store/spool.h"
#include "store/verify.h"

static bool may_mount;

static struct dir *small_disk(const char *size)
{
    char options[40];
    if (!may_mount) {
        print_message("skipped: mounting a tmpfs needs root\n");
        skip();
    }
    struct dir *d = dir_new();
    snprintf(options, sizeof options, "size=%s,mode=0700", size);
    assert_int_equal(mount("airlock-test", d->path, "tmpfs", 0, options), 0);
    fd_close(&d->fd);
    d->fd = open(d->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    assert_true(d->fd >= 0);
    return d;
}

static void remove_disk(struct dir *d)
{
    fd_close(&d->fd);
    assert_int_equal(umount2(d->path, MNT_DETACH), 0);
    d->fd = open(d->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    dir_free(d);
}

// Takes all that is free but `leave` bytes.
static void ballast(const struct dir *d, int64_t leave)
{
    CLEANUP_FD int fd = openat(d->fd, "ballast", O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    const int64_t take = fd_free_bytes(d->fd) - leave;
    assert_true(take > 0);
    assert_int_equal(posix_fallocate(fd, 0, take), 0);
}

static int admit_fn(struct store_tx *tx, void *arg, struct err *err)
{
    return evidence_admit(tx, arg, NULL, err);
}

static bool count_receipt(void *arg, const struct receipt_row *row)
{
    ++*(int *)arg;
    return true;
}

static int receipts(struct store *s)
{
    int n = 0;
    struct err err = {0};
    const struct page page = {.tenant = "t", .limit = 100000};
    assert_int_equal(receipt_list(s, &page, NULL, count_receipt, &n, &err), 0);
    return n;
}

static void test_database(void **state)
{
    struct dir *d = small_disk("12m");
    struct store *s = open_store(d);
    struct err err = {0};
    struct verify_report r;
    int good = 0, bad = 0;
    ballast(d, 1 << 20);
    for (int i = 0; i < 2000 && bad < 20; i++) {
        struct admission a = admission_of("t", "x.y");
        if (store_write(s, admit_fn, &a, &err) == 0) {
            good++;
        } else {
            assert_err(err, ERR_UNAVAILABLE, "disk_full");
            bad++;
        }
    }
    assert_int_equal(bad, 20);
    assert_true(good > 0);
    assert_int_equal(receipts(s), good); // all that was acknowledged, nothing else
    assert_int_equal(unlinkat(d->fd, "ballast", 0), 0);
    for (int i = 0; i < 50; i++) { // and on it goes
        struct admission a = admission_of("t", "x.y");
        admit(s, &a);
    }
    assert_int_equal(receipts(s), good + 50);
    if (verify_state(d->path, NULL, NULL, 1, &r) != VERIFY_OK)
        fail_msg("verdict %d: %s", r.verdict, r.fault);
    store_close(s);
    assert_int_equal(verify_state(d->path, NULL, NULL, 1, &r), VERIFY_OK);
    assert_int_equal(r.pending_receipts, good + 50);
    remove_disk(d);
}

static void test_first_start(void **state)
{
    struct dir *d = small_disk("64k");
    struct err err = {0};
    const struct store_options o = {.state_dirfd = d->fd, .server_version = "test"};
    assert_null(store_open(&o, &err));
    assert_err(err, ERR_UNAVAILABLE, "disk_full");
    remove_disk(d);
}

static void test_reserve(void **state)
{
    struct dir *d = small_disk("12m");
    struct err err = {0};
    const struct store_options o = {.state_dirfd = d->fd, .server_version = "test", .reserve_bytes = 4 << 20};
    struct store *s = store_open(&o, &err);
    assert_non_null(s);
    assert_int_equal(store_reserve_check(s, &err), 0);
    store_close(s);
    ballast(d, 3 << 20);
    s = store_open(&o, &err);
    assert_non_null(s);
    assert_int_equal(store_reserve_check(s, &err), -1);
    assert_err(err, ERR_UNAVAILABLE, "disk_full");
    struct admission a = admission_of("t", "x.y");
    admit(s, &a); // outcomes still fit
    settle(s, &a, "succeeded", 200);
    store_close(s);
    remove_disk(d);
}

static void test_spool(void **state)
{
    struct dir *d = small_disk("1m");
    struct err err = {0};
    struct spool_state st;
    static char data[64 << 10];
    struct spool *sp = spool_open(d->fd, "cmd1", &err);
    uint64_t end = 0;
    int result;
    memset(data, 'd', sizeof data);
    do {
        const struct spool_piece pieces[] = {{SPOOL_STDERR, end / sizeof data, "e", 1},
                                             {SPOOL_STDOUT, end, data, sizeof data}};
        result = spool_write(sp, pieces, 2, &err);
        end += result == 0 ? sizeof data : 0;
    } while (result == 0);
    assert_err(err, ERR_UNAVAILABLE, "disk_full");
    assert_true(end > 0);
    spool_state(sp, &st);
    assert_int_equal(st.kept[0], end);
    assert_int_equal(st.kept[1], end / sizeof data); // nothing of the failed call
    struct stat file;
    assert_int_equal(fstatat(d->fd, "cmd1.stdout", &file, 0), 0);
    assert_int_equal(file.st_size, end);
    char before[DIGEST_TEXT_MAX], after[DIGEST_TEXT_MAX];
    spool_digest(sp, SPOOL_STDOUT, before);
    spool_close(sp);
    sp = spool_open(d->fd, "cmd1", &err);
    assert_non_null(sp);
    spool_digest(sp, SPOOL_STDOUT, after);
    assert_string_equal(before, after);
    // Room again: the same bytes are accepted where they belong.
    assert_int_equal(mount("airlock-test", d->path, "tmpfs", MS_REMOUNT, "size=4m"), 0);
    const struct spool_piece again = {SPOOL_STDOUT, end, data, sizeof data};
    assert_int_equal(spool_write(sp, &again, 1, &err), 0);
    spool_state(sp, &st);
    assert_int_equal(st.kept[0], end + sizeof data);
    spool_close(sp);
    remove_disk(d);
}

static bool sum_log(void *arg, const struct log_entry *e)
{
    int *n = arg;
    n[strcmp(e->stream, "gap") == 0] += strcmp(e->stream, "gap") == 0 ? atoi(e->text) : 1;
    return true;
}

static void test_log(void **state)
{
    struct dir *d = small_disk("256k");
    struct err err = {0};
    struct logfile *l = logfile_open(d->fd, &err);
    static char text[4000];
    int good = 0, n[2] = {0, 0};
    memset(text, 't', sizeof text);
    for (int i = 0; i < 200; i++) {
        struct log_entry e = {.source = LOGSRC_CONSOLE, .text = text, .text_len = sizeof text};
        good += logfile_append(l, &e) == 0;
    }
    assert_true(good > 20 && good < 200);
    assert_int_equal(mount("airlock-test", d->path, "tmpfs", MS_REMOUNT, "size=4m"), 0);
    struct log_entry e = {.source = LOGSRC_CONSOLE, .text = "back", .text_len = 4};
    assert_int_equal(logfile_append(l, &e), 0);
    assert_int_equal(logfile_read(d->fd, 0, 0, 1000, sum_log, n, &err), 0);
    assert_int_equal(n[0], good + 1);
    assert_int_equal(n[1], 200 - good);
    logfile_close(l);
    remove_disk(d);
}

int main(void)
{
    may_mount = unshare(CLONE_NEWNS) == 0 && mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_database), cmocka_unit_test(test_first_start), cmocka_unit_test(test_reserve),
        cmocka_unit_test(test_spool), cmocka_unit_test(test_log),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
