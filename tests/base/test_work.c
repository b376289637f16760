// The pool: all that was taken runs once, in order where one thread runs it, bounded, and to the end.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "base/work.h"

// A gate that items wait at, so that a test decides when they go on.
struct gate {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool open;
    int inside, most, passed;
};

static void gate_init(struct gate *g)
{
    *g = (struct gate){PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, false, 0, 0, 0};
}

static void pass(void *arg)
{
    struct gate *g = arg;
    pthread_mutex_lock(&g->lock);
    g->inside++;
    if (g->inside > g->most)
        g->most = g->inside;
    pthread_cond_broadcast(&g->changed);
    while (!g->open)
        pthread_cond_wait(&g->changed, &g->lock);
    g->inside--;
    g->passed++;
    pthread_mutex_unlock(&g->lock);
}

static void open_gate(struct gate *g)
{
    pthread_mutex_lock(&g->lock);
    g->open = true;
    pthread_cond_broadcast(&g->changed);
    pthread_mutex_unlock(&g->lock);
}

static void wait_inside(struct gate *g, int n)
{
    pthread_mutex_lock(&g->lock);
    while (g->inside < n)
        pthread_cond_wait(&g->changed, &g->lock);
    pthread_mutex_unlock(&g->lock);
}

static struct work_pool *pool_of(unsigned threads, size_t max_queued)
{
    struct err err = {0};
    struct work_pool *p = work_pool_new("test", threads, max_queued, &err);
    assert_non_null(p);
    return p;
}

// ---- order ------------------------------------------------------------------------------------------------------------
struct order {
    int got[500];
    int n;
};

struct item {
    struct order *o;
    int number;
};

static void append(void *arg)
{
    struct item *it = arg;
    it->o->got[it->o->n++] = it->number;
}

static void one_thread_keeps_the_order(void **state)
{
    struct work_pool *p = pool_of(1, 1000);
    struct order o = {.n = 0};
    struct item items[500];
    for (int i = 0; i < 500; i++) {
        items[i] = (struct item){&o, i};
        assert_int_equal(work_submit(p, append, &items[i]), 0);
    }
    work_pool_free(p); // runs what is queued
    assert_int_equal(o.n, 500);
    for (int i = 0; i < 500; i++)
        assert_int_equal(o.got[i], i);
}

// ---- bounds -----------------------------------------------------------------------------------------------------------
static void the_queue_is_bounded(void **state)
{
    struct gate g;
    gate_init(&g);
    struct work_pool *p = pool_of(1, 3);
    assert_int_equal(work_submit(p, pass, &g), 0);
    wait_inside(&g, 1); // it waits no more, it runs
    assert_int_equal(work_pool_queued(p), 0);
    for (int i = 1; i <= 3; i++) {
        assert_int_equal(work_submit(p, pass, &g), 0);
        assert_int_equal(work_pool_queued(p), i);
    }
    for (int i = 0; i < 3; i++) {
        assert_int_equal(work_submit(p, pass, &g), -1);
        assert_int_equal(work_pool_queued(p), 3);
    }
    open_gate(&g);
    work_pool_free(p);
    assert_int_equal(g.passed, 4); // not those that were refused
    assert_int_equal(g.most, 1);
}

static void as_many_at_once_as_there_are_threads(void **state)
{
    struct gate g;
    gate_init(&g);
    struct work_pool *p = pool_of(4, 100);
    for (int i = 0; i < 10; i++)
        assert_int_equal(work_submit(p, pass, &g), 0);
    wait_inside(&g, 4); // all of them came to be, as they were needed
    assert_int_equal(work_pool_queued(p), 6);
    open_gate(&g);
    work_pool_free(p);
    assert_int_equal(g.passed, 10);
    assert_int_equal(g.most, 4);
}

