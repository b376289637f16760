// The loop: posted work in its order, timers in theirs, descriptors, and taking each away from within a callback.
// Longer than 600 lines: it mirrors one file, and its three parts share the thread that runs the loop.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <fcntl.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/fd.h"
#include "base/loop.h"

// What happened, one letter each; written on the loop's thread, read by the test when it has seen the end.
struct trace {
    struct loop *l;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    char text[4096];
    size_t len;
    bool done;
    struct loop_timer *timers[64];
    struct loop_watch *watches[16];
    int fds[16];
};

static struct trace *trace_new(void)
{
    struct err err = {0};
    struct trace *t = calloc(1, sizeof *t);
    assert_non_null(t);
    t->l = loop_new(&err);
    assert_non_null(t->l);
    pthread_mutex_init(&t->lock, NULL);
    pthread_cond_init(&t->changed, NULL);
    return t;
}

static void start(struct trace *t)
{
    struct err err = {0};
    assert_int_equal(loop_start(t->l, "test", &err), 0);
}

static void trace_free(struct trace *t)
{
    loop_free(t->l);
    pthread_mutex_destroy(&t->lock);
    pthread_cond_destroy(&t->changed);
    free(t);
}

static void add(struct trace *t, char c)
{
    pthread_mutex_lock(&t->lock);
    assert_true(t->len < sizeof t->text - 1);
    t->text[t->len++] = c;
    pthread_mutex_unlock(&t->lock);
}

static void done(void *arg)
{
    struct trace *t = arg;
    pthread_mutex_lock(&t->lock);
    t->done = true;
    pthread_cond_broadcast(&t->changed);
    pthread_mutex_unlock(&t->lock);
}

static void wait_done(struct trace *t)
{
    pthread_mutex_lock(&t->lock);
    while (!t->done)
        pthread_cond_wait(&t->changed, &t->lock);
    t->done = false;
    pthread_mutex_unlock(&t->lock);
}

static void post_and_wait(struct trace *t, loop_fn fn, void *arg)
{
    assert_int_equal(loop_post(t->l, fn, arg), 0);
    assert_int_equal(loop_post(t->l, done, t), 0);
    wait_done(t);
}

// An event with a letter, for anything that takes loop_fn.
struct letter {
    struct trace *t;
    char c;
};

static void write_letter(void *arg)
{
    const struct letter *l = arg;
    add(l->t, l->c);
}

// ---- posting ----------------------------------------------------------------------------------------------------------
static void posted_work_runs_in_order(void **state)
{
    struct trace *t = trace_new();
    struct letter letters[26];
    for (int i = 0; i < 26; i++)
        letters[i] = (struct letter){t, (char)('a' + i)};
    for (int i = 0; i < 13; i++) // also before it runs
        assert_int_equal(loop_post(t->l, write_letter, &letters[i]), 0);
    start(t);
    for (int i = 13; i < 26; i++)
        assert_int_equal(loop_post(t->l, write_letter, &letters[i]), 0);
    post_and_wait(t, done, t);
    assert_string_equal(t->text, "abcdefghijklmnopqrstuvwxyz");
    trace_free(t);
}

static void ask_current(void *arg)
{
    struct trace *t = arg;
    add(t, loop_is_current(t->l) ? 'y' : 'n');
}

static void it_runs_on_a_thread_of_its_own(void **state)
{
    struct trace *t = trace_new();
    assert_false(loop_is_current(t->l));
    start(t);
    assert_false(loop_is_current(t->l));
    post_and_wait(t, ask_current, t);
    assert_string_equal(t->text, "y");
    trace_free(t);
}

enum { THREADS = 4, EACH = 2000 };

struct poster {
    struct loop *l;
    int refused;      // the poster's
    int next, failed; // the loop's
    struct one {
        struct poster *p;
        int number;
    } ones[EACH];
};

static void take_one(void *arg)
{
    struct one *o = arg;
    o->p->failed |= o->number != o->p->next++;
}

static void *post_many(void *arg)
{
    struct poster *p = arg;
    for (int i = 0; i < EACH; i++) {
        p->ones[i] = (struct one){p, i};
        p->refused |= loop_post(p->l, take_one, &p->ones[i]);
    }
    return NULL;
}

static void any_thread_may_post(void **state)
{
    struct trace *t = trace_new();
    static struct poster posters[THREADS];
    pthread_t threads[THREADS];
    start(t);
    for (int i = 0; i < THREADS; i++) {
        posters[i] = (struct poster){.l = t->l};
        assert_int_equal(pthread_create(&threads[i], NULL, post_many, &posters[i]), 0);
    }
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    loop_stop(t->l); // runs what is left
    for (int i = 0; i < THREADS; i++) {
        assert_int_equal(posters[i].refused | posters[i].failed, 0);
        assert_int_equal(posters[i].next, EACH);
    }
    trace_free(t);
}

