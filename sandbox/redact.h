// redact.h - masks credentials in a byte stream, once, at capture. Knows the shapes of our own secrets (Airlock tokens,
// `alk_` + 40 base62). Same length out as in, so that offsets stay true. Pure; any thread.
#ifndef AIRLOCK_SANDBOX_REDACT_H
#define AIRLOCK_SANDBOX_REDACT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// Masks every complete secret in data and returns how many leading bytes are settled: with final, len; otherwise a tail
// that has the whole prefix of a secret and may still become one (at most 43 bytes) is left for the next call. A tail
// that is only the beginning of the prefix is settled, so that a prompt is never held back; *carry (0 at the start of a
// stream) remembers it. *ret_found is set when something was masked, else untouched.
size_t redact(uint8_t *data, size_t len, bool final, unsigned *carry, bool *ret_found);

#endif
