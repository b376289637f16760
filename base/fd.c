#include "base/fd.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/clock.h"

void fd_close(int *fd)
{
    const int code = errno;
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
    errno = code;
}

int fd_read_full(int fd, void *data, size_t len)
{
    for (size_t done = 0; done < len;) {
        const ssize_t n = read(fd, (char *)data + done, len - done);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0) {
            errno = n == 0 ? EIO : errno;
            return -1;
        }
        done += (size_t)n;
    }
    return 0;
}

int fd_write_full(int fd, const void *data, size_t len)
{
    for (size_t done = 0; done < len;) {
        const ssize_t n = write(fd, (const char *)data + done, len - done);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -1;
        done += (size_t)n;
    }
    return 0;
}

int fd_pread_full(int fd, void *data, size_t len, off_t offset)
{
    for (size_t done = 0; done < len;) {
        const ssize_t n = pread(fd, (char *)data + done, len - done, offset + (off_t)done);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0) {
            errno = n == 0 ? EIO : errno;
            return -1;
        }
        done += (size_t)n;
    }
    return 0;
}

int fd_pwrite_full(int fd, const void *data, size_t len, off_t offset)
{
    for (size_t done = 0; done < len;) {
        const ssize_t n = pwrite(fd, (const char *)data + done, len - done, offset + (off_t)done);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -1;
        done += (size_t)n;
    }
    return 0;
}

