// db.h - the thin layer over SQLite: one connection, its prepared statements, its errors in our words. Owns connections
// and statements; does not own any table. A connection belongs to one thread at a time. Private to store/.
//
// Errors everywhere: unavailable/disk_full, unavailable/store_busy, unavailable/store_read_only, internal/store_corrupt,
// conflict/constraint, internal/out_of_memory, internal/store_error.
#ifndef AIRLOCK_STORE_DB_H
#define AIRLOCK_STORE_DB_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

struct db;
struct stmt;

enum db_mode {
    DB_WRITER,  // the one connection that writes: WAL, synchronous=FULL, foreign keys, checkpoints only when asked
    DB_READER,  // beside a writer of this process: query_only, a small cache
    DB_FROZEN,  // nobody writes the file: no locks, no -wal, no -shm
    DB_PRIVATE, // a copy of our own with its -wal: no -shm, no syncs
};
// path must be absolute. Returns new, or NULL.
struct db *db_open(const char *path, enum db_mode mode, struct err *err);
void db_close(struct db *db); // accepts NULL

// One or more statements without parameters. 0, or -1.
int db_exec(struct db *db, const char *sql, struct err *err);
// One number, or -1.
int64_t db_number(struct db *db, const char *sql, struct err *err);
// False after an error that made SQLite roll the whole transaction back by itself.
bool db_in_transaction(struct db *db);
int64_t db_changes(struct db *db);  // rows changed by the last statement
// Looks for damage for at most limit_ms: 0 none found, -1 internal/store_corrupt.
int db_check(struct db *db, int limit_ms, struct err *err);
// Frames in the -wal after the last commit; db_checkpoint moves what no reader needs into the database.
unsigned db_wal_frames(const struct db *db);
void db_checkpoint(struct db *db);

// For tests: how SQLite goes about each statement that was prepared so far, line by line of EXPLAIN QUERY PLAN.
void db_plans(struct db *db, void (*fn)(void *arg, const char *sql, const char *line), void *arg);

// ---- statements -------------------------------------------------------------------------------------------------
// sql must be a literal: it is prepared once per connection and found again by its address. Parameters are bound and
// columns are read in order. Faults of binding are kept and told by the next step. Returns NULL with err.
struct stmt *db_stmt(struct db *db, const char *sql, struct err *err);
void db_end(struct stmt *st); // gives it back; accepts NULL
__attribute__((unused)) static inline void stmt_cleanup_(struct stmt **st) { db_end(*st); }
#define CLEANUP_STMT __attribute__((cleanup(stmt_cleanup_)))

// text and data are borrowed until the statement ends; NULL binds NULL. All accept a NULL statement.
void db_bind_text(struct stmt *st, const char *text);
void db_bind_int(struct stmt *st, int64_t v);
void db_bind_blob(struct stmt *st, const void *data, size_t len);

// Both accept NULL (db_stmt has set err).
int db_step(struct stmt *st, struct err *err); // 1 a row, 0 the end, -1
int db_run(struct stmt *st, struct err *err);  // steps to the end: 0, or -1

int64_t db_col_int(struct stmt *st);
void db_col_text(struct stmt *st, char *out, size_t cap); // "" for NULL; cut at cap
char *db_col_dup(struct stmt *st);                        // new; NULL for NULL or when out of memory (see db_col_failed)
void db_col_blob(struct stmt *st, void *out, size_t len); // zeroed where the column is not len bytes long
// Borrowed until the next step; "" for NULL. *ret_len (NULL allowed) counts bytes.
const char *db_col_borrow(struct stmt *st, size_t *ret_len);
bool db_col_failed(const struct stmt *st);                // a db_col_dup of this row ran out of memory

#endif