static void post_from_within(void *arg)
{
    struct trace *t = arg;
    add(t, 'a');
    loop_post(t->l, done, t);
    add(t, 'b');
}

static void posting_from_within_is_later(void **state)
{
    struct trace *t = trace_new();
    start(t);
    assert_int_equal(loop_post(t->l, post_from_within, t), 0);
    wait_done(t);
    assert_string_equal(t->text, "ab");
    trace_free(t);
}

static void a_stop_runs_what_is_posted(void **state)
{
    for (int round = 0; round < 50; round++) {
        struct trace *t = trace_new();
        struct letter x = {t, 'x'};
        start(t);
        for (int i = 0; i < 20; i++)
            assert_int_equal(loop_post(t->l, write_letter, &x), 0);
        loop_stop(t->l);
        assert_int_equal(t->len, 20);
        loop_stop(t->l); // again
        trace_free(t);
    }
    loop_free(NULL);
}

struct chain {
    struct trace *t;
    struct letter second;
};

static void post_second(void *arg)
{
    struct chain *c = arg;
    add(c->t, 'a');
    loop_post(c->t->l, write_letter, &c->second);
}

// Also what the last of them has posted, wherever the stop finds the loop.
static void a_stop_runs_what_was_posted_last(void **state)
{
    for (int round = 0; round < 300; round++) {
        struct trace *t = trace_new();
        struct chain c = {t, {t, 'b'}};
        assert_int_equal(loop_post(t->l, post_second, &c), 0);
        start(t);
        loop_stop(t->l);
        assert_string_equal(t->text, "ab");
        trace_free(t);
    }
}

// ---- timers -----------------------------------------------------------------------------------------------------------
// One that knows when it is due, within what the clock said around setting it, and the place it got.
struct timed {
    struct trace *t;
    struct loop_timer *timer;
    int64_t from, until;
    size_t place; // from 1; 0: has not fired
};

static void take_place(void *arg)
{
    struct timed *d = arg;
    d->place = ++d->t->len;
}

static void set(struct timed *d, struct trace *t, int64_t delay)
{
    d->t = t;
    d->from = clock_mono_ms() + delay;
    d->timer = loop_timer_add(t->l, delay, take_place, d);
    d->until = clock_mono_ms() + delay;
    assert_non_null(d->timer);
}

// Of two that were set one after the other, for the same delay or any: never the one first that is surely due later.
static void assert_in_order(const struct timed *d, int n)
{
    for (int i = 0; i < n; i++)
        for (int k = 0; k < n; k++)
            if (d[i].place && d[k].place && d[i].until < d[k].from)
                assert_true(d[i].place < d[k].place);
}

static void timers_run_in_the_order_they_are_due(void **state)
{
    struct trace *t = trace_new();
    static const int DELAYS[] = {30, 10, 0, 20, 10, 20, 50, 40};
    struct timed timers[8] = {0};
    for (int i = 0; i < 8; i++)
        set(&timers[i], t, DELAYS[i]);
    assert_non_null(loop_timer_add(t->l, 50, done, t)); // set last, for as long as any
    start(t);
    wait_done(t);
    assert_int_equal(t->len, 8);
    assert_in_order(timers, 8);
    assert_true(timers[1].place < timers[4].place); // for the same delay, in the order they were set
    assert_true(timers[3].place < timers[5].place);
    trace_free(t);
}

static void note_time(void *arg)
{
    *(int64_t *)arg = clock_mono_ms();
}

static void no_timer_is_early(void **state)
{
    struct trace *t = trace_new();
    int64_t at = 0;
    const int64_t before = clock_mono_ms();
    assert_non_null(loop_timer_add(t->l, 25, note_time, &at));
    assert_non_null(loop_timer_add(t->l, 25, done, t));
    start(t);
    wait_done(t);
    assert_true(at >= before + 25);
    trace_free(t);
}

static void many_timers_some_cancelled(void **state)
{
    enum { N = 1000 };
    struct trace *t = trace_new();
    static struct timed timers[N];
    unsigned seed = 6;
    size_t kept = 0;
    memset(timers, 0, sizeof timers);
    for (int i = 0; i < N; i++)
        set(&timers[i], t, rand_r(&seed) % 40);
    for (int i = 0; i < N; i++) // taken out of anywhere in the heap
        if (rand_r(&seed) % 3) {
            loop_timer_cancel(timers[i].timer);
            timers[i].timer = NULL;
        } else {
            kept++;
        }
    assert_non_null(loop_timer_add(t->l, 40, done, t));
    start(t);
    wait_done(t);
    assert_int_equal(t->len, kept);
    for (int i = 0; i < N; i++)
        assert_true((timers[i].place > 0) == (timers[i].timer != NULL));
    assert_in_order(timers, N);
    loop_timer_cancel(NULL);
    trace_free(t);
}

