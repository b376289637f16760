// stream.h - what a peer may write onto a port, made from a fuzz input: either the input's bytes as they are, or what
// a small program in the input says to write (whole frames with fitting lengths, preambles, fields), so that the
// fuzzer gets behind lengths and magic numbers that bit flips seldom hit.
#ifndef TESTS_FUZZ_STREAM_H
#define TESTS_FUZZ_STREAM_H

#include "base/buf.h"
#include "fuzz.h"
#include "proto/frame.h"

// More than the parser holds at once, so that it must move what it has.
#define STREAM_MAX (640u << 10)

// Of the first byte of an input.
#define STREAM_PROGRAM 1u   // the rest is a program, otherwise bytes
#define STREAM_PREAMBLE 2u  // the stream begins with a preamble

extern const uint8_t STREAM_NONCE[FRAME_NONCE_BYTES]; // the host's

// Operations of a program, one byte each, modulo STREAM_OPS.
enum stream_op {
    STREAM_BYTES,    // n u8, bytes
    STREAM_SESSION,  // a preamble with our nonce
    STREAM_MAGIC,    // n u8: the first n % 17 bytes of the magic
    STREAM_FRAME,    // type, flags, id, length u16, payload
    STREAM_FIELDS,   // type, n u8, then n % 16 fields: tag, kind u8, bytes (see stream.c)
    STREAM_CUT,      // type, length u16, fewer bytes than that: n u8, bytes
    STREAM_HEADER,   // 16 bytes of header as they are
    STREAM_NONCE_OF, // magic and the next 16 bytes as nonce
    STREAM_LARGE,    // type, n u8: a frame with n + 1 KiB of zeros; so often at most as the stream has room
    STREAM_OPS,
};

// Appends to out (bounded by its max; what does not fit is left out).
void stream_make(struct bytes *in, uint8_t mode, struct buf *out);

#endif
