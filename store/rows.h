// rows.h - the rows and their queries. Every query that a client can reach takes the tenant and filters by it in
// SQL; the few that do not say `all_tenants` in their name and are for reconciliation, the reaper and verify only.
// Writes need a store_tx. Structs own their heap members (x_row_free); ids and words are inline.
#ifndef AIRLOCK_STORE_ROWS_H
#define AIRLOCK_STORE_ROWS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "base/id.h"
#include "base/crypto.h"
#include "base/limits.h"

struct store;
struct store_tx;

#define TENANT_MAX 64
#define NAME_MAX_ 64
#define WORD_MAX 40

// ---- tokens ---------------------------------------------------------------------------------------------------
#define TOKEN_TEXT_LEN 44 // "alk_" + 40 base62

enum scope { // bits; stored as a number: pinned
    SCOPE_SANDBOX_READ = 1, SCOPE_SANDBOX_WRITE = 2, SCOPE_COMMAND_RUN = 4, SCOPE_COMMAND_ROOT = 8,
    SCOPE_FILES_READ = 16, SCOPE_FILES_WRITE = 32, SCOPE_AUDIT_READ = 64, SCOPE_ADMIN = 128,
};
const char *scope_name(enum scope one);            // "sandbox:read"
int scope_parse(const char *name);                 // bit, or -1

struct token_row {
    char id[ID_MAX], tenant[TENANT_MAX], name[NAME_MAX_];
    unsigned scopes;
    int64_t created_at_ms, expires_at_ms /* 0: never */, revoked_at_ms /* 0: live */;
};
int token_insert(struct store_tx *tx, const struct token_row *row, const uint8_t hash[SHA256_BYTES],
                 struct err *err);
int token_revoke(struct store_tx *tx, const char *tenant, const char *id, int64_t at_ms, struct err *err);
// By hash of the secret text: the only query before a tenant is known. 0 found, 1 none, -1 error.
int token_find(struct store *s, const uint8_t hash[SHA256_BYTES], struct token_row *ret, struct err *err);
int token_get(struct store *s, const char *tenant, const char *id, struct token_row *ret, struct err *err);
// Whatever its tenant: for the operator, who makes tokens for others and must be able to take them back.
int token_get_any(struct store *s, const char *id, struct token_row *ret, struct err *err);

// ---- paging ---------------------------------------------------------------------------------------------------
// Lists are newest first by id; cursor is the last id seen. fn returns false to stop. The row is borrowed.
struct page {
    const char *tenant;
    const char *cursor;   // NULL: from the newest
    unsigned limit;       // the caller asks limit+1 where it wants to know of more
};
int token_list(struct store *s, const struct page *page, bool (*fn)(void *, const struct token_row *),
               void *arg, struct err *err);

// ---- sandboxes ------------------------------------------------------------------------------------------------
struct sandbox_row {
    char id[ID_MAX], tenant[TENANT_MAX], name[NAME_MAX_]; // name "" for none
    int state;                         // enum sandbox_state of sandbox/state.h: pinned numbers
    char state_reason[WORD_MAX];       // "" for none
    char image_ref[128], image_digest[DIGEST_TEXT_MAX];
    int vcpus, memory_mib, disk_mib;
    char *labels_json, *env_json;      // objects; env with values (never shown again: env_keys only)
    int64_t ttl_seconds, expires_at_ms;
    char on_expiry[WORD_MAX];
    bool detached;
    char owner[LIMIT_OWNER_MAX];
    int64_t generation, created_at_ms, updated_at_ms, destroyed_at_ms;
    char job_id[ID_MAX], audit_id[ID_MAX], receipt_id[ID_MAX];
    char *backend_json, *timings_json; // wire objects; NULL until known
    char *runtime_json;                // what adoption needs: pids, start times, uid, fds' names; not shown
    char *deletion_json;               // the report, once destroyed
    char parent_sandbox_id[ID_MAX], parent_snapshot_id[ID_MAX]; // "" for none
    char *origin_json;                 // what its memory goes back to; see sandbox/origin.h; not shown
    char *uniqueness_json;             // what the agent proved after the restore; NULL for a boot of its own
};
void sandbox_row_free(struct sandbox_row *row); // heap members; accepts a zeroed row
int sandbox_row_copy(struct sandbox_row *to, const struct sandbox_row *from);

// Unique name among the tenant's live ones: conflict/name_taken. Quota of live ones counted in the same
// transaction: rate_limited/quota_exceeded (max_live 0: no quota).
int sandbox_insert(struct store_tx *tx, const struct sandbox_row *row, unsigned max_live, struct err *err);
// Writes the row whole; refuses (internal/stale_row) when the stored generation is newer, and never brings a
// destroyed row back (conflict/deleted).
int sandbox_update(struct store_tx *tx, const struct sandbox_row *row, struct err *err);
// 0 found, 1 none (also another tenant's: the same query), -1 error.
int sandbox_get(struct store *s, const char *tenant, const char *id, struct sandbox_row *ret, struct err *err);
struct sandbox_filter {
    struct page page;
    int state;              // -1: all but destroyed
    const char *label_key, *label_value; // NULL: any
};
int sandbox_list(struct store *s, const struct sandbox_filter *filter,
                 bool (*fn)(void *, const struct sandbox_row *), void *arg, struct err *err);
