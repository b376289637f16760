// The only file that includes sqlite3.h.
#include "store/db.h"

#include <errno.h>
#include <fcntl.h>
#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/fd.h"

// Kept statements per connection, found by the literal's address; a full table prepares anew each time.
#define STMT_SLOTS 128
#define BUSY_MS 5000
// Memory: the writer's cache is bounded at 1 MiB, a reader's at 128 KiB, all of SQLite softly at 8 MiB.
#define SOFT_HEAP_BYTES (8ll << 20)
#define PATH_BYTES 1200
#define WAL_BYTES (4224l << 10) // 1,000 pages with their headers (writer.c, WAL_FRAMES_IDLE), and some

struct stmt {
    sqlite3_stmt *s;
    struct db *db;
    const char *sql;
    int bound, column, rc;
    bool kept, busy, failed;
};

struct db {
    sqlite3 *handle;
    unsigned wal_frames;
    int64_t deadline_us;
    struct stmt slots[STMT_SLOTS];
};

static bool disk_is_full(const struct db *db, int rc)
{
    if ((rc & 0xff) == SQLITE_FULL)
        return true;
    const int code = db && db->handle ? sqlite3_system_errno(db->handle) : errno;
    return (rc & 0xff) == SQLITE_IOERR && (code == ENOSPC || code == EDQUOT);
}

static int fail(const struct db *db, int rc, const char *what, struct err *err)
{
    const char *text = db && db->handle ? sqlite3_errmsg(db->handle) : sqlite3_errstr(rc);
    if (disk_is_full(db, rc))
        err_set(err, ERR_UNAVAILABLE, "disk_full", "the host's disk is full");
    else if ((rc & 0xff) == SQLITE_BUSY || (rc & 0xff) == SQLITE_LOCKED)
        err_set(err, ERR_UNAVAILABLE, "store_busy", "another process holds the database");
    else if ((rc & 0xff) == SQLITE_READONLY)
        err_set(err, ERR_UNAVAILABLE, "store_read_only", "the database cannot be written");
    else if ((rc & 0xff) == SQLITE_CORRUPT || (rc & 0xff) == SQLITE_NOTADB)
        err_set(err, ERR_INTERNAL, "store_corrupt", "the database is damaged");
    else if ((rc & 0xff) == SQLITE_CONSTRAINT)
        err_set(err, ERR_CONFLICT, "constraint", "the record conflicts with another");
    else if ((rc & 0xff) == SQLITE_NOMEM)
        err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
    else
        err_set(err, ERR_INTERNAL, "store_error", "the database failed");
    if (err) {
        err->sys_errno = db && db->handle ? sqlite3_system_errno(db->handle) : 0;
        snprintf(err->internal, sizeof err->internal, "%.60s: sqlite %d: %.200s", what, rc, text);
    }
    return -1;
}

// ---- connections ------------------------------------------------------------------------------------------------
static const char *const PRAGMAS[] = {
    // WAL with a sync per commit; the log is kept at the size it reached so that commits overwrite instead of
    // extending the file (a sync without a metadata change). https://www.sqlite.org/wal.html
    [DB_WRITER] = "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA foreign_keys=ON; PRAGMA mmap_size=0;"
                  "PRAGMA cache_size=-1024; PRAGMA journal_size_limit=16777216; PRAGMA wal_autocheckpoint=0;"
                  "PRAGMA temp_store=MEMORY; PRAGMA trusted_schema=OFF;",
    [DB_READER] = "PRAGMA query_only=ON; PRAGMA mmap_size=0; PRAGMA cache_size=-128; PRAGMA wal_autocheckpoint=0;"
                  "PRAGMA temp_store=MEMORY; PRAGMA trusted_schema=OFF;",
    [DB_FROZEN] = "PRAGMA query_only=ON; PRAGMA mmap_size=0; PRAGMA cache_size=-1024; PRAGMA temp_store=MEMORY;"
                  "PRAGMA trusted_schema=OFF;",
    [DB_PRIVATE] = "PRAGMA locking_mode=EXCLUSIVE; PRAGMA synchronous=OFF; PRAGMA mmap_size=0;"
                   "PRAGMA cache_size=-1024; PRAGMA wal_autocheckpoint=0; PRAGMA temp_store=MEMORY;"
                   "PRAGMA trusted_schema=OFF;",
};

