// One agent port over a socketpair, with the guest's end played by the test.
#include "peer.h"

#include <errno.h>
#include <sys/socket.h>
#include <unistd.h>

#include "qemu/channel.h"

static const uint8_t OTHER[FRAME_NONCE_BYTES] = "not your nonce!";

struct fixture {
    struct loop *loop;
    struct channel c;
    struct notes notes;
    struct peer peer;
    struct frame f;
    uint8_t nonce[FRAME_NONCE_BYTES]; // what the host sent last
    uint8_t close_at;                 // type of the frame at which the callback closes; 0: never
    size_t bytes;                     // of all payloads
    int give_fd, result;
};

static void on_frame(void *arg, struct channel *c, const struct frame *f)
{
    struct fixture *x = arg;
    assert_ptr_equal(c, &x->c);
    x->bytes += f->length;
    if (f->type != FRAME_OUTPUT)
        notes_add(&x->notes, "frame %u flags %u id %llu: %.*s", f->type, f->flags, (unsigned long long)f->id,
                  f->length < 40 ? (int)f->length : 40, (const char *)f->payload);
    if (f->type == x->close_at)
        channel_close(c);
}

static void on_lost(void *arg, struct channel *c, const char *why)
{
    struct fixture *x = arg;
    notes_add(&x->notes, "lost: %s%s", why, c->fd >= 0 || c->watch ? " (and still open)" : "");
}

static const struct channel_callbacks CALLBACKS = {on_frame, on_lost};

static void do_open(void *arg)
{
    struct fixture *x = arg;
    CLEANUP_BUF struct buf hello = BUF_INIT(64);
    buf_adds(&hello, "hello, guest");
    x->result = channel_open(&x->c, x->give_fd, &hello, NULL);
}

static void do_up(void *arg)
{
    channel_up(&((struct fixture *)arg)->c, true);
}

static void do_close(void *arg)
{
    channel_close(&((struct fixture *)arg)->c);
}

static void do_hold(void *arg)
{
    channel_hold(&((struct fixture *)arg)->c, true);
}

static void do_go_on(void *arg)
{
    channel_hold(&((struct fixture *)arg)->c, false);
}

// A new connection; sndbuf: of the host's end, 0 as it is.
static void connect_(struct fixture *x, int sndbuf)
{
    int sv[2];
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, sv), 0);
    if (sndbuf)
        assert_int_equal(setsockopt(sv[0], SOL_SOCKET, SO_SNDBUF, &sndbuf, sizeof sndbuf), 0);
    x->give_fd = sv[0];
    loop_call(x->loop, do_open, x);
    assert_int_equal(x->result, 0);
    peer_init(&x->peer, sv[1]);
    assert_int_equal(peer_next(&x->peer, &x->f), FRAME_RESET);
    memcpy(x->nonce, x->peer.in.nonce, sizeof x->nonce);
    peer_expect(&x->peer, FRAME_HELLO, &x->f);
    assert_int_equal(x->f.length, 12);
    assert_memory_equal(x->f.payload, "hello, guest", 12);
}

static struct fixture *begin(size_t tx_max, int sndbuf)
{
    struct fixture *x = calloc(1, sizeof *x);
    assert_non_null(x);
    notes_init(&x->notes);
    x->loop = loop_running();
    channel_init(&x->c, x->loop, tx_max, &CALLBACKS, x);
    connect_(x, sndbuf);
    return x;
}

static void end(struct fixture *x)
{
    loop_call(x->loop, do_close, x);
    loop_free(x->loop);
    channel_destroy(&x->c);
    peer_free(&x->peer);
    char *rest = notes_rest(&x->notes);
    assert_string_equal(rest, ""); // nothing happened that the test did not ask for
    free(rest);
    notes_free(&x->notes);
    free(x);
}

// ---- opening ----------------------------------------------------------------------------------------------------------
static void every_connection_has_a_nonce_of_its_own(void **state)
{
    struct fixture *x = begin(1 << 20, 0);
    uint8_t first[FRAME_NONCE_BYTES];
    memcpy(first, x->nonce, sizeof first);
    loop_call(x->loop, do_close, x);
    peer_expect_end(&x->peer);
    peer_free(&x->peer);
    connect_(x, 0);
    assert_memory_not_equal(first, x->nonce, sizeof first);
    end(x);
}