// Of every row, destroyed ones too.
int sandbox_each_id_all_tenants(struct store *s, void (*fn)(void *, const char *id), void *arg, struct err *err);
int sandbox_each_live_all_tenants(struct store *s, bool (*fn)(void *, const struct sandbox_row *), void *arg,
                                  struct err *err);

// ---- snapshots ------------------------------------------------------------------------------------------------
enum snapshot_state { SNAPSHOT_READY = 1, SNAPSHOT_DELETED = 2 }; // stored: pinned. A row exists once it is ready
struct snapshot_row {
    char id[ID_MAX], tenant[TENANT_MAX], name[NAME_MAX_]; // name "" for none; not unique
    char sandbox_id[ID_MAX], parent_id[ID_MAX];           // source; snapshot it was restored from, "" for none
    enum snapshot_state state;
    char state_reason[WORD_MAX];       // of deleted: "deleted", "expired"
    char kind[WORD_MAX];               // "delta", "full"
    char template_key[DIGEST_TEXT_MAX]; // "" where the memory stands alone
    char image_ref[128], image_digest[DIGEST_TEXT_MAX];
    int vcpus, memory_mib, disk_mib;
    char *env_json;                    // of the sandbox, restored with it
    char accel[WORD_MAX];
    int64_t epoch;                     // of the manifest
    char manifest_sha256[DIGEST_TEXT_MAX];
    char *sizes_json, *digests_json, *qemu_json, *timings_json; // wire objects
    int64_t bytes;                     // on disk, all files
    int64_t paused_us;
    int64_t expires_at_ms;             // 0: kept until it is deleted
    int64_t generation, created_at_ms, deleted_at_ms; // deleted_at_ms 0: alive
    char job_id[ID_MAX], audit_id[ID_MAX], receipt_id[ID_MAX];
    char *deletion_json;
};
void snapshot_row_free(struct snapshot_row *row);
int snapshot_row_copy(struct snapshot_row *to, const struct snapshot_row *from);
// Quota of alive ones in the same transaction: rate_limited/quota_exceeded (max_alive 0: none). A parent that is not
// alive (any more): conflict/parent_deleted.
int snapshot_insert(struct store_tx *tx, const struct snapshot_row *row, unsigned max_alive, struct err *err);
// Writes the row whole, but for sandbox_id, parent_id, created_at_ms. Moving to deleted (state and deleted_at_ms: both, or
// internal/snapshot_state) refuses while an alive snapshot has it as parent_id (conflict/has_children); a deleted row is
// never brought back nor deleted again at another time (conflict/deleted), a newer one never written over
// (internal/stale_row).
int snapshot_update(struct store_tx *tx, const struct snapshot_row *row, struct err *err);
int snapshot_get(struct store *s, const char *tenant, const char *id, struct snapshot_row *ret, struct err *err);
struct snapshot_filter {
    struct page page;
    const char *sandbox_id;            // NULL: any
    bool deleted;                      // list the deleted ones instead of the alive ones
};
int snapshot_list(struct store *s, const struct snapshot_filter *filter,
                  bool (*fn)(void *, const struct snapshot_row *), void *arg, struct err *err);
// Alive ones whose time has come, oldest first, at most limit. Not those with alive children: they cannot go yet.
int snapshot_each_expired_all_tenants(struct store *s, int64_t now_ms, unsigned limit,
                                      bool (*fn)(void *, const struct snapshot_row *), void *arg, struct err *err);
int snapshot_each_alive_all_tenants(struct store *s, bool (*fn)(void *, const struct snapshot_row *), void *arg,
                                    struct err *err);

// ---- jobs -----------------------------------------------------------------------------------------------------
enum job_state { JOB_QUEUED = 1, JOB_RUNNING = 2, JOB_SUCCEEDED = 3, JOB_FAILED = 4, JOB_CANCELLED = 5 };
const char *job_state_name(enum job_state s);

struct job_row {
    char id[ID_MAX], tenant[TENANT_MAX], sandbox_id[ID_MAX], kind[WORD_MAX]; // kind = operation
    enum job_state state;
    char stage[WORD_MAX];      // the stage under way: the journal a restart reads
    char *stages_json;         // [{"name","ms"}]
    char *problem_json, *result_json;
    char ref[ID_MAX];          // what it made or ran: a sandbox or command id
    char audit_id[ID_MAX], receipt_id[ID_MAX], request_id[129];
    int64_t created_at_ms, updated_at_ms, finished_at_ms;
};
void job_row_free(struct job_row *row);
int job_insert(struct store_tx *tx, const struct job_row *row, struct err *err);
int job_update(struct store_tx *tx, const struct job_row *row, struct err *err); // a finished job stays as it is
int job_get(struct store *s, const char *tenant, const char *id, struct job_row *ret, struct err *err);
int job_list(struct store *s, const struct page *page, const char *sandbox_id_or_null,
             bool (*fn)(void *, const struct job_row *), void *arg, struct err *err);
