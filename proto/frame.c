#include "proto/frame.h"

#include <stdlib.h>
#include <string.h>

// Bytes that no UTF-8 text contains, so that messages made of text can never hold the magic.
const uint8_t FRAME_MAGIC[FRAME_MAGIC_BYTES] = {0xf5, 0xfa, 0xff, 0xf7, 0xfe, 0xf9, 0xfc, 0xf6,
                                                0xfd, 0xf8, 0xfb, 0xff, 0xf6, 0xfa, 0xf7, 0xfe};

#define FRAME_MAGIC_LEAST 0xf5
#define PARSER_BYTES (FRAME_PREAMBLE_BYTES + FRAME_HEADER_BYTES + FRAME_PAYLOAD_MAX)

static uint64_t get_le(const uint8_t *p, int n)
{
    uint64_t v = 0;
    for (int i = n; i-- > 0;)
        v = v << 8 | p[i];
    return v;
}

static void put_le(uint8_t *p, uint64_t v, int n)
{
    for (int i = 0; i < n; i++, v >>= 8)
        p[i] = (uint8_t)v;
}

void frame_header(uint8_t out[FRAME_HEADER_BYTES], uint8_t type, uint8_t flags, uint64_t id, uint32_t length)
{
    out[0] = type;
    out[1] = flags;
    out[2] = out[3] = 0;
    put_le(out + 4, length, 4);
    put_le(out + 8, id, 8);
}

// Every byte of the magic is at least FRAME_MAGIC_LEAST, so one that is there shows at every sixteenth place.
static const uint8_t *find_magic(const uint8_t *data, size_t len)
{
    for (size_t at = FRAME_MAGIC_BYTES - 1; at < len; at += FRAME_MAGIC_BYTES) {
        if (data[at] < FRAME_MAGIC_LEAST)
            continue;
        for (size_t begin = at - (FRAME_MAGIC_BYTES - 1); begin <= at && begin + FRAME_MAGIC_BYTES <= len; begin++)
            if (memcmp(data + begin, FRAME_MAGIC, FRAME_MAGIC_BYTES) == 0)
                return data + begin;
    }
    return NULL;
}

bool frame_has_magic(const uint8_t *data, size_t len)
{
    return find_magic(data, len) != NULL;
}

size_t frame_data_cut(const uint8_t *data, size_t len)
{
    const uint8_t *at = find_magic(data, len);
    return at ? (size_t)(at - data) + FRAME_MAGIC_BYTES / 2 : len;
}

int frame_parser_init(struct frame_parser *p, enum frame_side side, const uint8_t *nonce)
{
    memset(p, 0, sizeof *p);
    p->side = side;
    if (nonce)
        memcpy(p->nonce, nonce, FRAME_NONCE_BYTES);
    p->data = malloc(PARSER_BYTES);
    p->cap = PARSER_BYTES;
    return p->data ? 0 : -1;
}

void frame_parser_free(struct frame_parser *p)
{
    free(p->data);
    p->data = NULL;
    p->start = p->end = p->cap = 0;
}

uint8_t *frame_parser_space(struct frame_parser *p, size_t *ret_cap)
{
    if (p->start == p->end) {
        p->start = p->end = 0;
    } else if (p->start > 0 && p->cap - p->end < p->cap / 2) {
        memmove(p->data, p->data + p->start, p->end - p->start);
        p->end -= p->start;
        p->start = 0;
    }
    *ret_cap = p->cap - p->end;
    return p->data + p->end;
}

void frame_parser_fed(struct frame_parser *p, size_t n)
{
    p->end += n;
}

static void drop(struct frame_parser *p, size_t n)
{
    p->start += n;
    p->scanned = p->scanned > n ? p->scanned - n : 0;
    if (n > 0)
        p->carried = 0;
}

// Takes n bytes as a frame or a preamble. A magic may have begun at their end: a host died within what looked like a
// frame, the next one's preamble filled it up.
static void take(struct frame_parser *p, size_t n)
{
    drop(p, n);
    const uint8_t *end = p->data + p->start;
    p->carried = FRAME_MAGIC_BYTES - 1; // < n
    while (p->carried > 0 && memcmp(end - p->carried, FRAME_MAGIC, p->carried) != 0)
        p->carried--;
}

