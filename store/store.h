// store.h - the SQLite file and what lives beside it: opening, the single writer, read access, reserve.
//
// Owns: <state>/airlock.db (WAL, synchronous=FULL), its migrations, the writer thread that commits in groups, the
// keys (<state>/keys/), <state>/checkpoint.json. Does not own: what the rows mean (sandbox/), HTTP, processes.
// Rows are declared in rows.h, evidence (admissions, receipts, audit) in evidence.h, output spools in
// spool.h, sandbox logs in logfile.h, seals in seal.h, offline checking in verify.h.
//
// Threads: store_write and store_submit from any thread but the writer's own; reads from any thread (each thread
// gets its own read connection, closed at thread exit). Transaction functions run on the writer thread and must
// not block on anything but SQLite.
#ifndef AIRLOCK_STORE_STORE_H
#define AIRLOCK_STORE_STORE_H

#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"

struct store;
struct store_tx; // an open write transaction: the proof of being inside one

struct store_options {
    int state_dirfd;            // borrowed for the life of the store
    uint64_t reserve_bytes;     // admissions are refused when less is free (LIMIT_DISK_RESERVE_MIB)
    const char *server_version; // named in receipts; borrowed
};

// Opens or creates, migrates, loads or makes the keys, checks integrity (quick_check) and starts the writer.
// Errors: unavailable/store_locked, internal/store_corrupt, internal/store_newer (a newer schema), disk_full.
struct store *store_open(const struct store_options *options, struct err *err);
// Commits what is queued, writes checkpoint.json, joins the writer. Accepts NULL.
void store_close(struct store *s);

typedef int (*store_tx_fn)(struct store_tx *tx, void *arg, struct err *err);
typedef void (*store_done_fn)(void *arg, const struct err *err); // err NULL: durable

// Queues fn for the next group: each fn runs in a savepoint of one transaction (BEGIN IMMEDIATE … COMMIT); when fn
// returns -1 its savepoint is rolled back and done gets its error; when the commit fails every done of the group
// gets an error (SQLITE_FULL: unavailable/disk_full) and nothing of the group is kept. done runs on the writer
// thread after the commit is durable and must only hand over (post, resume). done may be NULL. -1 when closing.
int store_submit(struct store *s, store_tx_fn fn, store_done_fn done, void *arg);
// The same for what nobody waits for: up to STORE_LATER_MS it lies until something urgent takes it along, so that a
// stream of reads is not a stream of commits beside it.
#define STORE_LATER_MS 20
int store_submit_later(struct store *s, store_tx_fn fn, store_done_fn done, void *arg);
// Opens the calling thread's read connection, which it keeps. For work_pool_warm.
void store_warm(void *store);
// Closes what the calling thread has opened to read. For threads that seldom do.
void store_thread_done(void);
// Waits until all that was queued before is committed. Not from the loop's thread.
void store_flush(struct store *s);
// The same, waiting. 0 once durable.
int store_write(struct store *s, store_tx_fn fn, void *arg, struct err *err);
// And once it is durable, before the caller or any done callback of later groups: then(arg) on the writer thread, for what
// is kept in memory beside the rows. Who reads the new rows finds it changed too, but for the moment between the two.
int store_write_then(struct store *s, store_tx_fn fn, void (*then)(void *arg), void *arg, struct err *err);

// 0, or -1 with unavailable/disk_full when the state directory's filesystem has less than the reserve free.
// Cheap (statvfs, cached 200 ms). Admissions call it; outcomes do not.
int store_reserve_check(struct store *s, struct err *err);

struct store_stats {
    uint64_t commits, transactions, failed_commits;
    uint64_t queue_depth;
    uint64_t last_commit_us;
    uint64_t db_bytes, wal_bytes;
};
void store_stats(struct store *s, struct store_stats *ret);

// Fault injection for tests: the n-th write from now fails with disk full / busy. 0 turns it off.
void store_fail_commit_after(struct store *s, unsigned n);

#endif
