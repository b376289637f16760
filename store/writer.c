// The one thread that writes: takes what is queued, commits it in one transaction, tells everybody. There is no delay to
// gather more for what somebody waits for: while a commit is being synced the next group gathers by itself.
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/clock.h"
#include "base/log.h"
#include "store/int.h"

#define GROUP_MAX 256
#define QUEUE_MAX 8192             // then the submitter waits: evidence is held back, never dropped
#define CHECKPOINT_FILE_MS 1000    // checkpoint.json at most once a second, when there is nothing else to do …
#define CHECKPOINT_BUSY_MS 5000    // … or when there always is
#define WAL_FRAMES_IDLE 1000       // moved into the database when idle (SQLite's own default) …
#define WAL_FRAMES_BUSY 3000       // … or anyway

struct waiter {
    pthread_mutex_t lock;
    pthread_cond_t cond;
    void (*then)(void *arg);
    bool ready, failed;
    struct err err;
};

static const struct err OUT_OF_MEMORY = {.kind = ERR_INTERNAL, .code = "out_of_memory", .detail = "out of memory"};

// ---- outcomes ---------------------------------------------------------------------------------------------------
static void item_fail(struct item *it, const struct err *err)
{
    if (it->waiter)
        it->err = &it->waiter->err;
    else if (!it->err)
        it->err = malloc(sizeof *it->err);
    if (it->err)
        *it->err = *err;
    else
        it->err = (struct err *)&OUT_OF_MEMORY;
}

static void item_tell(struct item *it)
{
    struct waiter *w = it->waiter;
    if (w) { // *it and *w are gone once the lock is given back
        pthread_mutex_lock(&w->lock);
        w->failed = it->err != NULL;
        w->ready = true;
        pthread_cond_signal(&w->cond);
        pthread_mutex_unlock(&w->lock);
        return;
    }
    if (it->done)
        it->done(it->arg, it->err);
    if (it->err != &OUT_OF_MEMORY)
        free(it->err);
    free(it);
}

// ---- one group ----------------------------------------------------------------------------------------------------
static int run(struct db *db, const char *sql, struct err *err)
{
    CLEANUP_STMT struct stmt *st = db_stmt(db, sql, err);
    return db_run(st, err);
}

static void rollback(struct db *db)
{
    if (db_in_transaction(db))
        (void)run(db, "ROLLBACK", NULL);
}

// One item inside the transaction. A failed one leaves no trace. False: the transaction itself is gone (*err).
static bool run_item(struct store_tx *tx, struct item *it, bool savepoint, struct err *err)
{
    const struct chain_head head = tx->head;
    const bool events = tx->events;
    struct err mine = {0};
    if (savepoint && run(tx->db, "SAVEPOINT item", err) != 0)
        return false;
    if (it->fn(tx, it->arg, &mine) == 0 && db_in_transaction(tx->db))
        return !savepoint || run(tx->db, "RELEASE item", err) == 0;
    if (mine.kind == ERR_NONE)
        err_set(&mine, ERR_INTERNAL, "store_error", "the database failed");
    item_fail(it, &mine);
    tx->head = head;
    tx->events = events;
    if (!db_in_transaction(tx->db)) { // SQLite gave the whole transaction up: full, I/O error, out of memory
        *err = mine;
        return false;
    }
    if (!savepoint) // alone in its group, which is rolled back
        return true;
    return run(tx->db, "ROLLBACK TO item", err) == 0 && run(tx->db, "RELEASE item", err) == 0;
}

static int injected_failure(struct store *s, struct err *err)
{
    unsigned n = atomic_load(&s->fail_after);
    while (n > 0 && !atomic_compare_exchange_weak(&s->fail_after, &n, n - 1))
        ;
    return n == 1 ? err_set(err, ERR_UNAVAILABLE, "disk_full", "the host's disk is full") : 0;
}

static int commit(struct store_tx *tx, struct err *err)
{
    struct store *s = tx->store;
    const int64_t t0 = clock_mono_us();
    if (tx->head.size != s->head.size && audit_sign_head(tx, err) != 0)
        return -1;
    if (injected_failure(s, err) != 0 || run(tx->db, "COMMIT", err) != 0)
        return -1;
    atomic_store(&s->last_commit_us, (unsigned long long)(clock_mono_us() - t0));
    atomic_fetch_add(&s->commits, 1);
    if (tx->head.size != s->head.size)
        s->checkpoint_due = true;
    s->head = tx->head;
    return 0;
}