static void cancel_second(void *arg)
{
    struct trace *t = arg;
    add(t, 'c');
    loop_timer_cancel(t->timers[1]);
    t->timers[1] = loop_timer_add(t->l, 0, done, t); // and sets another
}

static void a_timer_may_cancel_one_that_is_due_too(void **state)
{
    struct trace *t = trace_new();
    struct letter never = {t, '!'};
    t->timers[0] = loop_timer_add(t->l, 0, cancel_second, t);
    t->timers[1] = loop_timer_add(t->l, 0, write_letter, &never);
    start(t);
    wait_done(t);
    assert_string_equal(t->text, "c");
    trace_free(t);
}

static void tick(void *arg)
{
    struct trace *t = arg;
    add(t, 't');
    if (t->len < 5)
        loop_timer_add(t->l, 1, tick, t);
    else
        done(t);
}

static void a_timer_may_set_itself_again(void **state)
{
    struct trace *t = trace_new();
    loop_timer_add(t->l, 0, tick, t);
    start(t);
    wait_done(t);
    assert_string_equal(t->text, "ttttt");
    trace_free(t);
}

static void timers_that_are_not_due_are_freed(void **state)
{
    struct trace *t = trace_new();
    struct letter never = {t, '!'};
    for (int i = 0; i < 100; i++)
        assert_non_null(loop_timer_add(t->l, 3600000 * (int64_t)(i + 1), write_letter, &never));
    start(t);
    post_and_wait(t, ask_current, t);
    loop_stop(t->l);
    assert_string_equal(t->text, "y");
    trace_free(t); // the sanitizer counts
}

// ---- descriptors ------------------------------------------------------------------------------------------------------
struct reader {
    struct trace *t;
    int fd;
    struct loop_watch *w;
    size_t want;
};

static void on_readable(void *arg, uint32_t events)
{
    struct reader *r = arg;
    char c;
    if (events & EPOLLIN && read(r->fd, &c, 1) == 1) { // one byte a time: it is told of the rest again
        add(r->t, c);
        if (r->t->len == r->want)
            done(r->t);
    } else if (events & EPOLLHUP) {
        add(r->t, '$');
        loop_watch_remove(r->w);
        r->w = NULL;
        done(r->t);
    }
}

static void readable_until_it_is_read(void **state)
{
    struct trace *t = trace_new();
    int ends[2];
    assert_int_equal(pipe2(ends, O_CLOEXEC | O_NONBLOCK), 0);
    struct reader r = {t, ends[0], NULL, 5};
    r.w = loop_watch_add(t->l, ends[0], EPOLLIN, on_readable, &r);
    assert_non_null(r.w);
    start(t);
    assert_int_equal(write(ends[1], "hello", 5), 5);
    wait_done(t);
    close(ends[1]);
    wait_done(t);
    assert_string_equal(t->text, "hello$");
    close(ends[0]);
    trace_free(t);
}

static void no_watch_on_nothing(void **state)
{
    struct trace *t = trace_new();
    struct reader r = {t, -1, NULL, 0};
    assert_null(loop_watch_add(t->l, -1, EPOLLIN, on_readable, &r));
    CLEANUP_FD int file = open("/proc/self/exe", O_RDONLY | O_CLOEXEC); // a file has no events
    assert_null(loop_watch_add(t->l, file, EPOLLIN, on_readable, &r));
    loop_watch_remove(NULL);
    trace_free(t);
}

static void want_nothing(void *arg)
{
    assert_int_equal(loop_watch_set(((struct reader *)arg)->w, 0), 0);
}

static void want_input(void *arg)
{
    assert_int_equal(loop_watch_set(((struct reader *)arg)->w, EPOLLIN), 0);
}

static void events_may_be_switched(void **state)
{
    struct trace *t = trace_new();
    int ends[2];
    assert_int_equal(pipe2(ends, O_CLOEXEC | O_NONBLOCK), 0);
    struct reader r = {t, ends[0], NULL, 3};
    r.w = loop_watch_add(t->l, ends[0], EPOLLIN, on_readable, &r);
    start(t);
    post_and_wait(t, want_nothing, &r);
    assert_int_equal(write(ends[1], "abc", 3), 3);
    for (int i = 0; i < 5; i++) // turns of the loop in which it could have been told
        post_and_wait(t, ask_current, t);
    assert_string_equal(t->text, "yyyyy");
    r.want = 8;
    assert_int_equal(loop_post(t->l, want_input, &r), 0);
    wait_done(t);
    assert_string_equal(t->text, "yyyyyabc");
    loop_stop(t->l);
    loop_watch_remove(r.w);
    close(ends[0]);
    close(ends[1]);
    trace_free(t);
}