static void a_pool_without_room_or_threads_takes_nothing(void **state)
{
    struct gate g;
    gate_init(&g);
    struct work_pool *none = pool_of(0, 10), *full = pool_of(2, 0);
    assert_int_equal(work_submit(none, pass, &g), -1);
    assert_int_equal(work_pool_queued(none), 0);
    assert_int_equal(work_submit(full, pass, &g), -1);
    work_pool_free(none);
    work_pool_free(full);
    work_pool_free(NULL);
    assert_int_equal(g.passed, 0);
}

static void a_pool_that_nobody_used(void **state)
{
    work_pool_free(pool_of(64, 64));
}

// ---- the end ----------------------------------------------------------------------------------------------------------
struct chain {
    struct work_pool *p;
    struct gate *g;
    int refused;
};

static void submit_more(void *arg)
{
    struct chain *c = arg;
    pass(c->g);
    c->refused = work_submit(c->p, pass, c->g);
}

static void *free_pool(void *arg)
{
    work_pool_free(arg);
    return NULL;
}

// While it ends it finishes what it has and takes nothing new, also from its own threads.
static void an_ending_pool_takes_nothing(void **state)
{
    struct gate g;
    gate_init(&g);
    struct work_pool *p = pool_of(1, SIZE_MAX);
    struct chain c = {p, &g, 0};
    pthread_t thread;
    int taken = 1;
    assert_int_equal(work_submit(p, submit_more, &c), 0);
    wait_inside(&g, 1);
    assert_int_equal(pthread_create(&thread, NULL, free_pool, p), 0);
    while (work_submit(p, pass, &g) == 0) { // it cannot be gone while an item is inside; some time it refuses
        taken++;
        sched_yield();
    }
    open_gate(&g);
    pthread_join(thread, NULL);
    assert_int_equal(c.refused, -1);
    assert_int_equal(g.passed, taken);
}

// ---- many threads -----------------------------------------------------------------------------------------------------
enum { SUBMITTERS = 4, EACH = 1000 };

struct submitter {
    struct work_pool *p;
    atomic_int *runs;
    int taken;
};

static void count(void *arg)
{
    atomic_fetch_add((atomic_int *)arg, 1);
}

static void *submit_many(void *arg)
{
    struct submitter *s = arg;
    for (int i = 0; i < EACH; i++)
        s->taken += work_submit(s->p, count, s->runs) == 0;
    return NULL;
}

static void what_is_taken_runs_once(void **state)
{
    struct work_pool *p = pool_of(3, 16);
    struct submitter s[SUBMITTERS];
    pthread_t threads[SUBMITTERS];
    atomic_int runs = 0;
    int taken = 0;
    for (int i = 0; i < SUBMITTERS; i++) {
        s[i] = (struct submitter){p, &runs, 0};
        assert_int_equal(pthread_create(&threads[i], NULL, submit_many, &s[i]), 0);
    }
    for (int i = 0; i < SUBMITTERS; i++) {
        pthread_join(threads[i], NULL);
        taken += s[i].taken;
    }
    work_pool_free(p);
    assert_true(taken > 0);
    assert_int_equal(runs, taken);
}

// A thread that has gone idle is woken again.
static void again_after_a_rest(void **state)
{
    struct work_pool *p = pool_of(2, 4);
    struct gate g;
    gate_init(&g);
    g.open = true;
    for (int round = 1; round <= 200; round++) {
        assert_int_equal(work_submit(p, pass, &g), 0);
        pthread_mutex_lock(&g.lock);
        while (g.passed < round)
            pthread_cond_wait(&g.changed, &g.lock);
        pthread_mutex_unlock(&g.lock);
    }
    work_pool_free(p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(one_thread_keeps_the_order),
        cmocka_unit_test(the_queue_is_bounded),
        cmocka_unit_test(as_many_at_once_as_there_are_threads),
        cmocka_unit_test(a_pool_without_room_or_threads_takes_nothing),
        cmocka_unit_test(a_pool_that_nobody_used),
        cmocka_unit_test(an_ending_pool_takes_nothing),
        cmocka_unit_test(what_is_taken_runs_once),
        cmocka_unit_test(again_after_a_rest),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
