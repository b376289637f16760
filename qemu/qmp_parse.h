// qmp_parse.h - the reading half of QMP: bytes in, whole JSON objects out, bounded. Pure; any thread; fuzzed.
// Source: QEMU's docs/interop/qmp-spec.rst (one object per line).
#ifndef AIRLOCK_QEMU_QMP_PARSE_H
#define AIRLOCK_QEMU_QMP_PARSE_H

#include <jansson.h>
#include <stddef.h>

#include "base/buf.h"

#define QMP_LINE_MAX (1u << 20)

enum qmp_kind { QMP_GREETING, QMP_RETURN, QMP_ERROR, QMP_EVENT, QMP_OTHER };

struct qmp_parser {
    struct buf line;
    size_t scanned; // bytes of line known to hold no newline
};

void qmp_parser_init(struct qmp_parser *p);
void qmp_parser_free(struct qmp_parser *p);
// 0, or -1 when a line is longer than QMP_LINE_MAX: the connection is of no use any more.
int qmp_parser_feed(struct qmp_parser *p, const void *data, size_t len);
// The next object (new) and its kind, or NULL when more bytes are needed. Lines that are no JSON object are skipped and
// counted in *ret_skipped (NULL allowed).
json_t *qmp_parser_next(struct qmp_parser *p, enum qmp_kind *ret_kind, unsigned *ret_skipped);

#endif
