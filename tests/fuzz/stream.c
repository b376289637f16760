#include "stream.h"

const uint8_t STREAM_NONCE[FRAME_NONCE_BYTES] = {'0', '1', '2', '3', '4', '5', '6', '7',
                                                 '8', '9', 'a', 'b', 'c', 'd', 'e', 'f'};

static void add_taken(struct bytes *in, size_t want, struct buf *out)
{
    size_t n;
    const uint8_t *bytes = take(in, want, &n);
    buf_add(out, bytes, n);
}

static size_t take_u16(struct bytes *in)
{
    const size_t low = take_u8(in);
    return low | (size_t)take_u8(in) << 8;
}

static void add_header(struct buf *out, uint8_t type, uint8_t flags, uint64_t id, size_t length)
{
    uint8_t head[FRAME_HEADER_BYTES];
    frame_header(head, type, flags, id, (uint32_t)length);
    buf_add(out, head, sizeof head);
}

static void add_preamble(struct buf *out)
{
    buf_add(out, FRAME_MAGIC, FRAME_MAGIC_BYTES);
    buf_add(out, STREAM_NONCE, FRAME_NONCE_BYTES);
}

static void put_u64(uint8_t *p, uint64_t v)
{
    for (int i = 0; i < 8; i++, v >>= 8)
        p[i] = (uint8_t)v;
}

// kind: 0-2 a number (one byte of input, shifted up by kind), 3 a session of 16 bytes, 4 a directory entry,
// 5 a wrong length, otherwise n u8 and bytes.
static void add_field(struct bytes *in, struct buf *out)
{
    uint8_t value[56 + 255] = {0};
    const uint8_t tag = take_u8(in), kind = take_u8(in) % 8;
    size_t len = 8, n;
    const uint8_t *bytes;
    if (kind < 3) {
        put_u64(value, (uint64_t)take_u8(in) << (28 * kind));
    } else if (kind == 3) {
        len = 16;
        bytes = take(in, 16, &n);
        memcpy(value, bytes, n);
    } else {
        const size_t at = kind == 4 ? 56 : 0;
        if (kind == 4)
            put_u64(value + 48, take_u8(in)); // the name's length within what follows
        bytes = take(in, take_u8(in), &n);
        if (n)
            memcpy(value + at, bytes, n);
        len = at + n;
    }
    const size_t said = kind == 5 ? len + take_u8(in) : len;
    const uint8_t head[5] = {tag, (uint8_t)said, (uint8_t)(said >> 8), 0, 0};
    buf_add(out, head, sizeof head);
    buf_add(out, value, len);
}

static void add_message(struct bytes *in, struct buf *out)
{
    CLEANUP_BUF struct buf payload = BUF_INIT(16 * 400);
    const uint8_t type = take_u8(in);
    for (unsigned n = take_u8(in) % 16; n > 0; n--)
        add_field(in, &payload);
    add_header(out, type, (uint8_t)(type & FRAME_LAST), type, payload.len);
    buf_add(out, payload.data, payload.len);
}

static void add_frame(struct bytes *in, struct buf *out)
{
    const uint8_t type = take_u8(in), flags = take_u8(in), id = take_u8(in);
    const size_t said = take_u16(in), length = said < in->left ? said : in->left;
    add_header(out, type, flags, (uint64_t)id << (id % 49), length);
    add_taken(in, length, out);
}

static void run_op(struct bytes *in, struct buf *out)
{
    switch ((enum stream_op)(take_u8(in) % STREAM_OPS)) {
    case STREAM_BYTES:
        add_taken(in, take_u8(in), out);
        break;
    case STREAM_SESSION:
        add_preamble(out);
        break;
    case STREAM_MAGIC:
        buf_add(out, FRAME_MAGIC, take_u8(in) % (FRAME_MAGIC_BYTES + 1));
        break;
    case STREAM_FRAME:
        add_frame(in, out);
        break;
    case STREAM_FIELDS:
        add_message(in, out);
        break;
    case STREAM_CUT: {
        const uint8_t type = take_u8(in);
        const size_t said = take_u16(in);
        add_header(out, type, 0, 1, said);
        add_taken(in, take_u8(in) % (said + 1), out);
        break;
    }
    case STREAM_HEADER:
        add_taken(in, FRAME_HEADER_BYTES, out);
        break;
    case STREAM_NONCE_OF:
        buf_add(out, FRAME_MAGIC, FRAME_MAGIC_BYTES);
        add_taken(in, FRAME_NONCE_BYTES, out);
        break;
    case STREAM_LARGE: {
        const uint8_t type = take_u8(in);
        const size_t length = ((size_t)take_u8(in) + 1) << 10;
        if (buf_reserve(out, FRAME_HEADER_BYTES + length)) {
            add_header(out, type, 0, 1, length);
            memset(out->data + out->len, 0, length);
            out->len += length;
        }
        break;
    }
    case STREAM_OPS:
        break;
    }
}

void stream_make(struct bytes *in, uint8_t mode, struct buf *out)
{
    if (mode & STREAM_PREAMBLE)
        add_preamble(out);
    if (mode & STREAM_PROGRAM) {
        while (in->left > 0)
            run_op(in, out);
    } else {
        add_taken(in, in->left, out);
    }
}
