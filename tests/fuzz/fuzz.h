// fuzz.h - what the targets share: a claim that ends the run, input taken piece by piece, and copies of exactly the
// right size so that AddressSanitizer sees the first byte read too far. Test code only; one thread.
#ifndef TESTS_FUZZ_FUZZ_H
#define TESTS_FUZZ_FUZZ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

// A property of the code under test. Broken: said on stderr, and the process ends as after a memory fault.
#define CLAIM(what)                                                                                                    \
    do {                                                                                                               \
        if (!(what)) {                                                                                                 \
            fprintf(stderr, "%s:%d: claim broken: %s\n", __FILE__, __LINE__, #what);                                   \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

struct bytes {
    const uint8_t *data;
    size_t left;
};

static inline uint8_t take_u8(struct bytes *in)
{
    if (in->left == 0)
        return 0;
    in->left--;
    return *in->data++;
}

// At most n bytes; *ret_n is what there was.
static inline const uint8_t *take(struct bytes *in, size_t n, size_t *ret_n)
{
    const uint8_t *at = in->data;
    *ret_n = n < in->left ? n : in->left;
    in->data += *ret_n;
    in->left -= *ret_n;
    return at;
}

// New memory with exactly these bytes (1 byte where len is 0, which malloc(0) might not give).
static inline uint8_t *exact_copy(const void *data, size_t len)
{
    uint8_t *copy = malloc(len ? len : 1);
    CLAIM(copy);
    if (len)
        memcpy(copy, data, len);
    return copy;
}

// Sizes of the pieces a stream is fed in: from a seed, small ones often, one in eight up to 64 KiB.
struct cuts {
    uint32_t state;
};

static inline size_t next_cut(struct cuts *c)
{
    c->state = c->state * 1664525u + 1013904223u;
    const uint32_t r = c->state >> 16;
    return r % 8 == 0 ? 1 : r % 8 < 4 ? 1 + r / 8 % 16 : r % 8 < 7 ? 1 + r / 8 % 64 : 1 + r;
}

// FNV-1a, to compare what two runs saw.
static inline uint64_t mix(uint64_t hash, const void *data, size_t len)
{
    const uint8_t *p = data;
    for (size_t i = 0; i < len; i++)
        hash = (hash ^ p[i]) * 0x100000001b3u;
    return (hash ^ len) * 0x100000001b3u;
}

#endif
