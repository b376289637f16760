// seal.h - a keyed seal over what the server wrote for itself and will believe later: manifests of snapshots and
// templates. Owns the key (<state>/keys/snapshot.key, made at the first open, never shown). Does not own what is sealed:
// an older copy has a good seal too, so whoever reads one holds it against the database. A lost key is made anew, and
// what the old one sealed is good no longer. Any thread.
#ifndef AIRLOCK_STORE_SEAL_H
#define AIRLOCK_STORE_SEAL_H

#include <stdbool.h>
#include <stddef.h>

#include "base/crypto.h"
#include "base/err.h"

struct store;

// HMAC-SHA-256 (RFC 2104) of data, hex. -1: internal/seal_failed, *out untouched.
int store_seal(struct store *s, const void *data, size_t len, char out[static SHA256_HEX], struct err *err);
// Constant time in the seal. False also for NULL, for one of another length, and where none can be computed.
bool store_seal_ok(struct store *s, const void *data, size_t len, const char *seal);

#endif
