#include "base/loop.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/fd.h"

#define EVENTS_PER_TURN 64

struct posted {
    struct posted *next;
    loop_fn fn;
    void *arg;
};

struct loop_watch {
    struct loop *l;
    struct loop_watch *next_dead;
    int fd;
    bool dead;
    loop_fd_fn fn;
    void *arg;
};

// In a binary heap by due time; index is its place there.
struct loop_timer {
    struct loop *l;
    size_t index;
    int64_t due_ms;
    uint64_t order;
    loop_fn fn;
    void *arg;
};

struct loop {
    int epoll_fd, wake_fd;
    pthread_t thread;
    bool started;
    pthread_mutex_t lock; // posted, stopping
    struct posted *head, *tail;
    bool stopping;
    struct loop_watch *dead;
    struct loop_timer **heap;
    size_t n_timers, cap_timers;
    uint64_t order;
};

struct loop *loop_new(struct err *err)
{
    struct loop *l = calloc(1, sizeof *l);
    if (!l) {
        err_sys(err, ENOMEM, "making the loop");
        return NULL;
    }
    pthread_mutex_init(&l->lock, NULL);
    l->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    l->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = NULL};
    if (l->epoll_fd >= 0 && l->wake_fd >= 0 && epoll_ctl(l->epoll_fd, EPOLL_CTL_ADD, l->wake_fd, &e) == 0)
        return l;
    err_sys(err, errno, "making the loop");
    loop_free(l);
    return NULL;
}

bool loop_is_current(const struct loop *l)
{
    return l->started && pthread_equal(pthread_self(), l->thread);
}

// ---- posted work --------------------------------------------------------------------------------------------------
static void wake(struct loop *l)
{
    const uint64_t one = 1;
    if (write(l->wake_fd, &one, sizeof one) < 0)
        return; // full counter: it is awake anyway
}

int loop_post(struct loop *l, loop_fn fn, void *arg)
{
    struct posted *p = malloc(sizeof *p);
    if (!p)
        return -1;
    *p = (struct posted){NULL, fn, arg};
    pthread_mutex_lock(&l->lock);
    const bool first = !l->head;
    if (l->tail)
        l->tail->next = p;
    else
        l->head = p;
    l->tail = p;
    pthread_mutex_unlock(&l->lock);
    if (first)
        wake(l);
    return 0;
}

static bool run_posted(struct loop *l)
{
    pthread_mutex_lock(&l->lock);
    struct posted *p = l->head;
    l->head = l->tail = NULL;
    const bool stopping = l->stopping;
    pthread_mutex_unlock(&l->lock);
    while (p) {
        struct posted *next = p->next;
        p->fn(p->arg);
        free(p);
        p = next;
    }
    return !stopping;
}

// ---- descriptors --------------------------------------------------------------------------------------------------
struct loop_watch *loop_watch_add(struct loop *l, int fd, uint32_t events, loop_fd_fn fn, void *arg)
{
    struct loop_watch *w = calloc(1, sizeof *w);
    if (!w)
        return NULL;
    *w = (struct loop_watch){.l = l, .fd = fd, .fn = fn, .arg = arg};
    struct epoll_event e = {.events = events, .data.ptr = w};
    if (epoll_ctl(l->epoll_fd, EPOLL_CTL_ADD, fd, &e) == 0)
        return w;
    free(w);
    return NULL;
}

int loop_watch_set(struct loop_watch *w, uint32_t events)
{
    struct epoll_event e = {.events = events, .data.ptr = w};
    return epoll_ctl(w->l->epoll_fd, EPOLL_CTL_MOD, w->fd, &e);
}

void loop_watch_remove(struct loop_watch *w)
{
    if (!w || w->dead)
        return;
    epoll_ctl(w->l->epoll_fd, EPOLL_CTL_DEL, w->fd, NULL);
    w->dead = true; // freed after this turn: its event may still be in the array
    w->next_dead = w->l->dead;
    w->l->dead = w;
}

static void bury(struct loop *l)
{
    while (l->dead) {
        struct loop_watch *next = l->dead->next_dead;
        free(l->dead);
        l->dead = next;
    }
}

// ---- timers -------------------------------------------------------------------------------------------------------
static bool earlier(const struct loop_timer *a, const struct loop_timer *b)
{
    return a->due_ms < b->due_ms || (a->due_ms == b->due_ms && a->order < b->order);
}

