// Groups: one commit for many, a failed item leaves no trace, a failed commit leaves nothing of anybody.
#include <pthread.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fixture.h"
#include "store/int.h"

static int append_fn(struct store_tx *tx, void *arg, struct err *err)
{
    return event_append(tx, "t", arg ? arg : "x.y", NULL, "{}", err);
}

static int fail_fn(struct store_tx *tx, void *arg, struct err *err)
{
    if (append_fn(tx, (void *)"bad.one", err) != 0)
        return -1;
    const struct audit_note n = {.tenant = "t", .operation = "bad.one"};
    return audit_append(tx, &n, err) == 0 ? err_set(err, ERR_CONFLICT, "refused", "refused") : -1;
}

static int note_fn(struct store_tx *tx, void *arg, struct err *err)
{
    const struct audit_note n = {.tenant = "t", .operation = arg};
    return audit_append(tx, &n, err);
}

static bool count_event(void *arg, const struct event_row *row)
{
    assert_string_not_equal(row->kind, "bad.one");
    ++*(int *)arg;
    return true;
}

static int events(struct store *s)
{
    int n = 0;
    struct err err = {0};
    assert_int_equal(event_list(s, "t", 0, 100000, count_event, &n, &err), 0);
    return n;
}

// ---- items that wait for each other -------------------------------------------------------------------------------------
struct gate {
    pthread_mutex_t lock;
    pthread_cond_t cond;
    bool entered, open;
    int done, failed;
    char codes[16][ERR_CODE_MAX];
};
#define GATE_INIT {.lock = PTHREAD_MUTEX_INITIALIZER, .cond = PTHREAD_COND_INITIALIZER}

// Holds the writer inside a transaction until the test has queued what is to be one group.
static int hold_fn(struct store_tx *tx, void *arg, struct err *err)
{
    struct gate *g = arg;
    pthread_mutex_lock(&g->lock);
    g->entered = true;
    pthread_cond_broadcast(&g->cond);
    while (!g->open)
        pthread_cond_wait(&g->cond, &g->lock);
    pthread_mutex_unlock(&g->lock);
    return 0;
}

static void count_done(struct gate *g, const struct err *err)
{
    pthread_mutex_lock(&g->lock);
    if (err && g->failed < 16)
        strcpy(g->codes[g->failed], err->code);
    g->failed += err != NULL;
    g->done++;
    pthread_cond_broadcast(&g->cond);
    pthread_mutex_unlock(&g->lock);
}

static void hold(struct store *s, struct gate *g)
{
    assert_int_equal(store_submit(s, hold_fn, NULL, g), 0);
    pthread_mutex_lock(&g->lock);
    while (!g->entered)
        pthread_cond_wait(&g->cond, &g->lock);
    pthread_mutex_unlock(&g->lock);
}

static void release(struct gate *g, int wanted)
{
    pthread_mutex_lock(&g->lock);
    g->open = true;
    pthread_cond_broadcast(&g->cond);
    while (g->done < wanted)
        pthread_cond_wait(&g->cond, &g->lock);
    pthread_mutex_unlock(&g->lock);
}

static struct gate *the_gate; // of done callbacks whose arg is something else

static void done_cb(void *arg, const struct err *err)
{
    count_done(the_gate, err);
}

static void test_one_commit_for_many(void **state)
{
    struct store *s = open_store(*state);
    struct gate g = GATE_INIT;
    struct store_stats before, after;
    the_gate = &g;
    hold(s, &g);
    for (int i = 0; i < 100; i++)
        assert_int_equal(store_submit(s, i % 10 == 5 ? fail_fn : append_fn, done_cb, NULL), 0);
    store_stats(s, &before);
    assert_int_equal(before.queue_depth, 100);
    release(&g, 100);
    store_stats(s, &after);
    assert_int_equal(after.commits - before.commits, 2); // the held one and the group
    assert_int_equal(g.failed, 10);
    assert_string_equal(g.codes[0], "refused");
    assert_int_equal(events(s), 90); // the failed left nothing
    struct err err = {0};
    CLEANUP_FREE char *text = audit_checkpoint(s, &err);
    CLEANUP_JSON json_t *c = json_loads(text, 0, NULL);
    assert_int_equal(json_get_int(c, "size", -1), 0); // nor did their audit entries
    store_close(s);
}