static int count_frames(void *arg, sqlite3 *handle, const char *name, int frames)
{
    ((struct db *)arg)->wal_frames = (unsigned)frames;
    return SQLITE_OK;
}

// file:<path>[?immutable=1], escaped as https://www.sqlite.org/uri.html asks.
static int uri_of(const char *path, enum db_mode mode, char *out, size_t cap)
{
    size_t at = (size_t)snprintf(out, cap, "file:");
    for (; *path && at + 4 < cap; path++) {
        const bool plain = *path != '%' && *path != '?' && *path != '#';
        at += (size_t)snprintf(out + at, cap - at, plain ? "%c" : "%%%02X", (unsigned char)*path);
    }
    if (*path || at + 16 > cap)
        return -1;
    snprintf(out + at, cap - at, "%s", mode == DB_FROZEN ? "?immutable=1" : "");
    return 0;
}

// A log that grows makes each commit write the file's size as well: it is laid out once, as long as it is when it is moved
// into the database. Zeros behind what is in it are no frames to SQLite (their salt and checksum are not its own).
static void lay_out_log(const char *path)
{
    static const char zeros[65536];
    char log[PATH_BYTES];
    struct stat st;
    snprintf(log, sizeof log, "%s-wal", path);
    CLEANUP_FD int fd = open(log, O_WRONLY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0 || fstat(fd, &st) != 0 || st.st_size >= WAL_BYTES)
        return;
    for (off_t at = st.st_size; at < WAL_BYTES; at += (off_t)sizeof zeros)
        if (pwrite(fd, zeros, sizeof zeros, at) != (ssize_t)sizeof zeros) {
            (void)!ftruncate(fd, st.st_size);
            return;
        }
    (void)fdatasync(fd);
}

static int open_handle(struct db *db, const char *path, enum db_mode mode)
{
    char uri[PATH_BYTES];
    if (uri_of(path, mode, uri, sizeof uri) != 0)
        return SQLITE_CANTOPEN;
    int flags = SQLITE_OPEN_URI | SQLITE_OPEN_NOMUTEX | SQLITE_OPEN_EXRESCODE;
    flags |= mode == DB_FROZEN ? SQLITE_OPEN_READONLY : SQLITE_OPEN_READWRITE;
    flags |= mode == DB_WRITER ? SQLITE_OPEN_CREATE : 0;
    sqlite3_soft_heap_limit64(SOFT_HEAP_BYTES);
    int rc = sqlite3_open_v2(uri, &db->handle, flags, NULL);
    if (rc != SQLITE_OK)
        return rc;
    sqlite3_busy_timeout(db->handle, BUSY_MS);
    sqlite3_db_config(db->handle, SQLITE_DBCONFIG_DEFENSIVE, 1, NULL);
    rc = sqlite3_exec(db->handle, PRAGMAS[mode], NULL, NULL, NULL);
    if (mode == DB_WRITER)
        sqlite3_wal_hook(db->handle, count_frames, db); // after the pragma, which takes the hook away
    if (mode == DB_WRITER && rc == SQLITE_OK)
        lay_out_log(path);
    return rc;
}

struct db *db_open(const char *path, enum db_mode mode, struct err *err)
{
    struct db *db = calloc(1, sizeof *db);
    if (!db) {
        err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
        return NULL;
    }
    const int rc = open_handle(db, path, mode);
    if (rc == SQLITE_OK)
        return db;
    fail(db, rc, "opening", err);
    db_close(db);
    return NULL;
}

void db_close(struct db *db)
{
    if (!db)
        return;
    for (int i = 0; i < STMT_SLOTS; i++)
        sqlite3_finalize(db->slots[i].s);
    sqlite3_close_v2(db->handle);
    free(db);
}

