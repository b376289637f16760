// One-shot wake-ups: by key, once, none lost between registering and looking, none after a cancel.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "sandbox/hub.h"

#define KEY "sbx01jbx3w8n0v9k2m4p6r8t0a2c4"

static void count(void *arg)
{
    atomic_fetch_add((atomic_int *)arg, 1);
}

static void a_waiter_is_woken_once(void **state)
{
    struct hub *h = hub_new();
    atomic_int n = 0;
    struct hub_waiter *w = hub_wait(h, KEY, count, &n);
    assert_int_equal(n, 0);
    hub_notify(h, KEY);
    assert_int_equal(n, 1);
    hub_notify(h, KEY);
    assert_int_equal(n, 1);
    hub_cancel(h, w);
    hub_free(h);
}

static void only_its_own_key_wakes_it(void **state)
{
    struct hub *h = hub_new();
    atomic_int a = 0, b = 0, c = 0;
    struct hub_waiter *wa = hub_wait(h, "events", count, &a), *wb = hub_wait(h, KEY, count, &b),
                      *wc = hub_wait(h, "", count, &c);
    hub_notify(h, "event");
    hub_notify(h, "eventss");
    hub_notify(h, "nobody");
    assert_int_equal(a + b + c, 0);
    hub_notify(h, KEY);
    assert_int_equal(b, 1);
    assert_int_equal(a + c, 0);
    hub_notify(h, "");
    assert_int_equal(c, 1);
    hub_notify(h, "events");
    assert_int_equal(a, 1);
    hub_cancel(h, wa);
    hub_cancel(h, wb);
    hub_cancel(h, wc);
    hub_free(h);
}

// More keys than buckets: those that share one are still told apart.
static void many_keys(void **state)
{
    enum { N = 5000 };
    struct hub *h = hub_new();
    static atomic_int n[N];
    static struct hub_waiter *w[N];
    char key[24];
    for (int i = 0; i < N; i++) {
        n[i] = 0;
        snprintf(key, sizeof key, "cmd%d", i);
        w[i] = hub_wait(h, key, count, &n[i]);
    }
    for (int i = 0; i < N; i += 2) {
        snprintf(key, sizeof key, "cmd%d", i);
        hub_notify(h, key);
    }
    for (int i = 0; i < N; i++)
        assert_int_equal(n[i], i % 2 == 0);
    hub_notify_all(h);
    for (int i = 0; i < N; i++) {
        assert_int_equal(n[i], 1);
        hub_cancel(h, w[i]);
    }
    hub_free(h);
}

static void all_waiters_of_a_key_are_woken(void **state)
{
    enum { N = 100 };
    struct hub *h = hub_new();
    struct hub_waiter *w[N];
    atomic_int n = 0;
    for (int i = 0; i < N; i++)
        w[i] = hub_wait(h, KEY, count, &n);
    for (int i = 0; i < N; i += 3) // some leave, from within the list too
        hub_cancel(h, w[i]);
    hub_notify(h, KEY);
    assert_int_equal(n, N - (N + 2) / 3);
    for (int i = 0; i < N; i++)
        if (i % 3)
            hub_cancel(h, w[i]);
    hub_free(h);
}

static void cancelled_waiters_are_not_woken(void **state)
{
    struct hub *h = hub_new();
    atomic_int n = 0;
    hub_cancel(h, hub_wait(h, KEY, count, &n));
    hub_notify(h, KEY);
    hub_notify_all(h);
    assert_int_equal(n, 0);
    hub_cancel(h, NULL);
    hub_free(h);
    hub_free(NULL);
}

// A wake function may wait again and may notify: it runs without the hub's lock.
struct again {
    struct hub *h;
    struct hub_waiter *next;
    atomic_int woken, other;
};

static void wake_again(void *arg)
{
    struct again *a = arg;
    if (atomic_fetch_add(&a->woken, 1) > 0)
        return;
    a->next = hub_wait(a->h, KEY, wake_again, a);
    hub_notify(a->h, "other");
}

static void wakes_may_use_the_hub(void **state)
{
    struct again a = {.h = hub_new()};
    struct hub_waiter *w = hub_wait(a.h, KEY, wake_again, &a), *o = hub_wait(a.h, "other", count, &a.other);
    hub_notify(a.h, KEY);
    assert_int_equal(a.woken, 1); // the new one is for the next notice
    assert_int_equal(a.other, 1);
    hub_notify(a.h, KEY);
    assert_int_equal(a.woken, 2);
    hub_cancel(a.h, w);
    hub_cancel(a.h, a.next);
    hub_cancel(a.h, o);
    hub_free(a.h);
}