// Throws away what cannot be the beginning of a magic. True when the buffer now begins with a whole one.
static bool seek_magic(struct frame_parser *p)
{
    const uint8_t *at = find_magic(p->data + p->start, p->end - p->start);
    const size_t have = p->end - p->start;
    const size_t keep = have < FRAME_MAGIC_BYTES - 1 ? have : FRAME_MAGIC_BYTES - 1;
    const size_t n = at ? (size_t)(at - (p->data + p->start)) : have - keep;
    p->skipped += n;
    drop(p, n);
    return at != NULL;
}

// Host, not in step: on to FRAME_MAGIC and our nonce.
static enum frame_event host_sync(struct frame_parser *p)
{
    while (seek_magic(p)) {
        if (p->end - p->start < FRAME_PREAMBLE_BYTES)
            return FRAME_NEED_MORE;
        const bool ours = memcmp(p->data + p->start + FRAME_MAGIC_BYTES, p->nonce, FRAME_NONCE_BYTES) == 0;
        drop(p, ours ? FRAME_PREAMBLE_BYTES : 1);
        if (ours) {
            p->synced = true;
            return FRAME_SYNCED;
        }
    }
    return FRAME_NEED_MORE;
}

// The last magic in what has not been searched: a host that died within its preamble is followed by another one's.
static const uint8_t *last_magic(const struct frame_parser *p)
{
    const uint8_t *end = p->data + p->end, *at = NULL;
    const size_t from = p->scanned > FRAME_MAGIC_BYTES - 1 ? p->scanned - (FRAME_MAGIC_BYTES - 1) : 0;
    const uint8_t *next = find_magic(p->data + p->start + from, p->end - p->start - from);
    for (; next; next = find_magic(at + 1, (size_t)(end - at) - 1))
        at = next;
    return at;
}

// Whether the magic that began at the end of what was taken goes on; a header never does, and is no shorter.
static bool magic_goes_on(const struct frame_parser *p)
{
    const size_t rest = FRAME_MAGIC_BYTES - p->carried;
    return p->carried > 0 && p->end - p->start >= rest &&
           memcmp(p->data + p->start, FRAME_MAGIC + p->carried, rest) == 0;
}

// Guest: a preamble anywhere in what has come ends the old session at once.
static enum frame_event guest_scan(struct frame_parser *p)
{
    const uint8_t *at = last_magic(p);
    const bool goes_on = !at && magic_goes_on(p);
    if (!at)
        p->scanned = p->end - p->start;
    if (!at && !goes_on)
        return FRAME_GOT; // nothing of the kind: go on
    const size_t before = at ? (size_t)(at - (p->data + p->start)) : 0;
    const size_t magic = goes_on ? FRAME_MAGIC_BYTES - p->carried : FRAME_MAGIC_BYTES;
    p->skipped += before; // what stands before it is void, complete or not
    drop(p, before);
    p->synced = false;
    if (p->end - p->start < magic + FRAME_NONCE_BYTES)
        return FRAME_NEED_MORE;
    memcpy(p->nonce, p->data + p->start + magic, FRAME_NONCE_BYTES);
    take(p, magic + FRAME_NONCE_BYTES);
    p->synced = true;
    return FRAME_RESET;
}

static bool header_ok(const uint8_t *h)
{
    return h[0] != 0 && h[2] == 0 && h[3] == 0 && get_le(h + 4, 4) <= FRAME_PAYLOAD_MAX && h[15] == 0;
}

static enum frame_event next_frame(struct frame_parser *p, struct frame *ret)
{
    const size_t have = p->end - p->start;
    const uint8_t *h = p->data + p->start;
    if (have < FRAME_HEADER_BYTES)
        return FRAME_NEED_MORE;
    if (!header_ok(h)) {
        p->synced = false;
        return FRAME_VIOLATION;
    }
    const uint32_t length = (uint32_t)get_le(h + 4, 4);
    if (have < FRAME_HEADER_BYTES + length)
        return FRAME_NEED_MORE;
    *ret = (struct frame){.type = h[0], .flags = h[1], .id = get_le(h + 8, 8), .payload = h + FRAME_HEADER_BYTES,
                          .length = length};
    take(p, FRAME_HEADER_BYTES + length);
    return FRAME_GOT;
}

enum frame_event frame_parser_next(struct frame_parser *p, struct frame *ret)
{
    if (p->side == FRAME_SIDE_HOST && !p->synced)
        return host_sync(p);
    if (p->side == FRAME_SIDE_GUEST) {
        const enum frame_event e = guest_scan(p);
        if (e != FRAME_GOT)
            return e;
        if (!p->synced) {
            (void)seek_magic(p);
            return FRAME_NEED_MORE;
        }
    }
    return next_frame(p, ret);
}
