// spool.h - what a command wrote, kept on disk byte for byte: <state>/sandboxes/<sbx>/out/<cmd>.{stdout,stderr} are
// the streams themselves (sha256sum of the file is the hash in the receipt) and <cmd>.order says in which order the
// pieces arrived. Owns the files of one open spool. Not thread-safe for one writer; readers use their own spool_reader
// and may run beside the writer. Bounded by LIMIT_SPOOL_STREAM_BYTES per stream; what came after is counted, not kept.
//
// Position: the number of bytes of both streams in arrival order; it is the SSE `id`. Durability: spool_write returns
// after fdatasync of the stream files; `.order` is repaired on open when it does not add up (host power loss only).
#ifndef AIRLOCK_STORE_SPOOL_H
#define AIRLOCK_STORE_SPOOL_H

#include <stdbool.h>
#include <stdint.h>

#include "base/crypto.h"
#include "base/err.h"

enum spool_stream { SPOOL_STDOUT = 0, SPOOL_STDERR = 1 };

struct spool;
// dirfd: the `out` directory (borrowed for the life of the spool). Files are made with the first byte. Reopening
// continues: sizes and hashes are taken from the files. Returns new, or NULL.
struct spool *spool_open(int dirfd, const char *command_id, struct err *err);
void spool_close(struct spool *sp); // accepts NULL

struct spool_piece {
    enum spool_stream stream;
    uint64_t offset;       // in the stream: must be the stream's end (a lower one: overlapping bytes are skipped)
    const void *data;
    uint64_t len;
};
// Appends n pieces, then one fdatasync per touched file. On ENOSPC/EIO nothing of the call counts as kept (files are
// truncated back) and -1 with unavailable/disk_full says to try again later.
int spool_write(struct spool *sp, const struct spool_piece *pieces, unsigned n, struct err *err);

struct spool_state {
    uint64_t produced[2];  // counted, kept or not
    uint64_t kept[2];
    uint64_t position;     // of both, kept
};
void spool_state(const struct spool *sp, struct spool_state *ret);
void spool_digest(const struct spool *sp, enum spool_stream stream, char out[static DIGEST_TEXT_MAX]);

struct spool_reader;
struct spool_reader *spool_reader_open(int dirfd, const char *command_id, struct err *err); // no files yet: empty
void spool_reader_close(struct spool_reader *r);
// Raw bytes of one stream: count, 0 at the present end, -1.
int64_t spool_read(struct spool_reader *r, enum spool_stream stream, uint64_t offset, void *out, uint64_t cap,
                   struct err *err);
// The next piece at or after *position in arrival order, at most cap bytes: sets stream, offset and moves *position.
// count, 0 at the present end, -1 (also for a position that is past the end).
int64_t spool_next(struct spool_reader *r, uint64_t *position, enum spool_stream *ret_stream, uint64_t *ret_offset,
                   void *out, uint64_t cap, struct err *err);

#endif