int fd_read_file(int dirfd, const char *path, struct buf *out)
{
    CLEANUP_FD int fd = openat(dirfd, path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    for (;;) {
        size_t room = out->max - out->len;
        if (room > 65536)
            room = 65536;
        if (room == 0) { // full: fine only if this is the end
            char c;
            const ssize_t n = read(fd, &c, 1);
            errno = n > 0 ? EFBIG : errno;
            return n == 0 ? 0 : -1;
        }
        if (!buf_reserve(out, room)) {
            errno = ENOMEM;
            return -1;
        }
        const ssize_t n = read(fd, out->data + out->len, room);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -1;
        out->len += (size_t)n;
        out->data[out->len] = 0;
        if (n == 0)
            return 0;
    }
}

int fd_write_file_atomic(int dirfd, const char *name, const void *data, size_t len, mode_t mode)
{
    static atomic_uint counter;
    char temporary[300];
    snprintf(temporary, sizeof temporary, ".%.200s.%d.%u", name, (int)getpid(), atomic_fetch_add(&counter, 1));
    CLEANUP_FD int fd = openat(dirfd, temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, mode);
    if (fd < 0)
        return -1;
    CLEANUP_FD int dir = -1;
    if (fchmod(fd, mode) == 0 && fd_write_full(fd, data, len) == 0 && fsync(fd) == 0 &&
        renameat(dirfd, temporary, dirfd, name) == 0) {
        dir = openat(dirfd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        return dir >= 0 && fsync(dir) == 0 ? 0 : -1;
    }
    const int code = errno;
    (void)unlinkat(dirfd, temporary, 0);
    errno = code;
    return -1;
}

int fd_mkdirs(const char *path, mode_t mode)
{
    char copy[4096];
    size_t len = strlen(path);
    while (len > 1 && path[len - 1] == '/')
        len--;
    if (len == 0 || len >= sizeof copy) {
        errno = len ? ENAMETOOLONG : ENOENT;
        return -1;
    }
    memcpy(copy, path, len);
    copy[len] = 0;
    for (size_t i = 1; i <= len; i++) {
        if (copy[i] != '/' && copy[i] != 0)
            continue;
        const char c = copy[i];
        copy[i] = 0;
        if (mkdir(copy, i == len ? mode : 0755) != 0 && errno != EEXIST)
            return -1;
        copy[i] = c;
    }
    struct stat st;
    if (stat(path, &st) != 0)
        return -1;
    if (S_ISDIR(st.st_mode))
        return 0;
    errno = ENOTDIR;
    return -1;
}

// A directory with what is in it, depth-bounded so that a hostile tree cannot exhaust the stack.
static int remove_dir(int parent, const char *name, dev_t dev, uint64_t *bytes, int depth)
{
    CLEANUP_FD int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    struct stat st;
    if (fd < 0 || fstat(fd, &st) != 0)
        return -1;
    if (st.st_dev != dev || depth > 256) {
        errno = depth > 256 ? ELOOP : EXDEV;
        return -1;
    }
    DIR *d = fdopendir(fd);
    if (!d)
        return -1;
    const int dirfd_ = fd_steal(&fd);
    int failed = 0;
    for (const struct dirent *e; (e = readdir(d));) {
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0)
            continue;
        if (fstatat(dirfd_, e->d_name, &st, AT_SYMLINK_NOFOLLOW) != 0) {
            failed |= errno != ENOENT;
            continue;
        }
        if (S_ISDIR(st.st_mode)) {
            failed |= remove_dir(dirfd_, e->d_name, dev, bytes, depth + 1) != 0;
        } else if (unlinkat(dirfd_, e->d_name, 0) == 0) {
            *bytes += (uint64_t)st.st_blocks * 512;
        } else {
            failed |= errno != ENOENT;
        }
    }
    const int code = errno;
    closedir(d);
    errno = code;
    return failed || unlinkat(parent, name, AT_REMOVEDIR) != 0 ? -1 : 0;
}

int fd_remove_tree(int dirfd, const char *name, uint64_t *ret_bytes)
{
    struct stat st;
    uint64_t bytes = 0;
    int failed = 0;
    if (fstatat(dirfd, name, &st, AT_SYMLINK_NOFOLLOW) != 0)
        failed = errno == ENOENT ? 0 : -1;
    else if (S_ISDIR(st.st_mode))
        failed = remove_dir(dirfd, name, st.st_dev, &bytes, 0);
    else if ((failed = unlinkat(dirfd, name, 0)) == 0)
        bytes = (uint64_t)st.st_blocks * 512;
    if (ret_bytes)
        *ret_bytes += bytes;
    return failed;
}

static int set_flag(int fd, int get, int set, int flag, bool on)
{
    const int flags = fcntl(fd, get);
    if (flags < 0)
        return -1;
    const int wanted = on ? flags | flag : flags & ~flag;
    return wanted == flags ? 0 : fcntl(fd, set, wanted);
}

int fd_set_nonblock(int fd, bool on)
{
    return set_flag(fd, F_GETFL, F_SETFL, O_NONBLOCK, on);
}

int fd_set_cloexec(int fd, bool on)
{
    return set_flag(fd, F_GETFD, F_SETFD, FD_CLOEXEC, on);
}

int fd_lock(int fd, int patience_ms)
{
    const int64_t until = clock_mono_ms() + patience_ms;
    while (flock(fd, LOCK_EX | LOCK_NB) != 0) {
        if (errno != EINTR && (errno != EWOULDBLOCK || clock_mono_ms() >= until))
            return -1;
        nanosleep(&(struct timespec){.tv_nsec = 2000000}, NULL); // nobody tells when a lock is free, but by blocking
    }
    return 0;
}

static int unix_address(int dirfd, const char *name, struct sockaddr_un *ret)
{
    *ret = (struct sockaddr_un){.sun_family = AF_UNIX};
    const int n = snprintf(ret->sun_path, sizeof ret->sun_path, "/proc/self/fd/%d/%s", dirfd, name);
    if (n > 0 && (size_t)n < sizeof ret->sun_path)
        return 0;
    errno = ENAMETOOLONG;
    return -1;
}

int fd_unix_listen(int dirfd, const char *name, int backlog)
{
    struct sockaddr_un address;
    CLEANUP_FD int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || unix_address(dirfd, name, &address) != 0)
        return -1;
    if (unlinkat(dirfd, name, 0) != 0 && errno != ENOENT)
        return -1;
    if (bind(fd, (const struct sockaddr *)&address, sizeof address) != 0 || listen(fd, backlog) != 0)
        return -1;
    return fd_steal(&fd);
}

int fd_unix_connect(int dirfd, const char *name)
{
    struct sockaddr_un address;
    CLEANUP_FD int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0 || unix_address(dirfd, name, &address) != 0)
        return -1;
    if (connect(fd, (const struct sockaddr *)&address, sizeof address) != 0)
        return -1; // EAGAIN: the backlog is full; AF_UNIX never says EINPROGRESS
    return fd_steal(&fd);
}

int fd_count_open(void)
{
    DIR *d = opendir("/proc/self/fd");
    if (!d)
        return -1;
    int n = -1; // its own
    for (const struct dirent *e; (e = readdir(d));)
        n += e->d_name[0] != '.';
    closedir(d);
    return n;
}

int64_t fd_free_bytes(int fd)
{
    struct statvfs v;
    if (fstatvfs(fd, &v) != 0)
        return -1;
    return (int64_t)v.f_bavail * (int64_t)v.f_frsize;
}