static void nothing_is_sent_before_it_is_up(void **state)
{
    struct fixture *x = begin(1 << 20, 0);
    assert_int_equal(channel_send(&x->c, FRAME_PING, 0, 1, NULL, 0, NULL, 0), -1);
    loop_call(x->loop, do_up, x);
    assert_int_equal(channel_send(&x->c, FRAME_STDIN, FRAME_LAST, 9, "head", 4, "and data", 8), 0);
    peer_expect(&x->peer, FRAME_STDIN, &x->f); // the first after the hello
    assert_int_equal(x->f.flags, FRAME_LAST);
    assert_int_equal(x->f.id, 9);
    assert_int_equal(x->f.length, 12);
    assert_memory_equal(x->f.payload, "headand data", 12);
    loop_call(x->loop, do_close, x);
    assert_int_equal(channel_send(&x->c, FRAME_PING, 0, 1, NULL, 0, NULL, 0), -1);
    peer_expect_end(&x->peer);
    end(x);
}

// ---- what the guest says ----------------------------------------------------------------------------------------------
static void old_bytes_and_other_sessions_are_skipped(void **state)
{
    struct fixture *x = begin(1 << 20, 0);
    uint8_t noise[20000];
    for (size_t i = 0; i < sizeof noise; i++)
        noise[i] = (uint8_t)(i * 2654435761u >> 11);
    peer_send(&x->peer, noise, sizeof noise);
    peer_frame(&x->peer, FRAME_LOG, 0, 1, "before any preamble", 19);
    peer_preamble(&x->peer, OTHER);
    peer_frame(&x->peer, FRAME_HELLO_REPLY, 0, 2, "to another host", 15);
    peer_frame(&x->peer, FRAME_EXITED, 0, 3, "of another session", 18);
    peer_send(&x->peer, FRAME_MAGIC, 9); // the old session ended within a preamble
    peer_preamble(&x->peer, x->nonce);
    peer_frame(&x->peer, FRAME_HELLO_REPLY, FRAME_LAST, 4, "to you", 6);
    peer_frame(&x->peer, FRAME_READY, 0, FRAME_ID_MAX, NULL, 0);
    notes_expect(&x->notes, "frame 2 flags 1 id 4: to you");
    notes_expect(&x->notes, "frame 6 flags 0 id 72057594037927935: ");
    end(x);
}

static void no_word_from_a_guest_with_the_wrong_nonce(void **state)
{
    struct fixture *x = begin(1 << 20, 0);
    uint8_t near[FRAME_NONCE_BYTES];
    memcpy(near, x->nonce, sizeof near);
    near[FRAME_NONCE_BYTES - 1] ^= 1;
    peer_preamble(&x->peer, near);
    peer_frame(&x->peer, FRAME_HELLO_REPLY, 0, 1, "almost", 6);
    loop_settle(x->loop);
    char *rest = notes_rest(&x->notes);
    assert_string_equal(rest, "");
    free(rest);
    assert_int_equal(x->c.frames_in, 0);
    peer_preamble(&x->peer, x->nonce);
    peer_frame(&x->peer, FRAME_PONG, 0, 2, NULL, 0);
    notes_expect(&x->notes, "frame 4 flags 0 id 2: ");
    end(x);
}

static void bytes_one_by_one(void **state)
{
    struct fixture *x = begin(1 << 20, 0);
    CLEANUP_BUF struct buf b = BUF_INIT(4096);
    uint8_t h[FRAME_HEADER_BYTES];
    buf_adds(&b, "noise");
    buf_add(&b, FRAME_MAGIC, FRAME_MAGIC_BYTES);
    buf_add(&b, x->nonce, sizeof x->nonce);
    frame_header(h, FRAME_LOG, 0, 5, 4);
    buf_add(&b, h, sizeof h);
    buf_adds(&b, "text");
    frame_header(h, FRAME_READY, 0, 6, 0);
    buf_add(&b, h, sizeof h);
    for (size_t i = 0; i < b.len; i++) {
        peer_send(&x->peer, b.data + i, 1);
        loop_settle(x->loop);
    }
    notes_expect(&x->notes, "frame 23 flags 0 id 5: text");
    notes_expect(&x->notes, "frame 6 flags 0 id 6: ");
    end(x);
}

