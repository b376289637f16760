// The byte layer: what a sender writes comes out of the parser, whatever the cuts; garbage and old bytes do not.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/buf.h"
#include "proto/frame.h"

static const uint8_t NONCE[FRAME_NONCE_BYTES] = "0123456789abcde", OTHER[FRAME_NONCE_BYTES] = "fedcba987654321";

static void add_frame(struct buf *b, uint8_t type, uint64_t id, const void *data, size_t len)
{
    uint8_t h[FRAME_HEADER_BYTES];
    frame_header(h, type, 0, id, (uint32_t)len);
    assert_true(buf_add(b, h, sizeof h) && buf_add(b, data, len));
}

static void add_preamble(struct buf *b, const uint8_t nonce[FRAME_NONCE_BYTES])
{
    assert_true(buf_add(b, FRAME_MAGIC, FRAME_MAGIC_BYTES) && buf_add(b, nonce, FRAME_NONCE_BYTES));
}

// Feeds as much as fits; returns how much that was.
static size_t feed(struct frame_parser *p, const uint8_t *data, size_t len)
{
    size_t cap;
    uint8_t *to = frame_parser_space(p, &cap);
    assert_true(cap > 0);
    const size_t n = len < cap ? len : cap;
    memcpy(to, data, n);
    frame_parser_fed(p, n);
    return n;
}

struct seen {
    unsigned frames, resets, synced, violations;
    uint64_t last_id;
    size_t bytes;
};

static struct seen run(struct frame_parser *p, const uint8_t *data, size_t len, size_t step)
{
    struct seen s = {0};
    struct frame f;
    for (size_t at = 0; at < len;) {
        at += feed(p, data + at, step < len - at ? step : len - at);
        for (enum frame_event e; (e = frame_parser_next(p, &f)) != FRAME_NEED_MORE;) {
            s.frames += e == FRAME_GOT;
            s.resets += e == FRAME_RESET;
            s.synced += e == FRAME_SYNCED;
            s.violations += e == FRAME_VIOLATION;
            if (e == FRAME_GOT) {
                s.last_id = f.id;
                s.bytes += f.length;
            }
        }
    }
    return s;
}

static void magic_is_no_text(void **state)
{
    for (size_t i = 0; i < FRAME_MAGIC_BYTES; i++)
        assert_true(FRAME_MAGIC[i] >= 0xf5);
    // No proper suffix of it is a prefix: a magic cut short never hides the beginning of a whole one.
    for (size_t n = 1; n < FRAME_MAGIC_BYTES; n++)
        assert_int_not_equal(memcmp(FRAME_MAGIC, FRAME_MAGIC + FRAME_MAGIC_BYTES - n, n), 0);
}

static void header_layout(void **state)
{
    uint8_t h[FRAME_HEADER_BYTES];
    static const uint8_t WANT[] = {7, 1, 0, 0, 4, 3, 2, 0, 8, 7, 6, 5, 4, 3, 2, 0};
    frame_header(h, FRAME_RUN, FRAME_LAST, 0x02030405060708, 0x020304);
    assert_memory_equal(h, WANT, sizeof h);
}

static void any_cut_gives_the_same_frames(void **state)
{
    CLEANUP_BUF struct buf b = BUF_INIT(1 << 20);
    char text[3000];
    memset(text, 'x', sizeof text);
    add_preamble(&b, NONCE);
    for (unsigned i = 1; i <= 20; i++)
        add_frame(&b, FRAME_RUN, i, text, i * 150);
    for (size_t step = 1; step < 4000; step = step < 40 ? step + 1 : step * 3) {
        struct frame_parser guest, host;
        assert_int_equal(frame_parser_init(&guest, FRAME_SIDE_GUEST, NULL), 0);
        assert_int_equal(frame_parser_init(&host, FRAME_SIDE_HOST, NONCE), 0);
        const struct seen g = run(&guest, b.data, b.len, step), h = run(&host, b.data, b.len, step);
        assert_int_equal(g.frames, 20);
        assert_int_equal(g.resets, 1);
        assert_int_equal(g.bytes, 150 * 210);
        assert_memory_equal(guest.nonce, NONCE, sizeof NONCE);
        assert_int_equal(h.frames, 20);
        assert_int_equal(h.synced, 1);
        assert_int_equal(h.last_id, 20);
        frame_parser_free(&guest);
        frame_parser_free(&host);
    }
}

