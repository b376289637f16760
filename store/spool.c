#include "store/spool.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/fd.h"
#include "base/limits.h"
#include "store/spool_int.h"

// Past so many records each write adds at most one per stream: a guest that alternates single bytes between the
// streams cannot make `.order` outgrow them.
#define ORDER_RECORDS_CROWDED (1u << 20)
#define SCAN_RECORDS 4096

struct spool {
    int dirfd;
    char id[ID_MAX];
    int fd[2], order_fd;       // -1: no file yet
    struct sha256 *hash[2];
    struct order_header head;  // what is durable
    uint64_t records;
    uint32_t last_record;      // 0: none
    bool broken;               // a failed write could not be undone: read everything again first
};

// A piece cut to what is new and fits.
struct slice {
    const uint8_t *data;
    uint64_t offset, len;
};

static struct slice clip(const struct spool_piece *p, struct order_header *h)
{
    const uint64_t end = h->kept[p->stream] + h->dropped[p->stream];
    const uint64_t skip = end - p->offset < p->len ? end - p->offset : p->len;
    const uint64_t fresh = p->len - skip, kept = h->kept[p->stream];
    const uint64_t room = kept < LIMIT_SPOOL_STREAM_BYTES ? LIMIT_SPOOL_STREAM_BYTES - kept : 0;
    const struct slice s = {(const uint8_t *)p->data + skip, kept, fresh < room ? fresh : room};
    h->kept[p->stream] += s.len;
    h->dropped[p->stream] += fresh - s.len;
    return s;
}

static int check_pieces(const struct spool *sp, const struct spool_piece *pieces, unsigned n, struct err *err)
{
    struct order_header h = sp->head;
    for (unsigned i = 0; i < n; i++) {
        const struct spool_piece *p = &pieces[i];
        if (p->stream != SPOOL_STDOUT && p->stream != SPOOL_STDERR)
            return err_set(err, ERR_INTERNAL, "spool_stream", "there is no such stream");
        if (p->offset > h.kept[p->stream] + h.dropped[p->stream])
            return err_set(err, ERR_INTERNAL, "spool_gap", "output does not continue where it ended");
        (void)clip(p, &h);
    }
    return 0;
}

static int fail(int code, const char *what, struct err *err)
{
    err_sys(err, code, "%s", what);
    if (code == EIO && err) { // as a full disk: nothing is lost, try again later
        err->kind = ERR_UNAVAILABLE;
        strcpy(err->code, "disk_full");
        strcpy(err->detail, "the host's disk fails");
    }
    return -1;
}

// ---- opening --------------------------------------------------------------------------------------------------------
static int open_file(const struct spool *sp, int which, int flags)
{
    char name[ID_MAX + 8];
    return openat(sp->dirfd, spool_name(sp->id, which, name), O_RDWR | O_CLOEXEC | O_NOFOLLOW | flags, 0600);
}

// Takes size and hash of a stream from its file.
static int load_stream(struct spool *sp, int stream, struct err *err)
{
    enum { CHUNK = 64 << 10 };
    sp->head.kept[stream] = 0;
    sha256_free(sp->hash[stream]);
    sp->hash[stream] = sha256_new();
    if (!sp->hash[stream])
        return err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
    fd_close(&sp->fd[stream]);
    sp->fd[stream] = open_file(sp, stream, 0);
    if (sp->fd[stream] < 0)
        return errno == ENOENT ? 0 : err_sys(err, errno, "opening a spool");
    CLEANUP_FREE uint8_t *chunk = malloc(CHUNK);
    ssize_t n = chunk ? 1 : 0;
    while (n > 0) {
        n = pread(sp->fd[stream], chunk, CHUNK, (off_t)sp->head.kept[stream]);
        if (n < 0 && errno == EINTR)
            n = 1;
        else if (n > 0) {
            sha256_update(sp->hash[stream], chunk, (size_t)n);
            sp->head.kept[stream] += (uint64_t)n;
        }
    }
    return chunk && n == 0 ? 0 : err_sys(err, chunk ? errno : ENOMEM, "reading a spool");
}

