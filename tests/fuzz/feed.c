#include "feed.h"

#include <sanitizer/asan_interface.h>

#include "stream.h"

void feed_begin(struct feed *f, enum frame_side side, const uint8_t *data, size_t len)
{
    const struct cuts cuts = f->cuts;
    const bool whole = f->whole;
    *f = (struct feed){.cuts = cuts, .whole = whole, .data = data, .len = len, .more = true};
    CLAIM(frame_parser_init(&f->p, side, side == FRAME_SIDE_HOST ? STREAM_NONCE : NULL) == 0);
}

static bool give(struct feed *f)
{
    size_t cap, n = f->len - f->given;
    if (n == 0)
        return false;
    ASAN_UNPOISON_MEMORY_REGION(f->p.data, f->p.cap);
    uint8_t *to = frame_parser_space(&f->p, &cap);
    CLAIM(cap >= 1);
    CLAIM(to >= f->p.data && to + cap <= f->p.data + f->p.cap);
    const size_t piece = f->whole ? n : next_cut(&f->cuts);
    n = piece < n ? piece : n;
    n = n < cap ? n : cap;
    memcpy(to, f->data + f->given, n);
    frame_parser_fed(&f->p, n);
    f->given += n;
    ASAN_POISON_MEMORY_REGION(f->p.data + f->p.end, f->p.cap - f->p.end);
    return true;
}

static void check_frame(const struct feed *f, const struct frame *frame)
{
    uint8_t head[FRAME_HEADER_BYTES];
    CLAIM(frame->type != 0);
    CLAIM(frame->length <= FRAME_PAYLOAD_MAX);
    CLAIM(frame->id <= FRAME_ID_MAX);
    CLAIM(frame->payload >= f->p.data + FRAME_HEADER_BYTES);
    CLAIM(frame->payload + frame->length <= f->p.data + f->p.end);
    frame_header(head, frame->type, frame->flags, frame->id, frame->length);
    CLAIM(memcmp(head, frame->payload - FRAME_HEADER_BYTES, sizeof head) == 0);
}

enum frame_event feed_next(struct feed *f, struct frame *ret)
{
    for (;;) {
        const enum frame_event e = f->more ? frame_parser_next(&f->p, ret) : FRAME_NEED_MORE;
        CLAIM(f->p.start <= f->p.end && f->p.end <= f->p.cap);
        if (e == FRAME_GOT)
            check_frame(f, ret);
        f->more = e != FRAME_NEED_MORE;
        if (f->more)
            return e;
        if (!give(f))
            return FRAME_NEED_MORE;
        f->more = true;
    }
}

size_t feed_consumed(const struct feed *f)
{
    return f->given - (f->p.end - f->p.start);
}

void feed_end(struct feed *f)
{
    ASAN_UNPOISON_MEMORY_REGION(f->p.data, f->p.cap);
    frame_parser_free(&f->p);
    frame_parser_free(&f->p);
}