static void largest_frame_and_bounded_memory(void **state)
{
    CLEANUP_BUF struct buf b = BUF_INIT(4 << 20);
    uint8_t *big = calloc(1, FRAME_PAYLOAD_MAX);
    add_preamble(&b, NONCE);
    for (unsigned i = 1; i <= 5; i++)
        add_frame(&b, FRAME_FILE, i, big, FRAME_PAYLOAD_MAX);
    for (size_t step = 1000; step < 3u << 20; step *= 7) {
        struct frame_parser p;
        assert_int_equal(frame_parser_init(&p, FRAME_SIDE_GUEST, NULL), 0);
        const size_t cap = p.cap;
        const struct seen s = run(&p, b.data, b.len, step);
        assert_int_equal(s.frames, 5);
        assert_int_equal(p.cap, cap);
        frame_parser_free(&p);
    }
    free(big);
}

// A new host takes over while the old one's bytes stopped anywhere: the guest is in the new session at once.
static void guest_starts_over_at_every_cut(void **state)
{
    CLEANUP_BUF struct buf old = BUF_INIT(1 << 16);
    char text[200];
    memset(text, 'o', sizeof text);
    add_preamble(&old, OTHER);
    add_frame(&old, FRAME_HELLO, 0, text, 50);
    add_frame(&old, FRAME_RUN, 77, text, sizeof text);
    for (size_t cut = 0; cut <= old.len; cut++)
        for (size_t step = 1; step <= 1000; step += 333) {
            CLEANUP_BUF struct buf b = BUF_INIT(1 << 16);
            struct frame_parser p;
            assert_int_equal(frame_parser_init(&p, FRAME_SIDE_GUEST, NULL), 0);
            buf_add(&b, old.data, cut);
            run(&p, b.data, b.len, step);
            buf_clear(&b);
            add_preamble(&b, NONCE);
            add_frame(&b, FRAME_PING, 99, NULL, 0);
            const struct seen s = run(&p, b.data, b.len, 1000);
            // Only a host that died within its own preamble, with its bytes read before the next one's came, costs
            // the next one its hello: it says it again.
            if (cut <= FRAME_MAGIC_BYTES || cut >= FRAME_PREAMBLE_BYTES) {
                assert_memory_equal(p.nonce, NONCE, sizeof NONCE);
                assert_int_equal(s.frames, 1);
                assert_int_equal(s.last_id, 99);
            }
            frame_parser_free(&p);
        }
}

static void guest_takes_the_last_of_glued_preambles(void **state)
{
    for (size_t cut = 0; cut <= FRAME_PREAMBLE_BYTES; cut++) {
        CLEANUP_BUF struct buf b = BUF_INIT(1 << 16);
        struct frame_parser p;
        assert_int_equal(frame_parser_init(&p, FRAME_SIDE_GUEST, NULL), 0);
        add_preamble(&b, OTHER);
        b.len = cut;
        add_preamble(&b, NONCE);
        add_frame(&b, FRAME_PING, 5, NULL, 0);
        const struct seen s = run(&p, b.data, b.len, 1000);
        assert_memory_equal(p.nonce, NONCE, sizeof NONCE);
        assert_int_equal(s.frames, 1);
        frame_parser_free(&p);
    }
}

static void guest_finds_the_magic_inside_a_payload(void **state)
{
    CLEANUP_BUF struct buf inner = BUF_INIT(1 << 16);
    add_preamble(&inner, NONCE);
    add_frame(&inner, FRAME_PING, 3, NULL, 0);
    CLEANUP_BUF struct buf b = BUF_INIT(1 << 20);
    uint8_t h[FRAME_HEADER_BYTES];
    frame_header(h, FRAME_FILE_DATA, 0, 1, 65536); // promised, and cut by the new session
    add_preamble(&b, OTHER);
    buf_add(&b, h, sizeof h);
    buf_add(&b, inner.data, inner.len);
    struct frame_parser p;
    assert_int_equal(frame_parser_init(&p, FRAME_SIDE_GUEST, NULL), 0);
    const struct seen s = run(&p, b.data, b.len, 10);
    assert_int_equal(s.resets, 2);
    assert_int_equal(s.frames, 1);
    assert_int_equal(s.last_id, 3);
    frame_parser_free(&p);
}

