#include "base/enc.h"

#include <string.h>
#include <sys/random.h>

#include "base/buf.h"

void enc_hex(const void *data, size_t len, char *out)
{
    static const char DIGITS[] = "0123456789abcdef";
    const uint8_t *p = data;
    for (size_t i = 0; i < len; i++) {
        out[2 * i] = DIGITS[p[i] >> 4];
        out[2 * i + 1] = DIGITS[p[i] & 15];
    }
    out[2 * len] = 0;
}

static int hex_value(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    if (c >= 'a' && c <= 'f')
        return c - 'a' + 10;
    if (c >= 'A' && c <= 'F')
        return c - 'A' + 10;
    return -1;
}

int enc_unhex(const char *text, size_t len, uint8_t *out)
{
    if (len % 2)
        return -1;
    for (size_t i = 0; i < len / 2; i++) {
        const int hi = hex_value(text[2 * i]);
        const int lo = hi < 0 ? -1 : hex_value(text[2 * i + 1]);
        if (lo < 0)
            return -1;
        out[i] = (uint8_t)(hi << 4 | lo);
    }
    return 0;
}

bool enc_base64(struct buf *out, const void *data, size_t len)
{
    static const char ALPHABET[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    const uint8_t *p = data;
    if (!buf_reserve(out, (len + 2) / 3 * 4))
        return false;
    char *to = (char *)out->data + out->len;
    for (size_t i = 0; i < len; i += 3) {
        const size_t have = len - i < 3 ? len - i : 3;
        const uint32_t v = (uint32_t)p[i] << 16 | (have > 1 ? (uint32_t)p[i + 1] << 8 : 0) | (have > 2 ? p[i + 2] : 0u);
        *to++ = ALPHABET[v >> 18];
        *to++ = ALPHABET[v >> 12 & 63];
        *to++ = have > 1 ? ALPHABET[v >> 6 & 63] : '=';
        *to++ = have > 2 ? ALPHABET[v & 63] : '=';
    }
    *to = 0;
    out->len += (len + 2) / 3 * 4;
    return true;
}

static int base64_value(char c)
{
    if (c >= 'A' && c <= 'Z')
        return c - 'A';
    if (c >= 'a' && c <= 'z')
        return c - 'a' + 26;
    if (c >= '0' && c <= '9')
        return c - '0' + 52;
    return c == '+' ? 62 : c == '/' ? 63 : -1;
}

ssize_t enc_unbase64(const char *text, size_t len, uint8_t *out, size_t cap)
{
    if (len % 4)
        return -1;
    size_t n = 0;
    for (size_t i = 0; i < len; i += 4) {
        const bool end = i + 4 == len;
        const size_t pad = end ? (size_t)(text[i + 3] == '=') + (size_t)(text[i + 3] == '=' && text[i + 2] == '=') : 0;
        uint32_t v = 0;
        for (size_t k = 0; k < 4; k++) {
            const int d = k >= 4 - pad ? 0 : base64_value(text[i + k]);
            if (d < 0)
                return -1;
            v = v << 6 | (uint32_t)d;
        }
        if ((pad == 1 && (v & 0xff)) || (pad == 2 && (v & 0xffff)))
            return -1; // bits that say nothing must be zero
        for (size_t k = 0; k < 3 - pad; k++) {
            if (n == cap)
                return -1;
            out[n++] = (uint8_t)(v >> (16 - 8 * k));
        }
    }
    return (ssize_t)n;
}

int enc_random_base62(char *out, size_t n)
{
    static const char ALPHABET[] = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    uint8_t pool[64];
    size_t have = 0;
    for (size_t i = 0; i < n;) {
        if (have == 0) {
            if (getrandom(pool, sizeof pool, 0) != (ssize_t)sizeof pool)
                return -1;
            have = sizeof pool;
        }
        const uint8_t b = pool[--have];
        if (b < 248) // 4 * 62: every character equally likely
            out[i++] = ALPHABET[b % 62];
    }
    out[n] = 0;
    return 0;
}

// Length of the code point at p (1-4), 0 when invalid, -1 when valid so far but cut by the end.
static int code_point(const uint8_t *p, size_t len)
{
    const uint8_t c = p[0];
    if (c < 0x80)
        return 1;
    const int n = c >= 0xc2 && c <= 0xdf ? 2 : (c & 0xf0) == 0xe0 ? 3 : c >= 0xf0 && c <= 0xf4 ? 4 : 0;
    if (n == 0)
        return 0;
    uint8_t lo = 0x80, hi = 0xbf; // RFC 3629: the second byte is narrower after these
    if (c == 0xe0)
        lo = 0xa0;
    else if (c == 0xed)
        hi = 0x9f;
    else if (c == 0xf0)
        lo = 0x90;
    else if (c == 0xf4)
        hi = 0x8f;
    for (int i = 1; i < n; i++, lo = 0x80, hi = 0xbf) {
        if ((size_t)i >= len)
            return -1;
        if (p[i] < lo || p[i] > hi)
            return 0;
    }
    return n;
}

bool enc_utf8_valid(const void *data, size_t len)
{
    const uint8_t *p = data;
    for (size_t i = 0; i < len;) {
        const int n = code_point(p + i, len - i);
        if (n <= 0)
            return false;
        i += (size_t)n;
    }
    return true;
}

size_t enc_utf8_cut(const void *data, size_t len)
{
    const uint8_t *p = data;
    for (size_t back = 1; back <= 3 && back <= len; back++) {
        const uint8_t c = p[len - back];
        if (c < 0x80)
            return len;
        if (c >= 0xc0)
            return code_point(p + len - back, back) < 0 ? len - back : len;
    }
    return len;
}
