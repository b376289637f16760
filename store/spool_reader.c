#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/fd.h"
#include "store/spool_int.h"

#define SCAN_RECORDS 1024

struct spool_reader {
    int dirfd;                  // of its own, while a file is missing
    char id[ID_MAX];
    int fd[3];                  // the streams, the order
    // The record that was read last: where it begins, by position and in each stream.
    uint64_t record, at, begins[2];
};

static int open_missing(struct spool_reader *r, int which, struct err *err)
{
    char name[ID_MAX + 8];
    if (r->fd[which] >= 0)
        return 0;
    r->fd[which] = openat(r->dirfd, spool_name(r->id, which, name), O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    return r->fd[which] >= 0 || errno == ENOENT ? 0 : err_sys(err, errno, "opening a spool");
}

struct spool_reader *spool_reader_open(int dirfd, const char *command_id, struct err *err)
{
    struct spool_reader *r = calloc(1, sizeof *r);
    if (!r) {
        err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
        return NULL;
    }
    r->fd[0] = r->fd[1] = r->fd[2] = -1;
    snprintf(r->id, sizeof r->id, "%s", command_id);
    r->dirfd = fcntl(dirfd, F_DUPFD_CLOEXEC, 3);
    if (r->dirfd < 0)
        err_sys(err, errno, "opening a spool");
    else if (open_missing(r, 0, err) == 0 && open_missing(r, 1, err) == 0 && open_missing(r, 2, err) == 0) {
        if (r->fd[0] >= 0 && r->fd[1] >= 0 && r->fd[2] >= 0)
            fd_close(&r->dirfd);
        return r;
    }
    spool_reader_close(r);
    return NULL;
}

void spool_reader_close(struct spool_reader *r)
{
    if (!r)
        return;
    for (int i = 0; i < 3; i++)
        fd_close(&r->fd[i]);
    fd_close(&r->dirfd);
    free(r);
}

// What may be seen now. All zero while there is no file.
static int read_header(struct spool_reader *r, struct order_header *ret, struct err *err)
{
    memset(ret, 0, sizeof *ret);
    if (open_missing(r, 2, err) != 0)
        return -1;
    if (r->fd[2] < 0)
        return 0;
    const ssize_t n = pread(r->fd[2], ret, sizeof *ret, 0);
    if (n < 0)
        return err_sys(err, errno, "reading a spool's order");
    if (n < (ssize_t)sizeof *ret || ret->magic != ORDER_MAGIC)
        memset(ret, 0, sizeof *ret); // being made, or repaired when the spool is opened next
    return 0;
}

static int64_t read_bytes(struct spool_reader *r, int stream, uint64_t offset, void *out, uint64_t len, struct err *err)
{
    if (open_missing(r, stream, err) != 0)
        return -1;
    if (r->fd[stream] < 0 || fd_pread_full(r->fd[stream], out, len, (off_t)offset) != 0)
        return err_sys(err, r->fd[stream] < 0 ? ENOENT : errno, "reading a spool");
    return (int64_t)len;
}

int64_t spool_read(struct spool_reader *r, enum spool_stream stream, uint64_t offset, void *out, uint64_t cap,
                   struct err *err)
{
    struct order_header h;
    if (read_header(r, &h, err) != 0)
        return -1;
    const uint64_t left = offset < h.kept[stream] ? h.kept[stream] - offset : 0;
    if (left == 0 || cap == 0)
        return 0;
    return read_bytes(r, (int)stream, offset, out, left < cap ? left : cap, err);
}

// Moves to the record that covers position; *ret gets it. 0, or -1.
static int find_record(struct spool_reader *r, uint64_t position, uint32_t *ret, struct err *err)
{
    uint32_t chunk[SCAN_RECORDS];
    if (position < r->at)
        r->record = r->at = r->begins[0] = r->begins[1] = 0;
    for (;;) {
        const off_t at = (off_t)(sizeof(struct order_header) + r->record * 4);
        const ssize_t n = pread(r->fd[2], chunk, sizeof chunk, at);
        if (n < 4)
            return err_set(err, ERR_INTERNAL, "spool_damaged", "the order of the output is damaged");
        for (ssize_t i = 0; i < n / 4; i++) {
            const uint64_t len = ORDER_LEN(chunk[i]);
            if (position < r->at + len) {
                *ret = chunk[i];
                return 0;
            }
            r->record++;
            r->at += len;
            r->begins[ORDER_STREAM(chunk[i])] += len;
        }
    }
}

int64_t spool_next(struct spool_reader *r, uint64_t *position, enum spool_stream *ret_stream, uint64_t *ret_offset,
                   void *out, uint64_t cap, struct err *err)
{
    struct order_header h;
    uint32_t record;
    if (read_header(r, &h, err) != 0)
        return -1;
    const uint64_t end = h.kept[0] + h.kept[1];
    if (*position > end)
        return err_set(err, ERR_RANGE, "position", "the position is past the end of the output");
    if (*position == end || cap == 0)
        return 0;
    if (find_record(r, *position, &record, err) != 0)
        return -1;
    const int stream = (int)ORDER_STREAM(record);
    const uint64_t into = *position - r->at;
    uint64_t len = ORDER_LEN(record) - into;
    len = len < end - *position ? len : end - *position;
    len = len < cap ? len : cap;
    const uint64_t offset = r->begins[stream] + into;
    if (read_bytes(r, stream, offset, out, len, err) < 0)
        return -1;
    *position += len;
    *ret_stream = (enum spool_stream)stream;
    *ret_offset = offset;
    return (int64_t)len;
}
