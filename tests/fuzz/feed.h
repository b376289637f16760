// feed.h - a frame parser under test: fed whole or in pieces, with all memory behind what was fed poisoned, and the
// promises of proto/frame.h claimed after every step.
#ifndef TESTS_FUZZ_FEED_H
#define TESTS_FUZZ_FEED_H

#include "fuzz.h"
#include "proto/frame.h"

struct feed {
    struct frame_parser p;
    struct cuts cuts;
    bool whole;              // as much at once as fits
    const uint8_t *data;     // the stream
    size_t len, given;       // given: how many bytes of it the parser has had
    bool more;               // the parser may have something without new bytes
};

void feed_begin(struct feed *f, enum frame_side side, const uint8_t *data, size_t len);
// The next event but FRAME_NEED_MORE; that one only when the stream is at its end.
enum frame_event feed_next(struct feed *f, struct frame *ret);
// How many bytes of the stream the parser is through with.
size_t feed_consumed(const struct feed *f);
void feed_end(struct feed *f);

// A payload through decode, encode, decode, encode: both encodings must be the same, and every slice must lie in the
// payload. A type that side does not receive is left alone.
void message_check(enum frame_side receiver, uint8_t type, const uint8_t *payload, size_t len);

#endif
