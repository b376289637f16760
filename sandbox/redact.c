#include "sandbox/redact.h"

#include <string.h>

#define PREFIX "alk_"
#define PREFIX_LEN 4
#define SECRET_LEN 44 // PREFIX + 40 base62

static bool base62(uint8_t c)
{
    return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z');
}

// How many of the available bytes at p agree with the shape of a token.
static size_t agrees(const uint8_t *p, size_t available)
{
    size_t i = 0;
    for (; i < available && i < SECRET_LEN; i++)
        if (i < PREFIX_LEN ? p[i] != (uint8_t)PREFIX[i] : !base62(p[i]))
            break;
    return i;
}

size_t redact(uint8_t *data, size_t len, bool final, bool *ret_found)
{
    for (size_t at = 0; at < len;) {
        const uint8_t *hit = memchr(data + at, PREFIX[0], len - at);
        if (!hit)
            return len;
        at = (size_t)(hit - data);
        const size_t n = agrees(hit, len - at);
        if (n == SECRET_LEN) {
            memset(data + at + PREFIX_LEN, '*', SECRET_LEN - PREFIX_LEN);
            *ret_found = true;
            at += SECRET_LEN;
        } else if (n == len - at && !final) {
            return at;
        } else {
            at++;
        }
    }
    return len;
}