// Counts the records that the bytes bear out. left: bytes not yet accounted for, per stream.
static int scan_order(struct spool *sp, uint64_t left[2], struct err *err)
{
    uint32_t chunk[SCAN_RECORDS];
    sp->records = 0;
    sp->last_record = 0;
    for (;;) {
        const off_t at = (off_t)(sizeof sp->head + sp->records * 4);
        const ssize_t n = pread(sp->order_fd, chunk, sizeof chunk, at);
        if (n < 0)
            return err_sys(err, errno, "reading a spool's order");
        for (ssize_t i = 0; i < n / 4; i++) {
            const uint32_t stream = ORDER_STREAM(chunk[i]);
            const uint64_t len = ORDER_LEN(chunk[i]), have = len < left[stream] ? len : left[stream];
            left[stream] -= have;
            if (have > 0) {
                sp->records++;
                sp->last_record = ORDER_RECORD(stream, have);
            }
            if (have < len || len == 0)
                return 0;
        }
        if (n < 4)
            return 0;
    }
}

static int write_record(struct spool *sp, uint64_t index, uint32_t record)
{
    return fd_pwrite_full(sp->order_fd, &record, 4, (off_t)(sizeof sp->head + index * 4));
}

static int write_header(struct spool *sp, const struct order_header *h)
{
    return fd_pwrite_full(sp->order_fd, h, sizeof *h, 0);
}

// Makes `.order` add up to the bytes that are there.
static int repair_order(struct spool *sp, const uint64_t left[2], struct err *err)
{
    if (ftruncate(sp->order_fd, (off_t)(sizeof sp->head + sp->records * 4)) != 0)
        return fail(errno, "repairing a spool's order", err);
    if (sp->records && write_record(sp, sp->records - 1, sp->last_record) != 0)
        return fail(errno, "repairing a spool's order", err);
    for (int i = 0; i < 2; i++) {
        if (left[i] == 0)
            continue;
        sp->last_record = ORDER_RECORD(i, left[i]);
        if (write_record(sp, sp->records, sp->last_record) != 0)
            return fail(errno, "repairing a spool's order", err);
        sp->records++;
    }
    return write_header(sp, &sp->head) == 0 ? 0 : fail(errno, "repairing a spool's order", err);
}

static int load(struct spool *sp, struct err *err)
{
    struct order_header was = {0};
    sp->head = (struct order_header){.magic = ORDER_MAGIC};
    if (load_stream(sp, 0, err) != 0 || load_stream(sp, 1, err) != 0)
        return -1;
    uint64_t left[2] = {sp->head.kept[0], sp->head.kept[1]};
    fd_close(&sp->order_fd);
    sp->order_fd = open_file(sp, 2, left[0] || left[1] ? O_CREAT : 0);
    if (sp->order_fd < 0)
        return errno == ENOENT ? 0 : fail(errno, "opening a spool's order", err);
    sp->records = 0;
    sp->last_record = 0;
    const bool good = pread(sp->order_fd, &was, sizeof was, 0) == sizeof was && was.magic == ORDER_MAGIC;
    if (good && scan_order(sp, left, err) != 0)
        return -1;
    for (int i = 0; good && i < 2; i++)
        sp->head.dropped[i] = was.dropped[i];
    struct stat st;
    const bool whole = fstat(sp->order_fd, &st) == 0 && (uint64_t)st.st_size == sizeof was + sp->records * 4;
    if (good && whole && left[0] == 0 && left[1] == 0 && memcmp(&was, &sp->head, sizeof was) == 0)
        return 0;
    return repair_order(sp, left, err);
}

struct spool *spool_open(int dirfd, const char *command_id, struct err *err)
{
    struct spool *sp = calloc(1, sizeof *sp);
    if (!sp) {
        err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
        return NULL;
    }
    sp->dirfd = dirfd;
    sp->fd[0] = sp->fd[1] = sp->order_fd = -1;
    snprintf(sp->id, sizeof sp->id, "%s", command_id);
    if (load(sp, err) == 0)
        return sp;
    spool_close(sp);
    return NULL;
}

void spool_close(struct spool *sp)
{
    if (!sp)
        return;
    for (int i = 0; i < 2; i++) {
        fd_close(&sp->fd[i]);
        sha256_free(sp->hash[i]);
    }
    fd_close(&sp->order_fd);
    free(sp);
}

// ---- writing --------------------------------------------------------------------------------------------------------
struct batch {
    const struct spool_piece *pieces;
    unsigned n;
    bool crowded;          // all of stdout first, then all of stderr
    uint64_t records;      // after it
    uint32_t last_record;
};