static void data_is_cut_inside_the_magic(void **state)
{
    uint8_t data[200];
    memset(data, 0xf5, sizeof data);
    assert_int_equal(frame_data_cut(data, sizeof data), sizeof data);
    for (size_t at = 0; at + FRAME_MAGIC_BYTES <= sizeof data; at++) {
        memset(data, 'd', sizeof data);
        memcpy(data + at, FRAME_MAGIC, FRAME_MAGIC_BYTES);
        const size_t cut = frame_data_cut(data, sizeof data);
        assert_true(frame_has_magic(data, sizeof data));
        assert_true(cut > at && cut < at + FRAME_MAGIC_BYTES);
        assert_false(frame_has_magic(data, cut));
        assert_false(frame_has_magic(data + cut, sizeof data - cut));
    }
    assert_int_equal(frame_data_cut(data, 0), 0);
    assert_int_equal(frame_data_cut(FRAME_MAGIC, FRAME_MAGIC_BYTES - 1), FRAME_MAGIC_BYTES - 1);
}

// Content that is nothing but the magic goes through, split.
static void split_data_arrives_whole(void **state)
{
    CLEANUP_BUF struct buf b = BUF_INIT(1 << 20);
    uint8_t data[FRAME_MAGIC_BYTES * 50];
    for (size_t i = 0; i < sizeof data; i++)
        data[i] = FRAME_MAGIC[i % FRAME_MAGIC_BYTES];
    add_preamble(&b, NONCE);
    for (size_t at = 0; at < sizeof data;) {
        const size_t n = frame_data_cut(data + at, sizeof data - at);
        assert_true(n > 0);
        add_frame(&b, FRAME_FILE_DATA, 1, data + at, n);
        at += n;
    }
    struct frame_parser p;
    assert_int_equal(frame_parser_init(&p, FRAME_SIDE_GUEST, NULL), 0);
    const struct seen s = run(&p, b.data, b.len, 61);
    assert_int_equal(s.resets, 1);
    assert_int_equal(s.bytes, sizeof data);
    frame_parser_free(&p);
}

static void host_skips_all_but_its_nonce(void **state)
{
    CLEANUP_BUF struct buf b = BUF_INIT(4 << 20);
    uint8_t *noise = malloc(1 << 20);
    for (size_t i = 0; i < 1 << 20; i++)
        noise[i] = (uint8_t)(i * 2654435761u >> 13);
    buf_add(&b, noise, 1 << 20);
    add_preamble(&b, OTHER); // an old session's answer
    add_frame(&b, FRAME_READY, 8, NULL, 0);
    buf_add(&b, FRAME_MAGIC, 7);
    add_preamble(&b, NONCE);
    add_frame(&b, FRAME_READY, 9, FRAME_MAGIC, FRAME_MAGIC_BYTES); // now a payload may hold anything
    for (size_t step = 5; step < 2u << 20; step *= 9) {
        struct frame_parser p;
        assert_int_equal(frame_parser_init(&p, FRAME_SIDE_HOST, NONCE), 0);
        const struct seen s = run(&p, b.data, b.len, step);
        assert_int_equal(s.synced, 1);
        assert_int_equal(s.frames, 1);
        assert_int_equal(s.last_id, 9);
        assert_true(p.skipped >= 1 << 20);
        frame_parser_free(&p);
    }
    free(noise);
}