static void test_failed_commit_fails_the_group(void **state)
{
    struct store *s = open_store(*state);
    struct err err = {0};
    struct gate g = GATE_INIT;
    the_gate = &g;
    must_write(s, note_fn, (void *)"first");
    hold(s, &g);
    for (int i = 0; i < 5; i++)
        assert_int_equal(store_submit(s, i == 2 ? fail_fn : i == 3 ? note_fn : append_fn, done_cb, NULL), 0);
    store_fail_commit_after(s, 2); // 1: the held one
    release(&g, 5);
    assert_int_equal(g.failed, 5);
    int refused = 0, full = 0;
    for (int i = 0; i < 5; i++) {
        refused += strcmp(g.codes[i], "refused") == 0;
        full += strcmp(g.codes[i], "disk_full") == 0;
    }
    assert_int_equal(refused, 1); // its own fault stays its own
    assert_int_equal(full, 4);
    assert_int_equal(events(s), 0);
    struct store_stats stats;
    store_stats(s, &stats);
    assert_int_equal(stats.failed_commits, 1);
    must_write(s, note_fn, (void *)"second"); // the chain goes on where it was
    CLEANUP_FREE char *text = audit_checkpoint(s, &err);
    CLEANUP_JSON json_t *c = json_loads(text, 0, NULL);
    assert_int_equal(json_get_int(c, "size", -1), 2);
    store_close(s);
}

static void test_single_failure(void **state)
{
    struct store *s = open_store(*state);
    struct err err = {0};
    store_fail_commit_after(s, 1);
    assert_int_equal(store_write(s, append_fn, NULL, &err), -1);
    assert_err(err, ERR_UNAVAILABLE, "disk_full");
    must_write(s, append_fn, NULL);
    store_fail_commit_after(s, 1);
    store_fail_commit_after(s, 0);
    must_write(s, append_fn, NULL);
    assert_int_equal(store_write(s, fail_fn, NULL, &err), -1);
    assert_err(err, ERR_CONFLICT, "refused");
    assert_int_equal(events(s), 2);
    store_close(s);
}

// ---- from the writer's own thread ------------------------------------------------------------------------------------------
struct chained {
    struct store *s;
    struct gate *g;
    int write_result;
    struct err err;
};

static void second_done(void *arg, const struct err *err)
{
    count_done(((struct chained *)arg)->g, err);
}

static int chained_fn(struct store_tx *tx, void *arg, struct err *err)
{
    return append_fn(tx, NULL, err);
}

static void first_done(void *arg, const struct err *err)
{
    struct chained *c = arg;
    c->write_result = store_write(c->s, chained_fn, NULL, &c->err); // must not wait for itself
    assert_int_equal(store_submit(c->s, chained_fn, second_done, c), 0);
}

static void test_submitting_from_a_callback(void **state)
{
    struct store *s = open_store(*state);
    struct gate g = GATE_INIT;
    struct chained c = {.s = s, .g = &g};
    assert_int_equal(store_submit(s, chained_fn, first_done, &c), 0);
    release(&g, 1);
    assert_int_equal(c.write_result, -1);
    assert_err(c.err, ERR_INTERNAL, "store_reentered");
    assert_int_equal(events(s), 2);
    store_close(s);
}

struct shown {
    struct store *s;
    pthread_t by;
    int times, events;
};

static int shown_fn(struct store_tx *tx, void *arg, struct err *err)
{
    return append_fn(tx, NULL, err);
}

static void show(void *arg)
{
    struct shown *x = arg;
    x->by = pthread_self();
    x->times++;
    x->events = events(x->s);
}