// Calls fn for every slice, in the order in which they are kept. 0, or the first errno.
static int each_slice(struct spool *sp, const struct batch *b, struct order_header *h,
                      int (*fn)(struct spool *sp, void *arg, int stream, const struct slice *s), void *arg)
{
    *h = sp->head;
    for (int lane = 0; lane < (b->crowded ? 2 : 1); lane++)
        for (unsigned i = 0; i < b->n; i++) {
            const int stream = (int)b->pieces[i].stream;
            if (b->crowded && stream != lane)
                continue;
            const struct slice s = clip(&b->pieces[i], h);
            const int code = s.len > 0 ? fn(sp, arg, stream, &s) : 0;
            if (code != 0)
                return code;
        }
    return 0;
}

static int add_record(struct spool *sp, void *arg, int stream, const struct slice *s)
{
    struct batch *b = arg;
    // A run of one stream is one record, also across writes.
    if (b->last_record && (int)ORDER_STREAM(b->last_record) == stream) {
        b->last_record += (uint32_t)s->len;
        return 0;
    }
    if (b->last_record && write_record(sp, b->records - 1, b->last_record) != 0)
        return errno;
    b->records++;
    b->last_record = ORDER_RECORD(stream, s->len);
    return 0;
}

static int add_bytes(struct spool *sp, void *arg, int stream, const struct slice *s)
{
    if (sp->fd[stream] < 0 && (sp->fd[stream] = open_file(sp, stream, O_CREAT)) < 0)
        return errno;
    ((bool *)arg)[stream] = true;
    return fd_pwrite_full(sp->fd[stream], s->data, s->len, (off_t)s->offset) == 0 ? 0 : errno;
}

static int add_hash(struct spool *sp, void *arg, int stream, const struct slice *s)
{
    sha256_update(sp->hash[stream], s->data, s->len);
    return 0;
}

static int write_batch(struct spool *sp, struct batch *b, struct order_header *h)
{
    bool touched[2] = {false, false};
    int code = 0;
    if (sp->order_fd < 0 && (sp->order_fd = open_file(sp, 2, O_CREAT)) < 0)
        return errno;
    if (sp->records == 0 && write_header(sp, &sp->head) != 0)
        return errno;
    code = each_slice(sp, b, h, add_record, b);
    if (code == 0 && b->last_record && write_record(sp, b->records - 1, b->last_record) != 0)
        code = errno;
    if (code == 0)
        code = each_slice(sp, b, h, add_bytes, touched);
    for (int i = 0; i < 2; i++) // a file new in this directory is made durable with it (ext4, xfs, btrfs)
        if (code == 0 && touched[i] && fdatasync(sp->fd[i]) != 0)
            code = errno;
    if (code == 0 && write_header(sp, h) != 0)
        code = errno;
    return code;
}

static void undo_batch(struct spool *sp)
{
    for (int i = 0; i < 2; i++)
        if (sp->fd[i] >= 0 && ftruncate(sp->fd[i], (off_t)sp->head.kept[i]) != 0)
            sp->broken = true;
    if (sp->order_fd < 0)
        return;
    if (ftruncate(sp->order_fd, (off_t)(sizeof sp->head + sp->records * 4)) != 0 || write_header(sp, &sp->head) != 0)
        sp->broken = true;
    if (sp->records && write_record(sp, sp->records - 1, sp->last_record) != 0)
        sp->broken = true;
}

int spool_write(struct spool *sp, const struct spool_piece *pieces, unsigned n, struct err *err)
{
    struct batch b = {.pieces = pieces, .n = n};
    struct order_header h;
    if (sp->broken) {
        if (load(sp, err) != 0)
            return -1;
        sp->broken = false;
    }
    if (check_pieces(sp, pieces, n, err) != 0)
        return -1;
    b.crowded = sp->records >= ORDER_RECORDS_CROWDED;
    b.records = sp->records;
    b.last_record = sp->last_record;
    const int code = write_batch(sp, &b, &h);
    if (code != 0) {
        undo_batch(sp);
        return fail(code, "writing a spool", err);
    }
    (void)each_slice(sp, &b, &h, add_hash, NULL);
    sp->head = h;
    sp->records = b.records;
    sp->last_record = b.last_record;
    return 0;
}

void spool_state(const struct spool *sp, struct spool_state *ret)
{
    for (int i = 0; i < 2; i++) {
        ret->kept[i] = sp->head.kept[i];
        ret->produced[i] = sp->head.kept[i] + sp->head.dropped[i];
    }
    ret->position = ret->kept[0] + ret->kept[1];
}

void spool_digest(const struct spool *sp, enum spool_stream stream, char out[static DIGEST_TEXT_MAX])
{
    uint8_t hash[SHA256_BYTES];
    sha256_peek(sp->hash[stream], hash);
    crypto_digest_text(hash, out);
}