static void a_broken_frame_closes_the_channel(void **state)
{
    static const struct {
        uint8_t at, value;
    } BREAKS[] = {{6, 5} /* past the largest payload */, {7, 1}, {0, 0} /* type */, {2, 1}, {3, 1}, {15, 1} /* id */};
    for (size_t i = 0; i < sizeof BREAKS / sizeof *BREAKS; i++) {
        struct fixture *x = begin(1 << 20, 0);
        uint8_t h[FRAME_HEADER_BYTES];
        loop_call(x->loop, do_up, x);
        peer_preamble(&x->peer, x->nonce);
        peer_frame(&x->peer, FRAME_READY, 0, 1, NULL, 0);
        frame_header(h, FRAME_LOG, 0, 2, 0);
        h[BREAKS[i].at] = BREAKS[i].value;
        CLEANUP_BUF struct buf b = BUF_INIT(4096);
        buf_add(&b, h, sizeof h);
        buf_add(&b, FRAME_MAGIC, FRAME_MAGIC_BYTES); // no way back in on the same connection
        buf_add(&b, x->nonce, sizeof x->nonce);
        frame_header(h, FRAME_LOG, 0, 3, 0);
        buf_add(&b, h, sizeof h);
        peer_send(&x->peer, b.data, b.len);
        notes_expect(&x->notes, "frame 6 flags 0 id 1: ");
        notes_expect(&x->notes, "lost: the guest broke the protocol");
        assert_int_equal(x->c.violations, 1);
        assert_int_equal(channel_send(&x->c, FRAME_PING, 0, 1, NULL, 0, NULL, 0), -1);
        peer_expect_end(&x->peer);
        end(x);
    }
}

static void the_largest_frame_arrives(void **state)
{
    struct fixture *x = begin(1 << 20, 0);
    uint8_t *big = malloc(FRAME_PAYLOAD_MAX);
    memset(big, 'b', FRAME_PAYLOAD_MAX);
    peer_preamble(&x->peer, x->nonce);
    for (unsigned i = 1; i <= 12; i++) // three times what one wake-up reads
        peer_frame(&x->peer, FRAME_OUTPUT, 0, i, big, FRAME_PAYLOAD_MAX);
    peer_frame(&x->peer, FRAME_READY, 0, 13, NULL, 0);
    notes_expect(&x->notes, "frame 6 flags 0 id 13: ");
    assert_int_equal(x->bytes, 12 * FRAME_PAYLOAD_MAX);
    free(big);
    end(x);
}

static void the_end_of_the_connection_is_told_once(void **state)
{
    struct fixture *x = begin(1 << 20, 0);
    peer_preamble(&x->peer, x->nonce);
    peer_frame(&x->peer, FRAME_READY, 0, 1, NULL, 0);
    peer_send(&x->peer, "\7", 1); // and a piece of the next
    fd_close(&x->peer.fd);
    notes_expect(&x->notes, "frame 6 flags 0 id 1: ");
    notes_expect(&x->notes, "lost: the connection was closed");
    loop_settle(x->loop);
    end(x);
}

static void closing_within_a_frame_s_callback_ends_it(void **state)
{
    struct fixture *x = begin(1 << 20, 0);
    CLEANUP_BUF struct buf b = BUF_INIT(4096);
    uint8_t h[FRAME_HEADER_BYTES];
    x->close_at = FRAME_FATAL;
    buf_add(&b, FRAME_MAGIC, FRAME_MAGIC_BYTES);
    buf_add(&b, x->nonce, sizeof x->nonce);
    for (unsigned i = 1; i <= 3; i++) {
        frame_header(h, i == 2 ? FRAME_FATAL : FRAME_LOG, 0, i, 0);
        buf_add(&b, h, sizeof h);
    }
    peer_send(&x->peer, b.data, b.len);
    notes_expect(&x->notes, "frame 23 flags 0 id 1: ");
    notes_expect(&x->notes, "frame 24 flags 0 id 2: ");
    peer_expect_end(&x->peer); // neither the third nor a loss is told
    end(x);
}

