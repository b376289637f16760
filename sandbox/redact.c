#include "sandbox/redact.h"

#include <string.h>

#define PREFIX "alk_"
#define PREFIX_LEN 4
#define SECRET_LEN 44 // PREFIX + 40 base62

static bool base62(uint8_t c)
{
    return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z');
}

// How many of the available bytes at p agree with the shape of a token, of which `before` characters came already.
static size_t agrees(const uint8_t *p, size_t available, size_t before)
{
    size_t i = 0;
    for (; i < available && before + i < SECRET_LEN; i++)
        if (before + i < PREFIX_LEN ? p[i] != (uint8_t)PREFIX[before + i] : !base62(p[i]))
            break;
    return i;
}

static void mask(uint8_t *p, size_t n, size_t before, bool *ret_found)
{
    const size_t keep = before < PREFIX_LEN ? PREFIX_LEN - before : 0;
    memset(p + keep, '*', n - keep);
    *ret_found = true;
}

// One place where a token may begin (or go on). Bytes to step over; SIZE_MAX: hold from here; *carry is set for a tail.
static size_t look(uint8_t *p, size_t len, bool final, unsigned *carry, bool *ret_found)
{
    const size_t before = *carry, n = agrees(p, len, before);
    *carry = 0;
    if (before + n == SECRET_LEN) {
        mask(p, n, before, ret_found);
        return n;
    }
    if (n < len || final)
        return before ? 0 : 1;
    if (before + n >= PREFIX_LEN) {
        *carry = (unsigned)before;
        return SIZE_MAX;
    }
    *carry = (unsigned)(before + n);
    return n;
}

size_t redact(uint8_t *data, size_t len, bool final, unsigned *carry, bool *ret_found)
{
    size_t at = 0;
    if (len > 0 && *carry > 0) {
        const size_t n = look(data, len, final, carry, ret_found);
        if (n == SIZE_MAX)
            return 0;
        at = n;
    }
    while (at < len) {
        uint8_t *hit = memchr(data + at, PREFIX[0], len - at);
        if (!hit)
            return len;
        at = (size_t)(hit - data);
        const size_t n = look(hit, len - at, final, carry, ret_found);
        if (n == SIZE_MAX)
            return at;
        at += n;
    }
    return len;
}
