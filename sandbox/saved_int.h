// saved_int.h - what the two sides of a saved state share. Private to saved.c and saved_write.c.
#ifndef AIRLOCK_SANDBOX_SAVED_INT_H
#define AIRLOCK_SANDBOX_SAVED_INT_H

#include "sandbox/saved.h"

#define SAVED_PATH_MAX 300 // "spool/" and a name

// Calls fn for everything in a directory below dirfd (sub "": itself), by its path, until it returns another than 0. -1 with
// errno where it cannot be read.
typedef int (*saved_file_fn)(void *arg, int dirfd, const char *path);
int saved_each_in(int dirfd, const char *sub, saved_file_fn fn, void *arg);

// ram_sparse_digest, once per inode and change time in this process.
int saved_disk_hash(int fd, uint8_t out[SHA256_BYTES], struct err *err);

#endif