static void a_new_connection_starts_afresh(void **state)
{
    struct fixture *x = begin(1 << 20, 8192);
    char text[30000];
    memset(text, 'o', sizeof text);
    loop_call(x->loop, do_up, x);
    for (int i = 0; i < 20; i++) // more than the socket takes: some of it is queued
        assert_int_equal(channel_send(&x->c, FRAME_STDIN, 0, 1, NULL, 0, text, sizeof text), 0);
    peer_preamble(&x->peer, x->nonce);
    peer_send(&x->peer, "\7\0\0", 3); // half a header
    loop_settle(x->loop);
    fd_close(&x->peer.fd);
    notes_expect(&x->notes, "lost: the connection was closed");
    peer_free(&x->peer);
    connect_(x, 0);
    assert_int_equal(channel_send(&x->c, FRAME_PING, 0, 1, NULL, 0, NULL, 0), -1); // not up yet
    loop_call(x->loop, do_up, x);
    assert_int_equal(channel_send(&x->c, FRAME_PING, 0, 77, NULL, 0, NULL, 0), 0);
    peer_expect(&x->peer, FRAME_PING, &x->f); // nothing of the old queue before it
    assert_int_equal(x->f.id, 77);
    peer_preamble(&x->peer, x->nonce);
    peer_frame(&x->peer, FRAME_PONG, 0, 77, NULL, 0);
    notes_expect(&x->notes, "frame 4 flags 0 id 77: ");
    end(x);
}

// ---- a guest that does not read ---------------------------------------------------------------------------------------
static void fill(uint8_t *data, size_t len, unsigned seed)
{
    for (size_t i = 0; i < len; i++)
        data[i] = (uint8_t)(i * 31 + seed * 7) & 0x7f;
}

static void what_is_queued_arrives_whole_and_in_order(void **state)
{
    struct fixture *x = begin(8 << 20, 4096);
    static uint8_t text[FRAME_DATA_MAX], want[FRAME_DATA_MAX];
    loop_call(x->loop, do_up, x);
    for (unsigned i = 0; i < 60; i++) {
        fill(text, sizeof text, i);
        assert_int_equal(channel_send(&x->c, FRAME_STDIN, 0, i, text, MSG_DATA_HEADER, text + MSG_DATA_HEADER,
                                      i * 1000), 0);
    }
    for (unsigned i = 0; i < 60; i++) {
        fill(want, sizeof want, i);
        peer_expect(&x->peer, FRAME_STDIN, &x->f);
        assert_int_equal(x->f.id, i);
        assert_int_equal(x->f.length, MSG_DATA_HEADER + i * 1000);
        assert_memory_equal(x->f.payload, want, x->f.length);
    }
    end(x);
}

static void the_queue_is_bounded_and_takes_whole_frames(void **state)
{
    enum { MAX = 300000, PART = 10000 };
    struct fixture *x = begin(MAX, 4096);
    uint8_t text[PART];
    unsigned sent = 0, got = 0;
    int code = 0;
    loop_call(x->loop, do_up, x);
    for (int round = 0; round < 3; round++) {
        for (;; sent++) {
            fill(text, sizeof text, sent);
            code = channel_send(&x->c, FRAME_STDIN, 0, sent, NULL, 0, text, sizeof text);
            if (code != 0)
                break;
            assert_true((uint64_t)(sent - got) * PART < MAX + (1 << 20)); // it must end somewhere
        }
        assert_int_equal(code, -2);
        assert_true((uint64_t)(sent - got) * PART > MAX - 2 * PART);
        for (unsigned until = round == 2 ? sent : got + (sent - got) / 2; got < until; got++) { // room for some more
            peer_expect(&x->peer, FRAME_STDIN, &x->f);
            fill(text, sizeof text, got);
            assert_int_equal(x->f.id, got); // the refused one left nothing behind
            assert_int_equal(x->f.length, PART);
            assert_memory_equal(x->f.payload, text, PART);
        }
        loop_settle(x->loop);
    }
    assert_int_equal(channel_send(&x->c, FRAME_PING, 0, 9, NULL, 0, NULL, 0), 0);
    peer_expect(&x->peer, FRAME_PING, &x->f);
    end(x);
}

static void a_frame_larger_than_the_queue_is_refused(void **state)
{
    struct fixture *x = begin(5000, 0);
    static uint8_t text[6000];
    loop_call(x->loop, do_up, x);
    assert_int_equal(channel_send(&x->c, FRAME_STDIN, 0, 1, NULL, 0, text, sizeof text), -2);
    assert_int_equal(channel_send(&x->c, FRAME_STDIN, 0, 2, NULL, 0, text, 4900), 0);
    peer_expect(&x->peer, FRAME_STDIN, &x->f);
    assert_int_equal(x->f.id, 2);
    end(x);
}

