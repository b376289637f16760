// A log: bounded, numbered, with every hole told.
#include <fcntl.h>
#include <pthread.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/enc.h"
#include "base/limits.h"
#include "fixture.h"
#include "store/logfile.h"

static struct logfile *open_log(const struct dir *d)
{
    struct err err = {0};
    struct logfile *l = logfile_open(d->fd, &err);
    assert_non_null(l);
    return l;
}

static int64_t add_as(struct logfile *l, enum log_source source, const char *text, size_t len)
{
    struct log_entry e = {.source = source, .stream = "stdout", .command_id = "cmd1", .text = text,
                          .text_len = (uint32_t)len};
    assert_int_equal(logfile_append(l, &e), 0);
    assert_true(e.at_ms > 0);
    return e.seq;
}

static int64_t add(struct logfile *l, const char *text)
{
    return add_as(l, LOGSRC_COMMAND, text, strlen(text));
}

struct got {
    unsigned n, gaps;
    int64_t first, last;
    int64_t missing;
    char text[3 * LIMIT_LOG_TEXT + 1];
    uint32_t text_len;
    bool truncated, redacted;
    unsigned stop_after;
};

static bool take(void *arg, const struct log_entry *e)
{
    struct got *g = arg;
    assert_true(e->seq > g->last);
    assert_true(enc_utf8_valid(e->text, e->text_len));
    g->first = g->n ? g->first : e->seq;
    g->last = e->seq;
    g->n++;
    if (strcmp(e->stream, "gap") == 0) {
        g->gaps++;
        g->missing += atoll(e->text);
    }
    memcpy(g->text, e->text, e->text_len);
    g->text[e->text_len] = 0;
    g->text_len = e->text_len;
    g->truncated = e->truncated;
    g->redacted = e->redacted;
    return g->n != g->stop_after;
}

static struct got read_log(const struct dir *d, int64_t after, int source, unsigned limit)
{
    struct got g = {.last = after};
    struct err err = {0};
    assert_int_equal(logfile_read(d->fd, after, source, limit, take, &g, &err), 0);
    return g;
}

static void test_round_trip(void **state)
{
    struct dir *d = *state;
    assert_int_equal(read_log(d, 0, 0, 10).n, 0); // no files yet
    struct logfile *l = open_log(d);
    assert_int_equal(logfile_last_seq(l), 0);
    struct log_entry e = {.source = LOGSRC_CONSOLE, .at_ms = 1234, .text = "\"quoted\\\"\n\t\x01 \xc3\xa9", .redacted = true};
    e.text_len = (uint32_t)strlen(e.text);
    assert_int_equal(logfile_append(l, &e), 0);
    assert_int_equal(e.seq, 1);
    assert_int_equal(e.at_ms, 1234);
    struct got g = read_log(d, 0, 0, 10);
    assert_int_equal(g.n, 1);
    assert_string_equal(g.text, e.text);
    assert_true(g.redacted);
    assert_false(g.truncated);
    add(l, "second");
    add_as(l, LOGSRC_VMM, "nul\0inside", 10);
    g = read_log(d, 2, 0, 10);
    assert_int_equal(g.n, 1);
    assert_int_equal(g.text_len, 10);
    assert_memory_equal(g.text, "nul\0inside", 10);
    assert_int_equal(read_log(d, 0, LOGSRC_COMMAND, 10).last, 2);
    assert_int_equal(read_log(d, 0, 0, 2).last, 2);
    assert_int_equal(read_log(d, 0, 0, 0).n, 0);
    assert_int_equal(logfile_last_seq(l), 3);
    logfile_close(l);
    logfile_close(NULL);
}

