#include "qemu/ram.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/fd.h"

#define COPY_CHUNK (4u << 20)

static int no_room(struct err *err, int code, const char *what)
{
    if (code == ENOSPC || code == EDQUOT)
        return err_set(err, ERR_UNAVAILABLE, "disk_full", "the host has no room for the copy of a disk or memory");
    if (code == ENOMEM)
        return err_set(err, ERR_UNAVAILABLE, "out_of_memory", "the host has not enough memory");
    return err_sys(err, code, "%s", what);
}

// ---- memory files -------------------------------------------------------------------------------------------------
int ram_new(uint64_t bytes, struct err *err)
{
    CLEANUP_FD int fd = memfd_create(RAM_MEMFD_NAME, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    // Opened again by QEMU under its own uid, by the descriptor it was given: nobody else has a way to it.
    if (fd < 0 || ftruncate(fd, (off_t)bytes) != 0 || fchmod(fd, 0666) != 0)
        return no_room(err, errno, "making a memory file");
    return fd_steal(&fd);
}

int ram_seal(int fd, struct err *err)
{
    if (fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0)
        return 0;
    return err_sys(err, errno, "sealing a memory file");
}

bool ram_is_sealed(int fd)
{
    const int seals = fcntl(fd, F_GET_SEALS), wanted = F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW;
    return seals >= 0 && (seals & wanted) == wanted;
}

uint64_t ram_bytes(int fd)
{
    struct stat st;
    return fstat(fd, &st) == 0 ? (uint64_t)st.st_blocks * 512 : 0;
}

// copy_file_range between two memory files copies page by page inside the kernel: no mapping of ours to fault in.
static int copy_extent(int from, int to, off_t at, off_t end, struct err *err)
{
    while (at < end) {
        loff_t in = at, out = at;
        const size_t want = (size_t)(end - at < COPY_CHUNK ? end - at : COPY_CHUNK);
        const ssize_t n = copy_file_range(from, &in, to, &out, want, 0);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return no_room(err, n < 0 ? errno : EIO, "copying");
        at += n;
    }
    return 0;
}

static int copy_extents(int from, int to, off_t size, struct err *err)
{
    for (off_t at = 0; at < size;) {
        const off_t data = lseek(from, at, SEEK_DATA);
        if (data < 0)
            return errno == ENXIO ? 0 : err_sys(err, errno, "looking for data");
        const off_t end = lseek(from, data, SEEK_HOLE);
        if (end < 0)
            return err_sys(err, errno, "looking for a hole");
        if (copy_extent(from, to, data, end, err) != 0)
            return -1;
        at = end;
    }
    return 0;
}

int ram_copy(int from_fd, int to_fd, uint64_t bytes, struct err *err)
{
    return copy_extents(from_fd, to_fd, (off_t)bytes, err);
}

// ---- digests and copies of sparse files -------------------------------------------------------------------------------
static bool all_zeros(const uint8_t *p, size_t len)
{
    return len == 0 || (p[0] == 0 && memcmp(p, p + 1, len - 1) == 0);
}

static void hash_number(struct sha256 *h, uint64_t v)
{
    uint8_t b[8];
    for (int i = 0; i < 8; i++, v >>= 8)
        b[i] = (uint8_t)v;
    sha256_update(h, b, sizeof b);
}

static void hash_block(struct sha256 *h, uint64_t offset, const uint8_t *block)
{
    if (all_zeros(block, RAM_PAGE))
        return;
    hash_number(h, offset);
    sha256_update(h, block, RAM_PAGE);
}

static int hash_extent(int fd, struct sha256 *h, off_t at, off_t end, off_t size, uint8_t *chunk, struct err *err)
{
    at = at / RAM_PAGE * RAM_PAGE;
    for (; at < end; at += COPY_CHUNK) {
        const size_t want = (size_t)(size - at < COPY_CHUNK ? size - at : COPY_CHUNK);
        if (fd_pread_full(fd, chunk, want, at) != 0)
            return err_sys(err, errno, "reading a disk");
        const size_t blocks = (want + RAM_PAGE - 1) / RAM_PAGE;
        memset(chunk + want, 0, blocks * RAM_PAGE - want);
        for (size_t i = 0; i < blocks && at + (off_t)(i * RAM_PAGE) < end; i++)
            hash_block(h, (uint64_t)at + i * RAM_PAGE, chunk + i * RAM_PAGE);
    }
    return 0;
}

int ram_sparse_digest(int fd, uint8_t ret_hash[SHA256_BYTES], uint64_t *ret_data, struct err *err)
{
    struct stat st;
    struct sha256 *h = sha256_new();
    CLEANUP_FREE uint8_t *chunk = malloc(COPY_CHUNK + RAM_PAGE);
    int failed = !h || !chunk || fstat(fd, &st) != 0 ? err_sys(err, h && chunk ? errno : ENOMEM, "hashing a disk") : 0;
    uint64_t data_bytes = 0;
    for (off_t at = 0; !failed && at < st.st_size;) {
        const off_t data = lseek(fd, at, SEEK_DATA);
        if (data < 0)
            break;
        const off_t end = lseek(fd, data, SEEK_HOLE);
        data_bytes += (uint64_t)(end - data);
        // Extents of a filesystem with smaller blocks than ours may begin inside a block that was hashed: never twice.
        const off_t from = data / RAM_PAGE * RAM_PAGE < at ? at : data;
        failed = hash_extent(fd, h, from, end, st.st_size, chunk, err);
        at = (end + RAM_PAGE - 1) / RAM_PAGE * RAM_PAGE;
    }
    if (!failed) {
        hash_number(h, (uint64_t)st.st_size);
        sha256_peek(h, ret_hash);
        if (ret_data)
            *ret_data = data_bytes;
    }
    sha256_free(h);
    return failed;
}

int ram_sparse_copy(int from_fd, int to_fd, uint8_t *ret_hash, struct err *err)
{
    struct stat st;
    if (fstat(from_fd, &st) != 0)
        return err_sys(err, errno, "reading a disk");
    const bool cloned = ioctl(to_fd, FICLONE, from_fd) == 0;
    if (!cloned && (ftruncate(to_fd, 0) != 0 || ftruncate(to_fd, st.st_size) != 0))
        return no_room(err, errno, "sizing a disk");
    if (!cloned && copy_extents(from_fd, to_fd, st.st_size, err) != 0)
        return -1;
    return ret_hash ? ram_sparse_digest(to_fd, ret_hash, NULL, err) : 0;
}
