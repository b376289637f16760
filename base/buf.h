// buf.h - a growable byte buffer that is born with a maximum. Owns its memory. Not thread-safe. libc only.
#ifndef AIRLOCK_BASE_BUF_H
#define AIRLOCK_BASE_BUF_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// data[0..len) is content; data[len] is always NUL once anything was added. failed stays set after an append
// that would pass max or that ran out of memory; such an append adds nothing.
struct buf {
    uint8_t *data;
    size_t len, cap, max;
    bool failed;
};

#define BUF_INIT(max_bytes) ((struct buf){.max = (max_bytes)})
// Over an array of the caller's: never grown, not to be freed.
#define BUF_OVER(array) ((struct buf){.data = (array), .cap = sizeof(array), .max = sizeof(array) - 1})

void buf_init(struct buf *b, size_t max);
void buf_free(struct buf *b);              // accepts an empty or zeroed buffer; leaves it empty
bool buf_add(struct buf *b, const void *data, size_t len);
bool buf_adds(struct buf *b, const char *text);
bool buf_addf(struct buf *b, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
bool buf_reserve(struct buf *b, size_t more); // after true, `more` bytes may be written at data+len
void buf_consume(struct buf *b, size_t n);    // drops n (<= len) bytes at the front
char *buf_steal(struct buf *b);               // returns new NUL-terminated memory; leaves b empty
void buf_clear(struct buf *b);

// The text of the buffer; "" while empty. Borrowed until the next change.
const char *buf_text(const struct buf *b);

__attribute__((unused)) static inline void buf_cleanup_(struct buf *b) { buf_free(b); }
#define CLEANUP_BUF __attribute__((cleanup(buf_cleanup_)))

#endif