// What goes with the rows is done when they can be read, before the writer of them goes on; not when they are not kept.
static void test_then(void **state)
{
    struct shown x = {.s = open_store(*state)};
    struct err err = {0};
    assert_int_equal(store_write_then(x.s, shown_fn, show, &x, &err), 0);
    assert_int_equal(x.times, 1);
    assert_int_equal(x.events, 1);
    assert_false(pthread_equal(x.by, pthread_self()));
    assert_int_equal(store_write_then(x.s, fail_fn, show, &x, &err), -1);
    store_fail_commit_after(x.s, 1);
    assert_int_equal(store_write_then(x.s, shown_fn, show, &x, &err), -1);
    assert_int_equal(x.times, 1);
    assert_int_equal(events(x.s), 1);
    store_close(x.s);
}

static void test_close_commits_what_is_queued(void **state)
{
    struct dir *d = *state;
    struct store *s = open_store(d);
    for (int i = 0; i < 1000; i++)
        assert_int_equal(store_submit(s, append_fn, NULL, NULL), 0);
    store_close(s);
    s = open_store(d);
    assert_int_equal(events(s), 1000);
    store_close(s);
}

// ---- many threads -------------------------------------------------------------------------------------------------------------
enum { THREADS = 8, WRITES = 50 };

static void *write_and_read(void *arg)
{
    struct store *s = arg;
    struct err err = {0};
    for (int i = 0; i < WRITES; i++) {
        if (store_write(s, i % 2 ? append_fn : note_fn, i % 2 ? NULL : (void *)"x.y", &err) != 0)
            return (void *)1;
        int n = 0;
        if (event_list(s, "t", 0, 1000, count_event, &n, &err) != 0)
            return (void *)1;
        const struct audit_note note = {.tenant = "t", .operation = "read"};
        if (audit_submit(s, &note) != 0)
            return (void *)1;
    }
    return NULL;
}

static void test_many_threads(void **state)
{
    struct store *s = open_store(*state);
    pthread_t threads[THREADS];
    void *result;
    for (int i = 0; i < THREADS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, write_and_read, s), 0);
    for (int i = 0; i < THREADS; i++) {
        pthread_join(threads[i], &result);
        assert_null(result);
    }
    assert_int_equal(events(s), THREADS * WRITES / 2);
    assert_null(s->readers ? s->readers->next_of_store : NULL); // threads that ended closed their connections
    store_close(s);
}

struct late_reader {
    struct store *s;
    struct gate g;
};

static void *read_until_told(void *arg)
{
    struct late_reader *r = arg;
    struct gate *g = &r->g;
    struct err err = {0};
    int n = 0;
    assert_int_equal(event_list(r->s, "t", 0, 1, count_event, &n, &err), 0);
    pthread_mutex_lock(&g->lock);
    g->entered = true;
    pthread_cond_broadcast(&g->cond);
    while (!g->open)
        pthread_cond_wait(&g->cond, &g->lock);
    pthread_mutex_unlock(&g->lock);
    return NULL;
}

static void test_closed_before_a_reader_ends(void **state)
{
    pthread_t thread;
    struct store *s = open_store(*state);
    struct late_reader r = {s, GATE_INIT};
    assert_int_equal(pthread_create(&thread, NULL, read_until_told, &r), 0);
    pthread_mutex_lock(&r.g.lock);
    while (!r.g.entered)
        pthread_cond_wait(&r.g.cond, &r.g.lock);
    pthread_mutex_unlock(&r.g.lock);
    store_close(s);
    release(&r.g, 0);
    pthread_join(thread, NULL);
    s = open_store(*state);
    assert_int_equal(events(s), 0);
    store_close(s);
}

// ---- a reader does not wait, and does not make others wait ----------------------------------------------------------------------
static void test_reading_while_the_writer_is_inside(void **state)
{
    struct store *s = open_store(*state);
    struct gate g = GATE_INIT;
    must_write(s, append_fn, NULL);
    hold(s, &g);
    assert_int_equal(events(s), 1); // would never return if it waited
    release(&g, 0);
    store_close(s);
}

struct nested {
    struct store *s;
    int inner;
};

