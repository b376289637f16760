#include "api/timer.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>

#include "base/clock.h"

struct timers {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed, ran;
    struct timer **heap;
    size_t n, cap;
    const struct timer *running;
    bool stopping;
};

static void put(struct timers *ts, size_t at, struct timer *t)
{
    ts->heap[at] = t;
    t->slot = at + 1;
}

static void sift_up(struct timers *ts, size_t at)
{
    struct timer *t = ts->heap[at];
    for (; at > 0 && ts->heap[(at - 1) / 2]->due_ms > t->due_ms; at = (at - 1) / 2)
        put(ts, at, ts->heap[(at - 1) / 2]);
    put(ts, at, t);
}

static void sift_down(struct timers *ts, size_t at)
{
    struct timer *t = ts->heap[at];
    for (;;) {
        size_t child = 2 * at + 1;
        if (child + 1 < ts->n && ts->heap[child + 1]->due_ms < ts->heap[child]->due_ms)
            child++;
        if (child >= ts->n || ts->heap[child]->due_ms >= t->due_ms)
            break;
        put(ts, at, ts->heap[child]);
        at = child;
    }
    put(ts, at, t);
}

static void take_out(struct timers *ts, struct timer *t)
{
    const size_t at = t->slot - 1;
    struct timer *last = ts->heap[--ts->n];
    t->slot = 0;
    if (last == t)
        return;
    put(ts, at, last);
    sift_up(ts, at);
    sift_down(ts, last->slot - 1);
}

static void wait_for_due(struct timers *ts)
{
    if (ts->n == 0) {
        pthread_cond_wait(&ts->changed, &ts->lock);
        return;
    }
    const int64_t due = ts->heap[0]->due_ms;
    const struct timespec at = {due / 1000, due % 1000 * 1000000};
    pthread_cond_timedwait(&ts->changed, &ts->lock, &at);
}

static void *run(void *arg)
{
    struct timers *ts = arg;
    pthread_mutex_lock(&ts->lock);
    while (!ts->stopping) {
        if (ts->n == 0 || ts->heap[0]->due_ms > clock_mono_ms()) {
            wait_for_due(ts);
            continue;
        }
        struct timer *t = ts->heap[0];
        void (*fn)(void *) = t->fn;
        void *fn_arg = t->arg;
        take_out(ts, t);
        ts->running = t;
        pthread_mutex_unlock(&ts->lock);
        fn(fn_arg); // t may be gone after this
        pthread_mutex_lock(&ts->lock);
        ts->running = NULL;
        pthread_cond_broadcast(&ts->ran);
    }
    pthread_mutex_unlock(&ts->lock);
    return NULL;
}

struct timers *timers_new(struct err *err)
{
    struct timers *ts = calloc(1, sizeof *ts);
    if (!ts) {
        err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
        return NULL;
    }
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_mutex_init(&ts->lock, NULL);
    pthread_cond_init(&ts->changed, &attr);
    pthread_cond_init(&ts->ran, NULL);
    pthread_condattr_destroy(&attr);
    const int failed = pthread_create(&ts->thread, NULL, run, ts);
    if (failed) {
        err_sys(err, failed, "starting the timer thread");
        free(ts);
        return NULL;
    }
    pthread_setname_np(ts->thread, "api-timer");
    return ts;
}

void timers_free(struct timers *ts)
{
    if (!ts)
        return;
    pthread_mutex_lock(&ts->lock);
    ts->stopping = true;
    pthread_cond_signal(&ts->changed);
    pthread_mutex_unlock(&ts->lock);
    pthread_join(ts->thread, NULL);
    pthread_cond_destroy(&ts->changed);
    pthread_cond_destroy(&ts->ran);
    pthread_mutex_destroy(&ts->lock);
    free(ts->heap);
    free(ts);
}

static bool grow(struct timers *ts)
{
    if (ts->n < ts->cap)
        return true;
    const size_t cap = ts->cap ? 2 * ts->cap : 64;
    struct timer **heap = realloc(ts->heap, cap * sizeof(struct timer *));
    if (!heap)
        return false;
    ts->heap = heap;
    ts->cap = cap;
    return true;
}

int timers_add(struct timers *ts, struct timer *t, int64_t delay_ms, void (*fn)(void *arg), void *arg)
{
    pthread_mutex_lock(&ts->lock);
    if (t->slot)
        take_out(ts, t);
    const bool fits = grow(ts);
    if (fits) {
        t->due_ms = clock_mono_ms() + (delay_ms > 0 ? delay_ms : 0);
        t->fn = fn;
        t->arg = arg;
        put(ts, ts->n++, t);
        sift_up(ts, ts->n - 1);
        if (t->slot == 1)
            pthread_cond_signal(&ts->changed);
    }
    pthread_mutex_unlock(&ts->lock);
    return fits ? 0 : -1;
}

void timers_cancel(struct timers *ts, struct timer *t)
{
    pthread_mutex_lock(&ts->lock);
    if (t->slot)
        take_out(ts, t);
    while (ts->running == t)
        pthread_cond_wait(&ts->ran, &ts->lock);
    pthread_mutex_unlock(&ts->lock);
}