// 0: committed, or nothing to commit. -1: nothing of the group is kept.
static int run_items(struct store_tx *tx, struct item *group, struct err *err)
{
    const bool alone = !group->next;
    unsigned good = 0;
    if (run(tx->db, "BEGIN IMMEDIATE", err) != 0)
        return -1;
    for (struct item *it = group; it; it = it->next) {
        if (!run_item(tx, it, !alone, err))
            return -1;
        good += it->err == NULL;
    }
    if (good == 0) {
        rollback(tx->db);
        return 0;
    }
    atomic_fetch_add(&tx->store->transactions, good);
    return commit(tx, err);
}

static void notify(struct store *s)
{
    pthread_mutex_lock(&s->lock);
    void (*const fn)(void *) = s->notify;
    void *const arg = s->notify_arg;
    pthread_mutex_unlock(&s->lock);
    if (fn)
        fn(arg);
}

static void run_group(struct store *s, struct item *group)
{
    struct err err = {0};
    struct store_tx tx = {.store = s, .db = s->db, .now_ms = clock_wall_ms(), .head = s->head};
    if (run_items(&tx, group, &err) != 0) {
        rollback(s->db);
        atomic_fetch_add(&s->failed_commits, 1);
        tx.events = false;
        for (struct item *it = group; it; it = it->next)
            if (!it->err)
                item_fail(it, &err);
    }
    for (struct item *it = group; it; it = it->next) // all can be read by now: before anybody is told
        if (it->waiter && it->waiter->then && !it->err)
            it->waiter->then(it->arg);
    for (struct item *next, *it = group; it; it = next) {
        next = it->next;
        item_tell(it);
    }
    if (tx.events)
        notify(s);
}

// ---- the thread ---------------------------------------------------------------------------------------------------
static void write_checkpoint_file(struct store *s)
{
    struct err err = {0};
    s->checkpoint_written_ms = clock_mono_ms();
    if (audit_write_file(s, &err) == 0)
        s->checkpoint_due = false;
    else
        log_warn_limited("checkpoint.json could not be written: %s %s", err.detail, err.internal);
}

static void housekeep(struct store *s, bool idle)
{
    const int64_t since = clock_mono_ms() - s->checkpoint_written_ms;
    if (s->checkpoint_due && since >= (idle ? CHECKPOINT_FILE_MS : CHECKPOINT_BUSY_MS))
        write_checkpoint_file(s);
    if (db_wal_frames(s->db) >= (idle ? WAL_FRAMES_IDLE : WAL_FRAMES_BUSY))
        db_checkpoint(s->db);
}

// Under the lock: there is a group to be written now.
static bool group_due(const struct store *s)
{
    return s->closing || s->urgent > 0 || (s->first && (s->depth >= GROUP_MAX || clock_mono_ms() >= s->later_ms));
}

// Under the lock: waits for work; false when the file is due first.
static bool wait_for_work(struct store *s)
{
    int64_t at = INT64_MAX;
    if (s->first)
        at = s->later_ms;
    else if (s->checkpoint_due)
        at = s->checkpoint_written_ms + CHECKPOINT_FILE_MS;
    if (at == INT64_MAX) {
        pthread_cond_wait(&s->wake, &s->lock);
        return true;
    }
    const struct timespec until = {.tv_sec = at / 1000, .tv_nsec = at % 1000 * 1000000};
    return pthread_cond_timedwait(&s->wake, &s->lock, &until) != ETIMEDOUT || s->first;
}

// Under the lock: up to GROUP_MAX items, in order.
static struct item *take_group(struct store *s)
{
    struct item *group = s->first, *last = group;
    unsigned n = 1;
    if (!group)
        return NULL;
    s->urgent -= !last->later;
    for (; last->next && n < GROUP_MAX; n++) {
        last = last->next;
        s->urgent -= !last->later;
    }
    s->first = last->next;
    if (!s->first)
        s->last = NULL;
    last->next = NULL;
    if (s->depth >= QUEUE_MAX)
        pthread_cond_broadcast(&s->room);
    s->depth -= n;
    s->later_ms = 0; // what is left has waited enough
    return group;
}

static void *writer_main(void *arg)
{
    struct store *s = arg;
    bool go = true;
    while (go) {
        pthread_mutex_lock(&s->lock);
        while (!group_due(s) && wait_for_work(s))
            ;
        struct item *group = group_due(s) ? take_group(s) : NULL;
        const bool idle = !s->first;
        go = group || !s->closing;
        s->busy = group != NULL;
        pthread_mutex_unlock(&s->lock);
        if (group)
            run_group(s, group);
        if (go)
            housekeep(s, idle);
    }
    if (s->checkpoint_due)
        write_checkpoint_file(s);
    return NULL;
}