static void place(struct loop *l, size_t i, struct loop_timer *t)
{
    l->heap[i] = t;
    t->index = i;
}

static void sift_up(struct loop *l, size_t i)
{
    struct loop_timer *t = l->heap[i];
    for (; i > 0 && earlier(t, l->heap[(i - 1) / 2]); i = (i - 1) / 2)
        place(l, i, l->heap[(i - 1) / 2]);
    place(l, i, t);
}

static void sift_down(struct loop *l, size_t i)
{
    struct loop_timer *t = l->heap[i];
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= l->n_timers)
            break;
        if (child + 1 < l->n_timers && earlier(l->heap[child + 1], l->heap[child]))
            child++;
        if (!earlier(l->heap[child], t))
            break;
        place(l, i, l->heap[child]);
        i = child;
    }
    place(l, i, t);
}

struct loop_timer *loop_timer_add(struct loop *l, int64_t delay_ms, loop_fn fn, void *arg)
{
    if (l->n_timers == l->cap_timers) {
        const size_t cap = l->cap_timers ? 2 * l->cap_timers : 64;
        struct loop_timer **heap = realloc(l->heap, cap * sizeof *heap);
        if (!heap)
            return NULL;
        l->heap = heap;
        l->cap_timers = cap;
    }
    struct loop_timer *t = malloc(sizeof *t);
    if (!t)
        return NULL;
    *t = (struct loop_timer){.l = l, .due_ms = clock_mono_ms() + delay_ms, .order = l->order++, .fn = fn, .arg = arg};
    place(l, l->n_timers++, t);
    sift_up(l, t->index);
    return t;
}

static void take_out(struct loop *l, struct loop_timer *t)
{
    const size_t i = t->index;
    struct loop_timer *last = l->heap[--l->n_timers];
    if (last == t)
        return;
    place(l, i, last);
    sift_up(l, i);
    sift_down(l, last->index);
}

void loop_timer_cancel(struct loop_timer *t)
{
    if (!t)
        return;
    take_out(t->l, t);
    free(t);
}

static void run_timers(struct loop *l)
{
    const int64_t now = clock_mono_ms();
    while (l->n_timers > 0 && l->heap[0]->due_ms <= now) {
        struct loop_timer *t = l->heap[0];
        const loop_fn fn = t->fn;
        void *arg = t->arg;
        take_out(l, t);
        free(t);
        fn(arg);
    }
}

static int timeout_of(const struct loop *l)
{
    if (l->n_timers == 0)
        return -1;
    const int64_t left = l->heap[0]->due_ms - clock_mono_ms();
    return left <= 0 ? 0 : left > 3600000 ? 3600000 : (int)left;
}

// ---- the thread -----------------------------------------------------------------------------------------------------
static void turn(struct loop *l)
{
    struct epoll_event events[EVENTS_PER_TURN];
    const int n = epoll_wait(l->epoll_fd, events, EVENTS_PER_TURN, timeout_of(l));
    for (int i = 0; i < n; i++) {
        struct loop_watch *w = events[i].data.ptr;
        uint64_t count;
        if (!w) {
            if (read(l->wake_fd, &count, sizeof count) < 0)
                continue;
        } else if (!w->dead) {
            w->fn(w->arg, events[i].events);
        }
    }
    run_timers(l);
}

static void *run(void *arg)
{
    struct loop *l = arg;
    while (run_posted(l)) {
        turn(l);
        bury(l);
    }
    return NULL;
}

int loop_start(struct loop *l, const char *thread_name, struct err *err)
{
    const int code = pthread_create(&l->thread, NULL, run, l);
    if (code != 0)
        return err_sys(err, code, "starting the loop");
    l->started = true;
    pthread_setname_np(l->thread, thread_name);
    return 0;
}

void loop_stop(struct loop *l)
{
    if (!l->started)
        return;
    pthread_mutex_lock(&l->lock);
    l->stopping = true;
    pthread_mutex_unlock(&l->lock);
    wake(l);
    pthread_join(l->thread, NULL);
    l->started = false;
    (void)run_posted(l);
}

void loop_free(struct loop *l)
{
    if (!l)
        return;
    loop_stop(l);
    while (l->n_timers > 0)
        loop_timer_cancel(l->heap[0]);
    bury(l);
    free(l->heap);
    fd_close(&l->epoll_fd);
    fd_close(&l->wake_fd);
    pthread_mutex_destroy(&l->lock);
    free(l);
}
