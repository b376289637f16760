// verify_int.h - what the files of the offline check share. Private to store/.
#ifndef AIRLOCK_STORE_VERIFY_INT_H
#define AIRLOCK_STORE_VERIFY_INT_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/crypto.h"
#include "base/id.h"
#include "store/db.h"
#include "store/dsse.h"
#include "store/verify.h"

// ---- verify_source.c: a database that nobody disturbs and that disturbs nobody -----------------------------------------
struct source {
    struct db *db;
    bool live;        // a server may be at work: directories may go while we look
    bool moving;      // read beside this process's own server: the chain may grow while we look
};
int source_open(struct source *src, int dirfd, struct err *err);
void source_close(struct source *src);
// True and the path where this process has the store of that file open (store.c).
bool store_open_here(int dirfd, char *path, size_t cap);

// ---- verify_keys.c: whom to believe --------------------------------------------------------------------------------------
enum key_use { KEY_RECEIPT = 1, KEY_CHECKPOINT = 2 };
struct trusted {
    unsigned uses;    // enum key_use, or-ed
    char id[17];
    uint8_t pub[ED25519_PUB_BYTES];
};
struct trust {
    struct trusted *keys;
    size_t n;
};
int trust_load_dir(struct trust *t, int state_dirfd); // keys/*.pub.pem; -1: none
int trust_load_file(struct trust *t, const char *path);
int trust_add_pem(struct trust *t, const char *pem, unsigned uses);
const struct trusted *trust_find(const struct trust *t, enum key_use use, const char *id);
void trust_free(struct trust *t);

// ---- the walk --------------------------------------------------------------------------------------------------------------
struct verifier {
    struct source src;
    struct trust trust;
    struct verify_report *report;
    int dirfd;
    int64_t size;     // entries the table's checkpoint signs
    uint64_t admitted; // receipts that the chain admitted
};

// Sets verdict and fault once; returns -1, so that `return verify_fault(…)` reads well.
int verify_fault(struct verifier *v, enum verify_verdict verdict, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
int verify_unreadable(struct verifier *v, const struct err *err);
// An envelope as we write it, byte for byte, signed by a trusted key of that use. Returns its payload as JSON, or NULL.
json_t *verify_envelope(const struct trust *t, enum key_use use, const char *text, uint8_t ret_hash[SHA256_BYTES]);

// verify_receipt.c. 0, or -1 with the fault set.
int verify_admission(struct verifier *v, const json_t *entry);  // its receipt is there and says the same
int verify_settlement(struct verifier *v, const json_t *entry); // its receipt is signed and says the same
int verify_counts(struct verifier *v);                          // no receipt that the chain does not know
int verify_outputs(struct verifier *v);                         // spooled output against receipts

// True when both are the same text; NULL and "" are the same.
bool verify_same(const char *a, const char *b);

#endif
