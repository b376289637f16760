// enc.h - text encodings: hex, base64 (RFC 4648, padded), base62, UTF-8 checks. Any thread. libc only.
#ifndef AIRLOCK_BASE_ENC_H
#define AIRLOCK_BASE_ENC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

struct buf;

void enc_hex(const void *data, size_t len, char *out);          // writes 2*len + NUL, lower case
int enc_unhex(const char *text, size_t len, uint8_t *out);      // exactly len/2 bytes, or -1
bool enc_base64(struct buf *out, const void *data, size_t len);
ssize_t enc_unbase64(const char *text, size_t len, uint8_t *out, size_t cap); // bytes, or -1
// n characters of [0-9A-Za-z] without bias from fresh randomness, + NUL.
int enc_random_base62(char *out, size_t n);

bool enc_utf8_valid(const void *data, size_t len); // RFC 3629: no surrogates, no overlong forms; NUL is valid
// Length of the longest prefix of data that does not end within a code point (for cutting a stream). Bytes that
// can never become valid count as complete, so that the caller's encoding choice, not the cut, deals with them.
size_t enc_utf8_cut(const void *data, size_t len);

#endif
