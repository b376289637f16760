// The host's side of a port: a guest may send anything. Input: mode, seed of the cuts, stream (see stream.h).
//
// Claims: what comes out does not depend on how the bytes arrive; every frame obeys the header's rules; nothing
// behind what was fed is read; every message that is accepted is said again in one form.
#include "feed.h"
#include "stream.h"

struct seen {
    uint64_t hash;
    unsigned synced, frames, violations;
    uint64_t skipped;
};

// Up to the first violation: there the host closes the connection.
static struct seen run(const struct buf *stream, bool whole, uint8_t seed, bool decode)
{
    struct feed f = {.whole = whole, .cuts = {seed}};
    struct seen s = {0};
    struct frame frame;
    feed_begin(&f, FRAME_SIDE_HOST, stream->data, stream->len);
    for (enum frame_event e; s.violations == 0 && (e = feed_next(&f, &frame)) != FRAME_NEED_MORE;) {
        CLAIM(e != FRAME_RESET);
        CLAIM(s.synced == (e != FRAME_SYNCED));
        s.synced |= e == FRAME_SYNCED;
        s.violations += e == FRAME_VIOLATION;
        if (e != FRAME_GOT)
            continue;
        s.frames++;
        s.hash = mix(s.hash, frame.payload - FRAME_HEADER_BYTES, FRAME_HEADER_BYTES + frame.length);
        if (decode)
            message_check(FRAME_SIDE_HOST, frame.type, frame.payload, frame.length);
    }
    s.skipped = f.p.skipped;
    feed_end(&f);
    return s;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct bytes in = {data, size};
    CLEANUP_BUF struct buf stream = BUF_INIT(STREAM_MAX);
    const uint8_t mode = take_u8(&in), seed = take_u8(&in);
    stream_make(&in, mode, &stream);
    const struct seen whole = run(&stream, true, 0, true), pieces = run(&stream, false, seed, false);
    CLAIM(whole.frames == pieces.frames && whole.hash == pieces.hash);
    CLAIM(whole.synced == pieces.synced && whole.violations == pieces.violations);
    CLAIM(whole.skipped == pieces.skipped);
    return 0;
}