int db_exec(struct db *db, const char *sql, struct err *err)
{
    const int rc = sqlite3_exec(db->handle, sql, NULL, NULL, NULL);
    return rc == SQLITE_OK ? 0 : fail(db, rc, "running", err);
}

int64_t db_number(struct db *db, const char *sql, struct err *err)
{
    sqlite3_stmt *s = NULL;
    int rc = sqlite3_prepare_v2(db->handle, sql, -1, &s, NULL);
    if (rc == SQLITE_OK)
        rc = sqlite3_step(s);
    const int64_t v = rc == SQLITE_ROW ? sqlite3_column_int64(s, 0) : -1;
    if (rc != SQLITE_ROW)
        fail(db, rc, sql, err);
    sqlite3_finalize(s);
    return v;
}

bool db_in_transaction(struct db *db)
{
    return sqlite3_get_autocommit(db->handle) == 0;
}

int64_t db_changes(struct db *db)
{
    return sqlite3_changes64(db->handle);
}

static int past_deadline(void *arg)
{
    return clock_mono_us() > ((struct db *)arg)->deadline_us;
}

int db_check(struct db *db, int limit_ms, struct err *err)
{
    sqlite3_stmt *s = NULL;
    db->deadline_us = clock_mono_us() + (int64_t)limit_ms * 1000;
    sqlite3_progress_handler(db->handle, 1000, past_deadline, db);
    int rc = sqlite3_prepare_v2(db->handle, "PRAGMA quick_check(1)", -1, &s, NULL);
    if (rc == SQLITE_OK)
        rc = sqlite3_step(s);
    const char *said = rc == SQLITE_ROW ? (const char *)sqlite3_column_text(s, 0) : NULL;
    int result = 0;
    if (said && strcmp(said, "ok") != 0) {
        result = err_set(err, ERR_INTERNAL, "store_corrupt", "the database is damaged");
        if (err)
            snprintf(err->internal, sizeof err->internal, "quick_check: %.250s", said);
    } else if (rc != SQLITE_ROW && (rc & 0xff) != SQLITE_INTERRUPT) {
        result = fail(db, rc, "quick_check", err);
    }
    sqlite3_finalize(s);
    sqlite3_progress_handler(db->handle, 0, NULL, NULL);
    return result;
}

unsigned db_wal_frames(const struct db *db)
{
    return db->wal_frames;
}

void db_checkpoint(struct db *db)
{
    int left = 0, moved = 0;
    // PASSIVE waits for nobody: what a reader still needs stays until the next time.
    if (sqlite3_wal_checkpoint_v2(db->handle, NULL, SQLITE_CHECKPOINT_PASSIVE, &left, &moved) == SQLITE_OK)
        db->wal_frames = left > moved ? (unsigned)(left - moved) : 0;
}

static void explain(struct db *db, const char *sql, void (*fn)(void *, const char *, const char *), void *arg)
{
    sqlite3_stmt *s = NULL;
    char *text = sqlite3_mprintf("EXPLAIN QUERY PLAN %s", sql);
    if (text && sqlite3_prepare_v2(db->handle, text, -1, &s, NULL) == SQLITE_OK)
        while (sqlite3_step(s) == SQLITE_ROW)
            fn(arg, sql, (const char *)sqlite3_column_text(s, 3));
    sqlite3_finalize(s);
    sqlite3_free(text);
}

void db_plans(struct db *db, void (*fn)(void *, const char *, const char *), void *arg)
{
    for (int i = 0; i < STMT_SLOTS; i++)
        if (db->slots[i].s)
            explain(db, db->slots[i].sql, fn, arg);
}

// ---- statements -------------------------------------------------------------------------------------------------
static struct stmt *slot_of(struct db *db, const char *sql)
{
    const size_t start = ((uintptr_t)sql >> 3) % STMT_SLOTS;
    for (size_t i = 0; i < STMT_SLOTS; i++) {
        struct stmt *st = &db->slots[(start + i) % STMT_SLOTS];
        if (!st->s || st->sql == sql)
            return st;
    }
    return NULL;
}