struct sender {
    struct fixture *x;
    unsigned number;
    int failed;
};

enum { SENDERS = 4, EACH = 150 };

static void *send_some(void *arg)
{
    struct sender *s = arg;
    uint8_t text[700];
    for (unsigned i = 0; i < EACH; i++) {
        fill(text, sizeof text, i);
        s->failed |= channel_send(&s->x->c, FRAME_STDIN, 0, (uint64_t)s->number << 32 | i, NULL, 0, text, sizeof text);
    }
    return NULL;
}

static void any_thread_may_send(void **state)
{
    struct fixture *x = begin(4 << 20, 4096);
    pthread_t threads[SENDERS];
    struct sender senders[SENDERS];
    unsigned seen[SENDERS] = {0};
    loop_call(x->loop, do_up, x);
    for (unsigned i = 0; i < SENDERS; i++) {
        senders[i] = (struct sender){x, i, 0};
        assert_int_equal(pthread_create(&threads[i], NULL, send_some, &senders[i]), 0);
    }
    for (unsigned i = 0; i < SENDERS * EACH; i++) {
        uint8_t want[700];
        peer_expect(&x->peer, FRAME_STDIN, &x->f);
        const unsigned who = (unsigned)(x->f.id >> 32);
        assert_true(who < SENDERS);
        assert_int_equal((uint32_t)x->f.id, seen[who]); // in the order of its sender
        fill(want, sizeof want, seen[who]++);
        assert_int_equal(x->f.length, sizeof want);
        assert_memory_equal(x->f.payload, want, sizeof want);
    }
    for (unsigned i = 0; i < SENDERS; i++) {
        pthread_join(threads[i], NULL);
        assert_int_equal(senders[i].failed, 0);
    }
    end(x);
}

// ---- holding ----------------------------------------------------------------------------------------------------------
static void a_held_channel_is_not_read_but_written(void **state)
{
    struct fixture *x = begin(1 << 20, 0);
    loop_call(x->loop, do_up, x);
    peer_preamble(&x->peer, x->nonce);
    peer_frame(&x->peer, FRAME_LOG, 0, 1, NULL, 0);
    notes_expect(&x->notes, "frame 23 flags 0 id 1: ");
    loop_call(x->loop, do_hold, x);
    peer_frame(&x->peer, FRAME_LOG, 0, 2, NULL, 0);
    loop_settle(x->loop);
    char *rest = notes_rest(&x->notes);
    assert_string_equal(rest, "");
    free(rest);
    assert_int_equal(channel_send(&x->c, FRAME_PING, 0, 3, NULL, 0, NULL, 0), 0);
    peer_expect(&x->peer, FRAME_PING, &x->f);
    loop_call(x->loop, do_go_on, x);
    notes_expect(&x->notes, "frame 23 flags 0 id 2: "); // nothing was lost
    end(x);
}

static void a_held_channel_whose_guest_is_gone_is_lost(void **state)
{
    struct fixture *x = begin(1 << 20, 0);
    loop_call(x->loop, do_hold, x);
    fd_close(&x->peer.fd);
    notes_expect(&x->notes, "lost: the connection broke");
    end(x);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_connection_has_a_nonce_of_its_own),
        cmocka_unit_test(nothing_is_sent_before_it_is_up),
        cmocka_unit_test(old_bytes_and_other_sessions_are_skipped),
        cmocka_unit_test(no_word_from_a_guest_with_the_wrong_nonce),
        cmocka_unit_test(bytes_one_by_one),
        cmocka_unit_test(a_broken_frame_closes_the_channel),
        cmocka_unit_test(the_largest_frame_arrives),
        cmocka_unit_test(the_end_of_the_connection_is_told_once),
        cmocka_unit_test(closing_within_a_frame_s_callback_ends_it),
        cmocka_unit_test(a_new_connection_starts_afresh),
        cmocka_unit_test(what_is_queued_arrives_whole_and_in_order),
        cmocka_unit_test(the_queue_is_bounded_and_takes_whole_frames),
        cmocka_unit_test(a_frame_larger_than_the_queue_is_refused),
        cmocka_unit_test(any_thread_may_send),
        cmocka_unit_test(a_held_channel_is_not_read_but_written),
        cmocka_unit_test(a_held_channel_whose_guest_is_gone_is_lost),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