static void test_text_that_is_not_text(void **state)
{
    struct dir *d = *state;
    struct logfile *l = open_log(d);
    add(l, "a\xff\xfe" "b\xed\xa0\x80" "c\xc3");
    struct got g = read_log(d, 0, 0, 1);
    assert_string_equal(g.text, "a\xef\xbf\xbd\xef\xbf\xbd" "b\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd" "c\xef\xbf\xbd");
    static char wide[LIMIT_LOG_TEXT + 10];
    memset(wide, '\x01', sizeof wide); // six characters each in the file
    add_as(l, LOGSRC_COMMAND, wide, LIMIT_LOG_TEXT);
    g = read_log(d, 1, 0, 1);
    assert_int_equal(g.text_len, LIMIT_LOG_TEXT);
    assert_false(g.truncated);
    memset(wide, 'x', sizeof wide);
    memcpy(wide + LIMIT_LOG_TEXT - 1, "\xc3\xa9", 2); // would be cut in the middle
    add_as(l, LOGSRC_COMMAND, wide, sizeof wide);
    g = read_log(d, 2, 0, 1);
    assert_int_equal(g.text_len, LIMIT_LOG_TEXT - 1);
    assert_true(g.truncated);
    logfile_close(l);
}

static void test_reopening(void **state)
{
    struct dir *d = *state;
    struct logfile *l = open_log(d);
    add(l, "one");
    add(l, "two");
    logfile_close(l);
    CLEANUP_FD int fd = openat(d->fd, "younger.ndjson", O_WRONLY | O_APPEND | O_CLOEXEC);
    assert_int_equal(fd_write_full(fd, "{\"seq\":3,\"at\":1,\"sou", 21), 0); // cut by a crash
    assert_int_equal(read_log(d, 0, 0, 10).n, 2);
    l = open_log(d);
    assert_int_equal(logfile_last_seq(l), 2);
    assert_int_equal(add(l, "three"), 3);
    struct got g = read_log(d, 0, 0, 10);
    assert_int_equal(g.n, 3);
    assert_int_equal(g.gaps, 0);
    assert_string_equal(g.text, "three");
    logfile_close(l);
}

static uint64_t bytes_on_disk(const struct dir *d)
{
    struct stat st;
    uint64_t n = 0;
    if (fstatat(d->fd, "older.ndjson", &st, 0) == 0)
        n += (uint64_t)st.st_size;
    if (fstatat(d->fd, "younger.ndjson", &st, 0) == 0)
        n += (uint64_t)st.st_size;
    return n;
}

static void test_rotation_by_entries(void **state)
{
    struct dir *d = *state;
    struct logfile *l = open_log(d);
    for (int i = 0; i < LIMIT_LOG_ENTRIES / 2; i++)
        add(l, "x");
    assert_int_equal(read_log(d, 0, 0, 100000).gaps, 0);
    for (int i = 0; i < LIMIT_LOG_ENTRIES; i++)
        add(l, "x");
    add(l, "last");
    struct got g = read_log(d, 0, 0, 100000);
    assert_int_equal(g.gaps, 1);
    assert_int_equal(g.n - g.gaps, LIMIT_LOG_ENTRIES / 2 + 1);
    assert_true(g.n <= LIMIT_LOG_ENTRIES);
    assert_int_equal(g.missing, LIMIT_LOG_ENTRIES);
    assert_int_equal(g.first, LIMIT_LOG_ENTRIES); // the gap has the last missing number …
    assert_int_equal(read_log(d, g.first, 0, 100000).gaps, 0); // … so reading on does not tell it again
    assert_int_equal(read_log(d, 500, 0, 100000).missing, LIMIT_LOG_ENTRIES - 500);
    assert_int_equal(read_log(d, 0, 0, 1).gaps, 1);
    assert_int_equal(read_log(d, 0, LOGSRC_COMMAND, 1).gaps, 1);
    logfile_close(l);
    l = open_log(d);
    assert_int_equal(add(l, "after"), LIMIT_LOG_ENTRIES * 3 / 2 + 2);
    logfile_close(l);
}

static void test_rotation_by_bytes(void **state)
{
    struct dir *d = *state;
    struct logfile *l = open_log(d);
    static char text[LIMIT_LOG_TEXT];
    memset(text, 'y', sizeof text);
    for (int i = 0; i < 2000; i++) {
        add_as(l, LOGSRC_CONSOLE, text, sizeof text);
        assert_true(bytes_on_disk(d) <= 2 * LOGFILE_SEGMENT_BYTES);
    }
    struct got g = read_log(d, 0, 0, 100000);
    assert_int_equal(g.last, 2000);
    assert_int_equal(g.missing + (int64_t)(g.n - g.gaps), 2000);
    for (int64_t after = g.first; after < 2000; after += 37) { // halving finds every place
        struct got from = read_log(d, after, 0, 1);
        assert_int_equal(from.first, after + 1);
        assert_int_equal(from.gaps, 0);
    }
    logfile_close(l);
}

