// A port of the agent over a socketpair: frames whole and in order, nothing before the session, nothing old in a new one,
// and a bounded queue.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <sys/ioctl.h>
#include <sys/socket.h>

#include "guest/port.c"

#include "base/fd.h"

static const uint8_t NONCE[FRAME_NONCE_BYTES] = "0123456789abcde";

struct fixture {
    struct port p;
    int host;
    struct frame_parser in;
    struct frame f;
};

static int setup(void **state)
{
    struct fixture *x = calloc(1, sizeof *x);
    int sv[2], small = 4096;
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, sv) != 0 ||
        setsockopt(sv[0], SOL_SOCKET, SO_SNDBUF, &small, sizeof small) != 0)
        return -1;
    x->p = (struct port){.fd = sv[0], .which = MSG_PORT_CONTROL};
    pthread_mutex_init(&x->p.lock, NULL);
    x->host = sv[1];
    *state = x;
    return frame_parser_init(&x->in, FRAME_SIDE_HOST, NONCE);
}

static int teardown(void **state)
{
    struct fixture *x = *state;
    fd_close(&x->p.fd);
    fd_close(&x->host);
    free(x->p.tx);
    pthread_mutex_destroy(&x->p.lock);
    frame_parser_free(&x->in);
    free(x);
    return 0;
}

// The host's next event; FRAME_NEED_MORE when the guest has nothing more to say.
static enum frame_event next(struct fixture *x)
{
    for (;;) {
        const enum frame_event e = frame_parser_next(&x->in, &x->f);
        if (e != FRAME_NEED_MORE)
            return e;
        size_t cap;
        uint8_t *to = frame_parser_space(&x->in, &cap);
        const ssize_t n = recv(x->host, to, cap, MSG_DONTWAIT);
        if (n > 0)
            frame_parser_fed(&x->in, (size_t)n);
        else if (port_flush(&x->p) && recv(x->host, to, 1, MSG_PEEK | MSG_DONTWAIT) <= 0)
            return FRAME_NEED_MORE;
    }
}

static void begin_session(struct fixture *x)
{
    port_preamble(&x->p, NONCE);
    x->p.up = true;
    assert_true(port_send(&x->p, FRAME_HELLO_REPLY, 0, 0, NULL, 0, NULL, 0));
    assert_int_equal(next(x), FRAME_SYNCED);
    assert_int_equal(next(x), FRAME_GOT);
    assert_int_equal(x->f.type, FRAME_HELLO_REPLY);
}

static void nothing_but_the_hello_before_the_session(void **state)
{
    struct fixture *x = *state;
    assert_false(port_send(&x->p, FRAME_LOG, 0, 0, "early", 5, NULL, 0));
    assert_false(port_idle(&x->p));
    port_preamble(&x->p, NONCE);
    assert_true(port_send(&x->p, FRAME_HELLO_REPLY, 0, 0, "version", 7, NULL, 0));
    assert_int_equal(next(x), FRAME_SYNCED);
    assert_int_equal(next(x), FRAME_GOT);
    assert_int_equal(x->f.type, FRAME_HELLO_REPLY);
    assert_int_equal(next(x), FRAME_NEED_MORE);
    assert_false(port_send(&x->p, FRAME_LOG, 0, 0, "still early", 11, NULL, 0));
    assert_int_equal(next(x), FRAME_NEED_MORE);
}

static void head_and_data_are_one_payload(void **state)
{
    struct fixture *x = *state;
    CLEANUP_BUF struct buf b = BUF_INIT(100);
    begin_session(x);
    assert_true(port_idle(&x->p));
    assert_true(port_send(&x->p, FRAME_OUTPUT, FRAME_LAST, 77, "head", 4, "data", 4));
    buf_adds(&b, "from a buffer");
    assert_true(port_send_buf(&x->p, FRAME_EXITED, 0, 78, &b));
    assert_true(port_send_buf(&x->p, FRAME_READY, 0, 0, NULL));
    assert_int_equal(next(x), FRAME_GOT);
    assert_int_equal(x->f.type, FRAME_OUTPUT);
    assert_int_equal(x->f.flags, FRAME_LAST);
    assert_int_equal(x->f.id, 77);
    assert_int_equal(x->f.length, 8);
    assert_memory_equal(x->f.payload, "headdata", 8);
    assert_int_equal(next(x), FRAME_GOT);
    assert_int_equal(x->f.length, 13);
    assert_memory_equal(x->f.payload, "from a buffer", 13);
    assert_int_equal(next(x), FRAME_GOT);
    assert_int_equal(x->f.type, FRAME_READY);
    assert_int_equal(next(x), FRAME_NEED_MORE);
}

