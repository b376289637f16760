// The window of unacknowledged output: what is kept comes out as it went in, from any offset that is still kept, and
// never more than the maximum is held.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "guest/window.c"

// The stream: byte i of it, whatever the cuts.
static uint8_t byte_at(uint64_t i)
{
    return (uint8_t)(i * 31 + (i >> 8) * 7 + (i >> 16));
}

// Adds up to want bytes of the stream; how many fitted.
static size_t produce(struct window *w, size_t want)
{
    size_t done = 0;
    while (done < want) {
        size_t n;
        uint8_t *to = window_space(w, want - done, &n);
        if (n == 0)
            break;
        assert_non_null(to);
        assert_true(n <= want - done);
        for (size_t i = 0; i < n; i++)
            to[i] = byte_at(w->end + i);
        window_added(w, n);
        done += n;
    }
    assert_true(w->acked <= w->sent && w->sent <= w->end);
    assert_true(w->end - w->acked <= WINDOW_MAX && w->cap <= WINDOW_MAX);
    return done;
}

// Sends at most want bytes: they must be the stream's from w->sent on.
static size_t send_out(struct window *w, size_t want)
{
    size_t done = 0;
    while (done < want) {
        size_t n;
        const uint8_t *from = window_unsent(w, &n);
        if (n == 0) {
            assert_int_equal(w->sent, w->end);
            break;
        }
        if (n > want - done)
            n = want - done;
        for (size_t i = 0; i < n; i++)
            if (from[i] != byte_at(w->sent + i))
                fail_msg("byte %llu is another", (unsigned long long)(w->sent + i));
        w->sent += n;
        done += n;
    }
    return done;
}

static void an_empty_window(void **state)
{
    struct window w = {0};
    size_t n = 9;
    assert_int_equal(window_room(&w), WINDOW_MAX);
    assert_null(window_unsent(&w, &n));
    assert_int_equal(n, 0);
    window_ack(&w, 0);
    window_ack(&w, 100);
    window_rewind(&w, 0);
    window_rewind(&w, 100); // of bytes that never were
    assert_true(w.acked == 0 && w.sent == 0 && w.end == 0);
    window_free(&w);
    window_free(&w);
}

static void it_fills_to_the_maximum_and_no_further(void **state)
{
    struct window w = {0};
    size_t n;
    assert_int_equal(WINDOW_MAX, 1u << 20);
    assert_int_equal(produce(&w, 2 * WINDOW_MAX), WINDOW_MAX);
    assert_int_equal(window_room(&w), 0);
    assert_null(window_space(&w, 1, &n)); // the command's pipe is held back
    assert_int_equal(n, 0);
    assert_int_equal(send_out(&w, SIZE_MAX), WINDOW_MAX); // sending frees nothing: it may be asked for again
    assert_int_equal(produce(&w, 1), 0);
    window_ack(&w, 1);
    assert_int_equal(window_room(&w), 1);
    assert_int_equal(produce(&w, 10), 1);
    window_ack(&w, WINDOW_MAX);
    assert_int_equal(produce(&w, 2 * WINDOW_MAX), WINDOW_MAX - 1);
    assert_int_equal(send_out(&w, SIZE_MAX), WINDOW_MAX);
    window_free(&w);
}

static void it_grows_as_it_is_needed_and_shrinks_when_empty(void **state)
{
    struct window w = {0};
    assert_int_equal(produce(&w, 1), 1);
    const size_t small = w.cap;
    assert_true(small <= 65536); // a quiet command costs little
    assert_int_equal(produce(&w, 300000), 300000);
    assert_true(w.cap > 300000 && w.cap < WINDOW_MAX);
    send_out(&w, SIZE_MAX);
    window_ack(&w, w.end - 1);
    assert_true(w.cap > 300000); // not while anything is kept
    window_ack(&w, w.end);
    assert_int_equal(w.cap, 0);
    assert_null(w.data);
    assert_int_equal(produce(&w, 70000), 70000); // and again
    assert_int_equal(send_out(&w, SIZE_MAX), 70000);
    window_free(&w);
}

// It may grow while the kept bytes lie around the ring's end.
static void growing_keeps_what_is_wrapped(void **state)
{
    for (size_t shift = 1; shift < 65536; shift = shift * 5 + 3) {
        struct window w = {0};
        assert_int_equal(produce(&w, 65536), 65536);
        send_out(&w, shift);
        window_ack(&w, shift);
        assert_int_equal(produce(&w, shift), shift); // full, wrapped
        assert_int_equal(w.cap, 65536);
        assert_int_equal(produce(&w, 100000), 100000);
        assert_true(w.cap > 65536);
        assert_int_equal(send_out(&w, SIZE_MAX), 65536 + 100000);
        window_rewind(&w, shift);
        assert_int_equal(send_out(&w, SIZE_MAX), 65536 + 100000);
        window_free(&w);
    }
}

