// A database to read for the check. Three cases:
//   this process serves it   an ordinary read connection. (Opening the file here by hand would be worse: closing any
//                            descriptor of it would drop SQLite's POSIX locks, https://www.sqlite.org/howtocorrupt.html)
//   no -wal and no -shm      closed cleanly: the file itself, immutable.
//   otherwise                a server is at work, or was killed: a private copy of database and -wal.
// A copy made beside a working server is consistent when the -wal was not begun anew meanwhile (its header holds a salt):
// every page a checkpoint may have moved while we copied the database is still in the -wal, which is copied after it and
// read over it. https://www.sqlite.org/fileformat2.html#the_write_ahead_log
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/fd.h"
#include "store/verify_int.h"

#define DB "airlock.db"
#define COPY_TRIES 50
#define WAL_HEADER 32

static int copy_bytes(int from, int to)
{
    if (ioctl(to, FICLONE, from) == 0)
        return 0;
    for (;;) {
        const ssize_t n = copy_file_range(from, NULL, to, NULL, 64 << 20, 0);
        if (n == 0)
            return 0;
        if (n < 0)
            break;
    }
    CLEANUP_FREE char *chunk = malloc(64 << 10);
    if (!chunk || lseek(from, 0, SEEK_SET) < 0 || lseek(to, 0, SEEK_SET) < 0 || ftruncate(to, 0) != 0)
        return -1;
    for (;;) {
        const ssize_t n = read(from, chunk, 64 << 10);
        if (n <= 0)
            return (int)n;
        if (fd_write_full(to, chunk, (size_t)n) != 0)
            return -1;
    }
}

// 0 also where there is no such file: then there is no copy.
static int copy_file(int from_dir, const char *from_name, int to_dir, const char *to_name)
{
    CLEANUP_FD int from = openat(from_dir, from_name, O_RDONLY | O_CLOEXEC);
    if (from < 0)
        return errno == ENOENT ? 0 : -1;
    CLEANUP_FD int to = openat(to_dir, to_name, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    return to < 0 ? -1 : copy_bytes(from, to);
}

// What must not change while copying: the -wal's header, and where there is none the database itself.
struct mark {
    uint8_t header[WAL_HEADER];
    ssize_t len;
    struct timespec changed;
    off_t bytes;
};

static void take_mark(int dirfd, const char *wal, struct mark *m)
{
    struct stat st;
    memset(m, 0, sizeof *m);
    CLEANUP_FD int fd = openat(dirfd, wal, O_RDONLY | O_CLOEXEC);
    m->len = fd < 0 ? 0 : pread(fd, m->header, WAL_HEADER, 0);
    if (m->len < WAL_HEADER && fstatat(dirfd, DB, &st, 0) == 0) {
        m->changed = st.st_mtim;
        m->bytes = st.st_size;
    }
}

static int copy_once(int dirfd, int tmpfd, bool *same)
{
    struct mark before, after, copied;
    take_mark(dirfd, DB "-wal", &before);
    if (unlinkat(tmpfd, DB "-wal", 0) != 0 && errno != ENOENT)
        return -1;
    if (copy_file(dirfd, DB, tmpfd, DB) != 0 || copy_file(dirfd, DB "-wal", tmpfd, DB "-wal") != 0)
        return -1;
    take_mark(dirfd, DB "-wal", &after);
    take_mark(tmpfd, DB "-wal", &copied);
    *same = memcmp(&before, &after, sizeof before) == 0 && copied.len == after.len &&
            memcmp(copied.header, after.header, WAL_HEADER) == 0;
    return 0;
}

static int copy_all(int dirfd, int tmpfd)
{
    for (int i = 0; i < COPY_TRIES; i++) {
        bool same = false;
        if (copy_once(dirfd, tmpfd, &same) != 0)
            return -1;
        if (same)
            return 0;
    }
    errno = EAGAIN;
    return -1;
}

static void remove_copy(const char *dir, int tmpfd)
{
    static const char *const NAMES[] = {DB, DB "-wal", DB "-shm", DB "-journal"};
    for (size_t i = 0; i < sizeof NAMES / sizeof NAMES[0]; i++)
        (void)unlinkat(tmpfd, NAMES[i], 0);
    (void)rmdir(dir);
}

// The copy has no name any more once it is open.
static int open_copy(struct source *src, int dirfd, struct err *err)
{
    const char *base = getenv("TMPDIR");
    char dir[1024], path[1100];
    if (!base || *base != '/')
        base = "/var/tmp"; // not /tmp, which may be memory
    if (snprintf(dir, sizeof dir, "%s/airlock-verify.XXXXXX", base) >= (int)sizeof dir || !mkdtemp(dir))
        return err_sys(err, errno, "a directory for the copy");
    CLEANUP_FD int tmpfd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int result = tmpfd >= 0 && copy_all(dirfd, tmpfd) == 0 ? 0 : err_sys(err, errno, "copying the database");
    if (result == 0) {
        snprintf(path, sizeof path, "%s/" DB, dir);
        src->db = db_open(path, DB_PRIVATE, err);
        // The first read opens the -wal.
        result = src->db && db_number(src->db, "SELECT count(*) FROM sqlite_schema", err) >= 0 ? 0 : -1;
    }
    remove_copy(dir, tmpfd);
    return result;
}

static bool exists(int dirfd, const char *name)
{
    struct stat st;
    return fstatat(dirfd, name, &st, AT_SYMLINK_NOFOLLOW) == 0;
}

static int open_frozen(struct source *src, int dirfd, struct err *err)
{
    char link[64], path[1024];
    const size_t room = sizeof path - sizeof DB - 1;
    snprintf(link, sizeof link, "/proc/self/fd/%d", dirfd);
    const ssize_t n = readlink(link, path, room);
    if (n <= 0 || (size_t)n >= room)
        return err_sys(err, n < 0 ? errno : ENAMETOOLONG, "finding the state directory");
    snprintf(path + n, sizeof path - (size_t)n, "/%s", DB);
    src->db = db_open(path, DB_FROZEN, err);
    return src->db ? 0 : -1;
}

int source_open(struct source *src, int dirfd, struct err *err)
{
    char path[1024];
    *src = (struct source){0};
    if (!exists(dirfd, DB))
        return err_set(err, ERR_NOT_FOUND, "store_missing", "there is no airlock.db");
    if (store_open_here(dirfd, path, sizeof path)) {
        src->live = src->moving = true;
        src->db = db_open(path, DB_READER, err);
        return src->db ? 0 : -1;
    }
    src->live = exists(dirfd, DB "-shm") || exists(dirfd, DB "-wal");
    return src->live ? open_copy(src, dirfd, err) : open_frozen(src, dirfd, err);
}

void source_close(struct source *src)
{
    db_close(src->db);
    src->db = NULL;
}