int job_each_unfinished_all_tenants(struct store *s, bool (*fn)(void *, const struct job_row *), void *arg,
                                    struct err *err);

// ---- commands -------------------------------------------------------------------------------------------------
enum command_phase { COMMAND_ADMITTED = 1, COMMAND_RUNNING_ = 2, COMMAND_FINISHED = 3 };
enum command_outcome { OUTCOME_NONE = 0, OUTCOME_EXITED = 1, OUTCOME_SIGNALED = 2, OUTCOME_TIMED_OUT = 3,
                       OUTCOME_KILLED = 4, OUTCOME_LOST = 5, OUTCOME_SPAWN_FAILED = 6 };
const char *command_outcome_name(enum command_outcome o); // SPAWN_FAILED: "spawn_failed"; NONE: NULL

struct command_row {
    char id[ID_MAX], tenant[TENANT_MAX], sandbox_id[ID_MAX];
    enum command_phase phase;
    enum command_outcome outcome;
    int exit_code;             // OUTCOME_EXITED
    int signal;                // guest number, 0 for none
    char spawn_error[128];
    char user[NAME_MAX_];
    int64_t timeout_ms, max_output_bytes, duration_ms;
    bool background, check, internal; // internal: archive transfers, not listed
    bool has_stdin, stdin_closed;
    int64_t stdin_bytes;
    char argv_hmac[SHA256_HEX]; // keyed hash; argv itself is never stored
    char *env_names_json;
    int64_t stdout_bytes, stderr_bytes;         // produced
    int64_t stdout_spooled, stderr_spooled;     // kept (<= LIMIT_SPOOL_STREAM_BYTES)
    char stdout_sha256[DIGEST_TEXT_MAX], stderr_sha256[DIGEST_TEXT_MAX];
    bool redacted;
    char job_id[ID_MAX], audit_id[ID_MAX], receipt_id[ID_MAX];
    uint64_t agent_id;         // the frame id in the agent
    int64_t created_at_ms, started_at_ms, finished_at_ms;
};
void command_row_free(struct command_row *row);
int command_row_copy(struct command_row *to, const struct command_row *from);
// max_running counted in the same transaction: rate_limited/too_many_commands.
int command_insert(struct store_tx *tx, const struct command_row *row, unsigned max_running, struct err *err);
int command_update(struct store_tx *tx, const struct command_row *row, struct err *err); // finished stays finished
int command_get(struct store *s, const char *tenant, const char *sandbox_id, const char *id,
                struct command_row *ret, struct err *err);
int command_list(struct store *s, const struct page *page, const char *sandbox_id,
                 bool (*fn)(void *, const struct command_row *), void *arg, struct err *err);
int command_each_unfinished_all_tenants(struct store *s, bool (*fn)(void *, const struct command_row *),
                                        void *arg, struct err *err);

// ---- events ---------------------------------------------------------------------------------------------------
struct event_row {
    int64_t seq;
    char id[ID_MAX], tenant[TENANT_MAX], kind[WORD_MAX], sandbox_id[ID_MAX];
    char *data_json;
    int64_t at_ms;
};
// seq and id are assigned; the store calls the notifier (below) after the commit.
int event_append(struct store_tx *tx, const char *tenant, const char *kind, const char *sandbox_id_or_null,
                 const char *data_json, struct err *err);
int event_list(struct store *s, const char *tenant, int64_t after_seq, unsigned limit,
               bool (*fn)(void *, const struct event_row *), void *arg, struct err *err);
// Called on the writer thread after a commit that appended events. One notifier.
void event_notify_set(struct store *s, void (*fn)(void *arg), void *arg);

// ---- idempotency ----------------------------------------------------------------------------------------------
enum idem_state { IDEM_RUNNING = 1, IDEM_DONE = 2 };
struct idem_row {
    char tenant[TENANT_MAX], method[8], key[256];
    char path[512];
    uint8_t body_sha256[SHA256_BYTES];
    enum idem_state state;
    int status;                // the HTTP status to answer with again
    char ref[ID_MAX];          // sandbox, command, token, job … the answer is rebuilt from
    char job_id[ID_MAX];
    char audit_id[ID_MAX], receipt_id[ID_MAX];
    char *problem_json;        // where the first answer was a problem that is stored
    int64_t created_at_ms;
};
void idem_row_free(struct idem_row *row);
// 0 found (not older than 24 h), 1 none, -1 error. Insertion and completion happen in evidence.h.
int idem_find(struct store *s, const char *tenant, const char *method, const char *path, const char *key,
              struct idem_row *ret, struct err *err);

// ---- retention ------------------------------------------------------------------------------------------------
struct retention {
    int64_t destroyed_before_ms;   // destroyed sandboxes (with commands, jobs), deleted snapshots older than this go
    int64_t idem_before_ms, events_before_ms;
    unsigned max_rows;             // per call, so that the writer is never held long
};
// Returns the number of removed sandboxes whose files the caller erases next (ids through fn), or -1.
int store_prune(struct store_tx *tx, const struct retention *r, void (*fn)(void *arg, const char *sandbox_id),
                void *arg, struct err *err);

#endif
