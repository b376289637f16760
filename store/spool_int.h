// spool_int.h - the `.order` file, shared by the spool's writer and readers. Private to store/.
//
// Header, then one record of 4 bytes per piece in arrival order; all little-endian, as the host. A write goes in this
// order: records, stream bytes, fdatasync of the streams, header. What readers may see is what the header counts, so a
// write that failed or was cut is never seen; what a cut write left is put in order by the next open:
//   records > bytes   the records at the end are cut to the bytes that are there
//   records < bytes   (host power loss: `.order` is not synced) the rest is taken as stdout, then stderr
#ifndef AIRLOCK_STORE_SPOOL_INT_H
#define AIRLOCK_STORE_SPOOL_INT_H

#include <stdint.h>
#include <stdio.h>

#include "base/id.h"
#include "store/spool.h"

#define ORDER_MAGIC 0x314452304b4c41ull // "ALK0RD1"
struct order_header {
    uint64_t magic;
    uint64_t kept[2];    // bytes readers may see
    uint64_t dropped[2]; // counted past the cap: the stream's end is kept + dropped
};
#define ORDER_STREAM(record) ((record) >> 31)
#define ORDER_LEN(record) ((record) & 0x7fffffffu)
#define ORDER_RECORD(stream, len) ((uint32_t)(stream) << 31 | (uint32_t)(len))

// Name of one of a spool's files; which: a stream, or 2 for the order.
static inline char *spool_name(const char *id, int which, char out[static ID_MAX + 8])
{
    static const char *const SUFFIX[] = {"stdout", "stderr", "order"};
    snprintf(out, ID_MAX + 8, "%s.%s", id, SUFFIX[which]);
    return out;
}

#endif