static void an_attach_sends_again_from_its_offset(void **state)
{
    struct window w = {0};
    produce(&w, 200000);
    send_out(&w, 150000);
    window_ack(&w, 50000);
    window_rewind(&w, 60000); // that server has stored up to there
    assert_int_equal(w.acked, 60000);
    assert_int_equal(w.sent, 60000);
    assert_int_equal(send_out(&w, SIZE_MAX), 140000);
    window_rewind(&w, 10); // no longer kept: from where it is
    assert_int_equal(w.acked, 60000);
    assert_int_equal(w.sent, 60000);
    assert_int_equal(send_out(&w, SIZE_MAX), 140000);
    window_rewind(&w, 300000); // more than there ever was: nothing is believed, nothing is sent twice
    assert_int_equal(w.acked, 60000);
    assert_int_equal(w.sent, 200000);
    window_rewind(&w, 200000); // all is stored
    assert_int_equal(w.acked, 200000);
    assert_int_equal(send_out(&w, SIZE_MAX), 0);
    window_free(&w);
}

static void an_acknowledgement_never_goes_back(void **state)
{
    struct window w = {0};
    produce(&w, 1000);
    send_out(&w, 300);
    window_ack(&w, 200);
    window_ack(&w, 100);
    assert_int_equal(w.acked, 200);
    window_ack(&w, 1001); // not produced yet
    assert_int_equal(w.acked, 200);
    window_ack(&w, UINT64_MAX);
    assert_int_equal(w.acked, 200);
    window_ack(&w, 500); // not sent in this session, but stored by another: need not be sent
    assert_int_equal(w.sent, 500);
    assert_int_equal(send_out(&w, SIZE_MAX), 500);
    window_free(&w);
}

static void far_into_a_stream(void **state)
{
    struct window w = {0};
    w.acked = w.sent = w.end = (1ull << 40) - 12345;
    for (int i = 0; i < 40; i++) {
        assert_int_equal(produce(&w, 60001), 60001);
        assert_int_equal(send_out(&w, SIZE_MAX), 60001);
        window_ack(&w, w.end - 7);
    }
    assert_int_equal(w.cap, 65536); // what little is kept needs no more
    window_free(&w);
}

// Any course of events, against what the stream says.
static void any_course_of_events(void **state)
{
    for (unsigned seed = 1; seed <= 8; seed++) {
        struct window w = {0};
        unsigned r = seed;
        for (int step = 0; step < 400; step++) {
            const size_t size = (size_t)(rand_r(&r) % 4 ? rand_r(&r) % 2000 : rand_r(&r) % 400000);
            const uint64_t kept = w.end - w.acked, at = w.acked + (kept ? (uint64_t)rand_r(&r) % (kept + 1) : 0);
            switch (rand_r(&r) % 5) {
            case 0:
            case 1: {
                const size_t room = window_room(&w);
                assert_int_equal(produce(&w, size), size < room ? size : room);
                break;
            }
            case 2:
                send_out(&w, size);
                break;
            case 3:
                window_ack(&w, at < w.sent ? at : w.sent);
                break;
            default:
                if (rand_r(&r) % 8 == 0) {
                    window_rewind(&w, at);
                    assert_int_equal(w.sent, at);
                }
                break;
            }
            assert_true(w.acked <= w.sent && w.sent <= w.end);
            assert_int_equal(window_room(&w), WINDOW_MAX - (w.end - w.acked));
        }
        window_rewind(&w, w.acked);
        assert_int_equal(send_out(&w, SIZE_MAX), w.end - w.acked);
        window_free(&w);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(an_empty_window),
        cmocka_unit_test(it_fills_to_the_maximum_and_no_further),
        cmocka_unit_test(it_grows_as_it_is_needed_and_shrinks_when_empty),
        cmocka_unit_test(growing_keeps_what_is_wrapped),
        cmocka_unit_test(an_attach_sends_again_from_its_offset),
        cmocka_unit_test(an_acknowledgement_never_goes_back),
        cmocka_unit_test(far_into_a_stream),
        cmocka_unit_test(any_course_of_events),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