// ---- threads ----------------------------------------------------------------------------------------------------------
// A cancel waits for a wake that runs.
struct slow {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool running, let_go, over;
    struct hub *h;
};

static void wake_slowly(void *arg)
{
    struct slow *s = arg;
    pthread_mutex_lock(&s->lock);
    s->running = true;
    pthread_cond_broadcast(&s->changed);
    while (!s->let_go)
        pthread_cond_wait(&s->changed, &s->lock);
    s->over = true;
    pthread_mutex_unlock(&s->lock);
}

static void *notify(void *arg)
{
    hub_notify(((struct slow *)arg)->h, KEY);
    return NULL;
}

static void *let_go(void *arg)
{
    struct slow *s = arg;
    pthread_mutex_lock(&s->lock);
    s->let_go = true;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
    return NULL;
}

static void a_cancel_waits_for_a_running_wake(void **state)
{
    struct slow s = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, false, false, false, hub_new()};
    struct hub_waiter *w = hub_wait(s.h, KEY, wake_slowly, &s);
    pthread_t notifier, releaser;
    assert_int_equal(pthread_create(&notifier, NULL, notify, &s), 0);
    pthread_mutex_lock(&s.lock);
    while (!s.running)
        pthread_cond_wait(&s.changed, &s.lock);
    pthread_mutex_unlock(&s.lock);
    assert_int_equal(pthread_create(&releaser, NULL, let_go, &s), 0);
    hub_cancel(s.h, w);
    pthread_mutex_lock(&s.lock);
    assert_true(s.over);
    pthread_mutex_unlock(&s.lock);
    pthread_join(notifier, NULL);
    pthread_join(releaser, NULL);
    hub_free(s.h);
}

// The use that hub.h describes: a counter that goes up, and waiters that register, look, and wait. Nobody misses the end.
enum { WAITERS = 4, STEPS = 3000 };

struct shared {
    struct hub *h;
    atomic_int value;
};

struct waiter {
    struct shared *shared;
    pthread_mutex_t lock;
    pthread_cond_t woken_cond;
    bool woken;
};

static void wake_waiter(void *arg)
{
    struct waiter *w = arg;
    pthread_mutex_lock(&w->lock);
    w->woken = true;
    pthread_cond_signal(&w->woken_cond);
    pthread_mutex_unlock(&w->lock);
}

static void *wait_to_the_end(void *arg)
{
    struct waiter *w = arg;
    for (int seen = -1; seen < STEPS;) {
        pthread_mutex_lock(&w->lock);
        w->woken = false;
        pthread_mutex_unlock(&w->lock);
        struct hub_waiter *registered = hub_wait(w->shared->h, KEY, wake_waiter, w);
        const int now = atomic_load(&w->shared->value);
        if (now == seen) {
            pthread_mutex_lock(&w->lock);
            while (!w->woken)
                pthread_cond_wait(&w->woken_cond, &w->lock);
            pthread_mutex_unlock(&w->lock);
        }
        hub_cancel(w->shared->h, registered);
        seen = atomic_load(&w->shared->value);
    }
    return NULL;
}

static void no_wake_up_is_lost(void **state)
{
    struct shared shared = {hub_new(), 0};
    struct waiter waiters[WAITERS];
    pthread_t threads[WAITERS];
    for (int i = 0; i < WAITERS; i++) {
        waiters[i] = (struct waiter){&shared, PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, false};
        assert_int_equal(pthread_create(&threads[i], NULL, wait_to_the_end, &waiters[i]), 0);
    }
    for (int i = 1; i <= STEPS; i++) {
        atomic_store(&shared.value, i);
        if (i % 100 == 0)
            hub_notify_all(shared.h);
        else
            hub_notify(shared.h, KEY);
    }
    for (int i = 0; i < WAITERS; i++) // hangs when one was lost
        pthread_join(threads[i], NULL);
    hub_free(shared.h);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_waiter_is_woken_once),
        cmocka_unit_test(only_its_own_key_wakes_it),
        cmocka_unit_test(many_keys),
        cmocka_unit_test(all_waiters_of_a_key_are_woken),
        cmocka_unit_test(cancelled_waiters_are_not_woken),
        cmocka_unit_test(wakes_may_use_the_hub),
        cmocka_unit_test(a_cancel_waits_for_a_running_wake),
        cmocka_unit_test(no_wake_up_is_lost),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
