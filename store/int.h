// int.h - what the files of store/ share: the store, an open transaction, the chain's head, the keys. Private.
#ifndef AIRLOCK_STORE_INT_H
#define AIRLOCK_STORE_INT_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/buf.h"
#include "base/crypto.h"
#include "store/db.h"
#include "store/evidence.h"
#include "store/row.h"
#include "store/rows.h"
#include "store/store.h"

#define HMAC_KEY_BYTES 32

struct chain_head {
    int64_t size;
    char hash[SHA256_HEX]; // of entry `size`; 64 zeros before the first
};

struct keys {
    struct sign_key *receipt, *checkpoint;
    uint8_t argv[HMAC_KEY_BYTES], snapshot[HMAC_KEY_BYTES];
};

struct store_tx {
    struct store *store;
    struct db *db;
    int64_t now_ms;          // one time for all of the group
    struct chain_head head;  // as this transaction sees it
    bool events;             // some were appended
};

struct waiter;

struct item {
    struct item *next;
    store_tx_fn fn;
    store_done_fn done;
    void *arg;
    struct err *err;         // of a failed one; owned unless it is `waiter`'s
    struct waiter *waiter;   // who waits in store_write, or NULL
    bool later;
};

struct reader {              // one thread's connection to one store
    struct store *store;     // NULL once the store is closed
    struct db *db;
    struct reader *next_of_thread, *next_of_store;
};

struct store {
    struct store *next_open; // of this process
    int dirfd, lockfd;
    uint64_t reserve_bytes;
    char server_version[64];
    char db_path[1024];
    struct keys keys;
    // The writer's own; checkpoint_due: the file lags behind the table.
    struct db *db;
    struct chain_head head;
    bool checkpoint_due;
    int64_t checkpoint_written_ms;
    // Queue.
    pthread_t thread;
    bool started;
    pthread_mutex_t lock;
    pthread_cond_t wake, room;
    struct item *first, *last;
    uint64_t depth, urgent;  // of those queued, and those that are not for later
    int64_t later_ms;        // when the oldest of the others is due; in force while there are some
    bool closing, busy;      // busy: a group was taken and is not yet told of
    // Any thread.
    struct reader *readers;  // under the lock of readers.c
    void (*notify)(void *);
    void *notify_arg;
    atomic_ullong commits, transactions, failed_commits, last_commit_us;
    atomic_uint fail_after;
    _Atomic int64_t reserve_until_ms;
    atomic_bool reserve_ok;
};

// writer.c
int writer_start(struct store *s, struct err *err);
void writer_stop(struct store *s); // commits what is queued; accepts a store that never started
// readers.c: this thread's connection, opened on first use.
struct db *reader_db(struct store *s, struct err *err);
void readers_close(struct store *s);
// keys.c
int keys_open(struct store *s, struct err *err);
void keys_close(struct store *s);
// audit.c
int audit_open(struct store *s, struct err *err); // loads the head, saves a checkpoint file that knows more
// Signs the head into the checkpoint table.
int audit_sign_head(struct store_tx *tx, struct err *err);
// Copies the table's checkpoint to checkpoint.json.
int audit_write_file(struct store *s, struct err *err);

// One entry of the chain; "" and NULL members become null.
struct audit_entry {
    const char *id, *tenant, *token_id, *request_id, *operation, *sandbox_id, *job_id, *decision, *outcome;
    const char *receipt_id, *of, *receipt_sha256;
    int status;               // 0: null
    const json_t *facts;
};
int audit_add(struct store_tx *tx, const struct audit_entry *e, struct err *err);

#endif