static void test_damaged_line_counts_as_dropped(void **state)
{
    struct dir *d = *state;
    struct logfile *l = open_log(d);
    add(l, "one");
    add(l, "two");
    add(l, "three");
    CLEANUP_BUF struct buf text = BUF_INIT(4096);
    assert_int_equal(fd_read_file(d->fd, "younger.ndjson", &text), 0);
    const char *line = strchr(buf_text(&text), '\n') + 1;
    CLEANUP_FD int fd = openat(d->fd, "younger.ndjson", O_WRONLY | O_CLOEXEC);
    assert_int_equal(fd_pwrite_full(fd, "garbage", 7, line - buf_text(&text)), 0);
    struct got g = read_log(d, 0, 0, 10);
    assert_int_equal(g.n, 3);
    assert_int_equal(g.gaps, 1);
    assert_int_equal(g.missing, 1);
    logfile_close(l);
}

static void test_a_write_that_fails_leaves_a_number(void **state)
{
    struct dir *d = *state;
    struct logfile *l = open_log(d);
    add(l, "one");
    // Rotation into a name that cannot be made: a directory is in the way.
    struct log_entry e = {.source = LOGSRC_VMM, .text = "x", .text_len = 1};
    static char big[LIMIT_LOG_TEXT];
    memset(big, 'z', sizeof big);
    assert_int_equal(mkdirat(d->fd, "older.ndjson", 0700), 0);
    int failed = 0;
    for (int i = 0; i < 600; i++) {
        e.text = big;
        e.text_len = sizeof big;
        failed += logfile_append(l, &e) != 0;
    }
    assert_true(failed > 0);
    assert_int_equal(unlinkat(d->fd, "older.ndjson", AT_REMOVEDIR), 0);
    add(l, "after");
    struct got g = read_log(d, 0, 0, 10000);
    assert_int_equal(g.missing, failed);
    assert_int_equal(g.last, 602);
    assert_string_equal(g.text, "after");
    logfile_close(l);
}

// ---- beside a writer ------------------------------------------------------------------------------------------------------
static void *append_many(void *arg)
{
    static char text[2000];
    memset(text, 't', sizeof text);
    for (int i = 0; i < 8000; i++)
        add_as(arg, LOGSRC_CONSOLE, text, (size_t)(i % 2000));
    return NULL;
}

static void test_reading_beside_rotation(void **state)
{
    struct dir *d = *state;
    struct logfile *l = open_log(d);
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, append_many, l), 0);
    int64_t last = 0, seen = 0, missing = 0;
    while (last < 8000) {
        struct got g = read_log(d, last, 0, 500);
        last = g.last;
        seen += g.n - g.gaps;
        missing += g.missing;
    }
    pthread_join(thread, NULL);
    assert_int_equal(seen + missing, 8000);
    logfile_close(l);
}

static void test_names(void **state)
{
    assert_int_equal(log_source_parse("console"), LOGSRC_CONSOLE);
    assert_int_equal(log_source_parse("command"), LOGSRC_COMMAND);
    assert_int_equal(log_source_parse("Console"), -1);
    assert_string_equal(log_source_name(LOGSRC_VMM), "vmm");
    assert_null(log_source_name((enum log_source)9));
}

int main(void)
{
#define T(fn) cmocka_unit_test_setup_teardown(fn, dir_setup, dir_teardown)
    const struct CMUnitTest tests[] = {
        T(test_round_trip), T(test_text_that_is_not_text), T(test_reopening), T(test_rotation_by_entries),
        T(test_rotation_by_bytes), T(test_damaged_line_counts_as_dropped), T(test_a_write_that_fails_leaves_a_number),
        T(test_reading_beside_rotation), T(test_names),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
