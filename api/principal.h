// principal.h - who calls: bearer tokens to token rows, remembered for a while. Owns the cache; a principal is
// reference-counted and immutable but for its revocation. Any thread; principal_lookup blocks on the database and is for
// the work pool, principal_cached never does.
#ifndef AIRLOCK_API_PRINCIPAL_H
#define AIRLOCK_API_PRINCIPAL_H

#include <stdatomic.h>
#include <stdbool.h>

#include "store/rows.h"

struct principals;

struct principal {
    struct token_row row;
    atomic_int refs;
    atomic_bool revoked;
    int64_t loaded_ms;           // monotonic
};

struct principals *principals_new(struct store *store);
void principals_free(struct principals *ps); // accepts NULL

// False when the text has not the form of a token: nobody's.
bool principal_hash(const char *authorization, uint8_t out[SHA256_BYTES]);
// A reference, or NULL when it is not in memory. Check principal_live as well.
struct principal *principal_cached(struct principals *ps, const uint8_t hash[SHA256_BYTES]);
// Asks the store and remembers. NULL with unauthorized, or the store's error.
struct principal *principal_lookup(struct principals *ps, const uint8_t hash[SHA256_BYTES], struct err *err);
bool principal_live(const struct principal *p); // neither revoked nor expired
struct principal *principal_ref(struct principal *p);
void principal_unref(struct principal *p);      // accepts NULL
// After the revocation is durable: every holder sees it at once.
void principal_revoke(struct principals *ps, const char *token_id);

#endif
