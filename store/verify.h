// verify.h - checks receipts and chain from the files alone, without a server: for `airlock verify` and GET
// /v1/audit/verify. Opens the database read-only (immutable copy semantics: never writes, not even a -shm).
#ifndef AIRLOCK_STORE_VERIFY_H
#define AIRLOCK_STORE_VERIFY_H

#include <stdint.h>
#include <stdio.h>

#include "base/err.h"

enum verify_verdict { VERIFY_OK = 0, VERIFY_MISMATCH = 1, VERIFY_TRUNCATED = 2, VERIFY_UNREADABLE = 3 };

struct verify_report {
    enum verify_verdict verdict;
    uint64_t entries, receipts, pending_receipts, outputs_checked;
    char head_hash[65];
    char fault[320];         // the first fault, with the entry or receipt id; "" when verified
};

// state_dir: the directory; checkpoint_path: a kept copy of checkpoint.json, or NULL. With deep, the spooled output
// of every retained command is hashed and compared with its receipt. keys_pem_path: public keys to trust instead of
// the ones in the directory (NULL: those).
enum verify_verdict verify_state(const char *state_dir, const char *checkpoint_path, const char *keys_pem_path,
                                 int deep, struct verify_report *ret);
// One DSSE envelope against one public key (PEM). For `airlock verify --receipt FILE --key FILE`.
enum verify_verdict verify_receipt_text(const char *envelope_json, const char *public_pem, struct verify_report *ret);

#endif