// All are readable in one turn; whoever comes first takes the others away.
static void remove_the_others(void *arg, uint32_t events)
{
    struct trace *t = arg;
    (void)events;
    add(t, 'r');
    for (int i = 0; i < 8; i++) {
        loop_watch_remove(t->watches[i]);
        loop_watch_remove(t->watches[i]); // twice is once
        close(t->fds[i]);
    }
    done(t);
}

static void no_event_after_a_removal(void **state)
{
    for (int round = 0; round < 20; round++) {
        struct trace *t = trace_new();
        int other[8];
        for (int i = 0; i < 8; i++) {
            int ends[2];
            assert_int_equal(pipe2(ends, O_CLOEXEC), 0);
            t->fds[i] = ends[0];
            other[i] = ends[1];
            assert_int_equal(write(ends[1], "x", 1), 1);
            t->watches[i] = loop_watch_add(t->l, ends[0], EPOLLIN, remove_the_others, t);
            assert_non_null(t->watches[i]);
        }
        start(t);
        wait_done(t);
        post_and_wait(t, done, t);
        assert_string_equal(t->text, "r");
        for (int i = 0; i < 8; i++)
            close(other[i]);
        trace_free(t);
    }
}

// A descriptor's number is used again in the very turn in which the old one was taken away.
static void on_new(void *arg, uint32_t events)
{
    struct trace *t = arg;
    char c;
    (void)events;
    if (read(t->fds[1], &c, 1) == 1)
        add(t, c);
    done(t);
}

static void replace_watch(void *arg, uint32_t events)
{
    struct trace *t = arg;
    int ends[2];
    (void)events;
    loop_watch_remove(t->watches[0]);
    close(t->fds[0]);
    if (pipe2(ends, O_CLOEXEC) != 0 || write(ends[1], "n", 1) != 1)
        return;
    t->fds[1] = ends[0];
    t->fds[2] = ends[1];
    t->watches[1] = loop_watch_add(t->l, ends[0], EPOLLIN, on_new, t);
}

static void drop_new(void *arg)
{
    loop_watch_remove(((struct trace *)arg)->watches[1]);
}

static void a_number_may_be_used_again_at_once(void **state)
{
    struct trace *t = trace_new();
    int ends[2];
    assert_int_equal(pipe2(ends, O_CLOEXEC), 0);
    assert_int_equal(write(ends[1], "o", 1), 1);
    t->fds[0] = ends[0];
    t->watches[0] = loop_watch_add(t->l, ends[0], EPOLLIN, replace_watch, t);
    start(t);
    wait_done(t);
    post_and_wait(t, drop_new, t);
    assert_string_equal(t->text, "n");
    close(ends[1]);
    close(t->fds[1]);
    close(t->fds[2]);
    trace_free(t);
}

static void nothing_is_left_open(void **state)
{
    const int before = fd_count_open();
    struct trace *t = trace_new();
    start(t);
    post_and_wait(t, ask_current, t);
    trace_free(t);
    assert_int_equal(fd_count_open(), before);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(posted_work_runs_in_order),
        cmocka_unit_test(it_runs_on_a_thread_of_its_own),
        cmocka_unit_test(any_thread_may_post),
        cmocka_unit_test(posting_from_within_is_later),
        cmocka_unit_test(a_stop_runs_what_is_posted),
        cmocka_unit_test(a_stop_runs_what_was_posted_last),
        cmocka_unit_test(timers_run_in_the_order_they_are_due),
        cmocka_unit_test(no_timer_is_early),
        cmocka_unit_test(many_timers_some_cancelled),
        cmocka_unit_test(a_timer_may_cancel_one_that_is_due_too),
        cmocka_unit_test(a_timer_may_set_itself_again),
        cmocka_unit_test(timers_that_are_not_due_are_freed),
        cmocka_unit_test(readable_until_it_is_read),
        cmocka_unit_test(no_watch_on_nothing),
        cmocka_unit_test(events_may_be_switched),
        cmocka_unit_test(no_event_after_a_removal),
        cmocka_unit_test(a_number_may_be_used_again_at_once),
        cmocka_unit_test(nothing_is_left_open),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
