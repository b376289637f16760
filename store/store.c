#include "store/store.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/fd.h"
#include "store/int.h"
#include "store/migrate.h"
#include "store/verify_int.h"

#define DB_NAME "airlock.db"
#define CHECK_MS 500     // of a look for damage at start; a large file is looked at in part
#define RESERVE_KEPT_MS 200

// Stores of this process, so that an offline check does not take their files for a dead server's.
static pthread_mutex_t open_lock = PTHREAD_MUTEX_INITIALIZER;
static struct store *open_stores;

bool store_open_here(int dirfd, char *path, size_t cap)
{
    struct stat a, b;
    bool here = false;
    if (fstat(dirfd, &a) != 0)
        return false;
    pthread_mutex_lock(&open_lock);
    for (const struct store *s = open_stores; s && !here; s = s->next_open) {
        here = fstat(s->dirfd, &b) == 0 && a.st_dev == b.st_dev && a.st_ino == b.st_ino;
        if (here)
            snprintf(path, cap, "%s", s->db_path);
    }
    pthread_mutex_unlock(&open_lock);
    return here;
}

static void list_open(struct store *s)
{
    pthread_mutex_lock(&open_lock);
    s->next_open = open_stores;
    open_stores = s;
    pthread_mutex_unlock(&open_lock);
}

static void unlist_open(struct store *s)
{
    pthread_mutex_lock(&open_lock);
    for (struct store **at = &open_stores; *at; at = &(*at)->next_open)
        if (*at == s) {
            *at = s->next_open;
            break;
        }
    pthread_mutex_unlock(&open_lock);
}

// ---- opening ------------------------------------------------------------------------------------------------------
// One store per directory; the file names the holder for whoever comes second.
static int lock_directory(struct store *s, struct err *err)
{
    char pid[24] = "";
    s->lockfd = openat(s->dirfd, "airlock.lock", O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (s->lockfd < 0)
        return err_sys(err, errno, "opening airlock.lock");
    if (fd_lock(s->lockfd, FD_LOCK_PATIENCE_MS) != 0) {
        if (errno != EWOULDBLOCK)
            return err_sys(err, errno, "locking airlock.lock");
        if (pread(s->lockfd, pid, sizeof pid - 1, 0) < 0)
            pid[0] = 0;
        err_set(err, ERR_UNAVAILABLE, "store_locked", "process %d holds the state directory", atoi(pid));
        return err_remedy(err, "stop that process, or use another --state-dir");
    }
    const int n = snprintf(pid, sizeof pid, "%d\n", (int)getpid());
    if (ftruncate(s->lockfd, 0) != 0 || pwrite(s->lockfd, pid, (size_t)n, 0) != n)
        return err_sys(err, errno, "writing airlock.lock");
    return 0;
}

// SQLite wants a path; with its links resolved it stays the directory that dirfd is.
static int find_path(struct store *s, struct err *err)
{
    char link[64];
    const size_t room = sizeof s->db_path - sizeof DB_NAME - 1;
    snprintf(link, sizeof link, "/proc/self/fd/%d", s->dirfd);
    const ssize_t n = readlink(link, s->db_path, room);
    if (n <= 0 || (size_t)n >= room)
        return err_sys(err, n < 0 ? errno : ENAMETOOLONG, "finding the state directory");
    snprintf(s->db_path + n, sizeof s->db_path - (size_t)n, "/%s", DB_NAME);
    return 0;
}

// SQLite would make the file readable for all; -wal and -shm take over its mode.
static int make_file(struct store *s, struct err *err)
{
    CLEANUP_FD int fd = openat(s->dirfd, DB_NAME, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    return fd >= 0 || errno == EEXIST ? 0 : err_sys(err, errno, "making the database");
}

static int open_all(struct store *s, struct err *err)
{
    if (lock_directory(s, err) != 0 || find_path(s, err) != 0 || make_file(s, err) != 0)
        return -1;
    list_open(s);
    s->db = db_open(s->db_path, DB_WRITER, err);
    if (!s->db || db_check(s->db, CHECK_MS, err) != 0 || migrate_run(s->db, MIGRATIONS, MIGRATIONS_COUNT, err) != 0)
        return -1;
    if (keys_open(s, err) != 0 || audit_open(s, err) != 0)
        return -1;
    return writer_start(s, err);
}

struct store *store_open(const struct store_options *o, struct err *err)
{
    struct store *s = calloc(1, sizeof *s);
    if (!s) {
        err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
        return NULL;
    }
    s->dirfd = o->state_dirfd;
    s->lockfd = -1;
    s->reserve_bytes = o->reserve_bytes;
    s->reserve_ok = true;
    snprintf(s->server_version, sizeof s->server_version, "%s", o->server_version ? o->server_version : "");
    if (open_all(s, err) == 0)
        return s;
    store_close(s);
    return NULL;
}

void store_close(struct store *s)
{
    if (!s)
        return;
    writer_stop(s);
    readers_close(s);
    db_close(s->db); // the last connection moves the -wal into the database
    unlist_open(s);
    keys_close(s);
    fd_close(&s->lockfd);
    free(s);
}

// ---- what is asked of it --------------------------------------------------------------------------------------------
int store_reserve_check(struct store *s, struct err *err)
{
    const int64_t now = clock_mono_ms();
    if (now >= atomic_load(&s->reserve_until_ms)) {
        const int64_t left = fd_free_bytes(s->dirfd);
        atomic_store(&s->reserve_ok, left < 0 || (uint64_t)left >= s->reserve_bytes);
        atomic_store(&s->reserve_until_ms, now + RESERVE_KEPT_MS);
    }
    if (atomic_load(&s->reserve_ok))
        return 0;
    err_set(err, ERR_UNAVAILABLE, "disk_full", "the host keeps its last %llu MiB of disk for outcomes",
            (unsigned long long)(s->reserve_bytes >> 20));
    return err_remedy(err, "delete sandboxes, or free space on the host");
}

static uint64_t bytes_of(const struct store *s, const char *name)
{
    struct stat st;
    return fstatat(s->dirfd, name, &st, AT_SYMLINK_NOFOLLOW) == 0 ? (uint64_t)st.st_size : 0;
}

void store_stats(struct store *s, struct store_stats *ret)
{
    *ret = (struct store_stats){
        .commits = atomic_load(&s->commits), .transactions = atomic_load(&s->transactions),
        .failed_commits = atomic_load(&s->failed_commits), .last_commit_us = atomic_load(&s->last_commit_us),
        .db_bytes = bytes_of(s, DB_NAME), .wal_bytes = bytes_of(s, DB_NAME "-wal"),
    };
    pthread_mutex_lock(&s->lock);
    ret->queue_depth = s->depth;
    pthread_mutex_unlock(&s->lock);
}

void store_fail_commit_after(struct store *s, unsigned n)
{
    atomic_store(&s->fail_after, n);
}

void event_notify_set(struct store *s, void (*fn)(void *), void *arg)
{
    pthread_mutex_lock(&s->lock);
    s->notify_arg = arg;
    s->notify = fn;
    pthread_mutex_unlock(&s->lock);
}
