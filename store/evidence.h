// evidence.h - what proves an act: the audit chain, receipts (DSSE, Ed25519), idempotency, all appended in the same
// transaction as the change they tell of. Owns the chain's head and the keys. Writes need a store_tx.
//
// A request that changes something is admitted once (evidence_admit: durable before the act) and settled once
// (evidence_settle: with its outcome). Both may happen in one transaction where the act is the transaction.
// Chain: entry.hash = SHA-256(canonical JSON of the entry without `hash`, which includes prev_hash). Each commit
// that appended entries also writes a checkpoint {size, head_hash, at} signed with the checkpoint key; a copy goes
// to <state>/checkpoint.json (at most once a second, and at close). Receipts of one tenant are chained by
// previous_receipt_sha256, and the settling audit entry carries the receipt's SHA-256.
#ifndef AIRLOCK_STORE_EVIDENCE_H
#define AIRLOCK_STORE_EVIDENCE_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "store/rows.h"

#define RECEIPT_PAYLOAD_TYPE "application/vnd.airlock.receipt+json"
#define CHECKPOINT_PAYLOAD_TYPE "application/vnd.airlock.checkpoint+json"

// Who asks for what. Filled by api/ (principal, request) and sandbox/ (ids); plain values, copied freely.
struct admission {
    char tenant[TENANT_MAX];
    char token_id[ID_MAX];       // "" for the server itself (reaper, reconcile): actor "system"
    char request_id[129];
    char operation[WORD_MAX];    // "sandbox.create"
    char sandbox_id[ID_MAX], job_id[ID_MAX]; // "" for none
    char audit_id[ID_MAX];       // reserved at admission: id_new(ID_AUDIT)
    char receipt_id[ID_MAX];     // "" where only an audit entry is due
    // Idempotency; key "" for none.
    char idem_key[256], method[8], path[512];
    uint8_t body_sha256[SHA256_BYTES];
    int64_t if_generation;       // If-Match: what the object must be at when the operation's turn comes; 0: anything
};

// Appends the authorizing audit entry (decision "allowed"), the pending receipt, the idempotency row (a row that
// already exists: conflict/idempotency_race, the caller looks again). facts: borrowed, NULL allowed; names and
// counts only, never values.
int evidence_admit(struct store_tx *tx, const struct admission *a, const json_t *facts, struct err *err);

struct settlement {
    const char *outcome;         // "succeeded", "failed", "aborted", "lost", "denied", a command's outcome …
    int status;                  // HTTP status the client gets
    const char *ref;             // id the answer is rebuilt from; NULL for none
    const char *problem_json;    // stored for replay where status >= 400; NULL otherwise
    const json_t *facts;         // into the receipt's `facts`; borrowed, NULL allowed
    bool forget_idem;            // 401, 429 and 5xx are not stored: the key becomes free again
};
// Appends the outcome entry (id of its own, `of` = a->audit_id), signs the receipt, completes the idempotency row.
// Settling twice is refused (conflict/already_settled).
int evidence_settle(struct store_tx *tx, const struct admission *a, const struct settlement *s, struct err *err);

// One entry without a receipt (reads, denials, state changes by the system). id may be NULL: one is made.
struct audit_note {
    const char *id, *tenant, *token_id, *request_id, *operation, *sandbox_id, *decision, *outcome;
    const json_t *facts;
};
int audit_append(struct store_tx *tx, const struct audit_note *note, struct err *err);
// The same, queued for the next group without waiting (copied); the answer may already be out.
int audit_submit(struct store *s, const struct audit_note *note);

struct audit_row {
    int64_t seq, at_ms;
    char id[ID_MAX], tenant[TENANT_MAX];
    char *entry_json;            // canonical, as hashed, plus nothing
    char hash[SHA256_HEX];
};
int audit_list(struct store *s, const char *tenant, int64_t after_seq, unsigned limit,
               bool (*fn)(void *, const struct audit_row *), void *arg, struct err *err);
// The latest signed checkpoint as JSON text (DSSE envelope plus size, head_hash, at); new.
char *audit_checkpoint(struct store *s, struct err *err);

enum receipt_state { RECEIPT_PENDING = 1, RECEIPT_FINAL = 2 };
struct receipt_row {
    char id[ID_MAX], tenant[TENANT_MAX], sandbox_id[ID_MAX], job_id[ID_MAX], audit_id[ID_MAX], operation[WORD_MAX];
    char outcome[WORD_MAX];
    enum receipt_state state;
    char *envelope_json;         // DSSE; NULL while pending
    int64_t created_at_ms, settled_at_ms;
};
void receipt_row_free(struct receipt_row *row);
int receipt_get(struct store *s, const char *tenant, const char *id, struct receipt_row *ret, struct err *err);
int receipt_list(struct store *s, const struct page *page, const char *sandbox_id_or_null,
                 bool (*fn)(void *, const struct receipt_row *), void *arg, struct err *err);
// Pending receipts without a job or command that could still settle them (after a crash): reconcile settles them
// as lost. fn gets the admission it was made from.
int receipt_each_pending_all_tenants(struct store *s, bool (*fn)(void *, const struct admission *), void *arg,
                                     struct err *err);

// Public keys as JSON array [{"key_id","use":"receipt|checkpoint","algorithm":"Ed25519","public_key_pem",
// "created_at","retired_at"}]; old ones stay after a rotation. New text.
char *evidence_keys(struct store *s, struct err *err);
// HMAC-SHA-256 with the store's argv key, hex.
void evidence_argv_hmac(struct store *s, const void *data, size_t len, char out[static SHA256_HEX]);

#endif
