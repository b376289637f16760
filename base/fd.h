// fd.h - descriptors, whole-file reads and durable writes. Every descriptor it opens is close-on-exec.
// Owns nothing but what it returns. Any thread. libc only.
#ifndef AIRLOCK_BASE_FD_H
#define AIRLOCK_BASE_FD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/types.h>

#include "base/err.h"

struct buf;

// Closes *fd when it is >= 0 and sets it to -1; keeps errno.
void fd_close(int *fd);
__attribute__((unused)) static inline void free_cleanup_(void *p) { free(*(void **)p); }
#define CLEANUP_FD __attribute__((cleanup(fd_close)))
#define CLEANUP_FREE __attribute__((cleanup(free_cleanup_)))

static inline int fd_steal(int *fd) { int v = *fd; *fd = -1; return v; }
#define STEAL(p) (__extension__({ __typeof__(p) v_ = (p); (p) = NULL; v_; }))

// Reads/writes exactly len bytes, through EINTR and short counts. 0, or -1 with errno (EIO for end of file).
int fd_read_full(int fd, void *data, size_t len);
int fd_write_full(int fd, const void *data, size_t len);
int fd_pread_full(int fd, void *data, size_t len, off_t offset);
int fd_pwrite_full(int fd, const void *data, size_t len, off_t offset);

// Whole file below dirfd (AT_FDCWD allowed) into out (whose max bounds it; EFBIG past it).
int fd_read_file(int dirfd, const char *path, struct buf *out);

// Writes name below dirfd through a temporary file: write, fsync, rename, fsync of the directory, so that after
// any crash there is the old file or the new one. 0, or -1 with errno; the temporary file is gone either way.
int fd_write_file_atomic(int dirfd, const char *name, const void *data, size_t len, mode_t mode);

// mkdir for each missing component, the last with mode. 0, or -1 with errno.
int fd_mkdirs(const char *path, mode_t mode);

// Removes a tree below dirfd without following symlinks or crossing mounts; ENOENT is success. Adds up the
// regular files' allocated bytes into *ret_bytes (NULL allowed).
int fd_remove_tree(int dirfd, const char *name, uint64_t *ret_bytes);

int fd_set_nonblock(int fd, bool on);
int fd_set_cloexec(int fd, bool on);

// Takes the whole file for itself (flock). A process that was killed may have a child between fork and exec that holds its
// lock some moments longer: hence the patience. 0, or -1 with errno, EWOULDBLOCK when somebody still has it.
#define FD_LOCK_PATIENCE_MS 1000
int fd_lock(int fd, int patience_ms);

// AF_UNIX stream socket listening at dirfd/name, whatever the length of the directory's path (bound through
// /proc/self/fd); an old socket of that name is replaced. Returns the descriptor or -1 with errno.
int fd_unix_listen(int dirfd, const char *name, int backlog);
// Non-blocking connect; returns a descriptor or -1 with errno.
int fd_unix_connect(int dirfd, const char *name);

// Number of open descriptors of this process, or -1.
int fd_count_open(void);

// Bytes free for this process on the filesystem of fd, or -1 with errno.
int64_t fd_free_bytes(int fd);

#endif