struct stmt *db_stmt(struct db *db, const char *sql, struct err *err)
{
    struct stmt *st = slot_of(db, sql);
    const bool kept = st && !st->busy; // a nested use of the same text gets a statement of its own
    if (!kept && !(st = calloc(1, sizeof *st))) {
        err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
        return NULL;
    }
    if (!st->s) {
        const int rc = sqlite3_prepare_v3(db->handle, sql, -1, kept ? SQLITE_PREPARE_PERSISTENT : 0, &st->s, NULL);
        if (rc != SQLITE_OK) {
            fail(db, rc, sql, err);
            if (!kept)
                free(st);
            return NULL;
        }
        st->sql = sql;
        st->db = db;
        st->kept = kept;
    }
    st->busy = true;
    st->bound = st->column = 0;
    st->rc = SQLITE_OK;
    st->failed = false;
    return st;
}

void db_end(struct stmt *st)
{
    if (!st)
        return;
    if (!st->kept) {
        sqlite3_finalize(st->s);
        free(st);
        return;
    }
    sqlite3_reset(st->s);
    sqlite3_clear_bindings(st->s);
    st->busy = false;
}

static void bound(struct stmt *st, int rc)
{
    if (st->rc == SQLITE_OK)
        st->rc = rc;
}

void db_bind_text(struct stmt *st, const char *text)
{
    if (st)
        bound(st, sqlite3_bind_text(st->s, ++st->bound, text, -1, SQLITE_STATIC));
}

void db_bind_int(struct stmt *st, int64_t v)
{
    if (st)
        bound(st, sqlite3_bind_int64(st->s, ++st->bound, v));
}

void db_bind_blob(struct stmt *st, const void *data, size_t len)
{
    if (st)
        bound(st, sqlite3_bind_blob64(st->s, ++st->bound, data, len, SQLITE_STATIC));
}

int db_step(struct stmt *st, struct err *err)
{
    if (!st)
        return -1;
    st->column = 0;
    st->failed = false;
    if (st->rc == SQLITE_OK)
        st->rc = sqlite3_step(st->s);
    const int rc = st->rc;
    st->rc = rc == SQLITE_ROW ? SQLITE_OK : rc;
    if (rc == SQLITE_ROW)
        return 1;
    return rc == SQLITE_DONE ? 0 : fail(st->db, rc, st->sql, err);
}

int db_run(struct stmt *st, struct err *err)
{
    int got;
    do
        got = db_step(st, err);
    while (got > 0);
    return got;
}

int64_t db_col_int(struct stmt *st)
{
    return sqlite3_column_int64(st->s, st->column++);
}

const char *db_col_borrow(struct stmt *st, size_t *ret_len)
{
    const int i = st->column++;
    const char *text = (const char *)sqlite3_column_text(st->s, i);
    if (ret_len)
        *ret_len = text ? (size_t)sqlite3_column_bytes(st->s, i) : 0;
    return text ? text : "";
}

void db_col_text(struct stmt *st, char *out, size_t cap)
{
    snprintf(out, cap, "%s", db_col_borrow(st, NULL));
}

char *db_col_dup(struct stmt *st)
{
    const bool null = sqlite3_column_type(st->s, st->column) == SQLITE_NULL;
    const char *text = db_col_borrow(st, NULL);
    char *copy = null ? NULL : strdup(text);
    st->failed |= !null && !copy;
    return copy;
}

void db_col_blob(struct stmt *st, void *out, size_t len)
{
    const int i = st->column++;
    const void *data = sqlite3_column_blob(st->s, i);
    memset(out, 0, len);
    if (data && (size_t)sqlite3_column_bytes(st->s, i) == len)
        memcpy(out, data, len);
}

bool db_col_failed(const struct stmt *st)
{
    return st->failed;
}
