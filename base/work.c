#include "base/work.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct item {
    struct item *next;
    work_fn fn;
    void *arg;
};

struct work_pool {
    pthread_mutex_t lock;
    pthread_cond_t some;
    struct item *head, *tail;
    size_t queued, max_queued;
    unsigned threads, started, idle;
    bool ending;
    char name[12];
    pthread_t ids[];
};

static void *run(void *arg)
{
    struct work_pool *p = arg;
    pthread_setname_np(pthread_self(), p->name);
    pthread_mutex_lock(&p->lock);
    for (;;) {
        while (!p->head && !p->ending) {
            p->idle++;
            pthread_cond_wait(&p->some, &p->lock);
            p->idle--;
        }
        struct item *it = p->head;
        if (!it)
            break; // ending, and nothing is left
        p->head = it->next;
        if (!p->head)
            p->tail = NULL;
        p->queued--;
        pthread_mutex_unlock(&p->lock);
        it->fn(it->arg);
        free(it);
        pthread_mutex_lock(&p->lock);
    }
    pthread_mutex_unlock(&p->lock);
    return NULL;
}

struct work_pool *work_pool_new(const char *name, unsigned threads, size_t max_queued, struct err *err)
{
    struct work_pool *p = calloc(1, sizeof *p + threads * sizeof *p->ids);
    if (!p) {
        err_sys(err, ENOMEM, "making the worker pool %s", name);
        return NULL;
    }
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->some, NULL);
    p->threads = threads;
    p->max_queued = max_queued;
    snprintf(p->name, sizeof p->name, "%s", name);
    return p;
}

// Another thread, when all that there are have work. Under the lock.
static void grow(struct work_pool *p)
{
    pthread_attr_t attr;
    if (p->idle >= p->queued || p->started == p->threads)
        return;
    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, 512 << 10);
    if (pthread_create(&p->ids[p->started], &attr, run, p) == 0)
        p->started++;
    pthread_attr_destroy(&attr);
}

int work_submit(struct work_pool *p, work_fn fn, void *arg)
{
    struct item *it = malloc(sizeof *it);
    if (!it)
        return -1;
    *it = (struct item){NULL, fn, arg};
    pthread_mutex_lock(&p->lock);
    bool taken = !p->ending && p->queued < p->max_queued;
    if (taken) {
        if (p->tail)
            p->tail->next = it;
        else
            p->head = it;
        p->tail = it;
        p->queued++;
        grow(p);
        if (p->started == 0) { // no thread at all can be had: take it back
            p->head = p->tail = NULL;
            p->queued = 0;
            taken = false;
        }
        pthread_cond_signal(&p->some);
    }
    pthread_mutex_unlock(&p->lock);
    if (!taken)
        free(it);
    return taken ? 0 : -1;
}

struct warm {
    pthread_mutex_t lock;
    pthread_cond_t all;
    unsigned due, left;          // threads that have not come; that have not gone
    struct timespec until;
    work_fn fn;
    void *arg;
};

// Stays until all have come, so that each is another thread.
static void warm_one(void *arg)
{
    struct warm *w = arg;
    w->fn(w->arg);
    pthread_mutex_lock(&w->lock);
    if (--w->due == 0)
        pthread_cond_broadcast(&w->all);
    while (w->due > 0 && pthread_cond_timedwait(&w->all, &w->lock, &w->until) == 0)
        ;
    if (--w->left == 0)
        pthread_cond_broadcast(&w->all);
    pthread_mutex_unlock(&w->lock);
}

void work_pool_warm(struct work_pool *p, work_fn fn, void *arg)
{
    struct warm w = {.lock = PTHREAD_MUTEX_INITIALIZER, .all = PTHREAD_COND_INITIALIZER, .fn = fn, .arg = arg};
    clock_gettime(CLOCK_REALTIME, &w.until);
    w.until.tv_sec += 2;
    pthread_mutex_lock(&w.lock);
    for (unsigned i = 0; i < p->threads; i++) {
        w.due++;
        w.left++;
        if (work_submit(p, warm_one, &w) != 0) {
            w.due--;
            w.left--;
        }
    }
    while (w.left > 0)
        pthread_cond_wait(&w.all, &w.lock);
    pthread_mutex_unlock(&w.lock);
    pthread_cond_destroy(&w.all);
    pthread_mutex_destroy(&w.lock);
}

size_t work_pool_queued(struct work_pool *p)
{
    pthread_mutex_lock(&p->lock);
    const size_t n = p->queued;
    pthread_mutex_unlock(&p->lock);
    return n;
}

void work_pool_free(struct work_pool *p)
{
    if (!p)
        return;
    pthread_mutex_lock(&p->lock);
    p->ending = true;
    pthread_cond_broadcast(&p->some);
    pthread_mutex_unlock(&p->lock);
    for (unsigned i = 0; i < p->started; i++)
        pthread_join(p->ids[i], NULL);
    pthread_cond_destroy(&p->some);
    pthread_mutex_destroy(&p->lock);
    free(p);
}