static bool list_inside(void *arg, const struct event_row *row)
{
    struct nested *n = arg;
    struct err err = {0};
    assert_int_equal(event_list(n->s, "t", 0, 10, count_event, &n->inner, &err), 0);
    return true;
}

static void test_a_list_inside_a_list(void **state)
{
    struct store *s = open_store(*state);
    struct nested n = {.s = s};
    struct err err = {0};
    must_write(s, append_fn, NULL);
    must_write(s, append_fn, NULL);
    assert_int_equal(event_list(s, "t", 0, 10, list_inside, &n, &err), 0);
    assert_int_equal(n.inner, 4);
    store_close(s);
}

// ---- files ----------------------------------------------------------------------------------------------------------------------
static void test_checkpoint_file(void **state)
{
    struct dir *d = *state;
    struct store *s = open_store(d);
    must_write(s, note_fn, (void *)"x.y");
    store_close(s);
    CLEANUP_BUF struct buf text = BUF_INIT(10000);
    assert_int_equal(fd_read_file(d->fd, "checkpoint.json", &text), 0);
    CLEANUP_JSON json_t *c = json_loads(buf_text(&text), 0, NULL);
    assert_int_equal(json_get_int(c, "size", -1), 1);
    struct stat st;
    assert_int_not_equal(fstatat(d->fd, "airlock.db-wal", &st, 0), 0); // closed cleanly
}

static void test_the_log_stays_bounded(void **state)
{
    struct store *s = open_store(*state);
    struct store_stats stats;
    static char big[8000];
    memset(big, 'x', sizeof big - 1);
    for (int i = 0; i < 20; i++) {
        for (int k = 0; k < 300; k++)
            assert_int_equal(store_submit(s, append_fn, NULL, big), 0);
        must_write(s, append_fn, NULL);
    }
    store_stats(s, &stats);
    assert_true(stats.db_bytes > 40u << 20);
    assert_true(stats.wal_bytes <= 20u << 20);
    store_close(s);
}

static void test_reserve(void **state)
{
    const struct dir *d = *state;
    struct err err = {0};
    struct store_options o = {.state_dirfd = d->fd, .server_version = "test", .reserve_bytes = 1};
    struct store *s = store_open(&o, &err);
    assert_non_null(s);
    assert_int_equal(store_reserve_check(s, &err), 0);
    store_close(s);
    o.reserve_bytes = UINT64_MAX / 2;
    s = store_open(&o, &err);
    assert_int_equal(store_reserve_check(s, &err), -1);
    assert_err(err, ERR_UNAVAILABLE, "disk_full");
    assert_int_equal(store_reserve_check(s, &err), -1); // as remembered
    store_close(s);
}

// ---- what it costs ----------------------------------------------------------------------------------------------------------------
static int by_size(const void *a, const void *b)
{
    const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return x < y ? -1 : x > y;
}

// Printed, not judged: bench/ judges on a quiet machine.
static void test_latency(void **state)
{
    struct store *s = open_store(*state);
    enum { N = 300 };
    int64_t us[N];
    for (int i = 0; i < N; i++) {
        const int64_t t0 = clock_mono_us();
        must_write(s, append_fn, NULL);
        us[i] = clock_mono_us() - t0;
    }
    qsort(us, N, sizeof us[0], by_size);
    print_message("one commit: p50 %lld us, p90 %lld us\n", (long long)us[N / 2], (long long)us[N * 9 / 10]);
    store_close(s);
}

int main(void)
{
#define T(fn) cmocka_unit_test_setup_teardown(fn, dir_setup, dir_teardown)
    const struct CMUnitTest tests[] = {
        T(test_one_commit_for_many), T(test_failed_commit_fails_the_group), T(test_single_failure),
        T(test_submitting_from_a_callback), T(test_then), T(test_close_commits_what_is_queued), T(test_many_threads),
        T(test_closed_before_a_reader_ends), T(test_reading_while_the_writer_is_inside), T(test_a_list_inside_a_list),
        T(test_checkpoint_file), T(test_the_log_stays_bounded), T(test_reserve), T(test_latency),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