int writer_start(struct store *s, struct err *err)
{
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->wake, &attr);
    pthread_cond_init(&s->room, NULL);
    pthread_condattr_destroy(&attr);
    const int code = pthread_create(&s->thread, NULL, writer_main, s);
    if (code != 0)
        return err_sys(err, code, "starting the store's writer");
    pthread_setname_np(s->thread, "store");
    s->started = true;
    return 0;
}

void writer_stop(struct store *s)
{
    if (!s->started)
        return;
    pthread_mutex_lock(&s->lock);
    s->closing = true;
    pthread_cond_signal(&s->wake);
    pthread_cond_broadcast(&s->room);
    pthread_mutex_unlock(&s->lock);
    pthread_join(s->thread, NULL);
    pthread_mutex_destroy(&s->lock);
    pthread_cond_destroy(&s->wake);
    pthread_cond_destroy(&s->room);
    s->started = false;
}

// ---- submitting ---------------------------------------------------------------------------------------------------
static int enqueue(struct store *s, struct item *it)
{
    const bool own = pthread_equal(pthread_self(), s->thread); // a done callback: must not wait for itself
    pthread_mutex_lock(&s->lock);
    // Outcomes come under a sandbox's lock, which the writer's callbacks take too: they never wait, and are bounded by what
    // was admitted. Whoever waits for an admission, or leaves a note, does.
    while ((it->later || it->waiter) && s->depth >= QUEUE_MAX && !s->closing && !own)
        pthread_cond_wait(&s->room, &s->lock);
    if (s->closing) {
        pthread_mutex_unlock(&s->lock);
        return -1;
    }
    if (s->last)
        s->last->next = it;
    else
        s->first = it;
    s->last = it;
    if (s->depth++ == 0)
        s->later_ms = clock_mono_ms() + STORE_LATER_MS;
    s->urgent += !it->later;
    if (it->later ? s->depth == 1 || s->depth == GROUP_MAX : s->urgent == 1)
        pthread_cond_signal(&s->wake);
    pthread_mutex_unlock(&s->lock);
    return 0;
}

static int submit(struct store *s, store_tx_fn fn, store_done_fn done, void *arg, bool later)
{
    struct item *it = calloc(1, sizeof *it);
    if (!it)
        return -1;
    it->later = later;
    it->fn = fn;
    it->done = done;
    it->arg = arg;
    if (enqueue(s, it) == 0)
        return 0;
    free(it);
    return -1;
}

int store_submit(struct store *s, store_tx_fn fn, store_done_fn done, void *arg)
{
    return submit(s, fn, done, arg, false);
}

int store_submit_later(struct store *s, store_tx_fn fn, store_done_fn done, void *arg)
{
    return submit(s, fn, done, arg, true);
}

int store_write_then(struct store *s, store_tx_fn fn, void (*then)(void *arg), void *arg, struct err *err)
{
    struct waiter w = {.lock = PTHREAD_MUTEX_INITIALIZER, .cond = PTHREAD_COND_INITIALIZER, .then = then};
    struct item it = {.fn = fn, .arg = arg, .waiter = &w};
    if (pthread_equal(pthread_self(), s->thread))
        return err_set(err, ERR_INTERNAL, "store_reentered", "the store was asked to wait for itself");
    if (enqueue(s, &it) != 0)
        return err_set(err, ERR_UNAVAILABLE, "stopping", "the server is stopping");
    pthread_mutex_lock(&w.lock);
    while (!w.ready)
        pthread_cond_wait(&w.cond, &w.lock);
    pthread_mutex_unlock(&w.lock);
    pthread_cond_destroy(&w.cond);
    pthread_mutex_destroy(&w.lock);
    if (w.failed && err)
        *err = w.err;
    return w.failed ? -1 : 0;
}

int store_write(struct store *s, store_tx_fn fn, void *arg, struct err *err)
{
    return store_write_then(s, fn, NULL, arg, err);
}

static int nothing(struct store_tx *tx, void *arg, struct err *err)
{
    (void)tx, (void)arg, (void)err;
    return 0;
}

void store_flush(struct store *s)
{
    pthread_mutex_lock(&s->lock);
    const bool queued = s->first != NULL || s->busy;
    pthread_mutex_unlock(&s->lock);
    if (queued)
        (void)store_write(s, nothing, NULL, NULL);
}