static void broken_headers_are_violations(void **state)
{
    static const struct {
        size_t at;
        uint8_t value;
    } BREAKS[] = {{0, 0}, {2, 1}, {3, 255}, {6, 5}, {7, 1}, {15, 1}};
    for (size_t i = 0; i < sizeof BREAKS / sizeof *BREAKS; i++)
        for (int side = 0; side < 2; side++) {
            CLEANUP_BUF struct buf b = BUF_INIT(1 << 16);
            struct frame_parser p;
            add_preamble(&b, NONCE);
            add_frame(&b, FRAME_PING, 1, NULL, 0);
            b.data[FRAME_PREAMBLE_BYTES + BREAKS[i].at] = BREAKS[i].value;
            add_frame(&b, FRAME_PING, 2, NULL, 0);
            assert_int_equal(frame_parser_init(&p, side ? FRAME_SIDE_GUEST : FRAME_SIDE_HOST, NONCE), 0);
            const struct seen s = run(&p, b.data, b.len, 7);
            assert_int_equal(s.violations, 1);
            assert_int_equal(s.frames, 0); // nothing after it is believed
            buf_clear(&b);
            add_preamble(&b, NONCE);
            add_frame(&b, FRAME_PING, 3, NULL, 0);
            assert_int_equal(run(&p, b.data, b.len, 7).last_id, 3);
            frame_parser_free(&p);
        }
}

// A full buffer with the beginning of a preamble at its end still has room for the rest.
static void preamble_at_the_end_of_a_full_buffer(void **state)
{
    for (size_t tail = 1; tail < FRAME_PREAMBLE_BYTES; tail++) {
        struct frame_parser p;
        CLEANUP_BUF struct buf b = BUF_INIT(1 << 20);
        uint8_t h[FRAME_HEADER_BYTES];
        assert_int_equal(frame_parser_init(&p, FRAME_SIDE_GUEST, NULL), 0);
        add_preamble(&b, OTHER);
        run(&p, b.data, b.len, 1000);
        buf_clear(&b);
        frame_header(h, FRAME_FILE_DATA, 0, 1, FRAME_PAYLOAD_MAX);
        buf_add(&b, h, sizeof h);
        while (b.len < p.cap - tail)
            buf_add(&b, "z", 1);
        add_preamble(&b, NONCE);
        add_frame(&b, FRAME_PING, 4, NULL, 0);
        assert_int_equal(run(&p, b.data, b.len, SIZE_MAX).last_id, 4);
        frame_parser_free(&p);
    }
}

static void random_bytes_never_break_it(void **state)
{
    unsigned seed = 1;
    for (int round = 0; round < 300; round++) {
        uint8_t data[5000];
        struct frame_parser p;
        assert_int_equal(frame_parser_init(&p, round % 2 ? FRAME_SIDE_GUEST : FRAME_SIDE_HOST, NONCE), 0);
        for (size_t i = 0; i < sizeof data; i++)
            data[i] = (uint8_t)(rand_r(&seed) >> 5) & (rand_r(&seed) % 3 ? 0xff : 0x03);
        for (size_t i = 0; i + FRAME_PREAMBLE_BYTES < sizeof data; i += (size_t)rand_r(&seed) % 900 + 1) {
            memcpy(data + i, FRAME_MAGIC, FRAME_MAGIC_BYTES);
            if (rand_r(&seed) % 2)
                memcpy(data + i + FRAME_MAGIC_BYTES, NONCE, FRAME_NONCE_BYTES);
        }
        run(&p, data, sizeof data, (size_t)rand_r(&seed) % 100 + 1);
        frame_parser_free(&p);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(magic_is_no_text),
        cmocka_unit_test(header_layout),
        cmocka_unit_test(any_cut_gives_the_same_frames),
        cmocka_unit_test(largest_frame_and_bounded_memory),
        cmocka_unit_test(guest_starts_over_at_every_cut),
        cmocka_unit_test(guest_takes_the_last_of_glued_preambles),
        cmocka_unit_test(guest_finds_the_magic_inside_a_payload),
        cmocka_unit_test(data_is_cut_inside_the_magic),
        cmocka_unit_test(split_data_arrives_whole),
        cmocka_unit_test(host_skips_all_but_its_nonce),
        cmocka_unit_test(broken_headers_are_violations),
        cmocka_unit_test(preamble_at_the_end_of_a_full_buffer),
        cmocka_unit_test(random_bytes_never_break_it),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