static void what_the_host_does_not_read_waits_in_order(void **state)
{
    static uint8_t text[60000];
    struct fixture *x = *state;
    begin_session(x);
    for (unsigned i = 0; i < 30; i++) {
        memset(text, (int)('a' + i), sizeof text);
        assert_true(port_send(&x->p, FRAME_OUTPUT, 0, i, NULL, 0, text, i * 2000));
    }
    assert_false(port_idle(&x->p));
    assert_false(port_flush(&x->p));
    for (unsigned i = 0; i < 30; i++) {
        memset(text, (int)('a' + i), sizeof text);
        assert_int_equal(next(x), FRAME_GOT);
        assert_int_equal(x->f.id, i);
        assert_int_equal(x->f.length, i * 2000);
        assert_memory_equal(x->f.payload, text, x->f.length);
    }
    assert_int_equal(next(x), FRAME_NEED_MORE);
    assert_true(port_flush(&x->p));
    assert_true(port_idle(&x->p));
}

static void the_queue_is_bounded_and_takes_whole_frames(void **state)
{
    static uint8_t text[50000];
    struct fixture *x = *state;
    begin_session(x);
    unsigned sent = 0, got = 0;
    for (int round = 0; round < 3; round++) {
        while (port_send(&x->p, FRAME_OUTPUT, 0, sent, NULL, 0, text, sizeof text))
            assert_true(++sent - got < 100);
        assert_true(x->p.tx_cap <= TX_MAX);
        assert_true((sent - got) * sizeof text > TX_MAX / 2);
        for (unsigned until = got + (round < 2 ? 10 : sent - got); got < until; got++) {
            assert_int_equal(next(x), FRAME_GOT);
            assert_int_equal(x->f.id, got);
            assert_int_equal(x->f.length, sizeof text);
        }
    }
    assert_int_equal(next(x), FRAME_NEED_MORE); // the refused ones left nothing behind
}

// A new session begins while half a frame of the old one is out: the host finds the new preamble behind it.
static void nothing_old_in_a_new_session(void **state)
{
    static uint8_t text[60000];
    static const uint8_t SECOND[FRAME_NONCE_BYTES] = "another nonce!!";
    struct fixture *x = *state;
    begin_session(x);
    for (unsigned i = 0; i < 5; i++)
        assert_true(port_send(&x->p, FRAME_OUTPUT, 0, i, NULL, 0, text, sizeof text));
    assert_false(port_flush(&x->p)); // some of it is under way, the most is not
    int under_way = 0;
    assert_int_equal(ioctl(x->host, FIONREAD, &under_way), 0);
    port_reset(&x->p);
    assert_false(port_send(&x->p, FRAME_LOG, 0, 0, "x", 1, NULL, 0));
    frame_parser_free(&x->in);
    assert_int_equal(frame_parser_init(&x->in, FRAME_SIDE_HOST, SECOND), 0); // the host has started over as well
    port_preamble(&x->p, SECOND);
    assert_true(port_send(&x->p, FRAME_HELLO_REPLY, 0, 99, NULL, 0, NULL, 0));
    assert_int_equal(next(x), FRAME_SYNCED);
    assert_int_equal(next(x), FRAME_GOT);
    assert_int_equal(x->f.type, FRAME_HELLO_REPLY);
    assert_int_equal(x->f.id, 99);
    assert_true(under_way > 0 && under_way < 5 * 60000);
    assert_int_equal(x->in.skipped, under_way); // and no more of it came
    assert_int_equal(next(x), FRAME_NEED_MORE);
}

static void words_go_to_the_control_port(void **state)
{
    struct fixture *x = *state;
    char longer[1000];
    begin_session(x);
    control_port.fd = x->p.fd;
    control_port.up = true;
    port_log("%s %d", "seven", 7);
    memset(longer, 'l', sizeof longer - 1);
    longer[sizeof longer - 1] = 0;
    port_log("%s", longer); // cut
    port_log("%s", "");     // nothing to say
    assert_int_equal(next(x), FRAME_GOT);
    assert_int_equal(x->f.type, FRAME_LOG);
    assert_int_equal(x->f.length, 7);
    assert_memory_equal(x->f.payload, "seven 7", 7);
    assert_int_equal(next(x), FRAME_GOT);
    assert_int_equal(x->f.length, 511);
    assert_memory_equal(x->f.payload, longer, 511);
    assert_int_equal(next(x), FRAME_NEED_MORE);
    control_port.fd = -1;
    free(control_port.tx);
    control_port.tx = NULL;
    control_port.tx_cap = 0;
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(nothing_but_the_hello_before_the_session),
        TEST(head_and_data_are_one_payload),
        TEST(what_the_host_does_not_read_waits_in_order),
        TEST(the_queue_is_bounded_and_takes_whole_frames),
        TEST(nothing_old_in_a_new_session),
        TEST(words_go_to_the_control_port),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
