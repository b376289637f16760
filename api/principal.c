#include "api/principal.h"

#include <ctype.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "base/clock.h"

// Bounded and direct-mapped: a collision costs a query, not memory. An entry is asked for again after a minute, so that
// what another door to the store did is seen.
#define SLOTS 1024
#define LOCKS 64
#define KEEP_MS 60000

struct slot {
    uint8_t hash[SHA256_BYTES];
    struct principal *who;
};

struct principals {
    struct store *store;
    struct slot slots[SLOTS];
    pthread_mutex_t locks[LOCKS]; // of slots by index modulo LOCKS: never one for all
    atomic_uint revocations;
};

struct principals *principals_new(struct store *store)
{
    struct principals *ps = calloc(1, sizeof *ps);
    if (!ps)
        return NULL;
    ps->store = store;
    for (int i = 0; i < LOCKS; i++)
        pthread_mutex_init(&ps->locks[i], NULL);
    return ps;
}

void principals_free(struct principals *ps)
{
    if (!ps)
        return;
    for (int i = 0; i < SLOTS; i++)
        principal_unref(ps->slots[i].who);
    for (int i = 0; i < LOCKS; i++)
        pthread_mutex_destroy(&ps->locks[i]);
    free(ps);
}

struct principal *principal_ref(struct principal *p)
{
    atomic_fetch_add_explicit(&p->refs, 1, memory_order_relaxed);
    return p;
}

void principal_unref(struct principal *p)
{
    if (p && atomic_fetch_sub(&p->refs, 1) == 1)
        free(p);
}

bool principal_live(const struct principal *p)
{
    return !atomic_load_explicit(&((struct principal *)p)->revoked, memory_order_relaxed) &&
           (p->row.expires_at_ms == 0 || p->row.expires_at_ms > clock_wall_ms());
}

bool principal_hash(const char *authorization, uint8_t out[SHA256_BYTES])
{
    if (!authorization || strncasecmp(authorization, "Bearer ", 7) != 0)
        return false;
    const char *token = authorization + 7;
    while (*token == ' ')
        token++;
    if (strncmp(token, "alk_", 4) != 0 || strnlen(token, TOKEN_TEXT_LEN + 1) != TOKEN_TEXT_LEN)
        return false;
    for (const char *p = token + 4; *p; p++)
        if (!isalnum((unsigned char)*p))
            return false;
    crypto_sha256(token, TOKEN_TEXT_LEN, out);
    return true;
}

static unsigned slot_of(const uint8_t hash[SHA256_BYTES])
{
    return ((unsigned)hash[0] << 8 | hash[1]) % SLOTS;
}

struct principal *principal_cached(struct principals *ps, const uint8_t hash[SHA256_BYTES])
{
    const unsigned at = slot_of(hash);
    struct slot *s = &ps->slots[at];
    struct principal *found = NULL;
    pthread_mutex_lock(&ps->locks[at % LOCKS]);
    if (s->who && memcmp(s->hash, hash, SHA256_BYTES) == 0 && clock_mono_ms() - s->who->loaded_ms < KEEP_MS)
        found = principal_ref(s->who);
    pthread_mutex_unlock(&ps->locks[at % LOCKS]);
    return found;
}

static void remember(struct principals *ps, const uint8_t hash[SHA256_BYTES], struct principal *p)
{
    const unsigned at = slot_of(hash);
    struct slot *s = &ps->slots[at];
    pthread_mutex_lock(&ps->locks[at % LOCKS]);
    struct principal *old = s->who;
    memcpy(s->hash, hash, SHA256_BYTES);
    s->who = principal_ref(p);
    pthread_mutex_unlock(&ps->locks[at % LOCKS]);
    principal_unref(old);
}

struct principal *principal_lookup(struct principals *ps, const uint8_t hash[SHA256_BYTES], struct err *err)
{
    const unsigned before = atomic_load(&ps->revocations);
    struct principal *p = calloc(1, sizeof *p);
    if (!p) {
        err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
        return NULL;
    }
    p->refs = 1;
    p->loaded_ms = clock_mono_ms();
    const int found = token_find(ps->store, hash, &p->row, err);
    if (found == 0 && p->row.revoked_at_ms == 0 && principal_live(p)) {
        remember(ps, hash, p);
        // A revocation since may have looked through the slots before we were there.
        if (atomic_load(&ps->revocations) != before) {
            principal_unref(p);
            return principal_lookup(ps, hash, err);
        }
        return p;
    }
    principal_unref(p);
    if (found >= 0)
        err_set(err, ERR_UNAUTHORIZED, "", "the token is not known, has expired or was revoked");
    return NULL;
}

void principal_revoke(struct principals *ps, const char *token_id)
{
    atomic_fetch_add(&ps->revocations, 1);
    for (unsigned at = 0; at < SLOTS; at++) {
        struct principal *gone = NULL;
        pthread_mutex_lock(&ps->locks[at % LOCKS]);
        if (ps->slots[at].who && strcmp(ps->slots[at].who->row.id, token_id) == 0) {
            gone = ps->slots[at].who;
            atomic_store(&gone->revoked, true);
            ps->slots[at].who = NULL;
        }
        pthread_mutex_unlock(&ps->locks[at % LOCKS]);
        principal_unref(gone);
    }
}
