// The guest's side of a port: old bytes, dead hosts' halves and new sessions, in any order. Input: mode, seed of the
// cuts, stream (see stream.h); with GUEST_SENDER the stream is content that a sender must split.
//
// Claims: the session that stands at the end, and its frames, do not depend on how the bytes arrive (what comes before
// the last preamble is void and may or may not be seen); frames obey the header's rules; nothing behind what was
// fed is read; accepted messages are said again in one form; a split content never shows the magic.
#include "feed.h"
#include "proto/msg.h"
#include "stream.h"

#define GUEST_SENDER 4u // of the first byte

struct seen {
    bool synced;
    uint8_t nonce[FRAME_NONCE_BYTES];
    unsigned frames, resets, violations; // frames and violations: since the last reset
    uint64_t hash;
};

static struct seen run(const struct buf *stream, bool whole, uint8_t seed, bool decode)
{
    struct feed f = {.whole = whole, .cuts = {seed}};
    struct seen s = {0};
    struct frame frame;
    feed_begin(&f, FRAME_SIDE_GUEST, stream->data, stream->len);
    for (enum frame_event e; (e = feed_next(&f, &frame)) != FRAME_NEED_MORE;) {
        CLAIM(e != FRAME_SYNCED);
        CLAIM(e == FRAME_RESET || s.resets > 0);
        CLAIM(f.p.synced == (e != FRAME_VIOLATION));
        s.violations += e == FRAME_VIOLATION;
        if (e == FRAME_RESET)
            s = (struct seen){.resets = s.resets + 1, .hash = mix(0, f.p.nonce, FRAME_NONCE_BYTES)};
        if (e != FRAME_GOT)
            continue;
        s.frames++;
        s.hash = mix(s.hash, frame.payload - FRAME_HEADER_BYTES, FRAME_HEADER_BYTES + frame.length);
        if (decode)
            message_check(FRAME_SIDE_GUEST, frame.type, frame.payload, frame.length);
    }
    s.synced = f.p.synced;
    memcpy(s.nonce, f.p.nonce, FRAME_NONCE_BYTES);
    feed_end(&f);
    return s;
}

static void check_receiver(const struct buf *stream, uint8_t seed)
{
    const struct seen whole = run(stream, true, 0, true), pieces = run(stream, false, seed, true);
    CLAIM(whole.synced == pieces.synced);
    if (!whole.synced)
        return; // between sessions: nothing counts
    CLAIM(memcmp(whole.nonce, pieces.nonce, FRAME_NONCE_BYTES) == 0);
    CLAIM(whole.frames == pieces.frames && whole.hash == pieces.hash);
}

// As the host sends content: in data frames cut where frame_data_cut says.
static void check_sender(const struct buf *content)
{
    CLEANUP_BUF struct buf wire = BUF_INIT(3u << 20);
    uint8_t head[FRAME_HEADER_BYTES + MSG_DATA_HEADER];
    size_t pieces = 0;
    for (size_t at = 0; at < content->len; pieces++) {
        const size_t n = frame_data_cut(content->data + at, content->len - at);
        CLAIM(n > 0 && n <= content->len - at);
        frame_header(head, FRAME_STDIN, 0, FRAME_ID_MAX, (uint32_t)(MSG_DATA_HEADER + n));
        msg_data_header(head + FRAME_HEADER_BYTES, MSG_STDIN, at);
        CLAIM(buf_add(&wire, head, sizeof head) && buf_add(&wire, content->data + at, n));
        at += n;
    }
    CLAIM(!frame_has_magic(wire.data, wire.len));
    CLAIM(pieces <= 1 || frame_has_magic(content->data, content->len));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct bytes in = {data, size};
    CLEANUP_BUF struct buf stream = BUF_INIT(STREAM_MAX);
    const uint8_t mode = take_u8(&in), seed = take_u8(&in);
    stream_make(&in, mode, &stream);
    if (mode & GUEST_SENDER)
        check_sender(&stream);
    else
        check_receiver(&stream, seed);
    return 0;
}
